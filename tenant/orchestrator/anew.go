package orchestrator

import (
	"context"
	"errors"

	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/token"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// createAnew takes act 2 up again for a start whose host was asked for the VM, and
// whose answer a crash of the orchestrator lost together with the plain T1. That T1 is
// void when createAnew returns, so no instance that has it gets anywhere; the rest goes
// on in the background, within the deadline that the phase had. A crash leaves what this
// one left.
func (o *Orchestrator) createAnew(ctx context.Context, r ledger.Reservation) error {
	t1 := token.New(token.T1)
	spec, err := o.beginAnew(ctx, r, t1.Digest())
	if errors.Is(err, ledger.ErrMoved) {
		return nil
	}
	if err != nil {
		return err
	}
	o.drive(r.ID, r.Start, "create", func(ctx context.Context) error {
		// The host may have the VM under the former T1. It has written nothing: no
		// packet of it passed, since it was never recorded as started.
		instance := r
		instance.Erase = false // its volume is the next instance's
		if err := o.destroy(ctx, instance); err != nil {
			return err
		}
		return o.bringUp(ctx, spec, t1)
	})
	return nil
}

// beginAnew stores another T1's digest with the settings that it belongs to.
func (o *Orchestrator) beginAnew(ctx context.Context, r ledger.Reservation, t1 digest.SHA256) (hostedSpec, error) {
	out := hostedSpec{host: r.Host}
	err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		now, err := t.Reservation(r.ID)
		if err != nil {
			return err
		}
		s, err := t.Start(r.ID, r.Start)
		if err != nil {
			return err
		}
		if now.Phase != reservation.Booting || now.Start != r.Start || !s.HostStarted.IsZero() {
			return ledger.ErrMoved
		}
		out.Spec = s.Spec
		out.TokenDigest = t1
		return errors.Join(
			t.PutStart(r.ID, r.Start, ledger.Start{Spec: out.Spec, HostKeys: s.HostKeys}),
			t.AddToken(ledger.Token{Digest: t1, Kind: token.T1, Reservation: r.ID, Start: r.Start, Phase: reservation.Booting, Source: r.Address}),
			t.RestartPart(r.ID, r.Start, partCreating),
			t.Journal(event.Event{Kind: "vm.create-asked-again", Reservation: r.ID, Detail: map[string]string{
				"host": out.host, "settings": out.Spec.Digest().String()}}))
	})
	o.zones.journalled()
	return out, err
}
