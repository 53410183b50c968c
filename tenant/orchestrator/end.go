package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"foothold/protocol/event"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
	"foothold/tenant/verify"
)

// Times of the end.
const (
	sweepEvery   = 500 * time.Millisecond // how late a deadline may be noticed; it holds in every swap regardless
	cleanupLimit = 30 * time.Second       // one attempt at a host
)

// errEnded is the cause with which the work on an ended reservation is cancelled.
var errEnded = errors.New("the reservation has ended")

// Release is act 11 by wish: it ends a VM and crypto-erases its volume. When it returns
// no error, the volume's key is destroyed. It waits for one attempt at the clean-up at
// the host; what that leaves the sweep repeats.
func (o *Orchestrator) Release(ctx context.Context, nameOrID, by string) (ledger.Reservation, error) {
	r, err := o.find(ctx, nameOrID)
	if err != nil {
		return r, err
	}
	if !r.Deleted.IsZero() {
		return r, nil
	}
	ctx = context.WithoutCancel(ctx) // what is begun here is ended, whether its caller waits or not
	if err := o.release(ctx, r.ID, by); err != nil {
		return r, err
	}
	if r, err = o.findAny(ctx, r.ID); err != nil {
		return r, err
	}
	if err := o.erase(r); err != nil {
		return r, err
	}
	if err := o.cleanUp(ctx, r.ID); err != nil {
		slog.Warn("clean-up goes on", "reservation", r.ID, "error", err)
	}
	return o.findAny(ctx, r.ID)
}

// release stores the wish to erase and the end, in one transaction.
func (o *Orchestrator) release(ctx context.Context, id, by string) error {
	won, why := false, event.Refusal{Reason: event.Released}
	err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		r, err := t.Reservation(id)
		if err != nil {
			return err
		}
		if err := errors.Join(t.SetErase(r.ID), t.Journal(event.Event{Kind: "vm.release-asked", Reservation: r.ID, Detail: map[string]string{"by": by}})); err != nil {
			return err
		}
		won, err = end(t, r, reservation.Released, why)
		return err
	})
	if err != nil || !won {
		return err
	}
	return o.ended(ctx, id, reservation.Released, why)
}

func (o *Orchestrator) findAny(ctx context.Context, id string) (r ledger.Reservation, err error) {
	err = o.ledger.Read(ctx, func(t *ledger.Tx) (err error) {
		r, err = t.Reservation(id)
		return err
	})
	return r, err
}

// refusalOf is the reason in err.
func refusalOf(err error) *event.Refusal {
	var why *event.Refusal
	switch {
	case diskFull(err):
		return event.Refuse(event.DiskFull, "%v", err)
	case errors.As(err, &why) && why.Reason == event.UnknownVM: // a host's word
		return event.Refuse(event.VMStopped, "%s", why.Detail)
	case errors.As(err, &why):
		return why
	case errors.Is(err, context.DeadlineExceeded):
		return event.Refuse(event.DeadlinePassed, "%v", err)
	}
	return event.Refuse(event.InternalError, "%v", err)
}

// abort ends what err is about: the reservation, or, if it says no more than that an
// instance does not run (reservation.EndsStart), that start of it. start is 0 for whichever
// it is now. It does nothing to one that has ended before, and to one that has moved on only
// if err is a judgement of the machine (reservation.Damning). An end that cannot be stored
// now is owed, except one for a full disk, which says nothing of the VM. The clean-up goes on
// in the background.
func (o *Orchestrator) abort(ctx context.Context, id string, start int, err error) {
	e := ending{id, start}
	found := fate{Refusal: *refusalOf(err)}
	errors.As(err, &found.early)
	why := o.firstReason(e, found)
	stored, err := o.fail(ctx, id, start, why)
	if stored {
		o.settled(e)
	} else if why.Reason != event.DiskFull && !o.owe(e, why) {
		return // the sweep tries it again and again
	}
	if err != nil {
		slog.Error("abort", "reservation", id, "reason", why.Reason, "stored", stored, "error", err)
		return
	}
	o.cleanUpSoon(id)
}

// fail stores the end of a start or of the reservation; the rules go, at once. It reports
// whether the ledger has said its last word: the end is in it, or there is none to store.
// The evidence of early, if the end rests on that, is stored with it. Where the disk has room
// for the end alone, the end is stored, with its findings.
func (o *Orchestrator) fail(ctx context.Context, id string, start int, why fate) (stored bool, err error) {
	stored, err = o.failKeeping(ctx, id, start, why.Refusal, why.early, true)
	if why.early != nil && diskFull(err) {
		if stored, err = o.failKeeping(ctx, id, start, why.Refusal, why.early, false); stored {
			slog.Error("no room for a refusal's evidence: its findings are in the journal", "reservation", id)
		}
	}
	return stored, err
}

