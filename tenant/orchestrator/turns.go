package orchestrator

import (
	"context"
	"sync"
)

// turns lets one piece of work at a time happen for each name; its zero value is ready.
type turns struct {
	mu   sync.Mutex
	held map[string]*turn // guarded by mu; those that somebody has or waits for
}

type turn struct {
	token chan struct{}
	users int // guarded by turns.mu
}

// take waits for the name's turn, which lasts until release is called, or until ctx
// ends.
func (t *turns) take(ctx context.Context, name string) (release func(), err error) {
	t.mu.Lock()
	if t.held == nil {
		t.held = map[string]*turn{}
	}
	mine := t.held[name]
	if mine == nil {
		mine = &turn{token: make(chan struct{}, 1)}
		t.held[name] = mine
	}
	mine.users++
	t.mu.Unlock()
	leave := func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		if mine.users--; mine.users == 0 {
			delete(t.held, name)
		}
	}
	select {
	case mine.token <- struct{}{}:
		return func() { <-mine.token; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}

// taken reports whether somebody has the name's turn, or waits for it.
func (t *turns) taken(name string) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.held[name] != nil
}
