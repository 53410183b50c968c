package gateway

import (
	"bytes"
	"context"
	"fmt"
	"net/netip"
	"time"

	"foothold/dmz/ruleset"
	"foothold/dmz/upstream"
	"foothold/internal/wg"
	"foothold/protocol/event"
	"foothold/protocol/zone"
)

// unlisted is how long an admitted peer may be absent from documents: one that was
// under way during the admission does not know it yet.
const unlisted = 10 * time.Second

// Apply implements upstream.Target: a document names who stays, who is out of
// quarantine, and what open tunnels reach. It never brings a peer in: only an
// admission has the pre-shared key.
func (g *Gateway) Apply(ctx context.Context, s *upstream.State) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	before, old := g.zone, g.peers
	g.peers.Peers = nil
	var gone []*peer
	for _, p := range old.Peers {
		next := *p
		listed := match(s.Document.Peers, p)
		switch {
		case listed != nil:
			next.Listed, next.Open, next.Until = true, !listed.Quarantined, s.Until(listed.TTL)
		case p.Listed || s.Received > p.Admitted+unlisted:
			gone = append(gone, p)
			continue
		}
		g.peers.Peers = append(g.peers.Peers, &next)
	}
	g.zone = s
	if err := g.settle(ctx); err != nil {
		g.zone, g.peers = before, old
		return err
	}
	for _, p := range gone {
		g.ended(p, event.Released)
	}
	return nil
}

// match finds the document's entry that is this very peer.
func match(peers []zone.Peer, p *peer) *zone.Peer {
	for i, z := range peers {
		if z.Reservation == p.Reservation && z.Start == p.Start && z.Serial == p.Serial && z.Address == p.Address &&
			z.Source == p.Source && bytes.Equal(z.PublicKey, p.PublicKey) {
			return &peers[i]
		}
	}
	return nil
}

// base is what holds without any document: the daemon's way to the orchestrator,
// admissions and WireGuard. The firewalls in front say who comes that far.
func (g *Gateway) base() []ruleset.Flow {
	any4 := ruleset.Endpoint{Prefix: netip.MustParsePrefix("0.0.0.0/0")}
	c := g.conf
	return []ruleset.Flow{
		{ID: "gateway/upstream", From: host(g.outgoing), To: host(c.Upstream.Address.Addr()), Proto: "tcp", Port: int(c.Upstream.Address.Port())},
		{ID: "gateway/admission", From: any4, To: host(c.Admission.Addr()), Proto: "tcp", Port: int(c.Admission.Port())},
		{ID: "gateway/wireguard", From: any4, To: host(c.WireGuard.Addr()), Proto: "udp", Port: int(c.WireGuard.Port())},
	}
}

func host(a netip.Addr) ruleset.Endpoint {
	return ruleset.Endpoint{Prefix: netip.PrefixFrom(a, a.BitLen())}
}

// flows is everything that is permitted now. The caller holds mu.
func (g *Gateway) flows() ([]ruleset.Flow, error) {
	out := g.base()
	for _, p := range g.peers.Peers {
		out = append(out, ruleset.Flow{ID: "relay/" + p.Reservation, Reservation: p.Reservation, From: host(p.Address), To: host(g.self),
			Proto: "tcp", Port: g.conf.RelayPort, Until: p.Until})
	}
	if g.zone == nil {
		return out, nil
	}
	for _, z := range g.zone.Document.Flows {
		f, err := ruleset.FromZone(z, g.zone)
		if err != nil {
			return nil, err
		}
		ok, err := g.restrict(&f)
		if err != nil {
			return nil, fmt.Errorf("flow %q: %w", z.ID, err)
		}
		if ok {
			out = append(out, f)
		}
	}
	return out, nil
}

// restrict holds a flow of a tunnel to that tunnel: it needs the peer of its
// reservation, out of quarantine, and ends with it at the latest.
func (g *Gateway) restrict(f *ruleset.Flow) (bool, error) {
	for _, e := range []ruleset.Endpoint{f.From, f.To} {
		if !e.Prefix.Overlaps(g.conf.Pool) {
			continue
		}
		if !e.Prefix.IsSingleIP() {
			return false, fmt.Errorf("%s is more than one tunnel", e.Prefix)
		}
		p := g.peers.byAddress(e.Prefix.Addr())
		if p == nil || !p.Open || f.Reservation != p.Reservation {
			return false, nil
		}
		if f.Until == ruleset.Forever || f.Until > p.Until {
			f.Until = p.Until
		}
	}
	return true, nil
}

// Reread implements upstream.Target. Peers are read whenever Live is called.
func (g *Gateway) Reread() error { return g.table.Reread() }

// Live implements upstream.Target: flows from the kernel, peers from the interface.
func (g *Gateway) Live() ([]zone.Live, error) {
	out, err := g.table.Live()
	if err != nil {
		return nil, err
	}
	status, err := g.wg.Peers()
	if err != nil {
		return nil, err
	}
	now := upstream.Boottime()
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, s := range status {
		l := zone.Live{ID: "unexpected", Rule: fmt.Sprintf("tunnel %v", s.AllowedIPs)}
		for _, p := range g.peers.Peers {
			if p.key() == s.PublicKey {
				l = g.livePeer(p, s, now)
			}
		}
		out = append(out, l)
	}
	return out, nil
}

func (g *Gateway) livePeer(p *peer, s wg.Status, now time.Duration) zone.Live {
	state := "quarantined"
	if p.Open {
		state = "open"
	}
	seen := "no handshake yet"
	if !s.LastHandshake.IsZero() {
		seen = "last handshake " + s.LastHandshake.UTC().Format(time.RFC3339)
	}
	return zone.Live{ID: p.Reservation, Reservation: p.Reservation, Remaining: max(0, p.Until-now),
		Rule: fmt.Sprintf("tunnel %s from %s, %s, %s", p.Address, p.Source, state, seen)}
}
