// Package broker shares the host's one physical TPM among its VMs, one at a time.
//
// The broker is the only opener of the TPM. A VM that has a tunnel to its boot server is
// taken down with what its quote is to prove ([Broker.Attest]). [Attestation.Forward] then
// passes the boot server's commands, which come through the VM, if they have exactly the
// shape of a session start, a quote and a flush. The TPM is the VM's from extend to quote,
// and that is one piece without waiting for anybody: when the quote command is there, the
// VM takes its turn, fairly per tenant; the broker resets PCR 16 and 23, extends them,
// passes the quote, and resets them again. A VM that stalls holds no more than a session,
// which lies outside the TPM (session.go) and has a time limit.
//
// The host's own resets and extends run in an HMAC session salted to the inventoried key
// (own.go), so nobody on the way to the TPM can exchange a measurement. Both keys' public parts are the
// inventory's. A TPM that shows others is refused; one that only says it has them, without
// their private parts, fails at the first session.
//
// A tenant may have its VMs' sessions salted to a key of its own, which it migrates into
// the TPM ([Broker.Import]).
//
// Static quotes go between, also during a VM's turn: they touch neither register. They
// and activations wait in a line of their own, fairly per tenant too.
//
// TPM2_PCR_Extend has no sized first parameter, so its session authenticates it and
// cannot encrypt it (TPM 2.0 Library, part 1, "Session-based encryption"); the
// measurements are no secret.
package broker

import (
	"bytes"
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

// ErrOtherKey is returned for a TPM whose key is not the inventory's.
var ErrOtherKey = errors.New("the TPM shows another key than the inventory: it is another TPM, was enrolled anew, or something between lies")

// Keys are the public parts of a host's keys, from its entry in the inventory.
type Keys struct{ AIK, Session tpm2.TPMTPublic }

// KeysOf reads the keys of an inventory entry and refuses those of another form.
func KeysOf(h inventory.Host) (Keys, error) {
	aik, err := tpm.ParsePublic(h.AIK)
	if err == nil {
		err = tpm.CheckAIK(aik)
	}
	if err != nil {
		return Keys{}, fmt.Errorf("inventory entry of %s: attestation key: %w", h.Name, err)
	}
	session, err := tpm.ParsePublic(h.Session)
	if err == nil {
		err = tpm.CheckSession(session)
	}
	if err != nil {
		return Keys{}, fmt.Errorf("inventory entry of %s: session key: %w", h.Name, err)
	}
	return Keys{*aik, *session}, nil
}

// Broker owns the TPM.
type Broker struct {
	timeout  time.Duration // for each command of a VM
	aik      tpm.Key       // the inventory's
	session  tpm.Key       // the inventory's
	sessions *sessions     // of VMs
	turns    queue         // of VMs' commands
	statics  queue         // of static quotes and activations

	mu     sync.Mutex        // one sequence of commands at a time: of a VM, and one of statics
	own    map[string]ownKey // by tenant
	ours   *ownSession       // for the registers, unless it has to be begun
	dev    transport.TPM
	failed bool
	lost   chan struct{} // closed when failed becomes true
	aside  []*session    // saved outside the TPM, the longest first
	saves  uint64        // sessions saved so far
	gap    uint64        // how many savings the oldest saved session may be behind
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

// alone runs a sequence of commands that nobody else's go between.
func (b *Broker) alone(do func() error) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.failed {
		return ErrFailed
	}
	return do()
}

// Probe asks the TPM for its time, so that a TPM that is gone is noticed although nobody
// needs it.
func (b *Broker) Probe() error {
	return b.alone(func() error {
		if _, err := (tpm2.ReadClock{}).Execute(b.dev); err != nil {
			return fmt.Errorf("probe the TPM: %w", err)
		}
		return nil
	})
}

// New takes the TPM over: it holds it to both keys of the inventory, flushes whatever
// sessions and objects a predecessor left, and resets PCR 16 and 23. It extends nothing.
// A VM has timeout for each of its commands.
func New(dev transport.TPM, keys Keys, timeout time.Duration) (*Broker, error) {
	if timeout <= 0 {
		return nil, errors.New("take the TPM: no time limit for a VM")
	}
	b := &Broker{timeout: timeout, lost: make(chan struct{}), own: map[string]ownKey{}}
	b.dev = watched{dev, b.fail}
	dev = b.dev
	var err error
	if b.aik, err = same(dev, inventory.AIKHandle, keys.AIK); err != nil {
		return nil, fmt.Errorf("take the TPM: attestation key: %w", err)
	}
	if b.session, err = same(dev, inventory.SessionHandle, keys.Session); err != nil {
		return nil, fmt.Errorf("take the TPM: session key: %w", err)
	}
	if b.sessions, b.gap, err = newSessions(dev); err != nil {
		return nil, fmt.Errorf("take the TPM: %w", err)
	}
	if err := flushAll(dev); err != nil {
		return nil, fmt.Errorf("take the TPM: %w", err)
	}
	if err := b.inSession(func(s *ownSession) error { return s.reset(dev) }); err != nil {
		return nil, fmt.Errorf("take the TPM: %w", err)
	}
	return b, nil
}

// same gives the inventory's key, after what the TPM shows at its handle was compared
// with it: that is for a clear answer alone, nothing of what was read is used.
func same(dev transport.TPM, handle tpm2.TPMHandle, public tpm2.TPMTPublic) (tpm.Key, error) {
	key, err := keyAt(handle, public)
	if err != nil {
		return key, err
	}
	shown, err := tpm.ReadKey(dev, handle)
	if err != nil {
		return key, fmt.Errorf("%w (is the host enrolled?)", err)
	}
	if !bytes.Equal(tpm2.Marshal(shown.Public), tpm2.Marshal(public)) {
		return key, fmt.Errorf("at %#x: %w", uint32(handle), ErrOtherKey)
	}
	return key, nil
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

// apart runs a static quote or an activation in its tenant's turn.
func (b *Broker) apart(ctx context.Context, tenant string, do func() error) error {
	if err := b.statics.take(ctx, tenant); err != nil {
		return fmt.Errorf("wait for the TPM: %w", err)
	}
	defer b.statics.free()
	return b.alone(do)
}

// StaticQuote quotes the registers that say what the host runs.
func (b *Broker) StaticQuote(ctx context.Context, tenant string, qualifying digest.SHA256) (q evidence.Quote, err error) {
	err = b.apart(ctx, tenant, func() error {
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
			return fmt.Errorf("static quote: %w", err)
		}
		q = evidence.Quote{Attest: rsp.Quoted.Bytes(), Signature: tpm2.Marshal(rsp.Signature)}
		return nil
	})
	return q, err
}

// Activate answers a challenge that the AIK lies in this TPM.
func (b *Broker) Activate(ctx context.Context, tenant string, blob, encrypted []byte) (secret []byte, err error) {
	err = b.apart(ctx, tenant, func() (err error) {
		secret, err = tpm.Activate(b.dev, b.aik, blob, encrypted)
		return err
	})
	return secret, err
}
