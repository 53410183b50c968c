package fsck

import (
	"fmt"
	"strings"

	"foothold/protocol/zone"
)

// zone compares a zone's document with the ledger and with what its daemon reports.
// While the report is of an earlier document, there is nothing to compare it with.
func (c *check) zone(z Zone) {
	name := "zone " + z.Document.Zone
	want := fmt.Sprintf("revision %d is live", z.Document.Revision)
	if z.Outdated {
		c.misfit(ZoneOutdated, name, "a document that follows from the ledger", fmt.Sprintf("revision %d says otherwise", z.Document.Revision))
	}
	switch {
	case z.Report.Error != "":
		c.misfit(ZoneFault, name, want, z.Report.Error)
	case z.Report.Revision != z.Document.Revision || z.Report.Epoch != z.Document.Epoch:
		c.under(ZoneBehind, name, want, fmt.Sprintf("revision %d is live", z.Report.Revision), z.Changed.Add(z.Settle))
	case c.Now.Sub(z.Seen) > z.Document.Lease:
		c.misfit(ZoneSilent, name, fmt.Sprintf("a report within %v", z.Document.Lease), fmt.Sprintf("the last came %v ago", c.Now.Sub(z.Seen).Round(1e9)))
	default:
		c.rules(z)
	}
}

// wanted is one element that a document asks for.
type wanted struct {
	owner string // reservation, if it has one
	rule  string // for people
	peer  bool
	left  int // how often it has still to be found
}

// asked lists what the document asks for by the ids that daemons report.
func asked(d zone.Document) map[string]*wanted {
	all := map[string]*wanted{}
	want := func(id string, w wanted) {
		if all[id] == nil {
			all[id] = &w
		}
		all[id].left++
	}
	for _, f := range d.Flows {
		want(f.ID, wanted{owner: f.Reservation, rule: fmt.Sprintf("%s → %s %s %d", f.From.Prefix, f.To.Prefix, f.Proto, f.Port)})
	}
	for _, p := range d.Peers {
		want(p.Reservation, wanted{owner: p.Reservation, rule: fmt.Sprintf("tunnel %s from %s", p.Address, p.Source), peer: true})
	}
	for _, b := range d.Boots {
		want(b.Reservation, wanted{owner: b.Reservation, rule: b.Address.String() + " may connect"})
	}
	return all
}

// own reports whether a daemon has that element of its own account, without a document:
// a firewall what its configuration lets pass at the start, the gateway its own listeners
// and its relay for each of its peers.
func own(name, id string, asked map[string]*wanted) bool {
	kind, rest, _ := strings.Cut(id, "/")
	switch {
	case name == zone.External || name == zone.Internal:
		return kind == "bootstrap"
	case name != zone.Gateway:
		return false
	case kind == "relay":
		return asked[rest] != nil && asked[rest].peer
	}
	return id == "gateway/upstream" || id == "gateway/admission" || id == "gateway/wireguard"
}

// rules compares element by element.
func (c *check) rules(z Zone) {
	all := asked(z.Document)
	for _, l := range z.Report.Live {
		switch w := all[l.ID]; {
		case w != nil && w.left > 0:
			w.left--
		case !own(z.Document.Zone, l.ID, all):
			c.extra(z, l)
		}
	}
	for _, id := range sorted(all) {
		if w := all[id]; w.left > 0 {
			c.absent(z, id, *w)
		}
	}
}

// extra names an element that a kernel has and its document does not ask for.
func (c *check) extra(z Zone, l zone.Live) {
	peer := z.Document.Zone == zone.Gateway && (l.ID == l.Reservation || l.ID == "unexpected")
	code := RuleUnexpected
	if peer {
		code = PeerUnexpected
	}
	c.late(z, code, c.element(z, l.ID, l.Reservation, peer), "it is not in the kernel", fmt.Sprintf("it is, with %d packets: %s", l.Packets, l.Rule))
}

// absent names an element that a document asks for and its kernel lacks.
func (c *check) absent(z Zone, id string, w wanted) {
	code := RuleMissing
	if w.peer {
		code = PeerMissing
	}
	c.late(z, code, c.element(z, id, w.owner, w.peer), w.rule, "it is not in the kernel")
}

// element names one for people.
func (c *check) element(z Zone, id, owner string, peer bool) string {
	thing := fmt.Sprintf("rule %q in zone %s", id, z.Document.Zone)
	if peer {
		thing = fmt.Sprintf("tunnel %q of the gateway", id)
	}
	if owner != "" {
		thing += " of " + c.owner(owner)
	}
	return thing
}

// late records a misfit of an element. Firewalls and boot server report what they have
// made of the very document. The gateway does too, but its tunnels come with admissions,
// which bring them in after the document that names them, and may outlast it a little.
func (c *check) late(z Zone, code Code, thing, expected, found string) {
	if z.Late == 0 {
		c.misfit(code, thing, expected, found)
		return
	}
	c.under(code, thing, expected, found, z.Changed.Add(z.Late))
}
