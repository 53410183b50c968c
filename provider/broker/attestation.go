package broker

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/pcr"
)

// How an attestation may end without a quote.
var (
	ErrRefused = errors.New("TPM command refused")                            // with the VM's reason to end
	ErrOver    = errors.New("the VM's attestation is over")                   // by its time limit, or released
	ErrTimeout = errors.New("the VM's next TPM command did not come in time") // cause of ErrOver by the time limit
	ErrTPM     = errors.New("the TPM refused")                                // the VM's session or quote: they are not meant for it
	ErrEvicted = errors.New("the VM's TPM session had to make room for another tenant's")
)

// state of an attestation. It only grows.
type state int

const (
	waiting state = iota // for the session's start
	started              // its session is open
	quoted               // the quote has passed
	ended                // without a quote
)

// Attestation is one VM's way to its boot quote. Its methods are safe for concurrent use.
type Attestation struct {
	b      *Broker
	tenant string
	events []pcr.Event   // what the quote is to prove, PCR 23 last
	ending chan struct{} // closed at the end

	mu      sync.Mutex // held for one command, and for the end; taken before Broker.mu. It guards what follows
	state   state
	timer   *time.Timer
	due     time.Time // when the VM's next command is late
	session *session  // of the VM, while started
	handle  uint32    // of the session, which may be flushed once more after the quote; 0: there was none
	flushed bool      // that late flush was answered
	held    time.Duration
	cause   error
}

// Attest takes down what a VM's quote is to prove: measurements, which must be of PCR 16,
// and tunnel for PCR 23. The TPM is not taken before the VM's quote command is there. The
// VM has the broker's time limit for each of its commands, waiting for others not counted.
func (b *Broker) Attest(tenant string, measurements []pcr.Event, tunnel digest.SHA256) (*Attestation, error) {
	for _, e := range measurements {
		if e.PCR != pcr.VM || e.Digest.IsZero() {
			return nil, fmt.Errorf("attest: %q is no measurement of a VM", e.Name)
		}
	}
	if len(measurements) == 0 || tunnel.IsZero() {
		return nil, errors.New("attest: nothing to measure")
	}
	select {
	case <-b.lost:
		return nil, ErrFailed
	default:
	}
	a := &Attestation{b: b, tenant: tenant, ending: make(chan struct{}),
		events: append(measurements[:len(measurements):len(measurements)], pcr.Event{PCR: pcr.Tunnel, Digest: tunnel, Name: "tunnel"})}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.due = time.Now().Add(b.timeout)
	a.timer = time.AfterFunc(b.timeout, a.late)
	return a, nil
}

// late ends the attestation if the VM's next command is late.
func (a *Attestation) late() {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !time.Now().Before(a.due) {
		a.end(ended, ErrTimeout)
	}
}

// Forward passes one of the VM's commands to the TPM and returns the response. ctx bounds
// the waiting for others' turns. A command of another shape or out of order is [ErrRefused]
// and ends the attestation; one after its end is [ErrOver], save the flush of the VM's own
// session, which the broker has flushed already.
func (a *Attestation) Forward(ctx context.Context, command []byte) ([]byte, error) {
	req, err := parse(command)
	defer a.b.sessions.ring() // whoever waits for a place may find this one idle now
	a.mu.Lock()
	defer a.mu.Unlock()
	defer func() { // from here on it is the VM's time again
		a.due = time.Now().Add(a.b.timeout)
		if a.state < quoted {
			a.timer.Reset(a.b.timeout)
		}
	}()
	switch {
	case err == nil && req.kind == flush && req.session == a.handle && !a.flushed && (a.state == quoted || errors.Is(a.cause, ErrTPM)):
		a.flushed = true
		return flushed(), nil
	case a.state == ended:
		return nil, fmt.Errorf("%w: %w", ErrOver, a.cause)
	case err != nil:
	case a.state == waiting && req.own && !a.b.hasOwn(a.tenant):
		err = errors.New("this tenant has no session key of its own here")
	case a.state == waiting && req.kind == startSession:
		return a.start(ctx, command, req.own)
	case a.state == started && req.kind == quote && req.session == a.handle:
		return a.quote(ctx, command, req.last)
	default:
		err = errors.New("out of order")
	}
	a.end(ended, ErrRefused)
	return nil, fmt.Errorf("%w: %w", ErrRefused, err)
}

