package bootserver

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"foothold/dmz/upstream"
	"foothold/protocol/event"
	"foothold/protocol/zone"
)

// Bounds of connections.
const (
	maxPerAddress   = 2               // the conversation, and the delivered system's report while the first winds down
	maxConnections  = 512             //
	maxConversation = 5 * time.Minute // the loader gives up after four
	grace           = 5 * time.Second // behind the boot window, for an answer under way
	dropsEvery      = 5 * time.Second
	maxDropKinds    = 256
)

// gate lets only addresses with a live reservation connect, before any handshake, and
// only so many connections at once. It is the boot server's part of the zone document.
type gate struct {
	emit func(event.Event)

	mu      sync.Mutex
	boots   map[netip.Addr]boot // guarded by mu
	open    map[netip.Addr]int  // guarded by mu; connections
	total   int                 // guarded by mu
	dropped map[drop]int        // guarded by mu; since the last event
}

type boot struct {
	reservation string
	until       time.Duration // boot-time clock
}

type drop struct {
	from netip.Addr
	why  string
}

func newGate(emit func(event.Event)) *gate {
	return &gate{emit: emit, boots: map[netip.Addr]boot{}, open: map[netip.Addr]int{}, dropped: map[drop]int{}}
}

// Apply implements upstream.Target.
func (g *gate) Apply(_ context.Context, s *upstream.State) error {
	boots := make(map[netip.Addr]boot, len(s.Document.Boots))
	for _, b := range s.Document.Boots {
		if !b.Address.Is4() || b.Reservation == "" {
			return fmt.Errorf("boots: %q of reservation %q is no IPv4 address of a reservation", b.Address, b.Reservation)
		}
		boots[b.Address] = boot{b.Reservation, s.Until(b.TTL)}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.boots = boots
	return nil
}

// Reread implements upstream.Target: the gate is in this process, where nobody else changes it.
func (g *gate) Reread() error { return nil }

// Live implements upstream.Target.
func (g *gate) Live() ([]zone.Live, error) {
	now := upstream.Boottime()
	g.mu.Lock()
	defer g.mu.Unlock()
	var out []zone.Live
	for addr, b := range g.boots {
		if b.until > now {
			out = append(out, zone.Live{ID: b.reservation, Reservation: b.reservation, Rule: addr.String() + " may connect", Remaining: b.until - now})
		}
	}
	return out, nil
}

// admit decides on a connection and counts it in.
func (g *gate) admit(from netip.Addr) (boot, string) {
	now := upstream.Boottime()
	g.mu.Lock()
	defer g.mu.Unlock()
	b, ok := g.boots[from]
	why := ""
	switch {
	case !ok:
		why = "no live reservation"
	case b.until <= now:
		why = "boot window over"
	case g.open[from] >= maxPerAddress:
		why = "too many connections of this address"
	case g.total >= maxConnections:
		why = "too many connections"
	}
	if why != "" {
		k := drop{from, why}
		if _, known := g.dropped[k]; !known && len(g.dropped) >= maxDropKinds {
			k = drop{why: why}
		}
		g.dropped[k]++
		return boot{}, why
	}
	g.open[from]++
	g.total++
	return b, ""
}

func (g *gate) leave(from netip.Addr) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.total--
	if g.open[from]--; g.open[from] == 0 {
		delete(g.open, from)
	}
}

// tellDropped turns what was dropped into events, so that a flood stays small.
func (g *gate) tellDropped(ctx context.Context) {
	tick := time.NewTicker(dropsEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		g.mu.Lock()
		dropped := maps.Clone(g.dropped)
		clear(g.dropped)
		g.mu.Unlock()
		for d, n := range dropped {
			slog.Warn("connections dropped", "from", d.from.String(), "why", d.why, "count", n)
			g.emit(event.Event{Kind: "boot.dropped", Reason: event.NotPermitted,
				Detail: map[string]string{"from": d.from.String(), "why": d.why, "count": strconv.Itoa(n)}})
		}
	}
}

// gatedListener closes what the gate does not admit, without a byte.
type gatedListener struct {
	net.Listener
	gate *gate
	ctx  context.Context // of the daemon; each connection's ends with it
}

func (g *gate) listener(ctx context.Context, l net.Listener) net.Listener {
	return &gatedListener{l, g, ctx}
}

func (l *gatedListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		from := sourceOf(c)
		b, why := l.gate.admit(from)
		if why != "" {
			reset(c)
			continue
		}
		return l.wrap(c, from, b), nil
	}
}

// gatedConn ends at the latest with its boot window.
type gatedConn struct {
	net.Conn
	from   netip.Addr
	ctx    context.Context
	cancel context.CancelFunc
	once   sync.Once
	leave  func()
}

func (l *gatedListener) wrap(c net.Conn, from netip.Addr, b boot) *gatedConn {
	limit := min(maxConversation, b.until-upstream.Boottime()+grace)
	g := &gatedConn{Conn: c, from: from, leave: func() { l.gate.leave(from) }}
	g.ctx, g.cancel = context.WithTimeout(l.ctx, limit)
	context.AfterFunc(g.ctx, func() { g.Close() })
	return g
}

// Close frees the connection's place once.
func (c *gatedConn) Close() error {
	c.once.Do(func() {
		c.cancel()
		c.leave()
	})
	return c.Conn.Close()
}

func sourceOf(c net.Conn) netip.Addr {
	a, err := netip.ParseAddrPort(c.RemoteAddr().String())
	if err != nil {
		return netip.Addr{}
	}
	return a.Addr().Unmap()
}

// reset closes with RST, so that no state of ours lingers for a stranger.
func reset(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	c.Close()
}
