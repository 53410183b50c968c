// Package api is the orchestrator's API for operators: command line, console, tools.
// It is REST with JSON over mutual TLS, described by OpenAPI 3.1 at /openapi.json.
//
//	POST   /v1/vms                    CreateVM → VM
//	GET    /v1/vms                    → []VM
//	GET    /v1/vms/NAME               → VM               (name, or id)
//	DELETE /v1/vms/NAME               → VM               released; its volume is crypto-erased
//	POST   /v1/vms/NAME/stop          → VM               its volume is kept; one that computes writes it out first
//	POST   /v1/vms/NAME/start         → VM               a stopped one starts again, from act 2
//	POST   /v1/vms/NAME/restart       → VM               stop, then start
//	PUT    /v1/vms/NAME/workload      Workload → VM    without another start
//	GET    /v1/vms/NAME/explain       → Explanation
//	POST   /v1/vms/NAME/attest        → Verdict          its host is quoted now
//	GET    /v1/vms/NAME/evidence      → Evidence         ?start=N: verdicts of a start, the latest without it
//	GET    /v1/vms/NAME/evidence/SHA256 bytes            one verdict's evidence bundle, as `foothold verify` reads it
//	GET    /v1/vms/NAME/rules         → []zone.Live      the VM's rules, read back from the kernels
//	GET    /v1/vms/NAME/console       text               what the VM wrote to its console
//	GET    /v1/events                 → []JournalEntry   ?vm=NAME ?after=N ?limit=N; ?follow=true streams one JSON object a line
//	GET    /v1/templates              → []Template
//	POST   /v1/templates              RegisterTemplate → Template
//	PUT    /v1/templates/NAME/image   bytes              ciphertext, checked against its digest, passed on to the hosts
//	DELETE /v1/templates/NAME         → {}
//	PUT    /v1/objects/SHA256         bytes              workloads, kernels, initramfs: checked, passed on to the DMZ's store
//	GET    /v1/hosts                  → []Host
//	GET    /v1/hosts/NAME/platform    → Judged           what it measures now, against the reference values in force
//	GET    /v1/hosts/NAME/evidence    → evidence.Platform  its logs as it gives them now, for reference values
//	POST   /v1/platform/try           TryPlatform → []Judged  ?host=NAME; every host against other reference values
//	POST   /v1/hosts/NAME/readmit     → Host             one whose quote was refused may get VMs again
//	GET    /v1/inventories            → []Inventory      every version that was imported, newest first
//	POST   /v1/inventories            ImportDocument → InventoryImport
//	GET    /v1/inventories/VERSION    → Inventory        with its hosts; 0 is the one that counts
//	GET    /v1/platforms              → []Platform       reference values that were imported, newest first
//	POST   /v1/platforms              ImportDocument → Platform
//	POST   /v1/platforms/SHA256/withdraw WithdrawPlatform → Platform
//	GET    /v1/status                 → Status
//	GET    /v1/fsck                   → Fsck             everything held against everything; takes seconds
//
// A refusal is a status of 400 or above with Problem as body.
package api

import (
	"encoding/json"
	"net/netip"
	"time"

	"foothold/internal/secret"
	"foothold/protocol/bootmsg"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/signed"
)

// CreateVM asks for a VM.
type CreateVM struct {
	Name     string    `json:"name"`
	Template string    `json:"template,omitempty"` // default: the newest
	Size     string    `json:"size,omitempty"`     // default: "small"
	Workload *Workload `json:"workload,omitempty"` // absent: ready once it computes
	// Restart is what follows when the VM ends unasked: "always", "on-failure" (default) or "never".
	Restart string `json:"restart,omitempty"`
}

// Workload names an object that was put into the store before.
type Workload struct {
	SHA256 digest.SHA256 `json:"sha256"`
	Size   int64         `json:"size"`
	Kind   string        `json:"kind"`            // "executable" or "tar"
	Entry  string        `json:"entry,omitempty"` // tar: path inside
	Port   int           `json:"port,omitempty"`  // TCP port that must answer before the VM is ready; default 8080
}

