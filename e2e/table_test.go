//go:build system

package e2e

import (
	"net/netip"
	"slices"

	"foothold/lab"
	"foothold/protocol/api"
)

// This file is the table "phase → traffic allowed" of docs/boot-story.md, and every
// packet that is tried against it.

// The phases that rows are of. Before a VM is created and after its end no phase is on.
const (
	booting    = "booting"
	unlocking  = "unlocking"
	connecting = "connecting"
	computing  = "computing"
	always     = "always" // a standing flow between daemons
)

// rule is one row's permission: a kind of sender may reach a port of a receiver.
type rule struct {
	from, to, proto string
	port            uint16
	phases          []string
	// must: the packet has to arrive at least once in each of the phases, or a firewall
	// that passes nothing would look good.
	must bool
}

var table = []rule{
	{"vm", "bootserver", "tcp", 443, []string{booting}, true},
	{"tenant", "vm", "tcp", 22, []string{unlocking}, true},
	{"vm", "gateway", "tcp", 8443, []string{connecting}, true},
	{"vm", "gateway", "udp", 51820, []string{connecting, computing}, true},
	{"tunnel", "intranet", "tcp", 80, []string{computing}, true},
	{"tenant", "tunnel", "tcp", 8080, []string{computing}, true},
	{"intranet", "tunnel", "tcp", 8080, []string{computing}, false}, // workload's clients are the tenant's network

	{"bootserver", "tenant", "tcp", 8443, []string{always}, true},
	{"gateway", "tenant", "tcp", 8443, []string{always}, true},
	{"store", "tenant", "tcp", 8443, []string{always}, true},
	{"tenant", "host", "tcp", 8443, []string{always}, true},
	{"tenant", "store", "tcp", 8443, []string{always}, true},
}

// allowed reports whether the table lets the attempt pass in one of the phases.
func (a attempt) allowed(phases []string) bool {
	if a.never {
		return false
	}
	for _, r := range table {
		if r.matches(a) && (slices.Contains(r.phases, always) || slices.ContainsFunc(phases, func(p string) bool { return slices.Contains(r.phases, p) })) {
			return true
		}
	}
	return false
}

func (r rule) matches(a attempt) bool {
	return r.from == a.from && r.to == a.to && r.proto == a.proto && r.port == a.dport
}

// attempt is one packet tried in every round.
type attempt struct {
	from, to, proto string
	sport, dport    uint16
	never           bool   // no phase lets it pass, whatever the table says of from and to
	how             string // for people, when the sender is not what it seems
	place           string // that sends it
	forged          *forged
}

// forged is how a sender that is not what it seems looks on the link.
type forged struct {
	iface, mac string // interface and sender's address
	src        netip.Addr
	to         string // the firewall that receives it; "" is the external one
}

func (a attempt) String() string {
	text := a.from + " → " + a.to + " " + a.proto
	if a.dport != 0 {
		text += " " + portText(a.dport)
	}
	if a.sport != sourcePort {
		text += " from port " + portText(a.sport)
	}
	if a.how != "" {
		text += " (" + a.how + ")"
	}
	return text
}

// sourcePort is that of probes that do not pose as an answer.
const sourcePort = 40404

// ports that are tried at each receiver: its services, and others.
var ports = map[string][]struct {
	proto string
	port  uint16
}{
	"vm":         {{"tcp", 22}, {"tcp", 80}, {"tcp", 443}, {"tcp", 8080}, {"tcp", 8443}, {"udp", 53}, {"udp", 51820}, {"icmp", 0}},
	"bootserver": {{"tcp", 22}, {"tcp", 443}, {"tcp", 8443}, {"udp", 443}, {"icmp", 0}},
	"gateway":    {{"tcp", 22}, {"tcp", 443}, {"tcp", 8443}, {"udp", 53}, {"udp", 51820}, {"icmp", 0}},
	"store":      {{"tcp", 22}, {"tcp", 8443}, {"icmp", 0}},
	"tenant":     {{"tcp", 22}, {"tcp", 443}, {"tcp", 8443}, {"udp", 53}, {"icmp", 0}},
	"intranet":   {{"tcp", 22}, {"tcp", 80}, {"icmp", 0}},
	"host":       {{"tcp", 22}, {"tcp", 8443}, {"icmp", 0}},
	"tunnel":     {{"tcp", 22}, {"tcp", 8080}, {"udp", 53}, {"icmp", 0}},
	"neighbour":  {{"tcp", 22}, {"udp", 53}},
}

