package event

// Explanation is the cause behind a reason, and what the reader can do.
type Explanation struct {
	Cause string
	Next  string
}

// Explain looks a reason up; an unknown one has a general explanation.
func Explain(r Reason) Explanation {
	if e, ok := Explanations()[r]; ok {
		return e
	}
	return Explanation{"it failed for a reason that has no explanation", "look at `foothold events` and report this as a fault of Foothold"}
}

// Explanations is the table of all reasons.
func Explanations() map[Reason]Explanation {
	return map[Reason]Explanation{
		BadRequest:      {"a field of the request is missing, malformed or unknown", "correct the field that the message names"},
		UnknownTemplate: {"no such template is registered, or its image lies at no host", "see `foothold template list`; make one by `foothold template build`"},
		UnknownSize:     {"there is no size of that name", "take small, medium or large"},
		UnknownWorkload: {"the workload's object is not in the DMZ's store, or has another size", "create the VM with --workload FILE, which uploads it"},
		UnknownVM:       {"no VM has that name or id", "see `foothold vm list`"},
		NameTaken:       {"a VM of that name exists; a failed one keeps its name until it is deleted, a deleted one until its host confirms that it is gone", "take another name, or `foothold vm delete NAME`"},
		TemplateTaken:   {"a template of that name is registered with another image or key, or VMs have it with other boot components", "make it the next version: `foothold template rotate NAME`; or build it under another name"},
		PoolEmpty:       {"every address of the cloud network's pool is held by a VM", "delete VMs that have ended, or widen the pool in the orchestrator's configuration"},
		QuotaExceeded:   {"the VM would exceed what live VMs may use together", "delete a VM, take a smaller size, or raise the limits in the orchestrator's configuration"},
		NoHost:          {"no inventoried host in good standing can take the VM", "see `foothold host list` for the standing of each host"},
		InUse:           {"something still refers to it", "delete what uses it first"},
		WrongPhase:      {"the VM is not in a phase in which this can be asked of it", "see `foothold vm explain NAME` for where it stands"},
		NotPermitted:    {"the caller's certificate does not permit this", "use a context with an operator's certificate"},
		UnknownEvidence: {"the VM has no such verdict or start, or its evidence is not kept any more", "see `foothold vm evidence NAME`"},
		DiskFull:        {"a disk has no room for what would have to be stored, so nothing was done; the message says whose", "free space on it - the orchestrator's state directory or the host's - and ask again; `foothold fsck` tells whether all fits"},
		DocumentRefused: {"the inventory or the reference values are not such as may be taken into use; the message says why", "get the newest document from who signs it, and compare its SHA-256 with the published one over another way"},
		UnknownDocument: {"no such inventory or reference values were imported", "see `foothold inventory list` or `foothold platform manifest list`"},

		HostRefused:       {"the host declined what the orchestrator asked of it", "read the host's own reason; see the host agent's log at the provider"},
		HostUnreachable:   {"the host did not answer on the provider's management network", "check the host and the path to it: `foothold host list`, `foothold lab logs host`"},
		HostLost:          {"the VM's host is in good standing no more: it left the inventory, has other keys, failed a check, or its release has no reference values that count", "see `foothold host list` and `foothold inventory show`; a stopped VM starts again by `foothold vm start NAME` once its host is in order"},
		ValuesWithdrawn:   {"the reference values that the VM's last accepted quote was judged by were withdrawn or have ended", "see `foothold platform manifest list`; the VM's next quote is judged by those that count, and ends it if it satisfies none"},
		VMMoved:           {"another host than the VM's own listed it: a measured VM does not move", "ask the provider who copied it; create the VM again"},
		VMStopped:         {"the VM ended by itself, or its host ended it, before it was asked to", "see `foothold vm logs NAME` for the VM's last words"},
		GuestReset:        {"the VM's own system rebooted", "it starts again by its restart policy: `foothold vm explain NAME`"},
		GuestCrashed:      {"the VM's own kernel crashed", "see `foothold vm logs NAME` for its last words; it starts again by its restart policy: `foothold vm explain NAME`"},
		GuestPoweredOff:   {"the VM's own system powered it off", "start it again: `foothold vm start NAME`"},
		StopAsked:         {"an operator asked it to stop", "start it again: `foothold vm start NAME`"},
		RestartAsked:      {"an operator asked it to start anew", "follow it: `foothold vm watch NAME`"},
		EpochBegun:        {"the orchestrator's state was put back from a copy, so everything under way was ended", "start a VM that had computed by `foothold vm start NAME`, if nothing ended it for good since; create the others again"},
		DeadlinePassed:    {"what the phase waits for did not come in time", "see `foothold vm explain NAME` for what was awaited, then `foothold vm logs NAME`; create the VM again"},
		TokenUnknown:      {"somebody presented a token that was never issued", "look for who did: `foothold events` has the address; a guess cannot succeed"},
		TokenSpent:        {"a token was presented a second time", "look for who replays: `foothold events` has the address"},
		TokenWrongPhase:   {"a token was presented in another phase than it is for", "create the VM again; if it recurs, somebody holds back or replays messages"},
		TokenWrongAddress: {"a token was presented from another address than the VM's", "treat the token as stolen: look at the boot server's and the provider's logs, then create the VM again"},
		TokenExpired:      {"a token was presented after its phase had ended", "create the VM again; raise the phase's limit if the machine is slow"},
		ChannelMisuse:     {"the VM said something on its local channel that the host had not asked for", "treat the VM's loader as altered; see the host's log"},
		TPMCommandRefused: {"the VM's attestation session contained a TPM command that the broker does not pass", "treat the boot server as suspect: it alone makes these commands; see its log"},
		TPMLost: {"the host's TPM does not answer, or answered out of step: nobody can tell what it holds, so the host agent ended the VMs and itself",
			"the provider starts the agent again, and boots the host where its TPM has lost its registers; `foothold host list` tells whether its quotes are refused"},
		LogsUnreadable: {"the host has quotes and no logs to go with them: its agent cannot read those of firmware or kernel, or they grew larger than is read",
			"the provider sees that securityfs is mounted and that the agent's user may read both logs; a list of files that is too long is short again after the host boots"},
		TPMBusy:      {"the host's TPM was not free in time, or had to make room for another tenant's VM", "create the VM again; fewer at a time on one host"},
		QuoteRefused: {"the host's proof was not accepted; each failed check is listed", "read the findings: a changed file or setting is named where it can be known; do not admit the host until each is explained"},
		HostAuditFailed: {"an audit of the host from trusted media found another TPM, or other keys in it, than the inventory names",
			"no VM is placed there, and host_lost says what becomes of those that run there (`foothold vm list`); ask the provider which machine it is, and audit again once that is explained"},
		SignatureInvalid:   {"a signature does not belong to what it signs", "somebody altered it on the way: compare keys and documents, see the events before"},
		DigestMismatch:     {"a component or image is not the one that was signed for", "see the boot server's and the store's log for what was sent; build or upload it again"},
		LoaderFailed:       {"the VM's loader gave up", "see `foothold vm logs NAME` for its message"},
		ServerUntrusted:    {"the boot server or gateway that answered the VM has not the pinned certificate: another authority, name, use or role, or not of this time by the VM's clock", "look for who answers at its address on the cloud network; compare the host's clock with the server's; if its certificate was made anew, see that it is of the authority in the orchestrator's configuration"},
		BootServerFailed:   {"the boot server could not carry the conversation through", "see the boot server's log: `foothold lab logs bootserver`"},
		ReportRefused:      {"the VM's report does not fit what was delivered to it or is not signed by its key", "treat the relay as suspect: see the boot server's log"},
		ProbeAccepted:      {"the VM let in a login that must be refused", "do not use this template: its agent does not keep the door; audit it by `foothold template audit`"},
		HostKeyMismatch:    {"another machine than the attested one answered at the VM's address", "look for an address or route taken over on the cloud network; create the VM again"},
		SSHFailed:          {"the unlock channel to the VM could not be established or broke", "see `foothold vm logs NAME` and the firewalls' drops in `foothold events`"},
		AuditFailed:        {"the machine holds something that should not be there, or lacks something; each is listed", "read the findings; if they are meant, build the template's expectations anew"},
		HandoverFailed:     {"the VM could not use what it was handed", "see `foothold vm logs NAME`"},
		DiskRefused:        {"a disk or its header is not what the guest accepts: altered, another one, or of another form", "see `foothold vm logs NAME` for which; headers never come from the provider's storage, disks do: ask it what became of that one"},
		CertificateInvalid: {"the VM's certificate was not issued for this, or has expired", "create the VM again; if it recurs, somebody tries a foreign certificate"},
		CertificateRevoked: {"the VM's certificate was revoked", "look for who still uses it: the VM that it was issued to has ended"},
		CredentialsWrong:   {"user name or password at the gateway are wrong", "look for who tries: only the VM itself was told them"},
		AdmissionRefused:   {"the gateway or the orchestrator declined the tunnel", "see the events before it for the reason"},
		GatewayFailed:      {"the gateway could not be reached by the VM, broke off, or granted a tunnel that leads elsewhere", "see the gateway's log and `foothold vm logs NAME`: which of them it was; if it recurs, treat the gateway as suspect"},
		AttestationLate:    {"the host of a computing VM gave no good quote for longer than limits.attest_within, so its tunnel and rules were closed", "check the host and the path to it: `foothold host list`; the VM starts again by its restart policy"},
		HeartbeatMissed:    {"the VM did not report through its tunnel within its lease", "see `foothold vm logs NAME`; check gateway and cloud network"},
		WorkloadFailed:     {"the workload could not be fetched or started, or ended", "run it in a VM of the same template; see `foothold vm logs NAME`"},
		ZoneNotApplied:     {"a firewall, the gateway or the boot server did not make the wanted rules so", "see `foothold status` for which, and its log"},
		ZoneRefused:        {"a daemon was sent a zone document that is older than the one it holds, of another zone, or malformed", "look for who plays old documents back between orchestrator and DMZ; after a restored database, see that its epoch has grown"},
		TrafficRefused:     {"a packet came that nothing lets pass in the phase that its VM is in: another port, source, MAC or direction", "see source, MAC and port in `foothold events`; a VM that sends before its rules are live is dropped for a moment, too"},

		OrchestratorAway:      {"no answer came from the orchestrator; nothing is known of the request", "check that it runs and that the context names its address: `foothold context show`, in a lab `foothold lab status`; then `foothold vm list`"},
		OrchestratorUntrusted: {"the tool and the orchestrator do not trust each other's certificates", "use the context that belongs to this orchestrator: `foothold context show`; if it is, compare both clocks"},
		WaitTimeout:           {"--timeout passed while the VM was on its way; it goes on", "`foothold vm watch NAME` waits on, `foothold vm explain NAME` says for what"},
		Interrupted:           {"the command was interrupted; a VM that was created goes on", "`foothold vm watch NAME` waits on"},

		Released:      {"it was released by wish", "nothing is left to do"},
		InternalError: {"the orchestrator itself failed", "see its log: `foothold lab logs orchestrator`; create the VM again"},
	}
}
