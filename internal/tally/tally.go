// Package tally counts what a daemon refuses until that is told, so that a flood becomes a few
// lines of a log and a few entries of a journal.
package tally

import (
	"context"
	"maps"
	"sync"
	"time"
)

// Tally counts by kind. It is safe for concurrent use.
type Tally[K comparable] struct {
	most   int        // kinds that are told apart between two tellings
	others func(K) K  // the kind that stands for one too many; it has few values
	mu     sync.Mutex //
	counts map[K]int  // guarded by mu; since the last telling
}

// New makes a tally that tells at most most kinds apart, and counts any further one as others
// says.
func New[K comparable](most int, others func(K) K) *Tally[K] {
	return &Tally[K]{most: most, others: others, counts: map[K]int{}}
}

// Count counts one.
func (t *Tally[K]) Count(kind K) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, known := t.counts[kind]; !known && len(t.counts) >= t.most {
		kind = t.others(kind)
	}
	t.counts[kind]++
}

// Take returns what was counted since the last call.
func (t *Tally[K]) Take() map[K]int {
	t.mu.Lock()
	defer t.mu.Unlock()
	counts := maps.Clone(t.counts)
	clear(t.counts)
	return counts
}

// Run has tell called with each kind and its count, again and again, until ctx ends.
func (t *Tally[K]) Run(ctx context.Context, every time.Duration, tell func(kind K, count int)) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for kind, n := range t.Take() {
			tell(kind, n)
		}
	}
}
