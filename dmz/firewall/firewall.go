package firewall

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"foothold/dmz/ruleset"
	"foothold/dmz/upstream"
	"foothold/protocol/event"
	"foothold/protocol/zone"
)

// sweepEvery is how soon a fixed neighbour entry goes after its flow timed out. The
// flow itself ends in the kernel, on time.
const sweepEvery = 2 * time.Second

// Firewall carries out one zone's documents in the kernel.
type Firewall struct {
	bootstrap []ruleset.Flow
	table     *ruleset.Table
	adjacent  string

	mu    sync.Mutex
	flows []ruleset.Flow // guarded by mu; applied
}

// Run is the daemon. Rules stand before the kernel forwards its first packet, and stay
// when the daemon ends: their timeouts close what is dynamic.
func Run(ctx context.Context, c Config) error {
	if err := ruleset.Shut(); err != nil {
		return err
	}
	if c.Zone != zone.External && c.Zone != zone.Internal {
		return fmt.Errorf("configuration: zone: %q is neither %s nor %s", c.Zone, zone.External, zone.Internal)
	}
	client, err := upstream.New(c.Upstream)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	fw, err := New(c)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	events := upstream.NewEvents(client)
	watcher, err := upstream.NewWatcher(ctx, client, events, c.Zone, c.State, fw)
	if err != nil {
		return err
	}
	if err := fw.Start(ctx); err != nil {
		return err
	}
	events.Emit(event.Event{Kind: "daemon.started", Detail: map[string]string{"zone": c.Zone}})
	slog.Info("serving", "zone", c.Zone, "adjacent", c.Adjacent)

	var wg sync.WaitGroup
	outer := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	wg.Go(func() { events.Run(ctx) })
	wg.Go(func() { watcher.Run(ctx) })
	wg.Go(func() { fw.sweep(ctx) })
	wg.Go(func() {
		if err := ruleset.WatchDrops(ctx, events.Emit); err != nil {
			cancel(err) // drops must be seen: start again
		}
	})
	<-ctx.Done()
	wg.Wait()
	if outer.Err() != nil {
		return nil
	}
	return context.Cause(ctx)
}

// New reads the configuration's flows; the kernel is untouched until Apply or Start.
func New(c Config) (*Firewall, error) {
	fw := &Firewall{adjacent: c.Adjacent,
		table: ruleset.New(ruleset.Config{Adjacent: c.Adjacent, LogGroup: ruleset.LogGroup, Now: upstream.Boottime})}
	for i, b := range c.Bootstrap {
		f := ruleset.Flow{ID: "bootstrap/" + strconv.Itoa(i+1), Proto: b.Proto, Port: b.Port, Until: ruleset.Forever}
		var err error
		if f.From.Prefix, err = netip.ParsePrefix(b.From); err != nil {
			return nil, fmt.Errorf("bootstrap %d: from: %w", i+1, err)
		}
		if f.To.Prefix, err = netip.ParsePrefix(b.To); err != nil {
			return nil, fmt.Errorf("bootstrap %d: to: %w", i+1, err)
		}
		fw.bootstrap = append(fw.bootstrap, f)
	}
	return fw, nil
}

// Start makes the table stand, if no document has done so already, and then lets the
// kernel forward.
func (fw *Firewall) Start(ctx context.Context) error {
	fw.mu.Lock()
	flows := fw.flows
	fw.mu.Unlock()
	if flows == nil {
		if err := fw.apply(ctx, fw.bootstrap); err != nil {
			return err
		}
	}
	if err := ruleset.Harden(); err != nil {
		return err
	}
	return ruleset.Forward()
}

// Apply implements upstream.Target.
func (fw *Firewall) Apply(ctx context.Context, s *upstream.State) error {
	flows := append([]ruleset.Flow(nil), fw.bootstrap...)
	for _, f := range s.Document.Flows {
		flow, err := ruleset.FromZone(f, s)
		if err != nil {
			return err
		}
		flows = append(flows, flow)
	}
	return fw.apply(ctx, flows)
}

// apply opens flows before their neighbour entries are fixed and frees entries after
// their flows have gone: a missing entry only means that the kernel asks by ARP.
func (fw *Firewall) apply(ctx context.Context, flows []ruleset.Flow) error {
	fw.mu.Lock()
	defer fw.mu.Unlock()
	if err := fw.table.Apply(ctx, flows); err != nil {
		return err
	}
	fw.flows = flows
	return fixNeighbours(fw.adjacent, flows, upstream.Boottime())
}

// Reread implements upstream.Target.
func (fw *Firewall) Reread() error { return fw.table.Reread() }

// Live implements upstream.Target.
func (fw *Firewall) Live() ([]zone.Live, error) { return fw.table.Live() }

// sweep frees neighbour entries of flows that timed out.
func (fw *Firewall) sweep(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		fw.mu.Lock()
		err := fixNeighbours(fw.adjacent, fw.flows, upstream.Boottime())
		fw.mu.Unlock()
		if err != nil {
			slog.Warn("neighbour entries not updated", "err", err)
		}
	}
}