// VM is one virtual machine and its latest start.
type VM struct {
	Name        string       `json:"name"`
	ID          string       `json:"id"` // reservation
	Start       int          `json:"start"`
	Phase       string       `json:"phase"`
	Ready       bool         `json:"ready"`
	Reason      event.Reason `json:"reason,omitempty"` // why it ended, or, while it computes, why it is not ready any more
	Explanation string       `json:"explanation,omitempty"`
	// Findings are all checks that failed, of a VM that was ended for what it or its host showed.
	Findings []event.FailedCheck `json:"findings"`
	Cleanup  string              `json:"cleanup,omitempty"` // of an ended VM: CleanupPending, CleanupDone
	Template string              `json:"template"`
	// TemplateVersion is the version that the latest start is of, 0 before the first, and
	// NextVersion a newer one that its next start takes, 0 if there is none.
	TemplateVersion int                 `json:"template_version,omitempty"`
	NextVersion     int                 `json:"next_template_version,omitempty"`
	Size            string              `json:"size"`
	Measured        bool                `json:"measured"` // false: runs on a host that proved nothing
	Host            string              `json:"host,omitempty"`
	Address         netip.Addr          `json:"address,omitzero"`        // on the cloud network
	MAC             string              `json:"mac,omitempty"`           //
	TunnelAddress   netip.Addr          `json:"tunnel_address,omitzero"` // inside the tunnel
	WorkloadURL     string              `json:"workload_url,omitempty"`  // from the tenant's network
	Created         time.Time           `json:"created"`
	Deadline        time.Time           `json:"deadline,omitzero"` // of the phase
	Workload        *Workload           `json:"workload,omitempty"`
	Restart         string              `json:"restart"`                  // policy
	Restarts        int                 `json:"restarts,omitempty"`       // in a row, since it last computed for long
	Wish            string              `json:"wish,omitempty"`           // what was asked of the running VM: "stop", "restart"
	NextStart       time.Time           `json:"next_start,omitzero"`      // of a stopped VM; absent: not by itself
	Phases          []Phase             `json:"phases"`                   // reserved, booting, unlocking, connecting, computing; ready: from computing to the workload's first answer
	Creating        float64             `json:"create_seconds,omitempty"` // part of booting: until the host reported the VM running
	Components      []bootmsg.Component `json:"components"`               // what was delivered and runs
	TPMHeld         float64             `json:"tpm_held_seconds,omitempty"`
	Attested        time.Time           `json:"attested,omitzero"` // last accepted quote of the latest start
	Verdict         digest.SHA256       `json:"verdict,omitzero"`  // on it: the newest link of the start's evidence
}

// Whether an ended VM is gone from its host.
const (
	CleanupPending = "pending" // its host has not confirmed it; the orchestrator goes on asking
	CleanupDone    = "done"    // its host does not list it any more
)

// Phase is one phase of the latest start. While it goes on, End is zero, null in JSON,
// and Seconds is the time so far.
type Phase struct {
	Name    string    `json:"name"`
	Start   time.Time `json:"start"`
	End     time.Time `json:"end" nullable:"true"`
	Seconds float64   `json:"seconds"`
}

// MarshalJSON writes a zero End as null.
func (p Phase) MarshalJSON() ([]byte, error) {
	type fields Phase
	out := struct {
		fields
		End *time.Time `json:"end"`
	}{fields: fields(p)}
	if !p.End.IsZero() {
		out.End = &p.End
	}
	return json.Marshal(out)
}

// Explanation says where a VM stands, for people.
type Explanation struct {
	Name    string       `json:"name"`
	Phase   string       `json:"phase"`
	Until   time.Time    `json:"until,omitzero"`
	Awaited string       `json:"awaited,omitempty"` // what has to happen next
	Reason  event.Reason `json:"reason,omitempty"`
	What    string       `json:"what"` // what is or went wrong, or "as it should be"
	// Findings are all checks that failed.
	Findings []event.FailedCheck `json:"findings"`
	Next     string              `json:"next,omitempty"` // what the reader can do
}

