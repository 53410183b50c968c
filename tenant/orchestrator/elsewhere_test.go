package orchestrator

import (
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/protocol/hostapi"
	"foothold/tenant/reservation"
)

// list puts a copy of another host's VM into this host's listing.
func (h *fakeHost) list(v hostedVM) {
	h.mu.Lock()
	defer h.mu.Unlock()
	v.Host = h.entry.Name
	h.vms[v.ID] = &v
}

func (w *world) createNever(name string) string {
	w.t.Helper()
	return w.create(api.CreateVM{Name: name, Restart: string(reservation.Never)}).ID
}

// TestVMSeenElsewhere: a VM that another host lists, running or stopped there, is ended and
// told of; the copy and the VM are destroyed; the other VMs of both hosts go on.
func TestVMSeenElsewhere(t *testing.T) {
	w := newWorld(t)
	second := w.addHost("host-2")
	w.listEvery = 100 * time.Millisecond
	w.restart()
	w.template("debian") // at host-1 alone
	stays, moves := w.computing("stays"), w.take(w.createNever("moves"))
	w.publish(2, w.host.entry, second.entry)
	copied := moves.vm
	copied.State = hostapi.Stopped
	second.list(copied)
	stranger := moves.vm
	stranger.ID = "1b6c2f4e-5a7d-4c1b-9e57-3d2a8f60c911"
	second.list(stranger)
	vm := w.waitPhase("moves", reservation.Aborted)
	if vm.Reason != event.VMMoved || !strings.Contains(vm.Explanation, "host host-2 lists it, its own is host-1") {
		t.Errorf("%q: %s", vm.Reason, vm.Explanation)
	}
	w.waitGone(moves.id)
	for end := time.Now().Add(10 * time.Second); second.has(moves.id); pause(t.Context(), 10*time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the copy is still there")
		}
	}
	if !slices.Contains(w.events("moves"), "vm.moved") {
		t.Errorf("events: %v", w.events("moves"))
	}
	if vm := w.vm("stays"); vm.Phase != string(reservation.Computing) || !w.host.has(stays.id) {
		t.Errorf("the other VM is %s", vm.Phase)
	}
	if !second.has(stranger.ID) {
		t.Error("a VM that the ledger does not know was destroyed, which is an operator's to decide")
	}
}

// TestCopyThatStays: a host that keeps the copy is asked again, and told of once.
func TestCopyThatStays(t *testing.T) {
	w := newWorld(t)
	second := w.addHost("host-2")
	w.restart()
	w.template("debian")
	moves := w.take(w.createNever("moves"))
	w.publish(2, w.host.entry, second.entry)
	second.mu.Lock()
	second.undead = true
	second.mu.Unlock()
	second.list(moves.vm)
	told := map[[2]string]bool{}
	for range 3 {
		w.o.lookElsewhere(t.Context(), told)
	}
	if got := w.count("moves", "vm.moved"); got != 1 {
		t.Errorf("told of %d times", got)
	}
	second.mu.Lock()
	second.undead = false
	second.mu.Unlock()
	w.o.lookElsewhere(t.Context(), told)
	if second.has(moves.id) {
		t.Error("the copy was not destroyed at the next look")
	}
}
