package orchestrator

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// placePause is how often a VM that waits for a place looks again when nobody tells it
// that one is free: a host may have become fit meanwhile.
const placePause = time.Second

// errNoPlace says that each host that could take a VM has as many in phase booting as
// limits.boots_at_once, or that what is free there is for those who wait in front.
var errNoPlace = errors.New("no host has a place for another VM that boots")

// waitsSince is since when a VM waits for a place at a host; zero if it does not.
func waitsSince(r ledger.Reservation, now time.Time) time.Time {
	switch due := r.NextStart(); {
	case r.Phase == reservation.Reserved:
		return r.Created
	case r.Gone && !due.IsZero() && !due.After(now):
		return due
	}
	return time.Time{}
}

// placesFor says which of the hosts have room for r's boot, or errNoPlace. There must be
// one place more than there are VMs that wait longer and could take it, so those who
// came first go first, whoever looks first. Which VMs boot and wait is in the ledger
// alone; a place is free again with the move that ends the phase.
func placesFor(r ledger.Reservation, live []ledger.Reservation, hosts []string, most int, now time.Time) ([]string, error) {
	since := waitsSince(r, now)
	if since.IsZero() {
		return nil, ledger.ErrMoved
	}
	booting, ahead := map[string]int{}, 0
	for _, other := range live {
		if other.Phase == reservation.Booting {
			booting[other.Host]++
		}
		at := waitsSince(other, now)
		if at.IsZero() || other.ID == r.ID || other.Host != "" && !slices.Contains(hosts, other.Host) {
			continue
		}
		if at.Before(since) || at.Equal(since) && other.ID < r.ID {
			ahead++
		}
	}
	var room []string
	free := 0
	for _, h := range hosts {
		if n := most - booting[h]; n > 0 {
			room, free = append(room, h), free+n
		}
	}
	if free <= ahead {
		return nil, errNoPlace
	}
	return room, nil
}

// bell tells those who wait that a place may be free; its zero value is ready.
type bell struct {
	mu   sync.Mutex
	rung chan struct{} // guarded by mu; closed and replaced
}

// next is closed when the bell rings.
func (b *bell) next() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rung == nil {
		b.rung = make(chan struct{})
	}
	return b.rung
}

func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.rung != nil {
		close(b.rung)
		b.rung = nil
	}
}

// await waits for the bell, or placePause, or until ctx ends.
func await(ctx context.Context, rung <-chan struct{}) error {
	timer := time.NewTimer(placePause)
	defer timer.Stop()
	select {
	case <-rung:
	case <-timer.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	return nil
}
