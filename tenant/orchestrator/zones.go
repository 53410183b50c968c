package orchestrator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"foothold/protocol/event"
	"foothold/protocol/signed"
	"foothold/protocol/zone"
	"foothold/tenant/authority"
	"foothold/tenant/ledger"
	"foothold/tenant/policy"
)

// zoneNames lists the zones, one a daemon.
var zoneNames = []string{zone.External, zone.Internal, zone.Gateway, zone.Boot}

// liveWait bounds how long an act waits for rules to be live in a kernel.
const liveWait = 15 * time.Second

// settlePause lies between looks whether the documents that were asked for are made.
const settlePause = 20 * time.Millisecond

// zones holds the newest document of each zone and what its daemon last read back.
type zones struct {
	epoch int64
	// publishing serialises making and signing, so that a later reading of the ledger
	// never gets an earlier revision.
	publishing sync.Mutex
	asked      atomic.Int64 // publishings so far
	covered    int64        // guarded by publishing; the last of them whose caller's ledger is in the documents

	mu      sync.Mutex
	state   map[string]*zoneState
	changed chan struct{} // closed and replaced when a document or a report comes
	grown   chan struct{} // the same for the journal
}

// zoneState is guarded by zones.mu; its documents are not changed once stored.
type zoneState struct {
	revision int64
	document zone.Document
	line     []byte // the signed envelope as it is streamed, with newline
	plain    []byte // the document without what changes with time alone
	signed   time.Time
	changed  time.Time // when plain last did
	report   zone.Report
	seen     time.Time
}

func (o *Orchestrator) newZones(ctx context.Context) (*zones, error) {
	z := &zones{state: map[string]*zoneState{}, changed: make(chan struct{}), grown: make(chan struct{})}
	for _, name := range zoneNames {
		z.state[name] = &zoneState{}
	}
	err := o.ledger.Read(ctx, func(t *ledger.Tx) (err error) {
		z.epoch, err = t.Epoch()
		return err
	})
	return z, err
}

// publish makes the documents from the ledger and signs each that should change or
// whose lease is half over. When it returns, the streams have them.
func (o *Orchestrator) publish(ctx context.Context) error {
	z := o.zones
	mine := z.asked.Add(1)
	z.publishing.Lock()
	defer z.publishing.Unlock()
	if mine <= z.covered { // somebody read the ledger while this call waited
		return nil
	}
	covers := z.asked.Load()
	vms, err := o.zoneVMs(ctx)
	if err != nil {
		return fmt.Errorf("publish zones: %w", err)
	}
	now := o.now()
	docs := o.network.Documents(vms, now)
	for _, name := range zoneNames {
		doc := docs[name]
		plain, err := json.Marshal(timeless(doc))
		if err != nil {
			return fmt.Errorf("publish zone %s: %w", name, err)
		}
		if !z.due(name, plain, now, doc.Lease/2) {
			continue
		}
		if err := o.signZone(ctx, doc, plain, now); err != nil {
			return fmt.Errorf("publish zone %s: %w", name, err)
		}
	}
	z.covered = covers
	return nil
}

// settle returns when every publishing that was asked for by now is done. One that failed
// is not waited for longer than liveWait: the next that succeeds makes up for it.
func (z *zones) settle(ctx context.Context) error {
	done := func(asked int64) bool {
		z.publishing.Lock()
		defer z.publishing.Unlock()
		return z.covered >= asked
	}
	asked := z.asked.Load()
	for end := time.Now().Add(liveWait); !done(asked) && time.Now().Before(end); {
		if err := pause(ctx, settlePause); err != nil {
			return err
		}
	}
	return nil
}

// signZone counts the revision durably, then signs, then shows it to the streams. A
// crash in between leaves a number that no document has.
func (o *Orchestrator) signZone(ctx context.Context, doc zone.Document, plain []byte, now time.Time) error {
	doc.Epoch = o.zones.epoch
	if err := o.ledger.Write(ctx, func(t *ledger.Tx) (err error) {
		doc.Revision, err = t.NextRevision(doc.Zone)
		return err
	}); err != nil {
		return err
	}
	payload, err := json.Marshal(doc)
	if err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	line, err := json.Marshal(signed.Seal(o.ca.Signer(authority.ZoneKey), signed.Zone, payload))
	if err != nil {
		return fmt.Errorf("encode: %w", err)
	}
	z := o.zones
	z.mu.Lock()
	defer z.mu.Unlock()
	s := z.state[doc.Zone]
	if string(s.plain) != string(plain) {
		s.changed = now
	}
	s.revision, s.document, s.line, s.plain, s.signed = doc.Revision, doc, append(line, '\n'), plain, now
	z.wake()
	return nil
}

// zoneVMs reads what the documents depend on, of one moment.
func (o *Orchestrator) zoneVMs(ctx context.Context) ([]policy.VM, error) {
	var vms []policy.VM
	err := o.ledger.Read(ctx, func(t *ledger.Tx) error {
		live, err := t.Live()
		if err != nil {
			return err
		}
		for _, r := range live {
			s, err := t.Start(r.ID, r.Start)
			if err != nil {
				return fmt.Errorf("start %d of %s: %w", r.Start, r.ID, err)
			}
			vms = append(vms, zoneVM(r, s))
		}
		return nil
	})
	return vms, err
}

