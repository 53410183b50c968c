package orchestrator

import (
	"context"
	"fmt"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/protocol/zone"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// explain says where a VM stands, until when, what is awaited or went wrong, and what
// the reader can do.
func (o *Orchestrator) explain(ctx context.Context, r ledger.Reservation) (api.Explanation, error) {
	e := api.Explanation{Name: r.Name, Phase: string(r.Phase), Until: r.Deadline, Awaited: reservation.Awaited(r.Phase),
		Reason: r.Reason, Findings: append([]event.FailedCheck{}, r.Findings...)}
	_, s, err := o.row(ctx, r.ID)
	if err != nil {
		return e, err
	}
	switch r.Phase {
	case reservation.Aborted:
		known := event.Explain(r.Reason)
		e.What, e.Next = known.Cause, known.Next
		if r.Detail != "" {
			e.What += ": " + r.Detail
		}
		if r.Cleanup == ledger.CleanupPending {
			e.Awaited = "the host to confirm that the VM is gone"
		}
	case reservation.Released:
		e.What = "it was released"
		if r.Cleanup == ledger.CleanupPending {
			e.Awaited = "the host to confirm that the VM is gone"
		}
	case reservation.Stopped:
		known := event.Explain(r.Reason)
		e.What, e.Until, e.Next = known.Cause, time.Time{}, "foothold vm start "+r.Name
		if r.Detail != "" {
			e.What += ": " + r.Detail
		}
		switch due := r.NextStart(); {
		case r.Closed():
			e.What += "; " + closedWords
			e.Awaited = "an operator, to look into it"
			e.Next = fmt.Sprintf("foothold vm evidence %s --out FOLDER; when you are done: foothold vm stop %s, which has the instance destroyed, foothold vm start %s or foothold vm delete %s",
				r.Name, r.Name, r.Name, r.Name)
		case !r.Gone:
			e.Awaited = "the host to confirm that its last instance is gone"
		case !due.IsZero():
			e.Until, e.Awaited, e.Next = due, fmt.Sprintf("its next start, by its restart policy %q", r.Restart), "foothold vm watch "+r.Name
		}
	default:
		e.Awaited = awaitedNow(r, s)
		e.What = "as it should be"
		e.Next = fmt.Sprintf("foothold vm watch %s", r.Name)
		if r.Wish != ledger.WishNone {
			e.What, e.Awaited = fmt.Sprintf("it was asked to %s", r.Wish), "the VM to write its volume out and end"
		}
		if workloadEnded(r, s) {
			known := event.Explain(event.WorkloadFailed)
			e.Reason, e.Awaited = event.WorkloadFailed, "nothing: the VM goes on computing without its workload"
			e.What, e.Next = known.Cause, known.Next
		}
		l, err := o.lostNow(ctx, r, s)
		if err != nil {
			return e, err
		}
		if l != nil && r.Phase.Running() {
			known := event.Explain(l.why.Reason)
			e.Reason, e.What, e.Next = l.why.Reason, known.Cause+": "+l.why.Detail, known.Next
		}
		if f, ok := o.hostSilent(r, s); ok {
			e.Findings = append(e.Findings, f)
		}
		for _, z := range o.zones.states() {
			if z.Live < z.Wanted || z.Error != "" {
				e.Findings = append(e.Findings, zoneBehind(z))
			}
		}
	}
	return e, nil
}

// zoneBehind is the finding about a daemon that has not made its document so.
func zoneBehind(z api.ZoneState) event.FailedCheck {
	f := event.FailedCheck{Check: "zone", Component: "zone " + z.Zone, Expected: fmt.Sprintf("revision %d is live", z.Wanted),
		Seen: fmt.Sprintf("revision %d is live", z.Live), Do: event.Explain(event.ZoneNotApplied).Next}
	if z.Error != "" {
		f.Seen += ": " + z.Error
	}
	f.Detail = fmt.Sprintf("%s: %s, seen: %s", z.Zone, f.Expected, f.Seen)
	return f
}

// workloadEnded reports whether a VM computes whose workload has ended after its first
// answer. One that ends before it aborts the VM.
func workloadEnded(r ledger.Reservation, s ledger.Start) bool {
	return r.Phase == reservation.Computing && (s.Workload == workloadFailed || s.Workload == workloadExited)
}

// awaitedNow is finer than the phase: which step of it comes next.
func awaitedNow(r ledger.Reservation, s ledger.Start) string {
	switch r.Phase {
	case reservation.Reserved:
		return "a turn at a host, where limits.boots_at_once VMs boot at once, and the orchestrator to ask it for the VM"
	case reservation.Booting:
		switch {
		case s.HostStarted.IsZero():
			return "the host to create and start the VM"
		case s.Opened.IsZero():
			return "the VM's loader to reach the boot server with T1"
		case s.Verdict.IsZero():
			return "the host's quote over this VM and its tunnel"
		case s.Delivered.IsZero():
			return "the VM to fetch its components"
		}
		return "the delivered system to report ready with T2"
	case reservation.Connecting:
		if !s.TunnelAddress.IsValid() {
			return "the VM to open its disks and ask the gateway for admission with T3"
		}
		return "the VM's system to start and its second audit, through the quarantined tunnel"
	case reservation.Computing:
		if r.Workload != nil && s.Ready.IsZero() {
			return "the workload to answer through the tunnel"
		}
	}
	return reservation.Awaited(r.Phase)
}

// states compares what each daemon should hold with what it last read back.
func (z *zones) states() []api.ZoneState {
	z.mu.Lock()
	defer z.mu.Unlock()
	var list []api.ZoneState
	for _, name := range []string{zone.External, zone.Internal, zone.Gateway, zone.Boot} {
		s := z.state[name]
		list = append(list, api.ZoneState{Zone: name, Wanted: s.revision, Live: s.report.Revision, Seen: s.seen, Error: s.report.Error})
	}
	return list
}
