package policy

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"foothold/protocol/event"
	"foothold/protocol/zone"
	"foothold/tenant/reservation"
)

var (
	now     = time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	network = Network{
		Orchestrator: netip.MustParseAddr("10.80.0.10"),
		BootServer:   netip.MustParseAddrPort("10.81.0.10:443"),
		Admission:    netip.MustParseAddrPort("10.81.0.20:8443"),
		WireGuard:    netip.MustParseAddrPort("10.81.0.20:51820"),
		Store:        netip.MustParseAddrPort("10.81.0.30:8443"),
		Lease:        time.Minute,
		Standing:     []Standing{{zone.Internal, netip.MustParsePrefix("10.81.0.10/32"), netip.MustParsePrefix("10.80.0.10/32"), "tcp", 8443}},
		Destinations: []Destination{{netip.MustParsePrefix("10.80.0.20/32"), "tcp", 80}},
		Clients:      []netip.Prefix{netip.MustParsePrefix("10.80.0.0/24")},
	}
)

const standing = "10.81.0.10/32 → 10.80.0.10/32 tcp 8443 0s"

func machine(p reservation.Phase, peer bool) VM {
	vm := VM{Reservation: "r", Start: 2, Phase: p, Deadline: now.Add(30 * time.Second), Address: netip.MustParseAddr("10.82.0.10"),
		MAC: "02:f0:0a:52:00:0a", Running: true, Port: 8080}
	if peer {
		vm.Peer = &Peer{"17", make([]byte, 32), netip.MustParseAddr("10.84.0.2")}
	}
	return vm
}

// text is a document as lines.
func text(d zone.Document) []string {
	var lines []string
	side := func(e zone.Endpoint) string {
		if e.MAC != "" {
			return e.Prefix.String() + "[" + e.MAC + "]"
		}
		return e.Prefix.String()
	}
	for _, f := range d.Flows {
		lines = append(lines, fmt.Sprintf("%s → %s %s %d %v", side(f.From), side(f.To), f.Proto, f.Port, f.TTL))
	}
	for _, p := range d.Peers {
		lines = append(lines, fmt.Sprintf("peer %s from %s quarantined=%v %v", p.Address, p.Source, p.Quarantined, p.TTL))
	}
	for _, b := range d.Boots {
		lines = append(lines, fmt.Sprintf("boots %s %v", b.Address, b.TTL))
	}
	slices.Sort(lines)
	return lines
}

// TestDocuments is the design's table of phases, zone by zone.
func TestDocuments(t *testing.T) {
	const vm, tunnel = "10.82.0.10/32[02:f0:0a:52:00:0a]", "10.84.0.2/32"
	inside := []string{tunnel + " → 10.80.0.20/32 tcp 80 30s", "10.80.0.0/24 → " + tunnel + " tcp 8080 30s"}
	type lines = map[string][]string
	cases := []struct {
		name string
		vm   VM
		want lines
	}{
		{"reserved", machine(reservation.Reserved, false), nil},
		{"booting", machine(reservation.Booting, false), lines{
			zone.External: {vm + " → 10.81.0.10/32 tcp 443 30s"}, zone.Boot: {"boots 10.82.0.10 30s"}}},
		{"booting, not started", func() VM { v := machine(reservation.Booting, false); v.Running = false; return v }(), nil},
		{"unlocking", machine(reservation.Unlocking, false), lines{
			zone.External: {"10.80.0.10/32 → " + vm + " tcp 22 30s"}, zone.Internal: {"10.80.0.10/32 → 10.82.0.10/32 tcp 22 30s"}}},
		{"connecting, not admitted", machine(reservation.Connecting, false), lines{
			zone.External: {vm + " → 10.81.0.20/32 tcp 8443 30s", vm + " → 10.81.0.20/32 udp 51820 30s"}}},
		{"connecting", machine(reservation.Connecting, true), lines{
			zone.External: {vm + " → 10.81.0.20/32 tcp 8443 30s", vm + " → 10.81.0.20/32 udp 51820 30s"},
			zone.Gateway:  {"peer 10.84.0.2 from 10.82.0.10 quarantined=true 30s"}}},
		{"computing", machine(reservation.Computing, true), lines{
			zone.External: {vm + " → 10.81.0.20/32 udp 51820 30s"},
			zone.Internal: inside,
			zone.Gateway:  append([]string{tunnel + " → 10.81.0.30/32 tcp 8443 30s", "peer 10.84.0.2 from 10.82.0.10 quarantined=false 30s"}, inside...)}},
		{"computing without workload", func() VM { v := machine(reservation.Computing, true); v.Port = 0; return v }(), lines{
			zone.External: {vm + " → 10.81.0.20/32 udp 51820 30s"},
			zone.Internal: inside[:1],
			zone.Gateway:  {inside[0], tunnel + " → 10.81.0.30/32 tcp 8443 30s", "peer 10.84.0.2 from 10.82.0.10 quarantined=false 30s"}}},
		{"released", machine(reservation.Released, true), nil},
		{"aborted", machine(reservation.Aborted, true), nil},
		{"past its deadline", func() VM { v := machine(reservation.Computing, true); v.Deadline = now; return v }(), nil},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			docs := network.Documents([]VM{c.vm}, now)
			for _, z := range []string{zone.External, zone.Internal, zone.Gateway, zone.Boot} {
				want := slices.Clone(c.want[z])
				if z == zone.Internal {
					want = append(want, standing)
				}
				slices.Sort(want)
				if got := text(docs[z]); !slices.Equal(got, want) {
					t.Errorf("%s:\n got %q\nwant %q", z, got, want)
				}
			}
		})
	}
}

