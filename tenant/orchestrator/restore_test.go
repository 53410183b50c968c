package orchestrator

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// putBack replaces the orchestrator's state by a copy, as an operator would.
func (w *world) putBack(copy string) {
	w.t.Helper()
	check(w.t, os.RemoveAll(w.conf.State))
	check(w.t, os.CopyFS(w.conf.State, os.DirFS(copy)))
	check(w.t, filepath.WalkDir(w.conf.State, func(path string, e os.DirEntry, err error) error {
		if err == nil {
			mode := os.FileMode(0o600)
			if e.IsDir() {
				mode = 0o700
			}
			err = os.Chmod(path, mode)
		}
		return err
	}))
}

// TestRestoredBackup: what a copy says is open, good or running may not be; what it does
// not know may run. Nothing of either serves after a new epoch has begun.
func TestRestoredBackup(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	kept := w.take(w.create(api.CreateVM{Name: "kept"}).ID)
	kept.pass()
	first := w.take(w.create(api.CreateVM{Name: "first"}).ID) // booting, T1 open
	w.stop()
	copied := filepath.Join(t.TempDir(), "copy")
	check(t, os.CopyFS(copied, os.DirFS(w.conf.State)))
	w.start()

	// After the copy: T1 is spent, and a VM appears.
	if why := first.boot(); why != "" {
		t.Fatal(why)
	}
	late := w.create(api.CreateVM{Name: "late"})
	w.take(late.ID)
	before := w.o.zones.epoch
	if _, err := Restore(t.Context(), w.conf.State); err == nil || !strings.Contains(err.Error(), "another orchestrator") {
		t.Errorf("restored under a running orchestrator: %v", err)
	}
	w.stop()
	w.putBack(copied)
	res, err := Restore(t.Context(), w.conf.State)
	check(t, err)
	if res.Epoch <= before || res.Epoch < time.Now().Add(-time.Hour).Unix() || res.Stopped != 1 || res.Aborted != 1 {
		t.Errorf("restored: %+v", res)
	}
	w.mu.Lock()
	clear(w.docs) // the daemons take a higher epoch with a lower revision
	w.mu.Unlock()
	w.start()

	if vm := w.vm("first"); vm.Phase != string(reservation.Aborted) || vm.Reason != event.EpochBegun {
		t.Errorf("a VM on its way: %+v", vm)
	}
	if _, why := first.open(first.vm.t1); why != event.TokenExpired {
		t.Errorf("its T1, which was spent after the copy: %q", why)
	}
	if _, why := kept.say(); why == "" {
		t.Error("a start from before the epoch still speaks")
	}
	if vm := w.vm("kept"); vm.Phase != string(reservation.Stopped) || !vm.NextStart.IsZero() || vm.Reason != event.EpochBegun {
		t.Errorf("a VM that computed: %+v", vm)
	}
	w.ask("start", "kept")
	g := w.takeStart(kept.id, 2)
	g.tunnel = g.tunnel.Next()
	g.pass()
	if g.hand.Volume.Format {
		t.Error("the volume is formatted again")
	}
	w.waitGone(late.ID)
	for end := time.Now().Add(10 * time.Second); ; {
		var open bool
		check(t, w.o.ledger.Read(context.Background(), func(tx *ledger.Tx) (err error) { open, err = tx.Strangers(); return err }))
		if !open {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the hosts were not looked at")
		}
		check(t, pause(t.Context(), 20*time.Millisecond))
	}
	kinds := w.events("")
	for _, want := range []string{"epoch.begun", "vm.stranger-destroyed", "epoch.hosts-looked-at"} {
		if !slices.Contains(kinds, want) {
			t.Errorf("the journal lacks %s: %q", want, kinds)
		}
	}
	if again, err := loginKeys(w, kept.id, 1); err != nil || again {
		t.Errorf("the login key of a start that is counted again is the same: %v", err)
	}
}

// loginKeys reports whether a start has the same login key in this epoch as in the last.
func loginKeys(w *world, id string, start int) (same bool, err error) {
	now, err := w.o.loginKey(id, start)
	if err != nil {
		return false, err
	}
	w.o.zones.epoch--
	defer func() { w.o.zones.epoch++ }()
	then, err := w.o.loginKey(id, start)
	if err != nil {
		return false, err
	}
	return slices.Equal(now.PublicKey().Marshal(), then.PublicKey().Marshal()), nil
}

// TestKeyOfAReleasedVM: a creation that is late makes no key for a volume that was
// erased meanwhile.
func TestKeyOfAReleasedVM(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	g := w.take(w.create(api.CreateVM{Name: "a"}).ID)
	w.call("DELETE", "/v1/vms/a", nil, nil)
	w.waitGone(g.id)
	if err := w.o.create(t.Context(), g.id); !errors.Is(err, ledger.ErrMoved) {
		t.Errorf("the creation of a released VM: %v", err)
	}
	if has, err := w.o.vault.Has(volumeKeyName(g.vm.spec.Volume.ID)); err != nil || has {
		t.Errorf("its volume has a key again: %v", err)
	}
}