// Evidence is the verdicts of one start: one chain, oldest first.
type Evidence struct {
	Name     string    `json:"name"`
	ID       string    `json:"id"` // reservation
	Start    int       `json:"start"`
	Verdicts []Verdict `json:"verdicts"`
}

// Verdict is a decision on one quote, or a refusal while one was awaited.
type Verdict struct {
	Role     string        `json:"role"`
	Host     string        `json:"host"`
	At       time.Time     `json:"at"`
	Accepted bool          `json:"accepted"`
	Previous digest.SHA256 `json:"previous"` // verdict, empty for a boot's
	Record   digest.SHA256 `json:"record"`   // SHA-256 of what it rests on
	Digest   digest.SHA256 `json:"digest"`   // names it
	Kept     bool          `json:"kept"`     // its bundle is there; of a VM that computes for long, older ones of role watch are not
	// Unjudged: it refused before there was a quote to judge; role is that of the quote.
	Unjudged bool `json:"unjudged,omitempty"`
}

// JournalEntry is one entry of the hash-chained journal.
type JournalEntry struct {
	Seq   int64         `json:"seq"`
	Hash  digest.SHA256 `json:"hash"` // over the previous hash and this entry
	VM    string        `json:"vm,omitempty"`
	Event event.Event   `json:"event"`
}

// RegisterTemplate announces a template that was built and audited on the tenant's side.
type RegisterTemplate struct {
	Name       string          `json:"name"`
	SHA256     digest.SHA256   `json:"sha256"` // of the ciphertext
	Size       int64           `json:"size"`
	RootHash   digest.SHA256   `json:"root_hash"`
	HashOffset int64           `json:"hash_offset"`
	VolumeKey  secret.Bytes    `json:"volume_key"` // 64 bytes, into the vault
	Components signed.Envelope `json:"components"` // bootmsg.Components; the two objects must be in the store
	Audit      []byte          `json:"audit"`      // JSON of the template's expectations, for both audits
	Created    time.Time       `json:"created"`
	// Rotate makes another image under a registered name its next version, instead of a refusal.
	Rotate bool `json:"rotate,omitempty"`
}

// States of a template's version.
const (
	TemplateCurrent    = "current"    // VMs take it at their next start, where it lies at their host
	TemplateSuperseded = "superseded" // there is a newer one; it is withdrawn when nothing uses it
	TemplateWithdrawn  = "withdrawn"  // its key is destroyed; hosts are asked to delete its ciphertext
)

// Template is one version of a registered template.
type Template struct {
	Name    string              `json:"name"`
	Version int                 `json:"version"`
	State   string              `json:"state"`
	SHA256  digest.SHA256       `json:"sha256"`
	Size    int64               `json:"size"`
	Created time.Time           `json:"created"`
	Release string              `json:"release"`
	Boot    []bootmsg.Component `json:"boot"`  // kernel and initramfs
	Hosts   []string            `json:"hosts"` // where its ciphertext lies
	VMs     int                 `json:"vms"`   // whose latest start is of this version
	// AuthenticatedVolume: its VMs keep a tag beside each sector of their volume.
	AuthenticatedVolume bool `json:"authenticated_volume"`
	// Problem is why no VM can be made of it; empty: none.
	Problem string `json:"problem,omitempty"`
}

// Host is an inventoried host.
type Host struct {
	Name     string         `json:"name"`
	API      netip.AddrPort `json:"api"`
	Location string         `json:"location"`
	Asset    string         `json:"asset"`
	Software string         `json:"software"`
	Standing string         `json:"standing"` // "good", or why not
	VMs      int            `json:"vms"`
	Quoted   time.Time      `json:"quoted,omitzero"` // last accepted quote
}

// MaxDocument bounds a signed inventory or signed reference values in bytes.
const MaxDocument = 16 << 20

