package ruleset

import (
	"net/netip"
	"testing"
	"time"

	"foothold/internal/nflog"
	"foothold/protocol/event"
)

// TestFloodStaysSmall: however many packets are dropped, the journal gets a bounded
// number of events, the most frequent kinds first, and is told what was not counted.
func TestFloodStaysSmall(t *testing.T) {
	var told []event.Event
	c := newDropCounter(func(e event.Event) { told = append(told, e) }, func(int) string { return "vpc0" })
	packet := func(port uint16) nflog.Packet {
		return nflog.Packet{Prefix: "forward", Src: netip.MustParseAddr("10.82.0.200"), Dst: netip.MustParseAddr("10.81.0.10"), Proto: 6, DstPort: port}
	}
	for port := range uint16(maxKinds + 100) {
		c.count(packet(port + 1))
	}
	for range 1000 {
		c.count(packet(22))
	}
	now := time.Now()
	c.flush(now)
	if len(told) != maxPerFlush+1 {
		t.Fatalf("%d events, want %d and one for the rest", len(told), maxPerFlush)
	}
	if d := told[0].Detail; told[0].Kind != kindDropped || d["port"] != "22" || d["packets"] != "1001" || d["from"] != "10.82.0.200" || d["interface"] != "vpc0" {
		t.Errorf("the most frequent: %+v", told[0])
	}
	for _, e := range told {
		if e.Reason != event.TrafficRefused {
			t.Errorf("told without its reason: %+v", e)
		}
	}
	if d := told[maxPerFlush].Detail; d["packets"] != "100" || d["rule"] != "various" {
		t.Errorf("the rest: %+v", d)
	}
	told = nil
	c.count(packet(22))
	c.flush(now.Add(time.Second))
	for _, e := range told {
		if e.Detail["port"] == "22" {
			t.Error("the same kind is told again at once")
		}
	}
	told = nil
	c.unseen(0, 0)
	c.unseen(7, 2)
	c.unseen(0, 2)
	if len(told) != 1 || told[0].Kind != kindUnseen || told[0].Detail["packets"] != "7" || told[0].Detail["overflows"] != "2" {
		t.Errorf("what was not counted: %+v", told)
	}
}
