package ledger

import (
	"errors"
	"testing"

	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/token"
	"foothold/tenant/reservation"
)

// TestSurvey: what is open is in it while it is, and what has ended is not.
func TestSurvey(t *testing.T) {
	l, c := openTest(t)
	tok := reserve(t, l, c, 1)
	move(t, l, c, 1, reservation.Reserved, reservation.Booting)
	must(t, l, func(tx *Tx) error {
		_, err := tx.NewNonce(identifier(1), 1, "boot")
		return errors.Join(err, tx.BeginPart(identifier(1), 1, "creating"), tx.AddObject(digest.Of([]byte("kernel")), 6),
			tx.AddCertificate(Certificate{Serial: "7", Reservation: identifier(1), Start: 1, DER: []byte("der"), Expires: c.In(600)}))
	})
	survey := func() (s Survey) {
		t.Helper()
		must(t, l, func(tx *Tx) (err error) { s, err = tx.Survey(); return err })
		return s
	}
	s := survey()
	key := StartKey{identifier(1), 1}
	if len(s.Reservations) != 1 || len(s.Starts) != 1 || s.Starts[0] != key || len(s.Latest) != 1 {
		t.Errorf("reservations and starts: %+v", s)
	}
	if len(s.Open) != 2 || s.Open[0] != (OpenPhase{key, "booting"}) || s.Open[1] != (OpenPhase{key, "creating"}) {
		t.Errorf("open phases: %+v", s.Open)
	}
	if len(s.Tokens) != 1 || s.Tokens[0].Digest != tok.Digest() || s.Tokens[0].Kind != token.T1 || s.Tokens[0].Phase != reservation.Booting {
		t.Errorf("open tokens: %+v", s.Tokens)
	}
	if len(s.Certificates) != 1 || s.Certificates[0].Serial != "7" || !s.Certificates[0].Expires.Equal(c.In(600)) {
		t.Errorf("certificates: %+v", s.Certificates)
	}
	if len(s.Nonces) != 1 || s.Nonces[0] != (NonceCount{key, 1, 0}) || len(s.Objects) != 1 || s.Objects[0] != digest.Of([]byte("kernel")) {
		t.Errorf("nonces %+v, objects %+v", s.Nonces, s.Objects)
	}
	must(t, l, func(tx *Tx) error {
		_, err := tx.End(identifier(1), reservation.Aborted, event.Refusal{Reason: event.VMStopped})
		return err
	})
	if s = survey(); len(s.Open) != 0 || len(s.Tokens) != 0 || len(s.Certificates) != 0 || len(s.Reservations) != 1 {
		t.Errorf("after the end: %+v", s)
	}
	must(t, l, func(tx *Tx) error {
		n, err := tx.change("harm", `DELETE FROM starts`)
		if n != 1 {
			t.Errorf("%d starts deleted", n)
		}
		return err
	})
	if s = survey(); len(s.Latest) != 0 || len(s.Starts) != 0 {
		t.Errorf("without the start's row: %+v", s)
	}
}

func TestLastEntry(t *testing.T) {
	l, c := openTest(t)
	reserve(t, l, c, 1)
	first := c.Now()
	for _, kind := range []string{"vm.aborted", "vm.gone"} {
		must(t, l, func(tx *Tx) error { return tx.Journal(event.Event{Kind: kind, Reservation: identifier(1)}) })
		c.Add(1)
	}
	must(t, l, func(tx *Tx) error {
		return tx.JournalFrom(event.Event{Seq: 1, Time: c.Now(), Source: "gateway/gateway", Kind: "vm.aborted", Reservation: identifier(1)})
	})
	must(t, l, func(tx *Tx) error {
		at, err := tx.LastEntry(identifier(1), "vm.released", "vm.aborted")
		none, err2 := tx.LastEntry(identifier(1), "vm.stopped")
		if !at.Equal(first) || !none.IsZero() {
			t.Errorf("found %v and %v, want %v and none", at, none, first)
		}
		return errors.Join(err, err2)
	})
}
