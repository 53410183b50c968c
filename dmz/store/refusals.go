package store

import (
	"context"
	"log/slog"
	"maps"
	"strconv"
	"sync"
	"time"

	"foothold/internal/mtls"
	"foothold/protocol/event"
	"foothold/protocol/vmspec"
)

// Bounds of what a flood of refused calls may become.
const (
	tellEvery = 2 * time.Second
	maxKinds  = 64 // that are told apart between two tellings
)

// refusal is what makes two refused calls the same for the journal. Nothing in it is the
// caller's own text, so that one caller makes but a few kinds.
type refusal struct {
	by          string // caller's role and name
	reservation string // of a VM that calls
	call        string // pattern of the path
	reason      event.Reason
	why         string
}

// refusals counts refused calls until they are told.
type refusals struct {
	mu     sync.Mutex
	counts map[refusal]int // guarded by mu; since the last telling
}

func newRefusals() *refusals { return &refusals{counts: map[refusal]int{}} }

// count counts one call of who that was refused.
func (r *refusals) count(who mtls.Identity, k refusal) {
	k.by = who.String()
	if who.Role == mtls.VM && vmspec.ValidID(who.Name) {
		k.reservation = who.Name
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, known := r.counts[k]; !known && len(r.counts) >= maxKinds {
		k = refusal{reason: k.reason, by: "others"}
	}
	r.counts[k]++
}

// tell turns what was refused into events, so that a flood stays small, until ctx ends.
func (r *refusals) tell(ctx context.Context, emit func(event.Event)) {
	tick := time.NewTicker(tellEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			r.flush(emit)
		}
	}
}

func (r *refusals) flush(emit func(event.Event)) {
	r.mu.Lock()
	counts := maps.Clone(r.counts)
	clear(r.counts)
	r.mu.Unlock()
	for k, n := range counts {
		slog.Warn("calls refused", "by", k.by, "call", k.call, "reason", string(k.reason), "why", k.why, "count", n)
		emit(event.Event{Kind: "store.refused", Reservation: k.reservation, Reason: k.reason,
			Detail: map[string]string{"by": k.by, "call": k.call, "detail": k.why, "count": strconv.Itoa(n)}})
	}
}
