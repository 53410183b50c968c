package broker

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"

	"foothold/internal/tpm"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// A TPM holds few sessions in its memory - three, on most - but numbers many more. Between
// its two commands a VM's session is therefore saved outside (TPM 2.0 Library, part 1,
// "Session Context Management"); the TPM has encrypted it and takes it back as it gave it.

const (
	// ownSessions are numbers kept for the broker itself.
	ownSessions = 8
	// maxSessions is enough for any host, and at most what the broker opens.
	maxSessions = 56
	// leastGap is what every TPM bears between the oldest saved session and the newest
	// (TPM 2.0 Library, part 2, TPM_PT_CONTEXT_GAP_MAX: 2^n - 1, n at least 8).
	leastGap = 255
)

// session is one VM's with the TPM, or its right to have one.
type session struct {
	of     *Attestation
	handle uint32 // 0 before it was started
	over   bool   // the TPM has ended it; guarded by of.mu

	// Guarded by Broker.mu.
	context *tpm2.TPMSContext // while it is saved
	saved   uint64            // count of savings at its last
}

// sessions shares the TPM's numbers of sessions. While there is room, everybody has one.
// Then a tenant with fewer than another takes the place of the other's oldest that waits
// for its VM; a tenant with as many as anybody waits until one ends. So whoever lets
// sessions stand open delays nobody but himself.
type sessions struct {
	most int
	line queue // of those who wait, fairly per tenant

	mu      sync.Mutex
	open    []*session    // oldest first
	changed chan struct{} // closed and replaced when one ends, or waits for its VM
}

// count must be called with mu held.
func (p *sessions) count(tenant string) (n int) {
	for _, s := range p.open {
		if s.of.tenant == tenant {
			n++
		}
	}
	return n
}

// greediest is the number of sessions of the tenant that has most. It must be called with
// mu held.
func (p *sessions) greediest() (most int) {
	n := map[string]int{}
	for _, s := range p.open {
		n[s.of.tenant]++
		most = max(most, n[s.of.tenant])
	}
	return most
}