func (o *Orchestrator) failKeeping(ctx context.Context, id string, start int, why event.Refusal, early *unjudged, keep bool) (stored bool, err error) {
	won, to := false, reservation.Aborted
	err = o.ledger.Write(ctx, func(t *ledger.Tx) (err error) {
		r, err := t.Reservation(id)
		if err != nil || !r.Live() {
			return err
		}
		if tunnel := r.Phase == reservation.Connecting || r.Phase == reservation.Computing; tunnel && why.Reason == event.DiskFull {
			return nil // its guest says the same again
		}
		if over := r.Phase == reservation.Stopped || start != 0 && r.Start != start; over {
			if reservation.Damning(why) {
				why.Detail = fmt.Sprintf("start %d: %s", start, why.Detail)
				if o.closesLate(why, r) {
					to = reservation.Stopped
					won, err = shut(t, r, why)
					return err
				}
				won, err = end(t, r, reservation.Aborted, why)
			}
			return err
		}
		if r.Phase != reservation.Computing && (why.Reason == event.GuestPoweredOff || why.Reason == event.GuestReset) {
			why.Reason = event.VMStopped // its agent gave up: nothing in it was asked to
		}
		if o.closes(why, r) {
			to = reservation.Stopped
			won, err = shut(t, r, why)
			return err
		}
		var parts verify.Parts
		if early != nil { // its findings are no judgement of the machine: nothing above may take them for one
			if parts, err = o.seal(t, r, early, &why); err != nil {
				return err
			}
			defer func() {
				if err == nil && won && keep {
					err = keepUnjudged(t, parts, early, len(why.Findings))
				}
			}()
		}
		closed := (why.Reason == event.HostLost || why.Reason == event.HostAuditFailed) && o.conf.HostLost != lostTerminate && reservation.MayStop(r.Phase, r.Start)
		if closed || r.Wish != ledger.WishNone && reservation.Outage(why.Reason) || reservation.EndsStart(why.Reason, r.Phase, r.Start) {
			to = reservation.Stopped
			won, err = halt(t, r, why)
			return err
		}
		won, err = end(t, r, reservation.Aborted, why)
		return err
	})
	if err != nil || !won {
		return err == nil || errors.Is(err, ledger.ErrNotFound), err
	}
	return true, o.ended(ctx, id, to, why)
}

// cleanUpSoon cleans up in the background.
func (o *Orchestrator) cleanUpSoon(id string) {
	o.task(func() {
		o.mu.Lock()
		ctx := o.ctx
		o.mu.Unlock()
		if err := o.cleanUp(ctx, id); err != nil && ctx.Err() == nil {
			slog.Warn("clean-up goes on", "reservation", id, "error", err)
		}
	})
}

// end stores the terminal state first: tokens void and certificates revoked with it, in
// one transaction. A crash after it leaves rules until the next publishing and a VM
// until the clean-up; both happen at the next start.
func end(t *ledger.Tx, r ledger.Reservation, to reservation.Phase, why event.Refusal) (bool, error) {
	won, err := t.End(r.ID, to, why)
	if err != nil || !won {
		return false, err
	}
	kind := "vm.aborted"
	if to == reservation.Released {
		kind = "vm.released"
	}
	return true, t.Journal(event.Event{Kind: kind, Reservation: r.ID, Reason: why.Reason,
		Detail: withFindings(map[string]string{"phase": string(r.Phase), "detail": why.Detail}, why)})
}

// withFindings adds all checks that failed to an entry's detail.
func withFindings(detail map[string]string, why event.Refusal) map[string]string {
	for i, f := range why.Findings {
		detail[fmt.Sprintf("finding-%02d", i+1)] = f.String()
	}
	return detail
}

// ended stops the work on what has ended in the ledger, and withdraws its rules.
func (o *Orchestrator) ended(ctx context.Context, id string, to reservation.Phase, why event.Refusal) error {
	slog.Info("reservation ended", "reservation", id, "phase", to, "reason", why.Reason, "detail", why.Detail)
	o.zones.journalled()
	o.stopRun(id, errEnded)
	o.places.ring()
	return o.publish(ctx)
}

