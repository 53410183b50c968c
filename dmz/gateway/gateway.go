package gateway

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"sync"
	"time"

	"foothold/dmz/ruleset"
	"foothold/dmz/upstream"
	"foothold/internal/mtls"
	"foothold/internal/serve"
	"foothold/internal/wg"
	"foothold/internal/wg/userspace"
	"foothold/protocol/agentmsg"
	"foothold/protocol/event"
	"foothold/protocol/zone"
)

const (
	device       = "wg0"
	defaultMTU   = 1500
	minMTU       = 1280 + overhead // what a tunnel must carry
	maxMTU       = 9000
	overhead     = 80 // bytes of WireGuard, UDP and an outer IPv6 header in each packet
	keepalive    = 20 // seconds; shorter than any conntrack timeout of UDP
	defaultRelay = 8443
	sweepEvery   = time.Second
	minPoolBits  = 8
	maxPoolBits  = 29
)

// Gateway is the daemon's state.
type Gateway struct {
	conf     Config
	self     netip.Addr // on the tunnel network
	outgoing netip.Addr // source of calls to the orchestrator
	client   *upstream.Client
	events   *upstream.Events
	table    *ruleset.Table
	wg       *wg.Device

	mu      sync.Mutex
	peers   peersState                        // guarded by mu
	pending map[netip.Addr]bool               // guarded by mu; addresses of admissions under way
	zone    *upstream.State                   // guarded by mu; applied document, nil: none yet
	limits  map[string]*bucket                // guarded by mu; by reservation
	device  map[[wg.KeyLen]byte]time.Duration // guarded by mu; peers in the interface and when they were admitted
}

// Run is the daemon. Rules stand before the tunnel's interface exists and before the
// kernel forwards.
func Run(ctx context.Context, c Config) error {
	if c.RelayPort == 0 {
		c.RelayPort = defaultRelay
	}
	if c.MTU == 0 {
		c.MTU = defaultMTU
	}
	if err := ruleset.Shut(); err != nil {
		return err
	}
	g, tlsConf, err := open(c)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	if err := g.start(ctx); err != nil {
		return err
	}
	defer g.wg.Close()
	watcher, err := upstream.NewWatcher(ctx, g.client, g.events, zone.Gateway, c.State, g)
	if err != nil {
		return err
	}
	if err := ruleset.Forward(); err != nil {
		return err
	}
	admission, err := net.Listen("tcp", c.Admission.String())
	if err != nil {
		return fmt.Errorf("listen for admissions: %w", err)
	}
	relay, err := net.Listen("tcp", netip.AddrPortFrom(g.self, uint16(c.RelayPort)).String())
	if err != nil {
		admission.Close()
		return fmt.Errorf("listen for agents: %w", err)
	}
	g.events.Emit(event.Event{Kind: "daemon.started"})
	slog.Info("serving", "listening", []string{admission.Addr().String(), relay.Addr().String(), c.WireGuard.String()}, "kernel_wireguard", g.wg.Kernel())

	outer := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var run sync.WaitGroup
	serveOn := func(l net.Listener, path string, h http.HandlerFunc) {
		mux := http.NewServeMux()
		mux.Handle("POST "+path, mtls.Allow(h, mtls.VM))
		run.Go(func() {
			if err := serve.HTTPS(ctx, l, tlsConf, mux, serve.TellRefused(ctx, g.events.TLSRefused(path))); err != nil {
				cancel(err)
			}
		})
	}
	serveOn(admission, agentmsg.PathAdmit, g.admit)
	serveOn(relay, agentmsg.PathAgent, g.agent)
	run.Go(func() { g.events.Run(ctx) })
	run.Go(func() { watcher.Run(ctx) })
	run.Go(func() { g.sweep(ctx) })
	run.Go(func() {
		if err := ruleset.WatchDrops(ctx, g.events.Emit); err != nil {
			cancel(err) // drops must be seen: start again
		}
	})
	<-ctx.Done()
	run.Wait()
	if outer.Err() != nil {
		return nil
	}
	return context.Cause(ctx)
}

// open checks the configuration; the kernel is untouched.
func open(c Config) (*Gateway, *tls.Config, error) {
	pool := c.Pool
	if !pool.IsValid() || !pool.Addr().Is4() || pool != pool.Masked() || pool.Bits() < minPoolBits || pool.Bits() > maxPoolBits {
		return nil, nil, fmt.Errorf("pool: %q is no IPv4 prefix of /%d to /%d", pool, minPoolBits, maxPoolBits)
	}
	if !c.Admission.Addr().Is4() || !c.WireGuard.Addr().Is4() || c.RelayPort < 1 || c.RelayPort > 65535 {
		return nil, nil, errors.New("admission, wireguard: want IPv4 addresses with ports; relay_port: want a port")
	}
	if pool.Contains(c.Admission.Addr()) || pool.Contains(c.WireGuard.Addr()) || pool.Contains(c.Store.Addr()) {
		return nil, nil, errors.New("pool: it holds an address of the gateway or the store")
	}
	if c.MTU < minMTU || c.MTU > maxMTU {
		return nil, nil, fmt.Errorf("mtu: %d, want %d to %d", c.MTU, minMTU, maxMTU)
	}
	client, err := upstream.New(c.Upstream)
	if err != nil {
		return nil, nil, err
	}
	cert, vms, err := c.TLS.Load()
	if err != nil {
		return nil, nil, fmt.Errorf("tls: %w", err)
	}
	if err := os.MkdirAll(c.State, 0o700); err != nil {
		return nil, nil, fmt.Errorf("open state: %w", err)
	}
	g := &Gateway{conf: c, self: pool.Addr().Next(), client: client, events: upstream.NewEvents(client),
		pending: map[netip.Addr]bool{}, limits: map[string]*bucket{}, device: map[[wg.KeyLen]byte]time.Duration{}}
	if g.peers, err = loadPeers(c.State); err != nil {
		return nil, nil, err
	}
	g.table = ruleset.New(ruleset.Config{Tunnel: device, Inside: g.self, LogGroup: ruleset.LogGroup, Now: upstream.Boottime})
	return g, mtls.ServerConfig(cert, vms, mtls.VM), nil
}