// ImportDocument takes a signed document into use.
type ImportDocument struct {
	Document []byte `json:"document"` // the file, byte for byte
	// SHA256 is what the signer published over another way; absent: it is not compared.
	SHA256 *digest.SHA256 `json:"sha256,omitempty"`
}

// Inventory is one version of the provider's inventory that was imported.
type Inventory struct {
	Version    int           `json:"version"`
	SHA256     digest.SHA256 `json:"sha256"` // of the signed payload
	Provider   string        `json:"provider"`
	Issued     time.Time     `json:"issued"`
	Expires    time.Time     `json:"expires"`
	Imported   time.Time     `json:"imported"`
	ImportedBy string        `json:"imported_by"` // "configuration", or whose certificate
	Current    bool          `json:"current"`     // the one that counts
	HostCount  int           `json:"host_count"`
	Hosts      []HostEntry   `json:"hosts,omitempty"`
}

// States of a host's keys.
const (
	KeysUnproved  = "unproved"  // its TPM has not proved yet that it holds them; it does before its first VM
	KeysValidated = "validated" // it has
	KeysFailed    = "failed"    // a check failed: the host gets no VM
)

// HostEntry is one host of an inventory, with what the tenant's own checks found.
type HostEntry struct {
	Name     string         `json:"name"`
	API      netip.AddrPort `json:"api"`
	Location string         `json:"location"`
	Asset    string         `json:"asset"`
	Software string         `json:"software"` // platform release
	EK       digest.SHA256  `json:"ek"`       // of the endorsement certificate
	AIK      digest.SHA256  `json:"aik"`      // of the attestation key
	Session  digest.SHA256  `json:"session"`  // of the session key
	Keys     string         `json:"keys,omitempty"`
	Reason   string         `json:"reason,omitempty"` // why they are not validated
	Checked  time.Time      `json:"checked,omitzero"`
}

// InventoryImport is what an import found and did.
type InventoryImport struct {
	Inventory
	Before  int          `json:"before"`  // version that counted until now; the same again changes nothing
	Changes []HostChange `json:"changes"` // against that version
	Alerts  []Alert      `json:"alerts"`  // VMs that run on hosts that lost their good standing
}

// HostChange is one host in which two versions differ.
type HostChange struct {
	Host string `json:"host"`
	What string `json:"what"` // "new", "gone", "keys" or "facts"
}

// Alert is one running VM that no longer stands on what it was admitted by.
type Alert struct {
	VM     string       `json:"vm"`
	Host   string       `json:"host"`
	Reason event.Reason `json:"reason"`
	Detail string       `json:"detail"`
	Action string       `json:"action"`
}

// What was done about a VM that an alert is of.
const (
	ActionNone       = "none"       // it runs on; its host's next quote decides
	ActionClosed     = "closed"     // its network is gone, and its instance but after a refused quote; its volume is kept for the next start
	ActionTerminated = "terminated" // it has ended
)

// Platform is reference values that were imported.
type Platform struct {
	SHA256      digest.SHA256 `json:"sha256"` // of the signed payload
	Release     string        `json:"release"`
	Profile     string        `json:"profile"`
	ValidFrom   time.Time     `json:"valid_from"`
	ValidUntil  time.Time     `json:"valid_until"`
	Imported    time.Time     `json:"imported"`
	ImportedBy  string        `json:"imported_by"`
	Withdrawn   time.Time     `json:"withdrawn,omitzero"`
	WithdrawnBy string        `json:"withdrawn_by,omitempty"`
	Why         string        `json:"why,omitempty"` // it was withdrawn
	Counts      bool          `json:"counts"`        // now
	VMs         int           `json:"vms"`           // that run, and whose last accepted quote was judged by it
	Alerts      []Alert       `json:"alerts,omitempty"`
}

// WithdrawPlatform says why reference values shall count no more.
type WithdrawPlatform struct {
	Why string `json:"why"`
}

// Status is the installation at a glance.
type Status struct {
	Version string      `json:"version"`
	Profile string      `json:"profile"`
	Epoch   int64       `json:"epoch"`
	VMs     int         `json:"vms"`
	Zones   []ZoneState `json:"zones"`
	// Refusals counts what was refused and what failed since the installation was made.
	Refusals []Refusals `json:"refusals"`
}

