package orchestrator

import (
	"context"
	"crypto/ed25519"
	"errors"
	"net/netip"

	"foothold/internal/mtls"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/token"
	"foothold/protocol/upstream"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// bootOpen is act 4: it spends T1 and gives the boot server a fresh nonce and the keys
// of the host that acknowledged the VM, from our copy of the inventory.
func (o *Orchestrator) bootOpen(ctx context.Context, _ mtls.Identity, in upstream.OpenRequest) (upstream.OpenResponse, error) {
	var out upstream.OpenResponse
	p := ledger.Presentation{Kind: token.T1, Digest: in.Token.Digest(), Source: in.Source.Unmap()}
	r, err := o.ledger.Spend(ctx, p, func(t *ledger.Tx, r ledger.Reservation) error {
		if len(in.VMKey) != ed25519.PublicKeySize {
			return event.Refuse(event.BadRequest, "the VM's key has %d bytes", len(in.VMKey))
		}
		host, ok := o.basis().inventory.Host(r.Host)
		if !ok || len(host.Problems) > 0 {
			return event.Refuse(event.NoHost, "host %s is not in the inventory in good standing", r.Host)
		}
		s, err := t.Start(r.ID, r.Start)
		if err != nil {
			return err
		}
		nonce, err := t.NewNonce(r.ID, r.Start, evidence.RoleBoot)
		if err != nil {
			return err
		}
		s.Opened, s.VMKey, s.BootNonce = t.Now, in.VMKey, nonce
		out = upstream.OpenResponse{Reservation: r.ID, Nonce: nonce, AIK: host.Host.AIK, Session: host.Host.Session, Settings: s.Spec.Digest()}
		if o.own != nil {
			out.Session, out.Own = o.own.public, true
		}
		return t.PutStart(r.ID, r.Start, s)
	})
	o.zones.journalled()
	if err != nil {
		o.tokenRefused(ctx, r, in.Source.Unmap(), err)
		return upstream.OpenResponse{}, err
	}
	return out, nil
}

// tokenRefused ends what a refused token ends: the reservation whose token this very
// use burnt; and, for T1, whatever VM is still booting at the address that presented a
// token that is not its own. A reservation that has moved on stands.
func (o *Orchestrator) tokenRefused(ctx context.Context, burnt ledger.Reservation, from netip.Addr, why error) {
	var refusal *event.Refusal
	if !errors.As(why, &refusal) { // a fault of ours: nothing was burnt
		return
	}
	ctx = context.WithoutCancel(ctx)
	if burnt.ID != "" {
		o.abort(ctx, burnt.ID, burnt.Start, why)
	}
	if from.IsValid() {
		o.abortBootingAt(ctx, from, burnt.ID, why)
	}
}

func (o *Orchestrator) abortBootingAt(ctx context.Context, from netip.Addr, but string, why error) {
	var live []ledger.Reservation
	if err := o.ledger.Read(ctx, func(t *ledger.Tx) (err error) { live, err = t.Live(); return err }); err != nil {
		logFault(err)
		return
	}
	for _, r := range live {
		if r.Address == from && r.Phase == reservation.Booting && r.ID != but {
			o.abort(ctx, r.ID, r.Start, why)
		}
	}
}

// fromBooting reads the reservation that a boot server's call is about and checks that
// it is booting, before its deadline, at this address.
func (o *Orchestrator) fromBooting(ctx context.Context, id string, source netip.Addr) (ledger.Reservation, ledger.Start, error) {
	r, s, err := o.row(ctx, id)
	switch {
	case errors.Is(err, ledger.ErrNotFound):
		return r, s, event.Refuse(event.UnknownVM, "no such reservation")
	case err != nil:
		return r, s, err
	case r.Phase != reservation.Booting:
		return r, s, event.Refuse(event.TokenWrongPhase, "the VM is %s, not booting", r.Phase)
	case source.IsValid() && r.Address != source:
		return r, s, event.Refuse(event.TokenWrongAddress, "the VM is at %s, not at %s", r.Address, source)
	case !r.Deadline.After(o.now()):
		return r, s, event.Refuse(event.DeadlinePassed, "booting ended at %s", r.Deadline)
	case s.Opened.IsZero():
		return r, s, event.Refuse(event.TokenWrongPhase, "T1 was not presented")
	}
	return r, s, nil
}