// start makes rules, interface and the peers of the last run. Those that the last
// document opened are quarantined until it is applied again.
func (g *Gateway) start(ctx context.Context) error {
	if err := ruleset.Harden(); err != nil {
		return err
	}
	var err error
	if g.outgoing, err = sourceTowards(g.conf.Upstream.Address); err != nil {
		return err
	}
	if err := g.table.Apply(ctx, g.base()); err != nil {
		return err
	}
	key, err := privateKey(g.conf.State)
	if err != nil {
		return err
	}
	defer key.Wipe()
	g.wg, err = wg.Open(wg.Config{Name: device, PrivateKey: key, ListenPort: int(g.conf.WireGuard.Port()), MTU: g.conf.MTU - overhead,
		Address: []netip.Prefix{netip.PrefixFrom(g.self, g.conf.Pool.Bits())}, Fallback: userspace.Start})
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	now := upstream.Boottime()
	g.peers.remove(func(p *peer) bool { return p.Until <= now })
	err = g.settle(ctx)
	if err != nil {
		g.wg.Close()
	}
	return err
}

// sourceTowards asks the kernel which address it would call from. Nothing is sent.
func sourceTowards(to netip.AddrPort) (netip.Addr, error) {
	c, err := net.DialUDP("udp4", nil, net.UDPAddrFromAddrPort(to))
	if err != nil {
		return netip.Addr{}, fmt.Errorf("find the way to the orchestrator: %w", err)
	}
	defer c.Close()
	return c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap(), nil
}

// settle brings file, interface and rules to what g.peers and g.zone say. What closes
// comes first: the rules of a peer that goes are gone before it is; a peer that comes
// is on disk before it is in the interface. The caller holds mu.
func (g *Gateway) settle(ctx context.Context) error {
	if err := g.peers.store(g.conf.State); err != nil {
		return err
	}
	flows, err := g.flows()
	if err != nil {
		return err
	}
	if err := g.table.Apply(ctx, flows); err != nil {
		return err
	}
	return g.settleDevice()
}

// settleDevice removes and adds peers; one that stays is left alone, for its packets'
// sake.
func (g *Gateway) settleDevice() error {
	want := map[[wg.KeyLen]byte]*peer{}
	for _, p := range g.peers.Peers {
		want[p.key()] = p
	}
	for key, admitted := range g.device {
		if p := want[key]; p == nil || p.Admitted != admitted {
			if err := g.wg.RemovePeer(key); err != nil {
				return err
			}
			delete(g.device, key)
		}
	}
	for key, p := range want {
		if _, ok := g.device[key]; ok {
			continue
		}
		if err := g.wg.AddPeer(p.wireguard()); err != nil {
			return err
		}
		g.device[key] = p.Admitted
	}
	return nil
}

// sweep ends peers whose time is over, and those that show up elsewhere than at the
// address they were admitted from.
func (g *Gateway) sweep(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := g.sweepOnce(ctx); err != nil {
			slog.Error("peers not swept", "err", err)
		}
	}
}

func (g *Gateway) sweepOnce(ctx context.Context) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	status, err := g.wg.Peers()
	if err != nil {
		return err
	}
	at := map[[wg.KeyLen]byte]netip.Addr{}
	for _, s := range status {
		at[s.PublicKey] = s.Endpoint.Addr()
	}
	now := upstream.Boottime()
	moved := func(p *peer) bool { a := at[p.key()]; return a.IsValid() && a != p.Source }
	gone := g.peers.remove(func(p *peer) bool { return p.Until <= now || moved(p) })
	if len(gone) == 0 {
		return nil
	}
	for _, p := range gone {
		reason := event.DeadlinePassed
		if moved(p) {
			reason = event.NotPermitted
		}
		g.ended(p, reason)
	}
	return g.settle(ctx)
}

// ended tells of a peer's end.
func (g *Gateway) ended(p *peer, reason event.Reason) {
	delete(g.limits, p.Reservation)
	slog.Info("tunnel ended", "reservation", p.Reservation, "address", p.Address.String(), "reason", string(reason))
	g.events.Emit(event.Event{Kind: "tunnel.ended", Reservation: p.Reservation, Reason: reason,
		Detail: map[string]string{"address": p.Address.String(), "source": p.Source.String()}})
}
