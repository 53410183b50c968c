package broker

import (
	"context"
	"errors"
	"slices"
	"sync"
)

// maxWaiting bounds one tenant's waiting VMs.
const maxWaiting = 256

// ErrBusy is returned to a tenant with too many VMs waiting already.
var ErrBusy = errors.New("too many VMs of this tenant wait for the TPM")

// queue gives one thing to one taker at a time: tenants in turn, the VMs of each
// tenant in the order in which they came. A tenant with many VMs waiting delays
// another's first one by a single turn.
type queue struct {
	mu      sync.Mutex
	taken   bool
	turn    []string                   // tenants with VMs waiting, next first
	waiting map[string][]chan struct{} // by tenant; a channel is closed to hand the turn over
}

// take waits for the turn until ctx ends. Whoever got it must call free.
func (q *queue) take(ctx context.Context, tenant string) error {
	q.mu.Lock()
	if !q.taken {
		q.taken = true
		q.mu.Unlock()
		return nil
	}
	if len(q.waiting[tenant]) >= maxWaiting {
		q.mu.Unlock()
		return ErrBusy
	}
	mine := make(chan struct{})
	if len(q.waiting[tenant]) == 0 {
		q.turn = append(q.turn, tenant)
	}
	if q.waiting == nil {
		q.waiting = map[string][]chan struct{}{}
	}
	q.waiting[tenant] = append(q.waiting[tenant], mine)
	q.mu.Unlock()
	select {
	case <-mine:
		return nil
	case <-ctx.Done():
	}
	if !q.leave(tenant, mine) { // it was handed over meanwhile
		q.free()
	}
	return context.Cause(ctx)
}

// leave withdraws a waiting taker and reports whether it was still waiting.
func (q *queue) leave(tenant string, mine chan struct{}) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	line := q.waiting[tenant]
	i := slices.Index(line, mine)
	if i < 0 {
		return false
	}
	q.waiting[tenant] = slices.Delete(line, i, i+1)
	if len(q.waiting[tenant]) == 0 {
		delete(q.waiting, tenant)
		q.turn = slices.DeleteFunc(q.turn, func(name string) bool { return name == tenant })
	}
	return true
}

// waited reports whether somebody has the thing or waits for it.
func (q *queue) waited() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.taken
}

// free hands the turn to the next.
func (q *queue) free() {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.turn) == 0 {
		q.taken = false
		return
	}
	tenant := q.turn[0]
	q.turn = q.turn[1:]
	line := q.waiting[tenant]
	next := line[0]
	if line = line[1:]; len(line) == 0 {
		delete(q.waiting, tenant)
	} else {
		q.waiting[tenant] = line
		q.turn = append(q.turn, tenant)
	}
	close(next)
}