// zoneVM is what the documents need to know of one live VM.
func zoneVM(r ledger.Reservation, s ledger.Start) policy.VM {
	vm := policy.VM{Reservation: r.ID, Start: r.Start, Phase: r.Phase, Deadline: r.Deadline, Address: r.Address, MAC: r.MAC,
		Running: !s.HostStarted.IsZero()}
	if r.Workload != nil {
		vm.Port = r.Workload.Port
	}
	if s.TunnelAddress.IsValid() {
		vm.Peer = &policy.Peer{Serial: s.Serial, PublicKey: s.WireGuardKey, Address: s.TunnelAddress}
	}
	return vm
}

// timeless is a document without the fields that change while nothing else does.
func timeless(d zone.Document) zone.Document {
	d.Issued = time.Time{}
	d.Flows = append([]zone.Flow{}, d.Flows...)
	for i := range d.Flows {
		d.Flows[i].TTL = 0
	}
	d.Peers = append([]zone.Peer{}, d.Peers...)
	for i := range d.Peers {
		d.Peers[i].TTL = 0
	}
	d.Boots = append([]zone.Boots{}, d.Boots...)
	for i := range d.Boots {
		d.Boots[i].TTL = 0
	}
	return d
}

func (z *zones) due(name string, plain []byte, now time.Time, half time.Duration) bool {
	z.mu.Lock()
	defer z.mu.Unlock()
	s := z.state[name]
	return s.revision == 0 || string(s.plain) != string(plain) || now.Sub(s.signed) >= half
}

// wake tells all waiters; the caller holds mu.
func (z *zones) wake() {
	close(z.changed)
	z.changed = make(chan struct{})
}

// next returns the newest line of a zone behind a revision, or a channel to wait on.
func (z *zones) next(name string, behind int64) (line []byte, revision int64, changed <-chan struct{}) {
	z.mu.Lock()
	defer z.mu.Unlock()
	s := z.state[name]
	if s.revision > behind {
		return s.line, s.revision, z.changed
	}
	return nil, behind, z.changed
}

// report takes what a daemon read back. A report of a revision that was never given,
// or of another epoch, is refused.
func (z *zones) report(r zone.Report, now time.Time) error {
	z.mu.Lock()
	defer z.mu.Unlock()
	s, ok := z.state[r.Zone]
	if !ok || r.Epoch != z.epoch || r.Revision < 0 || r.Revision > s.revision {
		return event.Refuse(event.BadRequest, "report of a document that was not issued")
	}
	if r.Revision >= s.report.Revision || r.Epoch != s.report.Epoch {
		s.report = r
	}
	s.seen = now
	z.wake()
	return nil
}

// waitLive returns when the named zones' newest documents are live in their kernels.
// Acts use it to order effects: nothing is tried over a path that is not open yet.
func (o *Orchestrator) waitLive(ctx context.Context, names ...string) error {
	ctx, cancel := context.WithTimeout(ctx, liveWait)
	defer cancel()
	for _, name := range names {
		want := o.zones.wanted(name)
		for {
			live, fault, changed := o.zones.live(name)
			if live >= want && fault == "" {
				break
			}
			select {
			case <-changed:
			case <-ctx.Done():
				if errors.Is(ctx.Err(), context.Canceled) {
					return ctx.Err()
				}
				return event.Refuse(event.ZoneNotApplied, "zone %s: revision %d is wanted, %d is live %s", name, want, live, fault)
			}
		}
	}
	return nil
}

func (z *zones) wanted(name string) int64 {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.state[name].revision
}

func (z *zones) live(name string) (int64, string, <-chan struct{}) {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.state[name].report.Revision, z.state[name].report.Error, z.changed
}

// rules lists a VM's rules as the daemons last read them back.
func (z *zones) rules(id string) []zone.Live {
	z.mu.Lock()
	defer z.mu.Unlock()
	list := []zone.Live{}
	for _, name := range zoneNames {
		for _, l := range z.state[name].report.Live {
			if l.Reservation == id {
				l.ID = name + ": " + l.ID
				list = append(list, l)
			}
		}
	}
	return list
}

// journalled tells the followers of the journal that it has grown.
func (z *zones) journalled() {
	z.mu.Lock()
	defer z.mu.Unlock()
	close(z.grown)
	z.grown = make(chan struct{})
}

func (z *zones) journalGrown() <-chan struct{} {
	z.mu.Lock()
	defer z.mu.Unlock()
	return z.grown
}

// keepZones publishes whenever half a lease is over.
func (o *Orchestrator) keepZones(ctx context.Context) {
	tick := time.NewTicker(max(o.network.Lease/8, 100*time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := o.publish(ctx); err != nil && ctx.Err() == nil {
				slog.Error("zones", "error", err)
			}
		}
	}
}

// zoneFault journals a daemon's report of failure.
func (o *Orchestrator) zoneFault(ctx context.Context, r zone.Report) {
	o.journal(ctx, event.Event{Kind: "zone.not-applied", Reason: event.ZoneNotApplied,
		Detail: map[string]string{"zone": r.Zone, "error": r.Error, "document": r.Document.Short()}})
}