// network of each party: traffic inside one local network passes no firewall and is
// not the table's.
var network = map[string]string{
	"vm": "vpc", "neighbour": "vpc",
	"bootserver": "dmz", "gateway": "dmz", "store": "dmz", "tunnel": "dmz",
	"tenant": "tenant", "intranet": "tenant",
	"host": "mgmt",
}

// addresses of places on their links.
type addresses struct{ neighbour, gateway string }

// strangerMAC belongs to nobody.
const strangerMAC = "02:de:ad:be:ef:01"

// attempts lists every packet of a round against this VM. Its address, and that of
// its tunnel, are guesses before they are known.
func attempts(vm api.VM, macs addresses) []attempt {
	var list []attempt
	all := func(a attempt, receivers ...string) {
		for _, to := range receivers {
			for _, p := range ports[to] {
				b := a
				b.to, b.proto, b.dport = to, p.proto, p.port
				if b.sport == 0 {
					b.sport = sourcePort
				}
				list = append(list, b)
			}
		}
	}
	asVM := &forged{iface: lab.CloudBridge, mac: vm.MAC, src: vm.Address}
	inside := []string{"bootserver", "gateway", "store", "tenant", "intranet", "host", "tunnel"}

	// Everyone as what they are.
	all(attempt{from: "vm", place: lab.Host, forged: asVM}, inside...)
	for _, from := range []string{lab.Neighbour} {
		all(attempt{from: from, place: from}, append([]string{"vm"}, inside...)...)
	}
	for _, from := range []string{lab.BootServer, lab.Gateway, lab.Store, lab.Tenant, lab.Intranet, lab.Host} {
		for _, to := range append([]string{"vm", "neighbour"}, inside...) {
			if network[from] != network[to] {
				all(attempt{from: from, place: from}, to)
			}
		}
	}
	// What leaves the tunnel, as a gateway that has been taken over would send it.
	all(attempt{from: "tunnel", place: lab.Gateway, forged: &forged{"dmz0", macs.gateway, vm.TunnelAddress, lab.Internal}}, "tenant", "intranet", "host")

	// Forged senders; and packets that leave from a service's port, so that they pose as
	// answers: to the table they are like any other of that sender. No two are answers to
	// each other, or a firewall that follows connections would rightly pass the second.
	all(attempt{from: "vm", never: true, how: "from the neighbour's MAC", place: lab.Neighbour,
		forged: &forged{iface: "vpc0", mac: macs.neighbour, src: vm.Address}}, inside...)
	all(attempt{from: "stranger", never: true, how: "an address nobody reserved", place: lab.Host,
		forged: &forged{iface: lab.CloudBridge, mac: strangerMAC, src: netip.MustParseAddr("10.82.0.149")}}, inside...)
	all(attempt{from: "tunnel", never: true, how: "outside the tunnel", place: lab.Host,
		forged: &forged{iface: lab.CloudBridge, mac: vm.MAC, src: vm.TunnelAddress}}, inside...)
	all(attempt{from: "tenant", never: true, how: "forged by the VM", place: lab.Host,
		forged: &forged{iface: lab.CloudBridge, mac: vm.MAC, src: lab.Address(lab.Tenant, lab.TenantLAN)}}, inside...)
	all(attempt{from: "bootserver", how: "posing as an answer", place: lab.BootServer, sport: 443}, "vm", "tenant", "host")
	all(attempt{from: "tenant", how: "posing as an answer", place: lab.Tenant, sport: 8080}, "vm")
	all(attempt{from: "vm", how: "posing as an answer", place: lab.Host, sport: 22, forged: asVM}, "tenant")
	all(attempt{from: "intranet", how: "posing as an answer", place: lab.Intranet, sport: 80}, "tunnel")
	return list
}
