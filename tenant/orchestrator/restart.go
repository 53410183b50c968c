package orchestrator

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"foothold/protocol/event"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// stopGrace is how long a VM that was asked to stop may take to write its volume out;
// then its host is asked to end it.
const stopGrace = 60 * time.Second

// halt ends one start of a VM and says when the next is due: by the operator's wish if
// there is one, else by the VM's policy. It reports whether this call did it.
func halt(t *ledger.Tx, r ledger.Reservation, why event.Refusal) (bool, error) {
	due, restarts := time.Time{}, 0
	switch r.Wish {
	case ledger.WishStop:
		why.Reason = event.StopAsked
	case ledger.WishRestart:
		why.Reason, due = event.RestartAsked, t.Now
	default:
		since, err := t.ComputedSince(r.ID, r.Start)
		if err != nil {
			return false, err
		}
		if restarts = r.Restarts; !since.IsZero() && t.Now.Sub(since) >= reservation.StableAfter {
			restarts = 0
		}
		if due = r.Restart.Next(why.Reason, restarts, t.Now); !due.IsZero() {
			restarts++
		}
	}
	won, err := t.Halt(r.ID, r.Start, why, due, restarts)
	if err != nil || !won {
		return false, err
	}
	return true, t.Journal(event.Event{Kind: "vm.stopped", Reservation: r.ID, Reason: why.Reason, Detail: withFindings(map[string]string{
		"phase": string(r.Phase), "detail": why.Detail, "next-start": dueText(due)}, why)})
}

func dueText(due time.Time) string {
	if due.IsZero() {
		return "none"
	}
	return due.Format(time.RFC3339)
}

// settle has the host of a stopped VM destroy its last instance and checks that it is
// gone. Only then another start may begin.
func (o *Orchestrator) settle(ctx context.Context, r ledger.Reservation) error {
	if r.Gone {
		return nil
	}
	r.Erase = false // a stopped VM keeps its volume, whatever the row says
	if err := o.destroy(ctx, r); err != nil {
		return err
	}
	err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		return errors.Join(t.SetGone(r.ID, r.Start), t.Journal(event.Event{Kind: "vm.gone", Reservation: r.ID, Detail: map[string]string{"host": r.Host, "volume": r.Volume}}))
	})
	if errors.Is(err, ledger.ErrNotFound) { // it was released meanwhile: its clean-up looks again
		return nil
	}
	o.zones.journalled()
	return err
}

// Stop asks a VM to stop, keeping its volume. One that computes is told through its
// tunnel and writes its volume out first; one that does not is ended at once.
func (o *Orchestrator) Stop(ctx context.Context, nameOrID, by string) (ledger.Reservation, error) {
	return o.ask(ctx, nameOrID, ledger.WishStop, by)
}

// Restart is Stop followed by another start: acts 2 to 10 with new tokens, new keys,
// new headers and a new quote.
func (o *Orchestrator) Restart(ctx context.Context, nameOrID, by string) (ledger.Reservation, error) {
	return o.ask(ctx, nameOrID, ledger.WishRestart, by)
}

// StartAgain has a stopped VM start now.
func (o *Orchestrator) StartAgain(ctx context.Context, nameOrID, by string) (ledger.Reservation, error) {
	r, err := o.find(ctx, nameOrID)
	if err != nil {
		return r, err
	}
	switch {
	case r.Wish == ledger.WishStop:
		return o.ask(ctx, r.ID, ledger.WishRestart, by)
	case r.Phase.Running() || r.Phase == reservation.Reserved:
		return r, nil // it is on its way, or there
	case r.Phase != reservation.Stopped:
		return r, event.Refuse(event.WrongPhase, "VM %s is %s and stays so", r.Name, r.Phase)
	}
	return o.schedule(ctx, r, event.RestartAsked, by)
}

// ask records what an operator wishes of a VM and acts on it.
func (o *Orchestrator) ask(ctx context.Context, nameOrID string, w ledger.Wish, by string) (ledger.Reservation, error) {
	r, err := o.find(ctx, nameOrID)
	if err != nil {
		return r, err
	}
	switch {
	case r.Phase == reservation.Stopped && w == ledger.WishStop:
		return o.schedule(ctx, r, event.StopAsked, by)
	case r.Phase == reservation.Stopped:
		return o.schedule(ctx, r, event.RestartAsked, by)
	case !r.Phase.Running():
		return r, event.Refuse(event.WrongPhase, "VM %s is %s", r.Name, r.Phase)
	}
	err = o.ledger.Write(ctx, func(t *ledger.Tx) error {
		return errors.Join(t.SetWish(r.ID, r.Start, w), t.Journal(event.Event{Kind: "vm." + string(w) + "-asked", Reservation: r.ID, Detail: map[string]string{"by": by}}))
	})
	if errors.Is(err, ledger.ErrMoved) { // its start has just ended: what was asked holds for what follows
		return o.ask(ctx, r.ID, w, by)
	}
	if err != nil {
		return r, err
	}
	o.zones.journalled()
	if r.Phase != reservation.Computing { // it hears nothing, and has written nothing
		o.abort(ctx, r.ID, r.Start, event.Refuse(event.VMStopped, "as asked, while it was %s", r.Phase))
	}
	return o.findAny(ctx, r.ID)
}

