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

// TestHostAuditHeldBack: a good report clears only what failed on an earlier order. One that
// was kept back while a later audit failed is stored and clears nothing; a failed one counts
// whenever it comes.
func TestHostAuditHeldBack(t *testing.T) {
	c := newClock()
	l := openAt(t, t.TempDir()+"/ledger.db", c)
	write := func(f func(*Tx) error) {
		t.Helper()
		if err := l.Write(context.Background(), f); err != nil {
			t.Fatal(err)
		}
	}
	audit := func(number, host string) HostAudit {
		return HostAudit{Number: number, Host: host, Order: []byte(`{}`), Key: []byte("k"), Answer: digest.Of([]byte("a")), Expires: c.Now().Add(time.Hour)}
	}
	for _, a := range []HostAudit{audit("f0", "host-1"), audit("e0", "host-1"), audit("d0", "host-1"), audit("c0", "host-1"), audit("b0", "host-2")} {
		write(func(tx *Tx) error { return tx.AddHostAudit(a) })
	}
	judge := func(number, host, why, want string) {
		t.Helper()
		a := audit(number, host)
		if why != "" {
			a.Failed = `[{}]`
		}
		write(func(tx *Tx) error { return tx.JudgeHostAudit(a, why) })
		var h HostState
		var stored HostAudit
		if err := l.Read(context.Background(), func(tx *Tx) (err error) {
			if stored, err = tx.HostAudit(number); err != nil {
				return err
			}
			h, err = tx.Host("host-1")
			return err
		}); err != nil {
			t.Fatal(err)
		}
		if stored.Judged.IsZero() || (stored.Failed == "") != (why == "") || h.AuditFailed != want {
			t.Errorf("%s: stored %+v, host-1 %q, want %q", number, stored, h.AuditFailed, want)
		}
	}
	judge("e0", "host-1", "the second failed", "the second failed")
	judge("f0", "host-1", "", "the second failed") // held back
	judge("b0", "host-2", "", "the second failed") // another host's
	judge("c0", "host-1", "", "")
	judge("d0", "host-1", "the third failed", "the third failed") // held back: nothing good is newer than it and came after
}