// cleanUp destroys the volume's key, if erase was wished, then asks the host to destroy
// the VM, checks its absence in the host's listing, and has the ciphertext deleted. The
// key goes first and whatever the host does: a provider that does not answer, or
// refuses, must not keep it alive. Every step may be repeated; the row says what is
// still to do. One clean-up of a reservation runs at a time: an end, a wish to erase and
// the sweep may ask for it at once.
func (o *Orchestrator) cleanUp(ctx context.Context, id string) error {
	done, err := o.cleaning.take(ctx, id)
	if err != nil {
		return err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, cleanupLimit)
	defer cancel()
	r, err := o.findAny(ctx, id)
	if err == nil && r.Closed() { // until an operator asks for anything of it
		return nil
	}
	if err == nil && r.Phase == reservation.Stopped {
		return o.settle(ctx, r)
	}
	if err != nil || r.Cleanup != ledger.CleanupPending {
		return err
	}
	if err := errors.Join(o.erase(r), o.destroy(ctx, r)); err != nil {
		return err
	}
	if r.Erase {
		if err := o.forgetConsole(id); err != nil {
			return err
		}
	}
	err = o.ledger.Write(ctx, func(t *ledger.Tx) error {
		kind := "vm.gone"
		if r.Erase {
			kind = "vm.erased"
		}
		return errors.Join(t.Cleaned(r), t.Journal(event.Event{Kind: kind, Reservation: id, Detail: map[string]string{"host": r.Host, "volume": r.Volume}}))
	})
	if errors.Is(err, ledger.ErrNotFound) { // erase was wished meanwhile: whoever wished it, or the sweep, looks again
		return nil
	}
	o.zones.journalled()
	return err
}

// erase makes the volume unreadable wherever its ciphertext lies.
func (o *Orchestrator) erase(r ledger.Reservation) error {
	if !r.Erase {
		return nil
	}
	if err := o.vault.Destroy(volumeKeyName(r.Volume)); err != nil {
		return fmt.Errorf("crypto-erase: %w", err)
	}
	return nil
}

func (o *Orchestrator) destroy(ctx context.Context, r ledger.Reservation) error {
	if r.Host == "" {
		return nil
	}
	h, err := o.reach(r.Host)
	if err != nil {
		return err
	}
	o.keepConsole(ctx, h, r)
	last, err := h.Destroy(ctx, r.ID)
	if err != nil {
		return err
	}
	o.tellDropped(ctx, r, last)
	o.dropped.forget(r.ID)
	list, err := h.VMs(ctx)
	if err != nil {
		return err
	}
	for _, vm := range list {
		if vm.ID == r.ID {
			return event.Refuse(event.HostRefused, "host %s still lists VM %s after it was asked to destroy it", r.Host, r.ID)
		}
	}
	if !r.Erase {
		return nil
	}
	return h.DeleteVolume(ctx, r.Volume)
}

// sweep ends what is past its deadline or owed its end, begins starts that are due, repeats clean-ups
// that did not come through, and withdraws templates' versions that nothing needs.
func (o *Orchestrator) sweep(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	var lastCleanup time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		o.endOwed(ctx)
		if err := errors.Join(o.endExpired(ctx), o.endWishes(ctx)); err != nil && ctx.Err() == nil {
			slog.Error("sweep", "error", err)
		}
		o.startDue(ctx)
		if o.now().Sub(lastCleanup) > 10*time.Second {
			lastCleanup = o.now()
			o.repeatCleanups(ctx)
			o.tellExpiry(ctx)
			o.task(func() { o.withdrawSuperseded(ctx) })
		}
	}
}

func (o *Orchestrator) endExpired(ctx context.Context) error {
	var rows []ledger.Reservation
	whys := map[string]error{}
	err := o.ledger.Read(ctx, func(t *ledger.Tx) (err error) {
		if rows, err = t.Expired(); err != nil {
			return err
		}
		for _, r := range rows {
			s, err := t.Start(r.ID, r.Start)
			if err != nil {
				return err
			}
			reason := event.DeadlinePassed
			if r.Phase == reservation.Computing {
				reason = event.HeartbeatMissed
			}
			why := event.Refuse(reason, "%s ended at %s, awaited was: %s", r.Phase, r.Deadline.Format(time.RFC3339), awaitedNow(r, s))
			if whys[r.ID], err = lateQuote(t, r, why); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, r := range rows {
		o.abort(ctx, r.ID, r.Start, whys[r.ID])
	}
	return nil
}

func (o *Orchestrator) repeatCleanups(ctx context.Context) {
	var rows []ledger.Reservation
	if err := o.ledger.Read(ctx, func(t *ledger.Tx) (err error) { rows, err = t.Unclean(); return err }); err != nil {
		return
	}
	for _, r := range rows {
		if !o.cleaning.taken(r.ID) {
			o.cleanUpSoon(r.ID)
		}
	}
}
