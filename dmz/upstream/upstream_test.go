package upstream_test

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"foothold/dmz/upstream"
	"foothold/dmz/upstream/upstreamtest"
	"foothold/internal/mtls"
	"foothold/protocol/event"
	"foothold/protocol/signed"
	wire "foothold/protocol/upstream"
	"foothold/protocol/zone"
)

// target remembers what it was told to be.
type target struct {
	mu      sync.Mutex
	applied []*upstream.State
	fail    int // next calls of Apply that fail
}

func (f *target) Apply(_ context.Context, s *upstream.State) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail > 0 {
		f.fail--
		return errors.New("kernel says no")
	}
	f.applied = append(f.applied, s)
	return nil
}

func (f *target) Reread() error { return nil }

func (f *target) Live() ([]zone.Live, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.applied) == 0 {
		return nil, nil
	}
	return []zone.Live{{ID: strconv.FormatInt(f.applied[len(f.applied)-1].Document.Revision, 10)}}, nil
}

func (f *target) states() []*upstream.State {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]*upstream.State(nil), f.applied...)
}

func listen(t *testing.T, addr string) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func start(t *testing.T) (*upstreamtest.Orchestrator, *upstream.Client) {
	t.Helper()
	o := upstreamtest.New(t)
	o.Serve(listen(t, "127.0.0.1:0"))
	c, err := upstream.New(o.Config(mtls.Firewall, "external"))
	if err != nil {
		t.Fatal(err)
	}
	return o, c
}

// watch runs a watcher until stop.
func watch(t *testing.T, c *upstream.Client, dir string, f *target) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ev := upstream.NewEvents(c)
	w, err := upstream.NewWatcher(ctx, c, ev, zone.External, dir, f)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() { ev.Run(ctx) })
	wg.Go(func() { w.Run(ctx) })
	return func() { cancel(); wg.Wait() }
}

func doc(epoch, revision int64) zone.Document {
	return zone.Document{Zone: zone.External, Epoch: epoch, Revision: revision, Lease: time.Minute}
}

func reported(epoch, revision int64) func(zone.Report) bool {
	return func(r zone.Report) bool {
		return r.Epoch == epoch && r.Revision == revision && r.Error == "" && len(r.Live) == 1 && r.Live[0].ID == strconv.FormatInt(revision, 10)
	}
}

func refused(why string) func(event.Event) bool {
	reason := event.ZoneRefused
	if why == "signature" {
		reason = event.SignatureInvalid
	}
	return func(e event.Event) bool {
		return e.Kind == "zone.refused" && e.Detail["why"] == why && e.Reason == reason
	}
}

func TestDocumentsApplyInOrderAndNeverBack(t *testing.T) {
	o, c := start(t)
	f := &target{fail: 1}
	defer watch(t, c, t.TempDir(), f)()
	o.Publish(doc(1, 5))
	o.WaitReport("failure", func(r zone.Report) bool { return r.Revision == 5 && r.Error != "" })
	o.WaitReport("revision 5, tried again", reported(1, 5))
	o.Publish(doc(1, 4))
	o.WaitEvent("refusal of a lower revision", refused("rollback"))
	other := doc(1, 5)
	other.Lease = time.Hour
	o.Publish(other)
	o.WaitEvent("refusal of another document of the same revision", refused("rollback"))
	o.Publish(doc(2, 1))
	o.WaitReport("new epoch", reported(2, 1))
	o.Publish(doc(1, 99))
	o.WaitEvent("refusal of an older epoch", refused("rollback"))
	if got := f.states(); len(got) != 2 {
		t.Errorf("%d documents applied, want 2", len(got))
	}
}

func TestDocumentsOfOthersAreRefused(t *testing.T) {
	_, stranger, _ := ed25519.GenerateKey(rand.Reader)
	payload, _ := json.Marshal(doc(1, 1))
	wrongZone := doc(1, 1)
	wrongZone.Zone = zone.Internal
	for why, publish := range map[string]func(*upstreamtest.Orchestrator){
		"signature": func(o *upstreamtest.Orchestrator) {
			o.PublishEnvelope(signed.Seal(stranger, signed.Zone, payload))
		},
		"form": func(o *upstreamtest.Orchestrator) { o.Publish(wrongZone) },
	} {
		t.Run(why, func(t *testing.T) {
			o, c := start(t)
			f := &target{}
			defer watch(t, c, t.TempDir(), f)()
			publish(o)
			o.WaitEvent(why, refused(why))
			if len(f.states()) != 0 {
				t.Error("applied")
			}
		})
	}
	t.Run("label", func(t *testing.T) {
		o, c := start(t)
		f := &target{}
		defer watch(t, c, t.TempDir(), f)()
		o.PublishEnvelope(signed.Seal(o.ZoneKey, signed.Manifest, payload))
		o.WaitEvent("label", refused("signature"))
		if len(f.states()) != 0 {
			t.Error("applied")
		}
	})
}

