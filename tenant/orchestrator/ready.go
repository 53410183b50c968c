package orchestrator

import (
	"context"
	"encoding/json"
	"errors"

	"foothold/internal/mtls"
	"foothold/protocol/bootmsg"
	"foothold/protocol/event"
	"foothold/protocol/signed"
	"foothold/protocol/token"
	"foothold/protocol/upstream"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// bootReady is act 7: the boot server relays the VM's report. T2 in it is spent first,
// before the signature is even looked at; the report must be signed by the key that the
// quote admitted. With that, in the same transaction, the VM moves to unlocking.
func (o *Orchestrator) bootReady(ctx context.Context, who mtls.Identity, in upstream.ReadyRequest) (empty, error) {
	// What is read here unverified serves to find T2 and nothing else.
	var claimed struct {
		T2 token.Token `json:"t2"`
	}
	if len(in.Report.Payload) > bootmsg.MaxMessage || json.Unmarshal(in.Report.Payload, &claimed) != nil || !claimed.T2.Is(token.T2) {
		return empty{}, o.refusedCall(ctx, who, upstream.PathBootReady, "", event.Refuse(event.BadRequest, "the report carries no T2"))
	}
	ctx, done := seenThrough(ctx)
	defer done()
	source := in.Source.Unmap()
	r, err := o.ledger.Spend(ctx, ledger.Presentation{Kind: token.T2, Digest: claimed.T2.Digest(), Source: source}, func(t *ledger.Tx, r ledger.Reservation) error {
		s, err := t.Start(r.ID, r.Start)
		if err != nil {
			return err
		}
		var report bootmsg.Report
		if err := in.Report.Open(s.VMKey, signed.Report, &report); err != nil {
			return event.Refuse(event.ReportRefused, "the report: %v", err)
		}
		if report.Reservation != r.ID || report.Start != r.Start || report.T2.Digest() != claimed.T2.Digest() {
			return event.Refuse(event.ReportRefused, "the report is of another VM or start")
		}
		if s.Delivered.IsZero() {
			return event.Refuse(event.ReportRefused, "it came before the boot server had delivered everything")
		}
		return errors.Join(
			t.Move(r.ID, r.Start, reservation.Booting, reservation.Unlocking, t.Now.Add(o.limits.Unlocking)),
			t.Journal(event.Event{Kind: "vm.reported-ready", Reservation: r.ID, Detail: map[string]string{"kernel": clip(report.Kernel, 128)}}))
	})
	o.zones.journalled()
	if err != nil {
		if r.ID != "" {
			o.abort(ctx, r.ID, r.Start, err)
		}
		return empty{}, err
	}
	o.places.ring()
	o.drive(r.ID, r.Start, "unlock", func(ctx context.Context) error { return o.unlock(ctx, r.ID) })
	return empty{}, nil
}

// clip bounds a text from outside.
func clip(s string, most int) string {
	if len(s) > most {
		return s[:most]
	}
	return s
}
