package broker

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/pcr"

	"github.com/google/go-tpm/tpm2"
)

// How a turn may end early.
var (
	ErrRefused = errors.New("TPM command refused")         // with the VM's reason to end
	ErrOver    = errors.New("the VM's turn is over")       // by its time limit, or released
	ErrTimeout = errors.New("the VM's turn took too long") // cause of ErrOver by the time limit
)

// state of a turn.
type state int

const (
	held    state = iota // registers hold the VM's measurements
	started              // its session is open
	quoted               // the quote has passed; the TPM is free
	ended                // without a quote
)

// Hold is one VM's turn. Its methods are safe for concurrent use.
type Hold struct {
	b      *Broker
	since  time.Time
	timer  *time.Timer
	ending chan struct{} // closed at the end

	mu      sync.Mutex // guards what follows; taken before Broker.mu
	state   state
	session uint32 // of the VM, while started; afterwards the one it may still flush
	flushed bool   // the late flush was answered
	taken   time.Duration
	cause   error
}

// Hold waits for the tenant's turn, then resets PCR 16 and 23 and extends them:
// measurements, which must be of PCR 16, and tunnel into PCR 23. ctx bounds the
// waiting; afterwards only the time limit, Forward and Release end the turn.
func (b *Broker) Hold(ctx context.Context, tenant string, measurements []pcr.Event, tunnel digest.SHA256) (*Hold, error) {
	for _, e := range measurements {
		if e.PCR != pcr.VM || e.Digest.IsZero() {
			return nil, fmt.Errorf("hold the TPM: %q is no measurement of a VM", e.Name)
		}
	}
	if len(measurements) == 0 || tunnel.IsZero() {
		return nil, errors.New("hold the TPM: nothing to measure")
	}
	if err := b.turns.take(ctx, tenant); err != nil {
		return nil, fmt.Errorf("wait for the TPM: %w", err)
	}
	h := &Hold{b: b, since: time.Now(), ending: make(chan struct{})}
	if err := b.measure(append(measurements[:len(measurements):len(measurements)], pcr.Event{PCR: pcr.Tunnel, Digest: tunnel, Name: "tunnel"})); err != nil {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.end(ended, err)
		return nil, fmt.Errorf("hold the TPM: %w", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.timer = time.AfterFunc(b.timeout, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.end(ended, ErrTimeout)
	})
	return h, nil
}

// measure resets both registers and extends the events.
func (b *Broker) measure(events []pcr.Event) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failed {
		return ErrFailed
	}
	return b.inSession(func(s tpm2.Session) error {
		if err := reset(b.dev, s); err != nil {
			return err
		}
		for _, e := range events {
			if err := extend(b.dev, s, e); err != nil {
				return err
			}
		}
		return nil
	})
}

// Forward passes one of the VM's commands to the TPM and returns the response. A
// command of another shape or out of order is [ErrRefused] and ends the turn; one
// after the turn's end is [ErrOver], save the flush of the VM's own session, which the
// broker has flushed already.
func (h *Hold) Forward(command []byte) ([]byte, error) {
	req, err := parse(command)
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case err != nil:
	case h.state == held && req.kind == startSession:
		return h.start(command)
	case h.state == started && req.kind == quote && req.session == h.session:
		return h.quote(command)
	case h.state == quoted && req.kind == flush && req.session == h.session && !h.flushed:
		h.flushed = true
		return flushed(), nil
	case h.state == ended:
		return nil, fmt.Errorf("%w: %w", ErrOver, h.cause)
	default:
		err = errors.New("out of order")
	}
	h.end(ended, ErrRefused)
	return nil, fmt.Errorf("%w: %w", ErrRefused, err)
}

// start must be called with h.mu held.
func (h *Hold) start(command []byte) ([]byte, error) {
	response, err := h.b.send(command)
	if err != nil {
		h.end(ended, err)
		return nil, err
	}
	session, ok := startedSession(response)
	if !ok {
		h.end(ended, errors.New("the TPM refused the session"))
		return response, nil
	}
	h.session, h.state = session, started
	return response, nil
}

// quote must be called with h.mu held.
func (h *Hold) quote(command []byte) ([]byte, error) {
	response, err := h.b.send(command)
	if err != nil {
		h.end(ended, err)
		return nil, err
	}
	if !succeeded(response) {
		h.end(ended, errors.New("the TPM refused the quote"))
		return response, nil
	}
	h.end(quoted, nil)
	return response, nil
}

// send passes a parsed command.
func (b *Broker) send(command []byte) ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failed {
		return nil, ErrFailed
	}
	response, err := b.dev.Send(command)
	if err != nil {
		return nil, fmt.Errorf("forward TPM command: %w", err)
	}
	return response, nil
}

// end flushes the VM's session, resets both registers and passes the turn on. It
// must be called with h.mu held; only the first call counts.
func (h *Hold) end(final state, cause error) {
	if h.state >= quoted {
		return
	}
	session := uint32(0)
	if h.state == started {
		session = h.session
	}
	h.state, h.cause = final, cause
	if h.timer != nil {
		h.timer.Stop()
	}
	h.b.clean(session)
	h.taken = time.Since(h.since)
	close(h.ending)
	h.b.turns.free()
}

// clean leaves nothing of a VM in the TPM; what cannot be cleaned is never used again.
func (b *Broker) clean(session uint32) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failed {
		return
	}
	if err := b.flushAndReset(session); err != nil {
		b.fail()
	}
}

func (b *Broker) flushAndReset(session uint32) error {
	if session != 0 {
		_, err := tpm2.FlushContext{FlushHandle: tpm2.TPMHandle(session)}.Execute(b.dev)
		// A quote without continueSession has ended its session by itself.
		if err != nil && !errors.Is(err, tpm2.TPMRCHandle) && !errors.Is(err, tpm2.TPMRCValue) && !errors.Is(err, tpm2.TPMRCReferenceH0) {
			return fmt.Errorf("flush the VM's session: %w", err)
		}
	}
	return b.inSession(func(s tpm2.Session) error { return reset(b.dev, s) })
}

// Release ends the turn if it has not ended; it may be called at any time.
func (h *Hold) Release() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.end(ended, errors.New("released"))
}

// Ended is closed when the TPM is free again.
func (h *Hold) Ended() <-chan struct{} { return h.ending }

// Quoted reports whether the turn came to its quote.
func (h *Hold) Quoted() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.state == quoted
}

// Cause is why a turn ended without a quote, or nil.
func (h *Hold) Cause() error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.cause
}

// Taken is how long the TPM was held, from the turn's beginning to its end.
func (h *Hold) Taken() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.state < quoted {
		return time.Since(h.since)
	}
	return h.taken
}
