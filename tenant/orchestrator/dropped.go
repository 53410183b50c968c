package orchestrator

import (
	"context"
	"strconv"
	"sync"

	"foothold/protocol/event"
	"foothold/protocol/hostapi"
	"foothold/tenant/ledger"
)

// bridgeDropped is the entry that tells of frames that a host's bridge dropped of a VM: it
// sent them past the firewall, to a neighbour, or under an address that is not its own.
const bridgeDropped = "bridge.dropped"

// dropped is what was told of each VM at a host, so that a look that finds no more tells
// nothing. It is the host's word, and one entry a VM and look at most.
type dropped struct {
	mu   sync.Mutex
	told map[string]drops // guarded by mu; by reservation, until its VM is destroyed
}

// drops are the frames of one start.
type drops struct {
	start  int
	frames hostapi.Dropped
}

// news reports whether a host's word of a VM says more than what was told, and takes it as told.
func (d *dropped) news(id string, now drops) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if now.frames == (hostapi.Dropped{}) || d.told[id] == now {
		return false
	}
	if d.told == nil {
		d.told = map[string]drops{}
	}
	d.told[id] = now
	return true
}

func (d *dropped) forget(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.told, id)
}

// tellDropped enters what its host's bridge dropped of a VM, so far in this start, if that
// is more than was told. After a restart of the orchestrator it is told once more.
func (o *Orchestrator) tellDropped(ctx context.Context, r ledger.Reservation, vm hostapi.VM) {
	if !o.dropped.news(r.ID, drops{vm.Start, vm.Dropped}) {
		return
	}
	count := func(n uint64) string { return strconv.FormatUint(n, 10) }
	e := event.Event{Kind: bridgeDropped, Reservation: r.ID, Reason: event.TrafficRefused, Detail: map[string]string{
		"host": r.Host, "start": strconv.Itoa(vm.Start), "other-source": count(vm.Dropped.OtherSource), "neighbour": count(vm.Dropped.Neighbour)}}
	if !o.journalled.take("host/"+r.Host, size([]event.Event{e}), o.now()) {
		o.dropped.forget(r.ID) // a later look tells it
		return
	}
	o.journal(ctx, e)
}
