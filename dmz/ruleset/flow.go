// Package ruleset keeps one nftables table equal to a list of flows, for the
// firewalls and the gateway.
//
// Everything is dropped that no flow permits. A flow is two elements of two sets: one
// that the initiator's packets are looked up by (call), one for the responder's
// (answer). Every packet is looked up, in both directions, and the elements carry the
// flow's deadline as their timeout: so the kernel itself ends a flow, and a connection
// that was established earlier ends with it. There is no rule that accepts established
// connections.
//
// Sets are hashes of exact keys; their rules are as many as there are pairs of prefix
// lengths ("shapes") in use, not as there are flows, so a packet's cost does not grow
// with the number of VMs:
//
//	calls_A_B        saddr/A . daddr/B . protocol . destination port
//	answers_A_B      saddr/A . daddr/B . protocol . source port
//	vmcalls_32_B     saddr . ether saddr . daddr/B . protocol . destination port
//	vmanswers_32_B   saddr . ether saddr . daddr/B . protocol . source port
//	selfcalls_A_B, selfanswers_A_B   like calls and answers, for the machine itself
//
// A packet that comes in by the interface on which VMs are neighbours is looked up in
// the vm sets alone, others never. Calls need conntrack's original direction, answers
// the reply direction of an established connection. ICMP, fragments that do not
// reassemble, invalid TCP and IPv6 never pass.
package ruleset

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Flow is one permitted kind of connection.
type Flow struct {
	ID          string // at most maxID bytes, stable
	Reservation string // absent: a standing flow
	From, To    Endpoint
	Proto       string        // tcp, udp
	Port        int           // of To
	Until       time.Duration // boot-time clock; Forever: no end
}

// Forever is the end of a standing flow.
const Forever time.Duration = 0

// Endpoint is one side of a flow.
type Endpoint struct {
	Prefix netip.Prefix
	MAC    net.HardwareAddr // set where the side is a neighbour on the adjacent interface
}

// maxID is the longest comment of a set element that nft shows.
const maxID = 128

func (f Flow) String() string {
	return fmt.Sprintf("%s → %s %s %d", f.From, f.To, f.Proto, f.Port)
}

func (e Endpoint) String() string {
	text := e.Prefix.String()
	if e.Prefix.IsSingleIP() {
		text = e.Prefix.Addr().String()
	}
	if e.MAC != nil {
		text += " " + e.MAC.String()
	}
	return text
}

func (f Flow) check() error {
	switch {
	case f.ID == "" || len(f.ID) > maxID:
		return errors.New("want an id of 1 to 128 bytes")
	case f.Proto != "tcp" && f.Proto != "udp":
		return fmt.Errorf("unknown protocol %q", f.Proto)
	case f.Port < 1 || f.Port > 65535:
		return fmt.Errorf("port %d", f.Port)
	}
	for _, e := range []Endpoint{f.From, f.To} {
		switch {
		case !e.Prefix.IsValid() || !e.Prefix.Addr().Is4():
			return fmt.Errorf("%q is no IPv4 prefix", e.Prefix)
		case e.Prefix != e.Prefix.Masked():
			return fmt.Errorf("%s has bits beyond its length", e.Prefix)
		case e.MAC != nil && (len(e.MAC) != 6 || !e.Prefix.IsSingleIP()):
			return fmt.Errorf("%s: a MAC goes with one address", e.Prefix)
		}
	}
	if f.From.MAC != nil && f.To.MAC != nil {
		return errors.New("two neighbours do not need the firewall")
	}
	return nil
}

// kind is a family of sets.
type kind int

const (
	calls kind = iota
	answers
	vmCalls
	vmAnswers
	selfCalls
	selfAnswers
)

var kindNames = [...]string{"calls", "answers", "vmcalls", "vmanswers", "selfcalls", "selfanswers"}

func (k kind) answer() bool { return k == answers || k == vmAnswers || k == selfAnswers }
func (k kind) vm() bool     { return k == vmCalls || k == vmAnswers }
func (k kind) self() bool   { return k == selfCalls || k == selfAnswers }

// shape is one set: a kind and the prefix lengths of source and destination.
type shape struct {
	kind     kind
	src, dst int
}

func (s shape) name() string { return fmt.Sprintf("%s_%d_%d", kindNames[s.kind], s.src, s.dst) }

func compareShapes(a, b shape) int {
	for _, d := range []int{int(a.kind - b.kind), b.src - a.src, b.dst - a.dst} {
		if d != 0 {
			return d
		}
	}
	return 0
}

// element is one member of a set.
type element struct {
	shape shape
	key   string // bytes of the concatenated key
}

// elements are the two members that a flow needs.
func (f Flow) elements(self func(netip.Addr) bool) [2]element {
	c, a := calls, answers
	local := func(e Endpoint) bool { return e.Prefix.IsSingleIP() && self(e.Prefix.Addr()) }
	if local(f.From) || local(f.To) {
		c, a = selfCalls, selfAnswers
	}
	if f.From.MAC != nil && c == calls {
		c = vmCalls
	}
	if f.To.MAC != nil && a == answers {
		a = vmAnswers
	}
	return [2]element{f.element(c, f.From, f.To), f.element(a, f.To, f.From)}
}

func (f Flow) element(k kind, src, dst Endpoint) element {
	var key []byte
	addr := func(p netip.Prefix) { a := p.Addr().As4(); key = append(key, a[:]...) }
	addr(src.Prefix)
	if k.vm() {
		key = append(append(key, src.MAC...), 0, 0) // fields are padded to four bytes
	}
	addr(dst.Prefix)
	proto := byte(unix.IPPROTO_TCP)
	if f.Proto == "udp" {
		proto = unix.IPPROTO_UDP
	}
	key = append(key, proto, 0, 0, 0)
	key = append(binary.BigEndian.AppendUint16(key, uint16(f.Port)), 0, 0)
	return element{shape{k, src.Prefix.Bits(), dst.Prefix.Bits()}, string(key)}
}

// shapesOf lists the sets that the elements need, exact ones first.
func shapesOf(elements map[element]want) []shape {
	seen := map[shape]bool{}
	var out []shape
	for e := range elements {
		if !seen[e.shape] {
			seen[e.shape] = true
			out = append(out, e.shape)
		}
	}
	slices.SortFunc(out, compareShapes)
	return out
}
