package event

// Reason is a stable code for why something was refused or failed.
type Reason string

// The reasons. Each has its cause and next step in Explanations.
const (
	// Requests of operators.
	BadRequest      Reason = "bad-request"
	UnknownTemplate Reason = "unknown-template"
	UnknownSize     Reason = "unknown-size"
	UnknownWorkload Reason = "unknown-workload"
	UnknownVM       Reason = "unknown-vm"
	NameTaken       Reason = "name-taken"
	TemplateTaken   Reason = "template-taken"
	PoolEmpty       Reason = "pool-empty"
	QuotaExceeded   Reason = "quota-exceeded"
	NoHost          Reason = "no-host"
	InUse           Reason = "in-use"
	WrongPhase      Reason = "wrong-phase"
	NotPermitted    Reason = "not-permitted"
	DiskFull        Reason = "disk-full"

	// Acts of the boot story.
	HostRefused        Reason = "host-refused"
	HostUnreachable    Reason = "host-unreachable"
	VMStopped          Reason = "vm-stopped"
	GuestReset         Reason = "guest-reset"
	GuestPoweredOff    Reason = "guest-powered-off"
	StopAsked          Reason = "stop-asked"
	RestartAsked       Reason = "restart-asked"
	EpochBegun         Reason = "epoch-begun"
	DeadlinePassed     Reason = "deadline-passed"
	TokenUnknown       Reason = "token-unknown"
	TokenSpent         Reason = "token-spent"
	TokenWrongPhase    Reason = "token-wrong-phase"
	TokenWrongAddress  Reason = "token-wrong-address"
	TokenExpired       Reason = "token-expired"
	ChannelMisuse      Reason = "channel-misuse"
	TPMCommandRefused  Reason = "tpm-command-refused"
	TPMBusy            Reason = "tpm-busy"
	TPMLost            Reason = "tpm-lost"
	LogsUnreadable     Reason = "logs-unreadable"
	QuoteRefused       Reason = "quote-refused"
	HostAuditFailed    Reason = "host-audit-failed"
	SignatureInvalid   Reason = "signature-invalid"
	DigestMismatch     Reason = "digest-mismatch"
	LoaderFailed       Reason = "loader-failed"
	ServerUntrusted    Reason = "server-untrusted"
	BootServerFailed   Reason = "boot-server-failed"
	ReportRefused      Reason = "report-refused"
	ProbeAccepted      Reason = "probe-accepted"
	HostKeyMismatch    Reason = "host-key-mismatch"
	SSHFailed          Reason = "ssh-failed"
	AuditFailed        Reason = "audit-failed"
	HandoverFailed     Reason = "handover-failed"
	DiskRefused        Reason = "disk-refused"
	CertificateInvalid Reason = "certificate-invalid"
	CertificateRevoked Reason = "certificate-revoked"
	CredentialsWrong   Reason = "credentials-wrong"
	AdmissionRefused   Reason = "admission-refused"
	HeartbeatMissed    Reason = "heartbeat-missed"
	WorkloadFailed     Reason = "workload-failed"
	ZoneNotApplied     Reason = "zone-not-applied"
	ZoneRefused        Reason = "zone-refused"
	TrafficRefused     Reason = "traffic-refused"

	// Said by the operator's own tool, which knows nothing more.
	OrchestratorAway      Reason = "orchestrator-away"
	OrchestratorUntrusted Reason = "orchestrator-untrusted"
	WaitTimeout           Reason = "wait-timeout"
	Interrupted           Reason = "interrupted"

	// Ends.
	Released      Reason = "released"
	InternalError Reason = "internal-error"
)
