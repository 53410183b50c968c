// Package broker shares the host's one physical TPM among its VMs, one at a time.
//
// The broker is the only opener of the TPM. A VM that has a tunnel to its boot server
// queues ([Broker.Hold]), fairly per tenant. Its turn begins with PCR 16 and 23 reset
// and extended by the host itself, in a session salted to the inventoried key, so
// nobody on the way to the TPM can exchange a measurement. Then [Hold.Forward] passes
// the boot server's commands, which come through the VM, if they have exactly the
// shape of a session start, a quote and a flush. The turn ends with the quote's
// response, with the first command of any other shape, with its time limit or with
// the VM; the broker then flushes the VM's session and resets both registers.
//
// Static quotes go between, also during a VM's turn: they touch neither register.
//
// TPM2_PCR_Extend has no sized first parameter, so its session authenticates it and
// cannot encrypt it (TPM 2.0 Library, part 1, "Session-based encryption"); the
// measurements are no secret.
package broker

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"foothold/internal/tpm"
	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/inventory"
	"foothold/protocol/pcr"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// nonceSize is the length of the broker's own session nonces in bytes.
const nonceSize = 16

// ErrFailed is returned when the TPM does not answer, and for everything after a failure
// that may have left a VM's measurement in it. The host agent must be started anew.
var ErrFailed = errors.New("the broker has lost control of the TPM")

// Broker owns the TPM.
type Broker struct {
	timeout time.Duration // of one VM's turn
	aik     tpm.Key
	session tpm.Key
	turns   queue

	mu     sync.Mutex // one sequence of commands at a time
	dev    transport.TPM
	failed bool
	lost   chan struct{} // closed when failed becomes true
}

// watched is the TPM, whose first exchange that fails is its last: nobody can tell what it
// holds then, be it gone or only out of step.
type watched struct {
	transport.TPM
	fail func()
}

func (w watched) Send(command []byte) ([]byte, error) {
	response, err := w.TPM.Send(command)
	if err != nil {
		w.fail()
		return nil, fmt.Errorf("%w: %w", ErrFailed, err)
	}
	return response, nil
}

// fail must be called with mu held, or before anybody else has the broker.
func (b *Broker) fail() {
	if !b.failed {
		b.failed = true
		close(b.lost)
	}
}

// Failed is closed when the broker has lost control of the TPM.
func (b *Broker) Failed() <-chan struct{} { return b.lost }

// Probe asks the TPM for its time, so that a TPM that is gone is noticed although nobody
// needs it.
func (b *Broker) Probe() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failed {
		return ErrFailed
	}
	if _, err := (tpm2.ReadClock{}).Execute(b.dev); err != nil {
		return fmt.Errorf("probe the TPM: %w", err)
	}
	return nil
}

// New takes the TPM over: it checks both keys, flushes whatever sessions and objects a
// predecessor left, and resets PCR 16 and 23. It extends nothing.
func New(dev transport.TPM, timeout time.Duration) (*Broker, error) {
	if timeout <= 0 {
		return nil, errors.New("take the TPM: no time limit for a turn")
	}
	b := &Broker{timeout: timeout, lost: make(chan struct{})}
	b.dev = watched{dev, b.fail}
	dev = b.dev
	var err error
	if b.aik, err = tpm.ReadKey(dev, inventory.AIKHandle); err != nil {
		return nil, fmt.Errorf("take the TPM: %w (is the host enrolled?)", err)
	}
	if err := tpm.CheckAIK(&b.aik.Public); err != nil {
		return nil, fmt.Errorf("take the TPM: %w", err)
	}
	if b.session, err = tpm.ReadKey(dev, inventory.SessionHandle); err != nil {
		return nil, fmt.Errorf("take the TPM: %w (is the host enrolled?)", err)
	}
	if err := tpm.CheckSession(&b.session.Public); err != nil {
		return nil, fmt.Errorf("take the TPM: %w", err)
	}
	if err := flushAll(dev); err != nil {
		return nil, fmt.Errorf("take the TPM: %w", err)
	}
	if err := b.inSession(func(s tpm2.Session) error { return reset(dev, s) }); err != nil {
		return nil, fmt.Errorf("take the TPM: %w", err)
	}
	return b, nil
}

