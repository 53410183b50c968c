package upstream

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strconv"
	"time"

	"foothold/internal/strictjson"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/signed"
	wire "foothold/protocol/upstream"
	"foothold/protocol/zone"
)

// Watcher keeps one daemon at the newest zone document.
type Watcher struct {
	client *Client
	events *Events
	zone   string
	target Target
	mark   *watermark

	docs chan *State   // newest accepted document, capacity 1
	ask  chan struct{} // report again although nothing changed
	read chan error    // a full reading's end
}

// Target is the daemon that a document describes.
type Target interface {
	// Apply makes the kernel what s says, wholly or, with an error, not at all, and
	// reads back what it changed; it is called again with the same document after an
	// error and when the daemon restarts. Calls do not overlap.
	Apply(ctx context.Context, s *State) error
	// Reread reads everything back, for what others changed. It may overlap with Apply
	// and does not hold it up.
	Reread() error
	// Live is what is in effect by the newest readings.
	Live() ([]zone.Live, error)
}

// Times of the watcher.
const (
	reconnectFirst = 250 * time.Millisecond
	reconnectMax   = 5 * time.Second
	applyRetry     = time.Second
	rereadEvery    = 10 * time.Second // so that what others changed is seen upstream
	silenceLeases  = 2                // a stream that is silent for so many leases is dead
	defaultSilence = 2 * time.Minute  // before the first document
	maxLine        = zone.MaxDocument/3*4 + 4096
)

// NewWatcher opens the persisted state in dir and re-applies its document with what
// is left of its times, so that a restart neither opens nor loses anything.
func NewWatcher(ctx context.Context, c *Client, ev *Events, name, dir string, t Target) (*Watcher, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	mark, env, err := openWatermark(dir)
	if err != nil {
		return nil, err
	}
	w := &Watcher{client: c, events: ev, zone: name, target: t, mark: mark,
		docs: make(chan *State, 1), ask: make(chan struct{}, 1), read: make(chan error)}
	if mark.held == nil {
		return w, nil
	}
	if err := env.Open(c.zoneKey, signed.Zone, &mark.held.Document); err != nil {
		return nil, fmt.Errorf("last zone document: %w", err)
	}
	if mark.held.Document.Zone != name {
		return nil, fmt.Errorf("last zone document is for zone %q, not %q", mark.held.Document.Zone, name)
	}
	if err := t.Apply(ctx, mark.held); err != nil {
		return nil, fmt.Errorf("re-apply zone document %d.%d: %w", mark.held.Document.Epoch, mark.held.Document.Revision, err)
	}
	slog.Info("zone document re-applied", "epoch", mark.held.Document.Epoch, "revision", mark.held.Document.Revision)
	return w, nil
}

// Run follows the stream until ctx ends.
func (w *Watcher) Run(ctx context.Context) {
	go w.applyLoop(ctx, w.mark.held)
	go w.rereadLoop(ctx)
	pause := reconnectFirst
	for ctx.Err() == nil {
		got, err := w.follow(ctx)
		if ctx.Err() != nil {
			return
		}
		if got {
			pause = reconnectFirst
		}
		slog.Warn("zone stream ended", "zone", w.zone, "err", err, "again_in", pause.String())
		wait(ctx, pause)
		pause = min(2*pause, reconnectMax)
	}
}

// follow reads one stream; it reports whether a good document came.
func (w *Watcher) follow(ctx context.Context) (bool, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	silent := time.AfterFunc(defaultSilence, cancel)
	defer silent.Stop()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, w.client.base+wire.PathZone, nil)
	if err != nil {
		return false, fmt.Errorf("follow zone: %w", err)
	}
	res, err := w.client.http.Do(req)
	if err != nil {
		return false, fmt.Errorf("follow zone: %w", err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return false, problem(wire.PathZone, res)
	}
	lines := bufio.NewReaderSize(res.Body, 64<<10)
	good := false
	for {
		line, err := readLine(lines)
		if err != nil {
			return good, err
		}
		if len(line) == 0 {
			continue // keep-alive
		}
		state, err := w.accept(line)
		if err != nil {
			return good, err
		}
		good = true
		silent.Reset(max(silenceLeases*state.Document.Lease, reconnectMax))
	}
}

// forged is why a document is refused that the orchestrator did not sign.
const forged = "signature"

