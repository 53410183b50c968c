package ledger

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"testing"

	"foothold/protocol/event"
	"foothold/protocol/token"
	"foothold/tenant/reservation"
)

// counts are the ledger's, as "source kind reason" → times.
func counts(t *testing.T, l *Ledger) map[string]int64 {
	t.Helper()
	all := map[string]int64{}
	err := l.Read(context.Background(), func(tx *Tx) error {
		list, err := tx.Refusals()
		for _, r := range list {
			all[r.Source+" "+r.Kind+" "+string(r.Reason)] = r.Count
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// TestRefusalsAreCounted: each entry with a reason counts once under it, with its
// transaction or not at all, and a restart forgets none.
func TestRefusalsAreCounted(t *testing.T) {
	c := newClock()
	file := filepath.Join(t.TempDir(), "ledger.db")
	l := openAt(t, file, c)
	tok := reserve(t, l, c, 1)
	move(t, l, c, 1, reservation.Reserved, reservation.Booting)
	for range 3 {
		l.Spend(t.Context(), present(tok, token.T1, address(1)), allow)
	}
	outside := event.Event{Source: "gateway/gateway", Kind: "admission.refused", Reason: event.CertificateRevoked}
	for range 2 { // the same event twice is one entry
		must(t, l, func(tx *Tx) error { return tx.JournalFrom(outside) })
	}
	undo := errors.New("undo")
	if err := l.Write(t.Context(), func(tx *Tx) error {
		return errors.Join(tx.Journal(event.Event{Kind: "vm.aborted", Reason: event.AuditFailed}), undo)
	}); !errors.Is(err, undo) {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = openAt(t, file, c)
	defer l.Close()
	got := counts(t, l)
	if len(got) != 2 || got["orchestrator token.rejected token-spent"] != 2 || got["gateway/gateway admission.refused certificate-revoked"] != 1 {
		t.Errorf("counted: %v", got)
	}
}

// TestInventedReasonsCountTogether: a daemon that invents reasons fills no ledger.
func TestInventedReasonsCountTogether(t *testing.T) {
	l, _ := openTest(t)
	must(t, l, func(tx *Tx) error {
		for i := range maxCounts + 50 {
			e := event.Event{Source: "gateway/gateway", Seq: int64(i), Kind: "agent.refused", Reason: event.Reason(fmt.Sprintf("invented-%d", i))}
			if err := tx.JournalFrom(e); err != nil {
				return err
			}
		}
		return tx.JournalFrom(event.Event{Source: "firewall/external", Kind: "zone.refused", Reason: event.SignatureInvalid})
	})
	got := counts(t, l)
	if len(got) != maxCounts+2 || got["gateway/gateway other other"] != 50 || got["firewall/external zone.refused signature-invalid"] != 1 {
		t.Errorf("%d counts, %d under other", len(got), got["gateway/gateway other other"])
	}
}
