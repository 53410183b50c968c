package orchestrator

import (
	"fmt"
	"slices"
	"testing"

	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// TestRestartWhileCreating: an orchestrator that dies between asking for a VM and hearing
// that it runs asks again when it is back, with another T1; what the host has under the
// former one is destroyed, and that T1 serves nobody. It does not matter which of its
// calls the host had carried out.
func TestRestartWhileCreating(t *testing.T) {
	for _, pattern := range []string{"POST /v1/vms", "POST /v1/vms/{id}/start"} {
		for _, done := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s done=%v", pattern, done), func(t *testing.T) {
				t.Parallel()
				w := newWorld(t)
				w.template("debian")
				came := w.host.muteNext(pattern, done)
				vm := w.create(api.CreateVM{Name: "web"})
				<-came
				before, there := w.host.get(vm.ID)
				w.restart()
				g := w.take(vm.ID)
				if there && (g.vm.t1.Digest() == before.t1.Digest() || g.vm.Created.Equal(before.Created)) {
					t.Error("the former instance was taken over")
				}
				w.fits("created again")
				g.pass()
				w.fits("computing")
				if there {
					if _, why := (&guest{w: w, id: g.id, vm: before, key: g.key}).open(before.t1); why != event.TokenExpired {
						t.Errorf("the former T1: %q", why)
					}
				}
				if kinds := w.events(vm.ID); !slices.Contains(kinds, "vm.create-asked-again") {
					t.Errorf("journal: %q", kinds)
				}
			})
		}
	}
}

// TestRestartWithAWish: a wish that was stored right before a crash is carried out.
func TestRestartWithAWish(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
	check(t, w.o.ledger.Write(t.Context(), func(tx *ledger.Tx) error { return tx.SetWish(g.id, 1, ledger.WishStop) }))
	w.restart()
	if vm := w.waitPhase("web", reservation.Stopped); vm.Reason != event.StopAsked || !vm.NextStart.IsZero() {
		t.Errorf("ended as %+v", vm)
	}
	w.waitGone(g.id)
	w.fits("stopped")
}