func TestRestartKeepsDocumentTimeAndWatermark(t *testing.T) {
	o, c := start(t)
	dir := t.TempDir()
	first := &target{}
	stop := watch(t, c, dir, first)
	o.Publish(doc(1, 7))
	o.WaitReport("revision 7", reported(1, 7))
	stop()
	received := first.states()[0].Received

	second := &target{}
	stop = watch(t, c, dir, second)
	got := second.states()
	if len(got) != 1 || got[0].Document.Revision != 7 || got[0].Received != received || got[0].Until(0) != received+time.Minute {
		t.Fatalf("after a restart: %+v", got)
	}
	o.Publish(doc(1, 6))
	o.WaitEvent("refusal after a restart", refused("rollback"))
	stop()

	// Another start of the machine: its clock says nothing about the old time.
	file := filepath.Join(dir, "zone.json")
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var s map[string]json.RawMessage
	if err := json.Unmarshal(data, &s); err != nil {
		t.Fatal(err)
	}
	s["boot"] = json.RawMessage(`"11111111-2222-4333-8444-555555555555"`)
	data, _ = json.Marshal(s)
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	third := &target{}
	defer watch(t, c, dir, third)()
	got = third.states()
	if len(got) != 1 || got[0].Until(time.Hour) > upstream.Boottime() {
		t.Fatalf("after a reboot: %+v", got)
	}
}

func TestTamperedStateStopsTheDaemon(t *testing.T) {
	o, c := start(t)
	dir := t.TempDir()
	stop := watch(t, c, dir, &target{})
	o.Publish(doc(1, 7))
	o.WaitReport("revision 7", reported(1, 7))
	stop()
	file := filepath.Join(dir, "zone.json")
	data, _ := os.ReadFile(file)
	for name, bad := range map[string][]byte{"cut": data[:len(data)-4], "empty": {}, "other key": nil} {
		if bad == nil {
			_, stranger, _ := ed25519.GenerateKey(rand.Reader)
			payload, _ := json.Marshal(doc(1, 8))
			var s map[string]any
			_ = json.Unmarshal(data, &s)
			s["envelope"] = signed.Seal(stranger, signed.Zone, payload)
			bad, _ = json.Marshal(s)
		}
		if err := os.WriteFile(file, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := upstream.NewWatcher(t.Context(), c, upstream.NewEvents(c), zone.External, dir, &target{}); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestOutageIsSurvived(t *testing.T) {
	o, c := start(t)
	f := &target{}
	defer watch(t, c, t.TempDir(), f)()
	o.Publish(doc(1, 1))
	o.WaitReport("revision 1", reported(1, 1))
	o.Stop()
	o.Publish(doc(1, 2))
	o.Serve(listen(t, o.Address.String()))
	o.WaitReport("revision 2 after the outage", reported(1, 2))
}

func TestRefusalKeepsItsReason(t *testing.T) {
	o, c := start(t)
	o.Open = func(wire.OpenRequest) (wire.OpenResponse, error) {
		return wire.OpenResponse{}, event.Refuse(event.TokenSpent, "second presentation")
	}
	_, err := c.BootOpen(t.Context(), wire.OpenRequest{})
	if got := event.ReasonOf(err); got != event.TokenSpent {
		t.Errorf("reason %q of %v", got, err)
	}
	if err := c.BootDone(t.Context(), wire.DoneRequest{}); err == nil {
		t.Error("a call without an answer succeeded")
	}
}

func TestEventsComeInOrderOnceAndCounted(t *testing.T) {
	o, c := start(t)
	ev := upstream.NewEvents(c)
	const many = 9000 // more than the queue holds while nobody sends
	for range many {
		ev.Emit(event.Event{Kind: "test.made"})
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go ev.Run(ctx)
	dropped := o.WaitEvent("count of lost events", func(e event.Event) bool { return e.Kind == "events.dropped" })
	all := o.Events()
	for i, e := range all {
		if e.Seq != int64(i+1) || e.Source != "firewall/external" {
			t.Fatalf("event %d: %+v", i, e)
		}
	}
	lost, _ := strconv.Atoi(dropped.Detail["count"])
	if len(all)-1+lost != many {
		t.Errorf("%d came, %d said to be lost, of %d", len(all)-1, lost, many)
	}
}

// An event that the journal will not take holds up no other, and long text is cut.
func TestRefusedEventsAreGivenUpAlone(t *testing.T) {
	o, c := start(t)
	o.Take = func(batch []event.Event) error {
		for _, e := range batch {
			if e.Kind == "bad" || len(e.Detail["text"]) > 512 {
				return event.Refuse(event.BadRequest, "malformed")
			}
		}
		return nil
	}
	ev := upstream.NewEvents(c)
	for _, kind := range []string{"first", "bad", "bad", "last"} {
		ev.Emit(event.Event{Kind: kind, Detail: map[string]string{"text": strings.Repeat("x", 2000)}})
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go ev.Run(ctx)
	o.WaitEvent("count of what was given up", func(e event.Event) bool { return e.Kind == "events.dropped" })
	var got []string
	for _, e := range o.Events() {
		got = append(got, e.Kind)
	}
	if last := got[len(got)-2]; last != "last" || slices.Contains(got, "bad") {
		t.Errorf("taken: %v", got)
	}
}
