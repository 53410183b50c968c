package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/bootmsg"
	"foothold/protocol/event"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// Parts of phases that are kept apart.
const (
	partCreating = "creating" // create asked → the host reported the VM running
	partReady    = "ready"    // computing → the workload answered
)

// find reads a VM by name or id.
func (o *Orchestrator) find(ctx context.Context, nameOrID string) (r ledger.Reservation, err error) {
	err = o.ledger.Read(ctx, func(t *ledger.Tx) (err error) {
		r, err = t.Find(nameOrID)
		return err
	})
	if errors.Is(err, ledger.ErrNotFound) {
		return r, event.Refuse(event.UnknownVM, "there is no %s", named("VM", nameOrID))
	}
	return r, err
}

// vms lists the VMs as operators see them; "" means all that are not deleted.
func (o *Orchestrator) vms(ctx context.Context, id string) ([]api.VM, error) {
	list := []api.VM{}
	err := o.ledger.Read(ctx, func(t *ledger.Tx) error {
		var rows []ledger.Reservation
		var err error
		if id == "" {
			rows, err = t.Reservations()
		} else {
			rows = make([]ledger.Reservation, 1)
			rows[0], err = t.Reservation(id)
		}
		if err != nil {
			return err
		}
		for _, r := range rows {
			vm, err := o.view(t, r)
			if err != nil {
				return err
			}
			list = append(list, vm)
		}
		return nil
	})
	return list, err
}

func (o *Orchestrator) vm(ctx context.Context, id string) (api.VM, error) {
	list, err := o.vms(ctx, id)
	if err != nil {
		return api.VM{}, err
	}
	return list[0], nil
}

func (o *Orchestrator) view(t *ledger.Tx, r ledger.Reservation) (api.VM, error) {
	s, err := t.Start(r.ID, r.Start)
	if err != nil {
		return api.VM{}, fmt.Errorf("start %d of %s: %w", r.Start, r.ID, err)
	}
	phases, err := t.Phases(r.ID, r.Start)
	if err != nil {
		return api.VM{}, err
	}
	vm := api.VM{
		Name: r.Name, ID: r.ID, Start: r.Start, Phase: string(r.Phase), Reason: r.Reason, Template: r.Template, Size: r.Size, Measured: true,
		Host: r.Host, Address: r.Address, MAC: r.MAC, TunnelAddress: s.TunnelAddress, Created: r.Created, Deadline: r.Deadline,
		Findings:   append([]event.FailedCheck{}, r.Findings...),
		Components: append([]bootmsg.Component{}, s.Components...), TPMHeld: s.TPMHeld.Seconds(),
		Ready:    r.Phase == reservation.Computing && !s.Ready.IsZero(),
		Attested: s.Attested, Verdict: s.Verdict,
		Workload: r.Workload, Restart: string(r.Restart), Restarts: r.Restarts, Wish: string(r.Wish), NextStart: r.NextStart(),
	}
	vm.TemplateVersion = r.Version
	if next, err := t.TemplateAt(r.Template, r.Host); err == nil && r.Version != 0 && next.Version > r.Version && r.Live() {
		vm.NextVersion = next.Version
	}
	if r.Phase == reservation.Stopped {
		vm.Deadline = time.Time{}
		if !r.Gone && !r.Closed() {
			vm.Cleanup = api.CleanupPending
		}
	}
	vm.Phases, vm.Creating = phaseTimes(phases, t.Now)
	if r.Reason != "" && r.Reason != event.Released {
		vm.Explanation = event.Explain(r.Reason).Cause
		if r.Detail != "" {
			vm.Explanation += " (" + r.Detail + ")"
		}
		if r.Closed() {
			vm.Explanation += "; " + closedWords + ": foothold vm explain " + r.Name
		}
	}
	switch r.Cleanup {
	case ledger.CleanupPending:
		vm.Cleanup = api.CleanupPending
	case ledger.CleanupDone:
		vm.Cleanup = api.CleanupDone
	}
	if workloadEnded(r, s) {
		vm.Reason, vm.Explanation = event.WorkloadFailed, "its workload has ended; the VM itself goes on computing"
	}
	l, err := o.basis().lost(t, r, s)
	if err != nil {
		return api.VM{}, err
	}
	if l != nil && r.Phase.Running() {
		vm.Reason, vm.Explanation = l.why.Reason, event.Explain(l.why.Reason).Cause+" ("+l.why.Detail+")"
	}
	if r.Workload != nil && s.TunnelAddress.IsValid() {
		vm.WorkloadURL = workloadURL(s.TunnelAddress, r.Workload.Port)
	}
	return vm, nil
}

// phaseTimes turns the history into the API's phases, with a running one's time so far.
func phaseTimes(history []ledger.PhaseTime, now time.Time) (list []api.Phase, creating float64) {
	list = []api.Phase{}
	for _, p := range history {
		end := p.End
		if end.IsZero() {
			end = now
		}
		seconds := end.Sub(p.Began).Seconds()
		if p.Name == partCreating {
			creating = seconds
			continue
		}
		list = append(list, api.Phase{Name: p.Name, Start: p.Began, End: p.End, Seconds: seconds})
	}
	return list, creating
}

func workloadURL(a netip.Addr, port int) string {
	return "http://" + netip.AddrPortFrom(a, uint16(port)).String() + "/"
}
