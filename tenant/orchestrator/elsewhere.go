package orchestrator

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"strconv"
	"sync"
	"time"

	"foothold/protocol/event"
	"foothold/protocol/hostapi"
	"foothold/tenant/hostclient"
	"foothold/tenant/ledger"
)

// Looks at what hosts list: copies of VMs, and frames that were dropped of them.
const (
	listEvery = time.Minute
	listsOnce = 16 // hosts that are asked at once
)

// watchListings looks again and again whether a host lists a VM that is another's. A
// measured VM does not move: its quote is bound to the host that acknowledged it, so
// whatever runs elsewhere under its name is a copy.
func (o *Orchestrator) watchListings(ctx context.Context) {
	told := map[[2]string]bool{}
	for pause(ctx, o.listEvery) == nil {
		o.lookElsewhere(ctx, told)
	}
}

// elsewhere is a VM in the listing of a host that is not its own.
type elsewhere struct {
	at   string
	host *hostclient.Client
	vm   hostapi.VM
}

// lookElsewhere asks all hosts, former ones too. told holds, by host and VM, what is in the
// journal; a copy that its host does not destroy is not told of at every look. A host that
// does not answer is for others to complain of.
func (o *Orchestrator) lookElsewhere(ctx context.Context, told map[[2]string]bool) {
	b := o.basis()
	hosts := maps.Clone(b.hosts)
	maps.Copy(hosts, b.former)
	var mu sync.Mutex
	var found []elsewhere
	var asked sync.WaitGroup
	turns := make(chan struct{}, listsOnce)
	for name, h := range hosts {
		turns <- struct{}{}
		asked.Go(func() {
			defer func() { <-turns }()
			vms, err := h.VMs(ctx)
			if err != nil {
				slog.Debug("list VMs", "host", name, "error", err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			for _, vm := range vms {
				found = append(found, elsewhere{name, h, vm})
			}
		})
	}
	asked.Wait()
	for _, f := range found {
		if err := o.endElsewhere(ctx, f, told); err != nil && ctx.Err() == nil {
			slog.Warn("VM at another host", "host", f.at, "reservation", f.vm.ID, "error", err)
		}
	}
}

// endElsewhere ends a VM that another host than its own lists, and has the copy destroyed.
// The row was written before its host was asked for the VM, and never names another host
// since: what the listing says after it cannot be older.
func (o *Orchestrator) endElsewhere(ctx context.Context, f elsewhere, told map[[2]string]bool) error {
	r, err := o.findAny(ctx, f.vm.ID)
	if errors.Is(err, ledger.ErrNotFound) { // a stranger: fsck names it
		return nil
	}
	if err != nil {
		return err
	}
	if r.Host == f.at {
		o.tellDropped(ctx, r, f.vm)
		return nil
	}
	if key := [2]string{f.at, r.ID}; !told[key] {
		told[key] = true
		o.journal(ctx, event.Event{Kind: "vm.moved", Reservation: r.ID, Reason: event.VMMoved, Detail: map[string]string{
			"host": r.Host, "seen-at": f.at, "start": strconv.Itoa(f.vm.Start), "state": clip(f.vm.State, maxText)}})
	}
	o.abort(context.WithoutCancel(ctx), r.ID, 0, event.Refuse(event.VMMoved, "host %s lists it, its own is %s", f.at, r.Host))
	_, err = f.host.Destroy(ctx, r.ID)
	return err
}
