package fsck

// Code names a kind of finding. Codes are stable.
type Code string

// The codes.
const (
	JournalBroken     Code = "journal-broken"
	StartMissing      Code = "start-missing"
	StartUnexpected   Code = "start-unexpected"
	PhaseHistory      Code = "phase-history"
	TokenOpen         Code = "token-open"
	CertificateValid  Code = "certificate-valid"
	CertificateAbsent Code = "certificate-absent"
	NonceOdd          Code = "nonce-odd"
	EvidenceBroken    Code = "evidence-broken"
	HeldTwice         Code = "held-twice"

	UnderWay     Code = "under-way"
	CleanUp      Code = "clean-up"
	StartPending Code = "start-pending"
	VMClosed     Code = "vm-closed"

	VolumeKeyMissing      Code = "volume-key-missing"
	VolumeKeyUnexpected   Code = "volume-key-unexpected"
	TemplateKeyMissing    Code = "template-key-missing"
	TemplateKeyUnexpected Code = "template-key-unexpected"

	TemplateUnregistered Code = "template-unregistered"
	ObjectMissing        Code = "object-missing"
	ObjectUnused         Code = "object-unused"

	HostUnknown        Code = "host-unknown"
	HostSilent         Code = "host-silent"
	VMMissing          Code = "vm-missing"
	VMUnexpected       Code = "vm-unexpected"
	VMDiffers          Code = "vm-differs"
	VolumeMissing      Code = "volume-missing"
	VolumeUnexpected   Code = "volume-unexpected"
	VolumeDiffers      Code = "volume-differs"
	TemplateMissing    Code = "template-missing"
	TemplateUnexpected Code = "template-unexpected"
	TemplateDiffers    Code = "template-differs"
	TemplateUnsent     Code = "template-unsent"

	ZoneBehind     Code = "zone-behind"
	ZoneSilent     Code = "zone-silent"
	ZoneFault      Code = "zone-fault"
	ZoneOutdated   Code = "zone-outdated"
	RuleMissing    Code = "rule-missing"
	RuleUnexpected Code = "rule-unexpected"
	PeerMissing    Code = "peer-missing"
	PeerUnexpected Code = "peer-unexpected"
)

// Meaning is what a code says and what the reader can do.
type Meaning struct{ What, Next string }