// Keys are the host's attestation key and session key.
func (b *Broker) Keys() (aik, session tpm.Key) { return b.aik, b.session }

// flushAll flushes every loaded session and transient object (handle types of TPM 2.0
// Library, part 2, "Handles").
func flushAll(dev transport.TPM) error {
	for _, first := range []uint32{0x02000000, 0x03000000, 0x80000000} {
		rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: first, PropertyCount: 64}.Execute(dev)
		if err != nil {
			return fmt.Errorf("list handles: %w", err)
		}
		list, err := rsp.CapabilityData.Data.Handles()
		if err != nil {
			return fmt.Errorf("list handles: %w", err)
		}
		for _, h := range list.Handle {
			if _, err := (tpm2.FlushContext{FlushHandle: h}).Execute(dev); err != nil {
				return fmt.Errorf("flush %#x: %w", uint32(h), err)
			}
		}
	}
	return nil
}

// inSession runs do in an HMAC session salted to the session key.
func (b *Broker) inSession(do func(tpm2.Session) error) (err error) {
	s, closeSession, err := tpm2.HMACSession(b.dev, tpm2.TPMAlgSHA256, nonceSize, tpm2.Salted(b.session.Handle, b.session.Public))
	if err != nil {
		return fmt.Errorf("start session: %w", err)
	}
	defer func() {
		if cerr := closeSession(); cerr != nil && err == nil {
			err = fmt.Errorf("flush session: %w", cerr)
		}
	}()
	return do(s)
}

func reset(dev transport.TPM, s tpm2.Session) error {
	for _, index := range []int{pcr.VM, pcr.Tunnel} {
		if _, err := (tpm2.PCRReset{PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(index), Auth: s}}).Execute(dev); err != nil {
			return fmt.Errorf("reset PCR %d: %w", index, err)
		}
	}
	return nil
}

func extend(dev transport.TPM, s tpm2.Session, e pcr.Event) error {
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(e.PCR), Auth: s},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: e.Digest[:]}}},
	}.Execute(dev)
	if err != nil {
		return fmt.Errorf("extend PCR %d: %w", e.PCR, err)
	}
	return nil
}

// StaticQuote quotes the registers that say what the host runs.
func (b *Broker) StaticQuote(ctx context.Context, qualifying digest.SHA256) (evidence.Quote, error) {
	if err := ctx.Err(); err != nil {
		return evidence.Quote{}, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failed {
		return evidence.Quote{}, ErrFailed
	}
	session := tpm2.HMAC(tpm2.TPMAlgSHA256, nonceSize, tpm2.Salted(b.session.Handle, b.session.Public), tpm2.AESEncryption(128, tpm2.EncryptInOut))
	rsp, err := tpm2.Quote{
		SignHandle:     b.aik.Auth(session),
		QualifyingData: tpm2.TPM2BData{Buffer: qualifying[:]},
		InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
			Hash: tpm2.TPMAlgSHA256, PCRSelect: bitmap(pcr.StaticSelection()),
		}}},
	}.Execute(b.dev)
	if err != nil {
		return evidence.Quote{}, fmt.Errorf("static quote: %w", err)
	}
	return evidence.Quote{Attest: rsp.Quoted.Bytes(), Signature: tpm2.Marshal(rsp.Signature)}, nil
}

// Activate answers a challenge that the AIK lies in this TPM.
func (b *Broker) Activate(ctx context.Context, blob, encrypted []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failed {
		return nil, ErrFailed
	}
	return tpm.Activate(b.dev, b.aik, blob, encrypted)
}
