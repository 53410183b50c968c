// Package expect judges audits: the facts that a guest reported of itself, held
// against what the tenant expects of this template and this start. One thing too many
// refuses, and every such thing is reported.
//
// The guest reports, the tenant judges. A guest that lies consistently is not found
// out here: that it runs the delivered components is the quote's to show. The audit
// shows what happened since - a process, module, mount, listener or route that should
// not be there.
package expect

import (
	"net/netip"

	"foothold/protocol/audit"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/vmspec"
)

// Instance is what the tenant knows of one start of one VM.
type Instance struct {
	Name         string         // host name
	Nonce        []byte         // of the audit request
	Cmdline      string         // of the signed manifest
	Network      vmspec.Network // on the cloud network
	BootServer   netip.Addr     // reached in act 7
	Orchestrator netip.Addr     // the one address that may open SSH
	Gateway      netip.Addr     // admission and WireGuard
	TemplateSize int64          // bytes of the ciphertext, disk vda
	VolumeSize   int64          // bytes, disk vdb
	RootHash     digest.SHA256  // of the template's verity tree

	// From connecting on; unused for the first audit.
	Tunnel       netip.Addr   // inside the tunnel
	TunnelPrefix netip.Prefix // of the tunnel network, on wg0

	// Workload is set once it was told to the agent.
	Workload *Workload
	// Former are the workloads that it replaces, until the agent says that it runs.
	Former []*Workload
}

// Workload is what may run beside the OS.
type Workload struct {
	SHA256 digest.SHA256 // of the executable; zero for a tar, whose programs are known by WorkloadDir
	Port   int           // TCP
}

// WorkloadDir is where the agent unpacks workloads.
const WorkloadDir = "/run/foothold/workload"

// Finding is one thing that is not as expected.
type Finding struct {
	Check  string `json:"check"`  // "process", "module", "listener"...
	Detail string `json:"detail"` // what was found and what was expected
}

func (f Finding) String() string { return f.Check + ": " + f.Detail }

// Initramfs judges the first audit, before any secret is handed over.
func Initramfs(t Template, i Instance, r audit.Report) []Finding {
	j := judge{t: t, stage: t.Initramfs, i: i, r: r}
	j.common(audit.Initramfs)
	j.disksClosed()
	j.initramfsListeners()
	j.initramfsNetwork()
	return j.found
}

// OS judges the second audit and later ones.
func OS(t Template, i Instance, r audit.Report) []Finding {
	j := judge{t: t, stage: t.OS, i: i, r: r, os: true}
	j.common(audit.OS)
	j.disksOpen()
	j.osListeners()
	j.osNetwork()
	return j.found
}

// Err is nil for no findings, else a refusal with all of them.
func Err(findings []Finding) error {
	if len(findings) == 0 {
		return nil
	}
	refusal := event.Refuse(event.AuditFailed, "the audited machine is not as expected")
	for _, f := range findings {
		refusal.Findings = append(refusal.Findings, event.FailedCheck{Check: f.Check, Component: f.Check, Expected: "what the template's expectations and this start's settings say",
			Seen: f.Detail, Do: event.Explain(event.AuditFailed).Next, Detail: f.Detail})
	}
	return refusal
}