// Codes is the table of all codes.
func Codes() map[Code]Meaning {
	return map[Code]Meaning{
		JournalBroken:     {"an entry of the journal was changed or removed", "treat the ledger's file as altered: compare it with a backup, entry by entry from the one named"},
		StartMissing:      {"a start of a VM has no facts", "`foothold vm delete NAME`; report this as a fault of Foothold"},
		StartUnexpected:   {"there are facts of a start that never was", "treat the ledger's file as altered; report this as a fault of Foothold"},
		PhaseHistory:      {"a VM's history does not fit the phase that it is in", "report this as a fault of Foothold, with `foothold events --vm NAME`"},
		TokenOpen:         {"a token could be spent that should be void", "nobody gets past the VM's phase with it; report this as a fault of Foothold, with `foothold events --vm NAME`"},
		CertificateValid:  {"a certificate is valid that should be revoked", "nobody gets past the VM's phase with it; report this as a fault of Foothold, with `foothold events --vm NAME`"},
		CertificateAbsent: {"the certificate that a VM uses is revoked or was never issued", "`foothold vm restart NAME`"},
		EvidenceBroken:    {"the kept verdicts of a VM's start are no chain from its boot to the verdict that it stands on", "treat the ledger's file as altered: hold it against a backup and against evidence that was exported; restart a VM that runs since before evidence was kept"},
		NonceOdd:          {"a nonce belongs to no start, or was used before it was issued", "treat the ledger's file as altered; report this as a fault of Foothold"},
		HeldTwice:         {"two VMs hold one address, name or volume", "delete neither before it is clear whose the data is; report this as a fault of Foothold"},

		UnderWay:     {"a VM is in a phase that ends by itself, or was asked to stop", "`foothold vm explain NAME`; past its time, see the orchestrator's log: `foothold lab logs orchestrator`"},
		CleanUp:      {"a host has not confirmed yet that a VM is gone", "it is asked again and again; past its time, check the host: `foothold host list`"},
		StartPending: {"a stopped VM is to start again", "`foothold vm explain NAME`; past its time, see the orchestrator's log"},
		VMClosed:     {"a refused quote has closed a VM: it is stopped, and its instance kept for whoever looks into it", "`foothold vm explain NAME`; then `foothold vm stop NAME`, which has the instance destroyed, `foothold vm start NAME` or `foothold vm delete NAME`"},

		VolumeKeyMissing:      {"the vault lacks the key of a VM's volume", "restore the vault from its backup: without the key the volume's data is lost"},
		VolumeKeyUnexpected:   {"the vault has the key of a volume that is erased or was never made", "if the ledger was not restored from an older backup, take `volume-ID.sealed` out of the vault's folder: erased data could be read with it"},
		TemplateKeyMissing:    {"the vault lacks the key of a template", "restore the vault from its backup, or delete the template and build it again"},
		TemplateKeyUnexpected: {"the vault has the key of a template that is not registered", "build that template again under its name; if the ledger was not restored from an older backup, `template-NAME.sealed` can go from the vault's folder"},

		TemplateUnregistered: {"a VM's template is not registered any more", "the VM cannot start again: `foothold vm delete NAME`"},
		ObjectMissing:        {"something refers to an object that was never put into the store", "delete what refers to it and make it again: `foothold template build NAME`, or a VM with --workload FILE"},
		ObjectUnused:         {"no template and no VM refers to an object of the store", "nothing needs to be done"},

		HostUnknown:        {"a VM lies at a host that is not in the inventory", "check the inventory for the host; else `foothold vm delete NAME`"},
		HostSilent:         {"a host could not be asked, so nothing there was compared", "check the host and the path to it: `foothold host list`, `foothold lab logs host`"},
		VMMissing:          {"a host does not list a VM that should run there", "`foothold vm restart NAME`, and ask the provider what became of it"},
		VMUnexpected:       {"a host lists a VM that should not be there", "ask the provider to destroy it; the orchestrator gives it no key and no network"},
		VMDiffers:          {"a host runs a VM in another start, state or with other settings than it was given", "`foothold vm restart NAME`, and ask the provider why"},
		VolumeMissing:      {"a host does not list a VM's volume", "its data is lost unless the provider finds it; then `foothold vm delete NAME`"},
		VolumeUnexpected:   {"a host has a volume that is erased, lies elsewhere or was never made", "ask the provider to delete it; without its key it is noise"},
		VolumeDiffers:      {"a volume has another size, or is attached though its VM does not run", "ask the provider who has it attached; do not start the VM before"},
		TemplateMissing:    {"a host does not list a template that was sent to it", "no VM of it can start there: `foothold template delete NAME` once no VM has it, then build it again"},
		TemplateUnexpected: {"a host has a template that is not registered, or was not sent to it", "ask the provider to delete it; without its key it is noise"},
		TemplateDiffers:    {"a template at a host has another size than the registered one", "delete it and build it again: `foothold template delete NAME`"},
		TemplateUnsent:     {"a registered template's image lies at no host", "upload it: `foothold template build NAME`"},

		ZoneBehind:     {"a daemon has not made the newest document so yet", "`foothold status`; past its time, see the daemon's log"},
		ZoneSilent:     {"a daemon has not reported for a whole lease", "check that it runs and reaches the orchestrator: `foothold status`, then its log"},
		ZoneFault:      {"a daemon could not make the wanted rules so", "see the daemon's log; its error is what was found"},
		ZoneOutdated:   {"a zone's document does not follow from the ledger", "see the orchestrator's log for why no new one was signed"},
		RuleMissing:    {"a kernel lacks a rule that its document asks for", "restart that daemon, which makes its rules anew; see its log"},
		RuleUnexpected: {"a kernel has a rule that its document does not ask for", "treat that machine as suspect: see who changed its rules, then restart the daemon, which makes them anew"},
		PeerMissing:    {"the gateway lacks a tunnel that its document names", "`foothold vm restart NAME`: only an admission brings a tunnel in"},
		PeerUnexpected: {"the gateway has a tunnel that its document does not name", "treat the gateway as suspect: see who added it, then restart the gateway"},
	}
}
