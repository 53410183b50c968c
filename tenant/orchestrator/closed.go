package orchestrator

import (
	"errors"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// What becomes of a VM that has computed when a later quote of its host is refused (quote_refused).
const (
	quoteClose     = "close"     // network, tunnel and tokens go; the instance is kept at its host for whoever looks into it
	quoteTerminate = "terminate" // it is ended for good
)

// closedWords tell of a closed VM.
const closedWords = "it is closed: it has no network, no token and no certificate, and does not start by itself; its instance is kept at its host for whoever looks into it"

// closes reports whether a judgement closes a VM in that phase and does not end it: a refused
// quote of one that has something to keep, in a phase in which its secrets were handed over.
func (o *Orchestrator) closes(why event.Refusal, r ledger.Reservation) bool {
	judged := why.Reason == event.QuoteRefused && reservation.Damning(why)
	handed := r.Phase == reservation.Connecting || r.Phase == reservation.Computing
	return o.conf.QuoteRefused == quoteClose && judged && handed && reservation.MayStop(r.Phase, r.Start)
}

// closesLate is closes for a judgement of a start that is over: the VM has stopped since, or is
// at a later start.
func (o *Orchestrator) closesLate(why event.Refusal, r ledger.Reservation) bool {
	return o.conf.QuoteRefused == quoteClose && why.Reason == event.QuoteRefused &&
		(r.Phase == reservation.Stopped || reservation.MayStop(r.Phase, r.Start))
}

// shut closes a VM: it is stopped, and nothing starts it but an operator, whatever was wished
// or planned before. Its host is not asked to destroy the instance until somebody asks for
// anything of the VM. It is done once for a start.
func shut(t *ledger.Tx, r ledger.Reservation, why event.Refusal) (bool, error) {
	s, err := t.Start(r.ID, r.Start)
	if err != nil || !s.Closed.IsZero() {
		return false, err
	}
	won := r.Phase == reservation.Stopped
	if won {
		err = errors.Join(t.Hold(r.ID, r.Start, why), t.Journal(event.Event{Kind: "vm.stopped", Reservation: r.ID, Reason: why.Reason,
			Detail: withFindings(map[string]string{"phase": string(r.Phase), "detail": why.Detail, "next-start": dueText(time.Time{})}, why)}))
	} else {
		r.Wish = ledger.WishNone
		won, err = halt(t, r, why)
	}
	if err != nil || !won {
		return false, err
	}
	return true, errors.Join(t.ChangeStart(r.ID, r.Start, func(s *ledger.Start) { s.Closed = t.Now }),
		t.Journal(alertEvent(r, api.Alert{Host: r.Host, Reason: why.Reason, Detail: why.Detail, Action: api.ActionClosed})))
}
