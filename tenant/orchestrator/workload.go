package orchestrator

import (
	"context"
	"errors"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// SetWorkload gives a VM another workload. One that computes is told with the answer to
// its next heartbeat, ends the old one and fetches the new one; it is not started anew,
// and is ready again when the new one answers. Every other gets it with its next start.
func (o *Orchestrator) SetWorkload(ctx context.Context, nameOrID string, w api.Workload, by string) (ledger.Reservation, error) {
	r, err := o.find(ctx, nameOrID)
	if err != nil {
		return r, err
	}
	if err := checkWorkloadForm(&w); err != nil {
		return r, err
	}
	changed := false
	err = o.ledger.Write(ctx, func(t *ledger.Tx) (err error) {
		if r, err = t.Reservation(r.ID); err != nil {
			return err
		}
		if !r.Live() {
			return event.Refuse(event.WrongPhase, "VM %s is %s", r.Name, r.Phase)
		}
		if err := checkWorkload(t, &w); err != nil {
			return err
		}
		if changed = r.Workload == nil || *r.Workload != w; !changed {
			return nil
		}
		return errors.Join(t.SetWorkload(r.ID, r.Start, &w), replaceRunning(t, r), t.Journal(event.Event{Kind: "workload.changed", Reservation: r.ID,
			Detail: map[string]string{"sha256": w.SHA256.String(), "by": by}}))
	})
	if err != nil {
		return r, err
	}
	o.zones.journalled()
	if changed && r.Phase == reservation.Computing {
		if err := o.publish(ctx); err != nil { // its port may be another
			return r, err
		}
		o.drive(r.ID, r.Start, "workload", func(ctx context.Context) error { return o.awaitWorkload(ctx, r.ID) })
	}
	return o.findAny(ctx, r.ID)
}

// replaceRunning notes for a computing VM that its workload, r's, is being replaced.
func replaceRunning(t *ledger.Tx, r ledger.Reservation) error {
	if r.Phase != reservation.Computing {
		return nil
	}
	s, err := t.Start(r.ID, r.Start)
	if err != nil {
		return err
	}
	if r.Workload != nil {
		s.Former = append(s.Former, *r.Workload) // the guest may run it, or fetch it
	}
	s.Replaced, s.Answered, s.Workload, s.Ready = true, false, "", time.Time{}
	return errors.Join(t.PutStart(r.ID, r.Start, s), t.RestartPart(r.ID, r.Start, partReady))
}