// accept takes one line of the stream: verify, compare, persist, hand to applyLoop.
func (w *Watcher) accept(line []byte) (*State, error) {
	received := Boottime()
	var env signed.Envelope
	if err := strictjson.Unmarshal(line, &env); err != nil {
		return nil, w.refuse("malformed", fmt.Errorf("zone document: %w", err))
	}
	s := &State{Received: received, Digest: digest.Of(env.Payload)}
	if err := env.Open(w.client.zoneKey, signed.Zone, &s.Document); err != nil {
		return nil, w.refuse(forged, fmt.Errorf("zone document: %w", err))
	}
	d := &s.Document
	if d.Zone != w.zone || d.Epoch < 1 || d.Revision < 1 || d.Lease <= 0 {
		return nil, w.refuse("form", fmt.Errorf("zone document is for zone %q, epoch %d, revision %d, lease %s", d.Zone, d.Epoch, d.Revision, d.Lease))
	}
	switch w.mark.compare(d, s.Digest) {
	case same:
		select {
		case w.ask <- struct{}{}:
		default:
		}
		return w.mark.held, nil
	case older:
		return nil, w.refuse("rollback", fmt.Errorf("zone document %d.%d is not newer than %d.%d", d.Epoch, d.Revision, w.mark.held.Document.Epoch, w.mark.held.Document.Revision))
	}
	// A crash after this line re-applies the document at start; one before it asks the
	// orchestrator again.
	if err := w.mark.advance(s, env); err != nil {
		return nil, err
	}
	select { // the newest document replaces one that was not applied yet
	case <-w.docs:
	default:
	}
	w.docs <- s
	return s, nil
}

func (w *Watcher) refuse(why string, err error) error {
	reason := event.ZoneRefused
	if why == forged {
		reason = event.SignatureInvalid
	}
	w.events.Emit(event.Event{Kind: "zone.refused", Reason: reason, Detail: map[string]string{"zone": w.zone, "why": why}})
	return err
}

// applyLoop applies what accept persisted and reports what is live.
func (w *Watcher) applyLoop(ctx context.Context, current *State) {
	var failed error
	retry := time.NewTimer(0)
	if current == nil {
		retry.Stop()
	}
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case s := <-w.docs:
			current = s
			failed = w.apply(ctx, s)
		case <-retry.C:
			if failed != nil {
				failed = w.apply(ctx, current)
			}
		case <-w.ask:
		case err := <-w.read:
			if err != nil && current != nil {
				slog.Error("zone not read back", "zone", w.zone, "err", err)
				failed = w.apply(ctx, current)
			}
		}
		if failed != nil {
			retry.Reset(applyRetry)
		}
		if current != nil {
			w.report(ctx, current, failed)
		}
	}
}

// rereadLoop has everything read back now and then, and a report made of it. What cannot
// be read is made anew.
func (w *Watcher) rereadLoop(ctx context.Context) {
	tick := time.NewTicker(rereadEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		select {
		case <-ctx.Done():
			return
		case w.read <- w.target.Reread():
		}
	}
}

func (w *Watcher) apply(ctx context.Context, s *State) error {
	err := w.target.Apply(ctx, s)
	if err != nil {
		slog.Error("zone document not applied", "revision", s.Document.Revision, "err", err)
		w.events.Emit(event.Event{Kind: "zone.failed", Reason: event.ZoneNotApplied,
			Detail: map[string]string{"zone": w.zone, "revision": strconv.FormatInt(s.Document.Revision, 10), "error": err.Error()}})
	}
	return err
}

func (w *Watcher) report(ctx context.Context, s *State, failed error) {
	r := zone.Report{Zone: w.zone, Epoch: s.Document.Epoch, Revision: s.Document.Revision, Document: s.Digest}
	live, err := w.target.Live()
	r.Live = live
	if err := errors.Join(failed, err); err != nil {
		r.Error = err.Error()
	}
	if err := w.client.Report(ctx, r); err != nil && ctx.Err() == nil {
		slog.Warn("zone report not delivered", "zone", w.zone, "err", err)
	}
}

// readLine reads one line of at most maxLine bytes, without its end.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line)+len(part) > maxLine {
			return nil, errors.New("line of the zone stream is over its limit")
		}
		line = append(line, part...)
		switch {
		case err == nil:
			return line[:len(line)-1], nil
		case errors.Is(err, bufio.ErrBufferFull):
		case errors.Is(err, io.EOF):
			return nil, io.ErrUnexpectedEOF
		default:
			return nil, err
		}
	}
}