// take gives a place, waiting until ctx ends. Whoever got it must call leave. The caller
// holds a.mu.
func (p *sessions) take(ctx context.Context, a *Attestation) (*session, error) {
	if s := p.try(a, false); s != nil {
		return s, nil
	}
	if err := p.line.take(ctx, a.tenant); err != nil {
		return nil, err
	}
	defer p.line.free()
	for {
		p.mu.Lock()
		changed := p.changed
		p.mu.Unlock()
		if s := p.try(a, true); s != nil {
			return s, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// try gives a place if there is one, or if another tenant has to make room. Whoever is
// not first in line has to be of a tenant with fewer sessions than another.
func (p *sessions) try(a *Attestation, first bool) *session {
	p.mu.Lock()
	mine, most := p.count(a.tenant), p.greediest()
	var victim *Attestation
	switch free := len(p.open) < p.most; {
	case free && (first || mine < most || !p.line.waited()):
	case !free && mine < most:
		if victim = p.evict(most); victim == nil {
			p.mu.Unlock()
			return nil
		}
	default:
		p.mu.Unlock()
		return nil
	}
	s := &session{of: a}
	p.open = append(p.open, s)
	p.mu.Unlock()
	if victim != nil {
		victim.end(ended, ErrEvicted)
		victim.mu.Unlock()
	}
	return s
}

// evict takes the place of the oldest session, of a tenant with most, that waits for its
// VM: whose attestation nobody works on now. It returns that attestation locked, for the
// caller to end, or nil. It must be called with mu held.
func (p *sessions) evict(most int) *Attestation {
	for i, s := range p.open {
		if p.count(s.of.tenant) == most && s.of.mu.TryLock() {
			if s.of.state < quoted {
				p.open = slices.Delete(p.open, i, i+1)
				return s.of
			}
			s.of.mu.Unlock()
		}
	}
	return nil
}

// leave gives a place back, if it was not taken away.
func (p *sessions) leave(s *session) {
	p.mu.Lock()
	p.open = slices.DeleteFunc(p.open, func(o *session) bool { return o == s })
	p.mu.Unlock()
	p.ring()
}

// ring has whoever waits look again.
func (p *sessions) ring() {
	p.mu.Lock()
	defer p.mu.Unlock()
	close(p.changed)
	p.changed = make(chan struct{})
}

// newSessions asks the TPM for its limits, which only bound how many may be open.
func newSessions(dev transport.TPM) (p *sessions, gap uint64, err error) {
	active, err := property(dev, tpm2.TPMPTActiveSessionsMax)
	if err != nil {
		return nil, 0, err
	}
	saves, err := property(dev, tpm2.TPMPTContextGapMax)
	if err != nil {
		return nil, 0, err
	}
	if active <= ownSessions {
		return nil, 0, fmt.Errorf("it numbers no more than %d sessions", active)
	}
	return &sessions{most: int(min(active-ownSessions, maxSessions)), changed: make(chan struct{})}, uint64(max(saves, leastGap)), nil
}

func property(dev transport.TPM, which tpm2.TPMPT) (uint32, error) {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapTPMProperties, Property: uint32(which), PropertyCount: 1}.Execute(dev)
	if err != nil {
		return 0, fmt.Errorf("read property %#x: %w", uint32(which), err)
	}
	list, err := rsp.CapabilityData.Data.TPMProperties()
	if err != nil || len(list.TPMProperty) != 1 || list.TPMProperty[0].Property != which {
		return 0, fmt.Errorf("read property %#x: the TPM does not say", uint32(which))
	}
	return list.TPMProperty[0].Value, nil
}

// open passes the start of a VM's session and saves the session. It reports whether the
// TPM agreed.
func (b *Broker) open(s *session, command []byte, own bool) (response []byte, ok bool, err error) {
	err = b.alone(func() error {
		if err := b.refresh(); err != nil {
			return err
		}
		if own {
			response, err = b.startOwn(s.of.tenant, command)
		} else if response, err = b.dev.Send(command); err != nil {
			err = fmt.Errorf("forward TPM command: %w", err)
		}
		if err != nil {
			return err
		}
		if s.handle, ok = startedSession(response); !ok {
			return nil
		}
		return b.save(s)
	})
	return response, ok, err
}

// resume loads a VM's session and passes its quote.
func (b *Broker) resume(s *session, command []byte) (response []byte, err error) {
	err = b.alone(func() error {
		if err := b.load(s); err != nil {
			return err
		}
		if response, err = b.dev.Send(command); err != nil {
			return fmt.Errorf("forward TPM command: %w", err)
		}
		return nil
	})
	return response, err
}

// save puts a session aside. It must be called with mu held.
func (b *Broker) save(s *session) error {
	rsp, err := tpm2.ContextSave{SaveHandle: tpm2.TPMIDHContext(s.handle)}.Execute(b.dev)
	if err != nil {
		return fmt.Errorf("put the VM's session aside: %w", err)
	}
	b.saves++
	s.context, s.saved = &rsp.Context, b.saves
	b.aside = append(b.aside, s)
	return nil
}

// load must be called with mu held.
func (b *Broker) load(s *session) error {
	if s.context == nil {
		return errors.New("load the VM's session: it is not there")
	}
	rsp, err := tpm2.ContextLoad{Context: *s.context}.Execute(b.dev)
	if err != nil {
		return fmt.Errorf("load the VM's session: %w", err)
	}
	if uint32(rsp.LoadedHandle) != s.handle {
		return fmt.Errorf("load the VM's session: it is %#x now", uint32(rsp.LoadedHandle))
	}
	b.forget(s)
	return nil
}

// forget must be called with mu held.
func (b *Broker) forget(s *session) {
	s.context = nil
	b.aside = slices.DeleteFunc(b.aside, func(o *session) bool { return o == s })
}

// refresh saves the oldest session anew before the TPM would refuse to open another
// because of its age. It must be called with mu held.
func (b *Broker) refresh() error {
	if len(b.aside) == 0 || b.saves-b.aside[0].saved < b.gap/2 {
		return nil
	}
	oldest := b.aside[0]
	if err := b.load(oldest); err != nil {
		return err
	}
	return b.save(oldest)
}

// discard closes a VM's session wherever it is; one that cannot be closed ends the
// broker's use of the TPM.
func (b *Broker) discard(s *session) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.forget(s)
	if s.handle == 0 || s.over || b.failed {
		return
	}
	if _, err := (tpm2.FlushContext{FlushHandle: tpm2.TPMHandle(s.handle)}).Execute(b.dev); err != nil && !isGone(err) {
		b.fail()
	}
}

// keyAt is the inventory's key at its handle.
func keyAt(handle tpm2.TPMHandle, public tpm2.TPMTPublic) (tpm.Key, error) {
	name, err := tpm2.ObjectName(&public)
	if err != nil {
		return tpm.Key{}, err
	}
	return tpm.Key{Handle: handle, Name: *name, Public: public}, nil
}