// TestFlowIDs shows that ids are distinct within a document and name VM and start.
func TestFlowIDs(t *testing.T) {
	other := machine(reservation.Computing, true)
	other.Reservation = "s"
	for z, d := range network.Documents([]VM{machine(reservation.Computing, true), other}, now) {
		seen := map[string]bool{}
		for _, f := range d.Flows {
			if f.ID == "" || seen[f.ID] {
				t.Errorf("%s: id %q is empty or not unique", z, f.ID)
			}
			seen[f.ID] = true
		}
	}
}

func TestPool(t *testing.T) {
	a := func(s string) netip.Addr { return netip.MustParseAddr(s) }
	p := Pool{a("10.82.0.254"), a("10.82.1.1")}
	if err := p.Validate(netip.MustParsePrefix("10.82.0.0/16")); err != nil {
		t.Fatal(err)
	}
	if (Pool{p.Last, p.First}).Validate(netip.MustParsePrefix("10.82.0.0/16")) == nil || p.Validate(netip.MustParsePrefix("10.82.0.0/24")) == nil {
		t.Error("a wrong pool was accepted")
	}
	taken, last := map[netip.Addr]bool{}, netip.Addr{}
	for _, want := range []string{"10.82.0.254", "10.82.0.255", "10.82.1.0", "10.82.1.1"} {
		got, err := p.Pick(last, taken)
		if err != nil || got != a(want) {
			t.Fatalf("pick: %v %v, want %s", got, err, want)
		}
		taken[got], last = true, got
	}
	if _, err := p.Pick(last, taken); event.ReasonOf(err) != event.PoolEmpty {
		t.Errorf("from an empty pool: %v", err)
	}
	delete(taken, a("10.82.0.255"))
	if got, err := p.Pick(last, taken); err != nil || got != a("10.82.0.255") {
		t.Errorf("the freed one: %v %v", got, err)
	}
}

func TestSizesAndQuota(t *testing.T) {
	if s, err := SizeOf(""); err != nil || s.Name != DefaultSize {
		t.Errorf("default: %v %v", s, err)
	}
	if _, err := SizeOf("gigantic"); event.ReasonOf(err) != event.UnknownSize {
		t.Errorf("unknown size: %v", err)
	}
	q, s := Quota{2, 3000}, Size{MemoryMiB: 1000}
	for _, c := range []struct {
		vms, mem int
		ok       bool
	}{{0, 0, true}, {1, 2000, true}, {2, 2000, false}, {1, 2001, false}} {
		if err := q.Check(c.vms, c.mem, s); (err == nil) != c.ok || (err != nil && event.ReasonOf(err) != event.QuotaExceeded) {
			t.Errorf("%+v: %v", c, err)
		}
	}
	if got := MAC(netip.MustParseAddr("10.82.0.10")); got != "02:f0:0a:52:00:0a" {
		t.Errorf("MAC: %s", got)
	}
}
