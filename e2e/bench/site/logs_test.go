package site

import (
	"encoding/binary"
	"strings"
	"testing"

	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/pcr"
)

// TestLogsThatLie: the host's quote is genuine, and its log of the launcher, which stands in
// a lab for those of firmware and kernel, says something else than was measured.
func TestLogsThatLie(t *testing.T) {
	s := openSite(t, 1)
	h := s.hosts[0]
	gigabyte := make([]byte, 32) // TCG_PCClientPCREvent: register, type, digest, size of the data that follow
	binary.LittleEndian.PutUint32(gigabyte[28:], 1<<30)
	other := pcr.Event{PCR: pcr.Platform, Digest: digest.Of([]byte("unknown")), Name: "unknown"}
	cases := []struct {
		name string
		lie  func(*evidence.Platform)
		why  event.Reason // empty: it is good
		says string
	}{
		{"true digests under false names", func(p *evidence.Platform) {
			for i := range p.Log {
				p.Log[i].Name = "false"
			}
		}, "", ""},
		{"no log", func(p *evidence.Platform) { p.Log = nil }, event.QuoteRefused, "was not measured"},
		{"one event left out", func(p *evidence.Platform) { p.Log = p.Log[1:] }, event.QuoteRefused, "log: "},
		{"an unknown event", func(p *evidence.Platform) { p.Log = append(p.Log, other) }, event.QuoteRefused, "one more than the reference values have"},
		{"an unknown event in the place of another", func(p *evidence.Platform) { p.Log[2] = other }, event.QuoteRefused, "its reference value is"},
		{"another order", func(p *evidence.Platform) { p.Log[0], p.Log[1] = p.Log[1], p.Log[0] }, event.QuoteRefused, "was measured where"},
		{"an event of another register", func(p *evidence.Platform) { p.Log[0].PCR = 0 }, event.QuoteRefused, "for which there are no reference values"},
		{"too many events", func(p *evidence.Platform) {
			for len(p.Log) <= pcr.MaxEvents {
				p.Log = append(p.Log, other)
			}
		}, event.QuoteRefused, "entries, at most"},
		{"a million events", func(p *evidence.Platform) {
			for len(p.Log) < 1e6 {
				p.Log = append(p.Log, other)
			}
		}, event.HostRefused, ""},
		{"a firmware's event of a gigabyte", func(p *evidence.Platform) { p.Firmware = gigabyte }, event.QuoteRefused, "has no log of firmware or kernel"},
	}
	vms := reserve(t, s, len(cases))
	for i, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			h.mu.Lock()
			h.logs = func() evidence.Platform { p := h.measured(); c.lie(&p); return p }
			h.mu.Unlock()
			a := attack{t, s, vms[i], nil}
			err := a.opened("").Attest(t.Context(), s)
			if c.why == "" {
				if err != nil {
					t.Errorf("names decide: %v", err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), "403") {
				t.Errorf("no refusal of the boot server's: %v", err)
			}
			a.ended(c.why, c.says)
		})
	}
}