// Refusals is how often the journal has an entry with this reason.
type Refusals struct {
	Source string       `json:"source"` // "orchestrator", or role/name of the daemon that told it
	Kind   string       `json:"kind"`   // of the entries
	Reason event.Reason `json:"reason"`
	Count  int64        `json:"count"`
}

// ZoneState compares what a daemon should hold with what it last read back.
type ZoneState struct {
	Zone   string    `json:"zone"`
	Wanted int64     `json:"wanted"`
	Live   int64     `json:"live"`
	Seen   time.Time `json:"seen,omitzero"`
	Error  string    `json:"error,omitempty"`
}

// Fsck says whether database, vault, hosts, kernel rules and tunnels fit each other.
type Fsck struct {
	Clean    bool      `json:"clean"` // there are no findings
	Time     time.Time `json:"time"`
	Looked   Looked    `json:"looked"`
	Findings []Finding `json:"findings"` // what does not fit
	Motion   []Finding `json:"motion"`   // what is under way and has time left
	Notes    []Finding `json:"notes"`    // what fits and may be of interest
}

// Looked counts what was held against each other.
type Looked struct {
	VMs       int   `json:"vms"`       // that are not deleted
	Keys      int   `json:"keys"`      // of volumes and templates, in the vault
	Hosts     int   `json:"hosts"`     // that answered
	Instances int   `json:"instances"` // of VMs, at hosts
	Volumes   int   `json:"volumes"`   // at hosts
	Templates int   `json:"templates"` // at hosts
	Rules     int   `json:"rules"`     // and tunnels, read back from the kernels
	Entries   int64 `json:"entries"`   // of the journal
}

// Finding is one thing that is not as it should be, or is on its way there.
type Finding struct {
	Code     string    `json:"code"` // stable; docs/fsck.md lists them
	Thing    string    `json:"thing"`
	Expected string    `json:"expected"`
	Found    string    `json:"found"`
	Until    time.Time `json:"until,omitzero"` // how long it may be under way, or might have been
	Next     string    `json:"next"`           // what the reader can do
}

// Problem is the body of every refusal: thing, reason, next step.
type Problem struct {
	Reason   event.Reason        `json:"reason"`
	Detail   string              `json:"detail"`
	Findings []event.FailedCheck `json:"findings,omitempty"` // all checks that failed
	Next     string              `json:"next,omitempty"`
}

// OrderHostAudit asks for an order to audit a host's TPM. Key is the public half, Ed25519,
// of the key that the medium will sign its report with.
type OrderHostAudit struct {
	Key []byte `json:"key"`
}

// HostAudit is an audit of a host's TPM from trusted media.
type HostAudit struct {
	Number  string    `json:"number"`
	Host    string    `json:"host"`
	Expires time.Time `json:"expires"`          // of the order
	Judged  time.Time `json:"judged,omitzero"`  // no report yet: zero
	Good    bool      `json:"good"`             // every check held
	Checks  []Check   `json:"checks,omitempty"` // those that failed
	// What the machine's firmware states of it, and the asset tag of the inventory beside it:
	// for people, since neither is proved.
	Asset     string `json:"asset,omitempty"`
	Serial    string `json:"serial,omitempty"`
	Inventory string `json:"inventory_asset,omitempty"`
	// Both only in the answer to a report.
	Alerts  []Alert `json:"alerts,omitempty"`  // VMs that run at the host whose audit failed
	Outdone string  `json:"outdone,omitempty"` // how an audit that was ordered later failed: this good one clears nothing
}

// Check is one that failed.
type Check struct {
	Check     string `json:"check"`
	Detail    string `json:"detail"`
	Component string `json:"component,omitempty"`
	Expected  string `json:"expected,omitempty"`
	Seen      string `json:"seen,omitempty"`
	Do        string `json:"do,omitempty"`
}