// start opens the VM's session and puts it aside, outside the TPM, which has room for
// few. The caller holds a.mu.
func (a *Attestation) start(ctx context.Context, command []byte, own bool) ([]byte, error) {
	s, err := a.b.sessions.take(ctx, a)
	if err != nil {
		a.end(ended, err)
		return nil, fmt.Errorf("wait for a TPM session: %w", err)
	}
	a.session = s
	if err := a.b.turns.take(ctx, a.tenant); err != nil {
		a.end(ended, err)
		return nil, fmt.Errorf("wait for the TPM: %w", err)
	}
	defer a.b.turns.free()
	response, ok, err := a.b.open(s, command, own)
	if err != nil {
		a.end(ended, err)
		return nil, err
	}
	if !ok {
		a.end(ended, fmt.Errorf("%w the session", ErrTPM))
		return response, nil
	}
	a.handle, a.state = s.handle, started
	return response, nil
}

// quote takes the TPM for this VM: from the reset of both registers to the next. No step
// waits for the VM. last: the command ends the VM's session. The caller holds a.mu.
func (a *Attestation) quote(ctx context.Context, command []byte, last bool) ([]byte, error) {
	if err := a.b.turns.take(ctx, a.tenant); err != nil {
		a.end(ended, err)
		return nil, fmt.Errorf("wait for the TPM: %w", err)
	}
	defer a.b.turns.free()
	since := time.Now()
	response, err := a.b.quoteOf(a.session, a.events, command)
	a.held = time.Since(since)
	switch {
	case err != nil:
		a.end(ended, err)
		return nil, err
	case !succeeded(response):
		a.end(ended, fmt.Errorf("%w the quote", ErrTPM))
	default:
		a.session.over = last
		a.end(quoted, nil)
	}
	return response, nil
}

// quoteOf resets both registers, extends the events, passes the quote, and leaves nothing
// of the VM in the TPM. The caller has the turn. Static quotes may go between the three.
func (b *Broker) quoteOf(s *session, events []pcr.Event, command []byte) (response []byte, err error) {
	err = b.measure(events)
	if err == nil {
		response, err = b.resume(s, command)
	}
	if cerr := b.alone(func() error { return b.inSession(func(s *ownSession) error { return s.reset(b.dev) }) }); cerr != nil {
		b.mu.Lock()
		defer b.mu.Unlock()
		b.fail() // what cannot be cleaned is never used again
		err = errors.Join(err, ErrFailed)
	}
	return response, err
}

// measure resets both registers and extends the events.
func (b *Broker) measure(events []pcr.Event) error {
	return b.alone(func() error {
		return b.inSession(func(s *ownSession) error {
			if err := s.reset(b.dev); err != nil {
				return err
			}
			for _, e := range events {
				if err := s.extend(b.dev, e); err != nil {
					return err
				}
			}
			return nil
		})
	})
}

// end closes the VM's session. The caller holds a.mu; only the first call counts.
func (a *Attestation) end(final state, cause error) {
	if a.state >= quoted {
		return
	}
	a.state, a.cause = final, cause
	a.timer.Stop()
	if a.session != nil {
		a.b.discard(a.session)
		a.b.sessions.leave(a.session)
		a.session = nil
	}
	close(a.ending)
}

// Release ends the attestation if it has not ended; it may be called at any time.
func (a *Attestation) Release() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.end(ended, errors.New("released"))
}

// Ended is closed when the broker is done with the VM.
func (a *Attestation) Ended() <-chan struct{} { return a.ending }

// Quoted reports whether it came to its quote.
func (a *Attestation) Quoted() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.state == quoted
}

// Cause is why it ended without a quote, or nil.
func (a *Attestation) Cause() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.cause
}

// Held is how long the TPM was held for the VM: from the first reset of its registers to
// the last, static quotes between included; 0 before its quote.
func (a *Attestation) Held() time.Duration {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.held
}
