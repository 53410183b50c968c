package orchestrator

import (
	"testing"
	"time"

	"foothold/protocol/event"
	"foothold/protocol/hostapi"
)

// TestDroppedFramesAreJournalled: what a host's bridge drops of a VM comes to its tenant's
// journal with the VM, once for each look that finds more, and the rest with the VM's end.
func TestDroppedFramesAreJournalled(t *testing.T) {
	w := newWorld(t)
	w.template("debian")
	loud, quiet := w.take(w.createNever("loud")), w.take(w.createNever("quiet"))
	look := func() { w.o.lookElsewhere(t.Context(), map[[2]string]bool{}) }
	expect := func(when string, want int, source, neighbour string) {
		t.Helper()
		list := w.journal(bridgeDropped)
		if len(list) != want {
			t.Fatalf("%s: %d entries, want %d: %+v", when, len(list), want, list)
		}
		if n := w.counted(bridgeDropped, event.TrafficRefused); n != int64(want) {
			t.Errorf("%s: counted %d times", when, n)
		}
		for _, e := range list {
			if e.Reservation != loud.id || e.Reason != event.TrafficRefused || e.Detail["host"] != "host-1" || e.Detail["start"] != "1" {
				t.Errorf("%s: %+v", when, e)
			}
			if e.Detail["other-source"] == source && e.Detail["neighbour"] == neighbour {
				source, neighbour = "", ""
			}
		}
		if source != "" {
			t.Errorf("%s: no entry of %s and %s frames: %+v", when, source, neighbour, list)
		}
	}
	look()
	expect("nothing is dropped", 0, "", "")
	w.host.drop(loud.id, hostapi.Dropped{OtherSource: 7})
	for range 3 {
		look()
	}
	expect("looked at three times", 1, "7", "0")
	w.host.drop(loud.id, hostapi.Dropped{OtherSource: 7, Neighbour: 40_000})
	look()
	expect("more is dropped", 2, "7", "40000")
	w.host.drop(loud.id, hostapi.Dropped{OtherSource: 9, Neighbour: 40_000})
	for _, name := range []string{"loud", "quiet"} {
		w.call("DELETE", "/v1/vms/"+name, nil, nil)
	}
	w.waitGone(quiet.id)
	for end := time.Now().Add(10 * time.Second); len(w.journal("vm.erased")) < 2; pause(t.Context(), 10*time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the VMs are not erased")
		}
	}
	expect("they have ended", 3, "9", "40000")
	look()
	expect("looked at once more", 3, "9", "40000")
}

// TestDroppedFramesAreToldLater: what finds no room among a host's entries is told by a later look.
func TestDroppedFramesAreToldLater(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	loud := w.take(w.createNever("loud"))
	w.o.journalled.take("host/host-1", journalBurst, time.Now().Add(time.Minute))
	w.host.drop(loud.id, hostapi.Dropped{OtherSource: 7})
	look := func() { w.o.lookElsewhere(t.Context(), map[[2]string]bool{}) }
	look()
	if list := w.journal(bridgeDropped); len(list) != 0 {
		t.Fatalf("without room: %+v", list)
	}
	w.o.journalled.mu.Lock()
	delete(w.o.journalled.spent, "host/host-1")
	w.o.journalled.mu.Unlock()
	for range 2 {
		look()
	}
	if list := w.journal(bridgeDropped); len(list) != 1 || list[0].Detail["other-source"] != "7" {
		t.Errorf("with room: %+v", list)
	}
}
