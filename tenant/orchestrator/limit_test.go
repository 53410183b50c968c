package orchestrator

import (
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/protocol/upstream"
	"foothold/protocol/zone"
)

func TestLimiter(t *testing.T) {
	var l limiter
	now := time.Now()
	if !l.take("gateway", journalBurst, now) || l.take("gateway", 1, now) {
		t.Error("the burst is not what it should be")
	}
	if !l.take("bootserver", 1, now) {
		t.Error("one daemon's flood is another's")
	}
	now = now.Add(time.Second)
	if !l.take("gateway", journalSecond, now) || l.take("gateway", 1, now) {
		t.Error("a second gives another allowance")
	}
	if l.take("gateway", 1, now.Add(-time.Hour)) || !l.take("gateway", journalBurst, now.Add(time.Hour)) {
		t.Error("a clock that went back, or an hour of silence")
	}
}

// TestAFloodIsNotJournalled: a daemon that tells too much is told to come again later;
// the others, and the orchestrator's own entries, go on.
func TestAFloodIsNotJournalled(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.o.journalled.take("gateway/gateway", journalBurst, time.Now().Add(time.Minute))
	entries := func() (list []api.JournalEntry) {
		if status, _ := w.call("GET", "/v1/events", nil, &list); status != http.StatusOK {
			t.Fatalf("events: %d", status)
		}
		return list
	}
	said := func(text string) bool { return strings.Contains(fmt.Sprint(entries()), text) }
	if why := w.post(t.Context(), "gateway", upstream.PathEvents, []event.Event{{Kind: "flood.more"}}, nil); why != event.QuotaExceeded || said("flood.more") {
		t.Errorf("a flood of events: %q", why)
	}
	if why := w.post(t.Context(), "gateway", upstream.PathZoneReport, zone.Report{Zone: zone.Gateway, Epoch: 1, Error: "flood-report"}, nil); why != "" || said("flood-report") {
		t.Errorf("a flood of failures: %q", why)
	}
	if why := w.post(t.Context(), "bootserver", upstream.PathEvents, []event.Event{{Kind: "quiet.word"}}, nil); why != "" || !said("quiet.word") {
		t.Errorf("another daemon's event: %q", why)
	}
}
