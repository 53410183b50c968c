package upstream

import (
	"context"
	"log/slog"
	"net/netip"
	"strconv"
	"sync"
	"time"

	"foothold/protocol/event"
)

// Bounds of the event queue. A daemon that is cut off keeps the newest of its
// trouble out of memory, not its traffic: what does not fit is counted.
const (
	maxQueued   = 8192
	gatherFor   = 200 * time.Millisecond // events that come together travel together
	firstRetry  = 500 * time.Millisecond
	maxRetry    = 15 * time.Second
	lastFlush   = 2 * time.Second // at shutdown
	kindDropped = "events.dropped"
	maxText     = 480 // bytes of one detail; the journal takes 512
)

// Events is the queue of a daemon's events to the journal. Emit never blocks; order
// and sequence are kept; a batch is repeated until the orchestrator takes it.
type Events struct {
	client *Client
	wake   chan struct{}

	mu      sync.Mutex
	seq     int64         // guarded by mu
	queue   []event.Event // guarded by mu
	dropped int           // guarded by mu; since the last events.dropped
}

// NewEvents makes the queue; Run empties it.
func NewEvents(c *Client) *Events {
	return &Events{client: c, wake: make(chan struct{}, 1)}
}

// Emit queues one event; sequence, time and source are set here.
func (e *Events) Emit(ev event.Event) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.queue) >= maxQueued {
		e.dropped++
		return
	}
	if e.dropped > 0 && len(e.queue) < maxQueued-1 {
		e.push(event.Event{Kind: kindDropped, Detail: map[string]string{"count": strconv.Itoa(e.dropped)}})
		e.dropped = 0
	}
	e.push(ev)
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

// TLSRefused tells of connections that ended in their handshake: of another authority,
// name, usage or version (serve.TellRefused).
func (e *Events) TLSRefused(listener string) func(netip.Addr, string, int) {
	return func(from netip.Addr, why string, count int) {
		e.Emit(event.Event{Kind: "tls.refused", Reason: event.NotPermitted,
			Detail: map[string]string{"listener": listener, "from": from.String(), "why": why, "count": strconv.Itoa(count)}})
	}
}

// push needs mu.
func (e *Events) push(ev event.Event) {
	for k, v := range ev.Detail {
		if len(v) > maxText {
			ev.Detail[k] = v[:maxText] + "..."
		}
	}
	e.seq++
	ev.Seq, ev.Time, ev.Source = e.seq, time.Now().UTC(), e.client.Identity().String()
	e.queue = append(e.queue, ev)
}

// Run sends batches until ctx ends, and then once more for what is left.
func (e *Events) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			e.flushLast(context.WithoutCancel(ctx))
			return
		case <-e.wake:
		}
		if !wait(ctx, gatherFor) {
			continue
		}
		e.drain(ctx)
	}
}

// drain sends until the queue is empty or ctx ends.
func (e *Events) drain(ctx context.Context) {
	retry := firstRetry
	for batch := e.head(); len(batch) > 0; batch = e.head() {
		err := e.client.sendEvents(ctx, batch)
		if event.ReasonOf(err) == event.BadRequest {
			e.discard(batch, err)
			continue
		}
		if err != nil {
			slog.Warn("events not delivered", "err", err, "waiting", len(batch))
			if !wait(ctx, retry) {
				return
			}
			retry = min(2*retry, maxRetry)
			continue
		}
		retry = firstRetry
		e.remove(len(batch))
	}
}

// discard gives up the first event of a batch that the orchestrator will never take as
// it is, lest it holds up all that follow. The log keeps what the journal does not.
func (e *Events) discard(batch []event.Event, err error) {
	slog.Error("event refused by the orchestrator", "event", batch[0], "err", err)
	e.mu.Lock()
	e.dropped++
	e.mu.Unlock()
	e.remove(1)
}

func (e *Events) flushLast(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, lastFlush)
	defer cancel()
	for batch := e.head(); len(batch) > 0; batch = e.head() {
		if err := e.client.sendEvents(ctx, batch); err != nil {
			slog.Warn("events lost at shutdown", "err", err, "count", len(batch))
			return
		}
		e.remove(len(batch))
	}
}

func (e *Events) head() []event.Event {
	e.mu.Lock()
	defer e.mu.Unlock()
	return append([]event.Event(nil), e.queue[:min(len(e.queue), event.MaxBatch)]...)
}

// remove is called only by the one sender, so the head is still what it sent.
func (e *Events) remove(n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.queue = append([]event.Event(nil), e.queue[n:]...)
	if len(e.queue) == 0 && e.dropped > 0 {
		e.push(event.Event{Kind: kindDropped, Detail: map[string]string{"count": strconv.Itoa(e.dropped)}})
		e.dropped = 0
	}
}

// wait reports false when ctx ended first.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
