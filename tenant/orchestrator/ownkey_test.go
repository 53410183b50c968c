package orchestrator

import (
	"bytes"
	"testing"

	"foothold/internal/tpm"
	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/tenant/reservation"
)

// TestOwnSessionKey: the host's TPM takes our key before a VM starts there, the boot server
// is told to use it, and it stays the same over a restart; a host that does not take it
// gets no VM.
func TestOwnSessionKey(t *testing.T) {
	w := newWorld(t, roomy, func(c *Config) { c.OwnSessionKey = true })
	w.template("debian")
	open := func(name string) []byte {
		g := w.take(w.create(api.CreateVM{Name: name}).ID)
		opened, why := g.open(g.vm.t1)
		if why != "" {
			t.Fatal(why)
		}
		pub, err := tpm.ParsePublic(opened.Session)
		if err != nil || tpm.CheckMigrated(pub) != nil || !opened.Own {
			t.Fatalf("the boot server is given %x as own key (%v): %v", opened.Session, opened.Own, err)
		}
		if taken := w.host.sessionKey(); !bytes.Equal(taken, opened.Session) {
			t.Errorf("the host's TPM has %x, the boot server is given %x", taken, opened.Session)
		}
		if why := g.attest(opened); why != "" {
			t.Errorf("attest: %s", why)
		}
		return opened.Session
	}
	first := open("one")
	w.stop()
	w.start()
	if second := open("two"); !bytes.Equal(first, second) {
		t.Error("another key after a restart")
	}
	w.host.failing("PUT /v1/session-key", 100)
	vm := w.create(api.CreateVM{Name: "three"})
	if got := w.waitPhase(vm.ID, reservation.Aborted); got.Reason != event.HostRefused {
		t.Errorf("a host that does not take the key: %s", got.Reason)
	}
}

// TestTheInventorysKeyIsTheDefault: without a wish for it, nobody is given a key.
func TestTheInventorysKeyIsTheDefault(t *testing.T) {
	w := newWorld(t)
	w.template("debian")
	g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
	opened, why := g.open(g.vm.t1)
	if why != "" || opened.Own || !bytes.Equal(opened.Session, w.host.entry.Session) || w.host.sessionKey() != nil {
		t.Errorf("%s, own %v, %x", why, opened.Own, opened.Session)
	}
	if has, err := w.o.vault.Has(sessionKeyName); err != nil || has {
		t.Errorf("a session key was made: %v, %v", has, err)
	}
}