// schedule makes a stopped VM's next start due now, or takes it off.
func (o *Orchestrator) schedule(ctx context.Context, r ledger.Reservation, why event.Reason, by string) (ledger.Reservation, error) {
	err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		due := t.Now
		if why == event.StopAsked {
			due = time.Time{}
		}
		return errors.Join(t.SetDue(r.ID, r.Start, event.Refusal{Reason: why}, due, 0),
			t.Journal(event.Event{Kind: "vm.start-scheduled", Reservation: r.ID, Reason: why, Detail: map[string]string{"next-start": dueText(due), "by": by}}))
	})
	if errors.Is(err, ledger.ErrMoved) { // its start has begun meanwhile, or it was released
		if why == event.StopAsked {
			return o.ask(ctx, r.ID, ledger.WishStop, by)
		}
		err = nil
	}
	if err != nil {
		return r, err
	}
	o.zones.journalled()
	o.cleanUpSoon(r.ID)
	o.startDue(ctx)
	return o.findAny(ctx, r.ID)
}

// startDue begins each start that is due. The row says so until the start has begun,
// which is one swap, so a crash loses nothing and two calls begin one start.
func (o *Orchestrator) startDue(ctx context.Context) {
	var rows []ledger.Reservation
	if err := o.ledger.Read(ctx, func(t *ledger.Tx) (err error) { rows, err = t.Due(); return err }); err != nil {
		if ctx.Err() == nil {
			slog.Error("look for due starts", "error", err)
		}
		return
	}
	for _, r := range rows {
		if !o.takeStart(r.ID) {
			continue
		}
		run := o.liveRun(r.ID)
		o.task(func() {
			defer o.leaveStart(r.ID)
			if err := o.create(run.ctx, r.ID); err != nil && run.ctx.Err() == nil {
				slog.Warn("act failed", "reservation", r.ID, "act", "create", "error", err)
				o.startFailed(context.WithoutCancel(run.ctx), r, err)
			}
		})
	}
}

// takeStart reserves the beginning of a VM's next start to one goroutine.
func (o *Orchestrator) takeStart(id string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.starting[id] {
		return false
	}
	o.starting[id] = true
	return true
}

func (o *Orchestrator) leaveStart(id string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.starting, id)
}

// startFailed takes the failure of act 2 of a further start: before the start began it
// puts the next try off, after it the start ends like any other.
func (o *Orchestrator) startFailed(ctx context.Context, r ledger.Reservation, err error) {
	if errors.Is(err, ledger.ErrMoved) { // it was released, or begun by another call
		return
	}
	why := refusalOf(err)
	putOff := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		now, err := t.Reservation(r.ID)
		if err != nil {
			return err
		}
		due := time.Time{}
		if !now.NextStart().IsZero() && reservation.Outage(why.Reason) { // else an operator took it off meanwhile
			due = r.Restart.Next(why.Reason, r.Restarts, t.Now)
		}
		return errors.Join(t.SetDue(r.ID, r.Start, *why, due, r.Restarts+1),
			t.Journal(event.Event{Kind: "vm.start-failed", Reservation: r.ID, Reason: why.Reason, Detail: map[string]string{"detail": why.Detail, "next-start": dueText(due)}}))
	})
	switch {
	case errors.Is(putOff, ledger.ErrMoved):
		o.abort(ctx, r.ID, r.Start+1, err)
	case putOff != nil:
		slog.Error("put the next start off", "reservation", r.ID, "error", putOff)
	default:
		o.zones.journalled()
	}
}

// endWishes has the hosts end what did not stop by itself.
func (o *Orchestrator) endWishes(ctx context.Context) error {
	var rows []ledger.Reservation
	if err := o.ledger.Read(ctx, func(t *ledger.Tx) (err error) { rows, err = t.Wishes(t.Now.Add(-stopGrace)); return err }); err != nil {
		return err
	}
	for _, r := range rows {
		o.abort(ctx, r.ID, r.Start, event.Refuse(event.VMStopped, "it did not stop within %v of being asked to", stopGrace))
	}
	return nil
}
