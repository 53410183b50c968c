package store

import (
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"

	"foothold/dmz/upstream/upstreamtest"
	"foothold/internal/mtls"
	"foothold/internal/nstest"
	"foothold/protocol/digest"
	"foothold/protocol/event"
)

const reservation = "1b6c2f4e-5a7d-4c1b-9e57-3d2a8f60c911"

// TestRefusalsAreJournalled: each thing that the store refuses comes to the journal once,
// under its own reason, with who asked; of a VM with its reservation. What is served, and
// what is not there, does not.
func TestRefusalsAreJournalled(t *testing.T) {
	w := newWorld(t)
	object := "/v1/objects/" + digest.Of([]byte("right")).String()
	vm := mtls.Identity{Role: mtls.VM, Name: reservation}
	daemon := func(role string) mtls.Identity { return mtls.Identity{Role: role, Name: "x"} }
	const call, tls = "store.refused", "tls.refused"
	tries := []struct {
		name         string
		ca           *upstreamtest.CA
		who          mtls.Identity
		method, path string
		body         string
		status       int
		kind         string
		reason       event.Reason
		says         string // detail or cause
		reservation  string
	}{
		{"a VM that stores", w.vms, vm, "PUT", object, "right", 403, call, event.NotPermitted, "its role", reservation},
		{"a boot server that stores", w.dmz, daemon(mtls.BootServer), "PUT", object, "right", 403, call, event.NotPermitted, "its role", ""},
		{"other content", w.dmz, daemon(mtls.Orchestrator), "PUT", object, "wrong", 422, call, event.DigestMismatch, "content", ""},
		{"no digest to store", w.dmz, daemon(mtls.Orchestrator), "PUT", "/v1/objects/x", "right", 400, call, event.BadRequest, "no SHA-256", ""},
		{"no digest to get", w.vms, vm, "GET", "/v1/objects/x", "", 404, call, event.BadRequest, "no SHA-256", reservation},
		{"no such call", w.vms, vm, "DELETE", object, "", 404, call, event.BadRequest, "no such call", reservation},
		{"another role", w.dmz, daemon(mtls.Firewall), "GET", object, "", 0, tls, event.NotPermitted, "may not call here", ""},
		{"another authority", upstreamtest.NewCA(t, "other"), vm, "GET", object, "", 0, tls, event.NotPermitted, "certificate", ""},
		{"a VM of the DMZ's authority", w.dmz, vm, "GET", object, "", 0, tls, event.NotPermitted, "not of the authority for its role", ""},
		{"what is not there", w.dmz, daemon(mtls.Gateway), "GET", object, "", 404, "", "", "", ""},
		{"what is right", w.dmz, daemon(mtls.Orchestrator), "PUT", object, "right", 201, "", "", "", ""},
		{"what is there", w.vms, vm, "GET", object, "", 200, "", "", "", ""},
		// Of another caller than all others: once it is told, they are.
		{"the last", w.dmz, daemon(mtls.Gateway), "DELETE", object, "", 404, call, event.BadRequest, "no such call", ""},
	}
	want := 0
	for _, c := range tries {
		if status, _ := w.callAs(c.ca, c.who, c.method, c.path, strings.NewReader(c.body)); status != c.status {
			t.Errorf("%s: status %d, want %d", c.name, status, c.status)
		}
		if c.kind != "" {
			want++
		}
	}
	for _, c := range tries {
		if c.kind == "" {
			continue
		}
		w.orch.WaitEvent(c.name, func(e event.Event) bool {
			return e.Kind == c.kind && e.Reason == c.reason && e.Reservation == c.reservation && e.Source == "store/store" && e.Detail["count"] == "1" &&
				strings.Contains(e.Detail["detail"]+e.Detail["why"], c.says) && (c.kind == tls || e.Detail["by"] == c.who.String())
		})
	}
	if list := w.refusals(); len(list) != want {
		t.Errorf("%d refusals are told as %+v", want, list)
	}
}

// TestDiskFull: an object that would leave the disk without reserve is refused, and leaves nothing.
func TestDiskFull(t *testing.T) {
	disk := nstest.SmallDisk(t, "size=1m")
	w := newWorldIn(t, disk.Path)
	if status, _ := w.call(w.dmz, mtls.Orchestrator, "PUT", "/v1/objects/"+digest.Of([]byte("right")).String(), strings.NewReader("right")); status != http.StatusInsufficientStorage {
		t.Errorf("status %d", status)
	}
	w.orch.WaitEvent("refusal", func(e event.Event) bool { return e.Kind == "store.refused" && e.Reason == event.DiskFull })
	if left, err := os.ReadDir(disk.Path); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// refusals are those that came to the journal, in their order.
func (w *world) refusals() (list []event.Event) {
	for _, e := range w.orch.Events() {
		if strings.HasSuffix(e.Kind, ".refused") {
			list = append(list, e)
		}
	}
	return list
}

// TestAFloodOfRefusalsStaysSmall: all are counted, few are told.
func TestAFloodOfRefusalsStaysSmall(t *testing.T) {
	r := newRefusals()
	const callers, each = 3 * maxKinds, 50
	for i := range callers {
		for range each {
			r.count(mtls.Identity{Role: mtls.VM, Name: fmt.Sprintf("%s%03d", reservation[:33], i)}, refusal{call: http.MethodPut, reason: event.NotPermitted})
		}
	}
	events, counted := 0, 0
	for k, n := range r.Take() {
		e := k.event(n)
		told, err := strconv.Atoi(e.Detail["count"])
		if err != nil || e.Reason != event.NotPermitted {
			t.Errorf("%+v", e)
		}
		events, counted = events+1, counted+told
	}
	if counted != callers*each || events > maxKinds+1 {
		t.Errorf("%d refusals became %d in %d events", callers*each, counted, events)
	}
	if again := r.Take(); len(again) != 0 {
		t.Errorf("told twice: %+v", again)
	}
}
