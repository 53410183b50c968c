package ledger

import (
	"context"
	"errors"
	"testing"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/event"
)

// TestHostAuditIsJudgedOnce: an order takes one report, before it expires, and the last
// report alone is the host's standing, over whatever else changes at the host.
func TestHostAuditIsJudgedOnce(t *testing.T) {
	c := newClock()
	l := openAt(t, t.TempDir()+"/ledger.db", c)
	write := func(f func(*Tx) error) error { return l.Write(context.Background(), f) }
	order := func(number string) HostAudit {
		return HostAudit{Number: number, Host: "host-1", Order: []byte(`{}`), Key: []byte("k"), Answer: digest.Of([]byte("a")), Expires: c.Now().Add(time.Hour)}
	}
	standing := func() (h HostState) {
		t.Helper()
		if err := l.Read(context.Background(), func(tx *Tx) (err error) { h, err = tx.Host("host-1"); return err }); err != nil {
			t.Fatal(err)
		}
		return h
	}
	first, second, late := order("01"), order("02"), order("03")
	for _, a := range []HostAudit{first, second, late} {
		if err := write(func(tx *Tx) error { return tx.AddHostAudit(a) }); err != nil {
			t.Fatal(err)
		}
	}
	if err := write(func(tx *Tx) error { return tx.AddHostAudit(first) }); err == nil {
		t.Error("one number serves two orders")
	}
	first.Failed = `[{}]`
	if err := write(func(tx *Tx) error { return tx.JudgeHostAudit(first, "another TPM") }); err != nil {
		t.Fatal(err)
	}
	if err := write(func(tx *Tx) error { return tx.JudgeHostAudit(first, "") }); event.ReasonOf(err) != event.BadRequest {
		t.Errorf("judged twice: %v", err)
	}
	if err := write(func(tx *Tx) error { return tx.PutHost("host-1", HostState{Quoted: c.Now()}) }); err != nil { // a good quote
		t.Fatal(err)
	}
	if h := standing(); h.AuditFailed != "another TPM" || h.Quoted.IsZero() {
		t.Errorf("after a good quote: %+v", h)
	}
	if err := write(func(tx *Tx) error { return tx.JudgeHostAudit(second, "") }); err != nil {
		t.Fatal(err)
	}
	if h := standing(); h.AuditFailed != "" || h.Quoted.IsZero() {
		t.Errorf("after a good audit: %+v", h)
	}
	c.Add(time.Hour)
	if err := write(func(tx *Tx) error { return tx.JudgeHostAudit(late, "") }); event.ReasonOf(err) != event.BadRequest {
		t.Errorf("judged after its end: %v", err)
	}
	err := l.Read(context.Background(), func(tx *Tx) error {
		list, err := tx.HostAudits("host-1", 2)
		if err == nil && (len(list) != 2 || list[0].Number != "03" || !list[0].Judged.IsZero() || list[1].Judged.IsZero()) {
			t.Errorf("%+v", list)
		}
		if _, err := tx.HostAudit("04"); !errors.Is(err, ErrNotFound) {
			t.Errorf("an audit that was never ordered: %v", err)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
