package bootserver

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"foothold/dmz/upstream"
	"foothold/internal/tally"
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
	emit    func(event.Event)
	dropped *tally.Tally[drop]

	mu    sync.Mutex
	boots map[netip.Addr]boot                    // guarded by mu
	open  map[netip.Addr]map[*gatedConn]struct{} // guarded by mu
	total int                                    // guarded by mu; connections
}

// boot is one start of a VM, which may connect.
type boot struct {
	reservation string
	start       int
	until       time.Duration // boot-time clock
}

// same reports whether b is the same start as o; its window may have been moved.
func (b boot) same(o boot) bool { return b.reservation == o.reservation && b.start == o.start }

type drop struct {
	from netip.Addr
	why  string
}

func newGate(emit func(event.Event)) *gate {
	return &gate{emit: emit, boots: map[netip.Addr]boot{}, open: map[netip.Addr]map[*gatedConn]struct{}{},
		dropped: tally.New(maxDropKinds, func(d drop) drop { return drop{why: d.why} })}
}

// Apply implements upstream.Target. Where another start has an address now, the last
// one's connections end: its VM is gone, and may have left without a word.
func (g *gate) Apply(_ context.Context, s *upstream.State) error {
	boots := make(map[netip.Addr]boot, len(s.Document.Boots))
	for _, b := range s.Document.Boots {
		if !b.Address.Is4() || b.Reservation == "" {
			return fmt.Errorf("boots: %q of reservation %q is no IPv4 address of a reservation", b.Address, b.Reservation)
		}
		boots[b.Address] = boot{b.Reservation, b.Start, s.Until(b.TTL)}
	}
	for _, c := range g.replace(boots) {
		c.Close()
	}
	return nil
}

// replace takes the new boots and returns the connections of starts that others follow.
func (g *gate) replace(boots map[netip.Addr]boot) []*gatedConn {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.boots = boots
	var left []*gatedConn
	for addr, conns := range g.open {
		now, ok := boots[addr]
		for c := range conns {
			if ok && !now.same(c.boot) {
				left = append(left, c)
			}
		}
	}
	return left
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

// admit decides on a connection and counts it in; it returns why it does not.
func (g *gate) admit(c *gatedConn) string {
	now := upstream.Boottime()
	g.mu.Lock()
	defer g.mu.Unlock()
	b, ok := g.boots[c.from]
	why := ""
	switch {
	case !ok:
		why = "no live reservation"
	case b.until <= now:
		why = "boot window over"
	case len(g.open[c.from]) >= maxPerAddress:
		why = "too many connections of this address"
	case g.total >= maxConnections:
		why = "too many connections"
	}
	if why != "" {
		g.dropped.Count(drop{c.from, why})
		return why
	}
	if g.open[c.from] == nil {
		g.open[c.from] = map[*gatedConn]struct{}{}
	}
	c.boot = b
	g.open[c.from][c] = struct{}{}
	g.total++
	return ""
}

func (g *gate) leave(c *gatedConn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.total--
	if delete(g.open[c.from], c); len(g.open[c.from]) == 0 {
		delete(g.open, c.from)
	}
}

// tellDropped turns what was dropped into events, so that a flood stays small.
func (g *gate) tellDropped(ctx context.Context) {
	g.dropped.Run(ctx, dropsEvery, func(d drop, n int) {
		slog.Warn("connections dropped", "from", d.from.String(), "why", d.why, "count", n)
		g.emit(event.Event{Kind: "boot.dropped", Reason: event.NotPermitted,
			Detail: map[string]string{"from": d.from.String(), "why": d.why, "count": strconv.Itoa(n)}})
	})
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
		conn := &gatedConn{Conn: c, gate: l.gate, from: sourceOf(c)}
		if why := l.gate.admit(conn); why != "" {
			reset(c)
			continue
		}
		conn.begin(l.ctx)
		return conn, nil
	}
}

// gatedConn ends at the latest with its boot window.
type gatedConn struct {
	net.Conn
	gate *gate
	from netip.Addr
	boot boot // set when it is admitted

	once   sync.Once
	mu     sync.Mutex
	closed bool               // guarded by mu
	ctx    context.Context    // of what is done for it; set by begin
	cancel context.CancelFunc // guarded by mu
}

// begin lets the connection's time run. The gate may have closed it already.
func (c *gatedConn) begin(ctx context.Context) {
	limit := min(maxConversation, c.boot.until-upstream.Boottime()+grace)
	c.mu.Lock()
	c.ctx, c.cancel = context.WithTimeout(ctx, limit)
	if c.closed {
		c.cancel()
	}
	c.mu.Unlock()
	context.AfterFunc(c.ctx, func() { c.Close() })
}

// Close frees the connection's place once.
func (c *gatedConn) Close() error {
	c.once.Do(func() {
		c.mu.Lock()
		c.closed = true
		if c.cancel != nil {
			c.cancel()
		}
		c.mu.Unlock()
		c.gate.leave(c)
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
