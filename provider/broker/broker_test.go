package broker

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/big"
	"sync"
	"testing"
	"time"

	"foothold/internal/tpm"
	"foothold/internal/tpm/swtpmtest"
	"foothold/protocol/digest"
	"foothold/protocol/inventory"
	"foothold/protocol/pcr"
	"foothold/provider/enroll"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// newBroker gives a broker over an enrolled TPM, and the TPM itself.
func newBroker(t testing.TB, timeout time.Duration) (*Broker, *tpm.Device) {
	t.Helper()
	dev := swtpmtest.New(t).Open()
	b, err := New(dev, enrolled(t, dev), timeout)
	if err != nil {
		t.Fatal(err)
	}
	return b, dev
}

// enrolled gives the keys that the inventory has of a TPM.
func enrolled(t testing.TB, dev transport.TPM) Keys {
	t.Helper()
	entry, err := enroll.Enroll(dev, inventory.Host{Name: "host-1"})
	if err != nil {
		t.Fatal(err)
	}
	keys, err := KeysOf(entry)
	if err != nil {
		t.Fatal(err)
	}
	return keys
}

// commands passes an attestation's commands.
func commands(t testing.TB, a *Attestation) send {
	return func(c []byte) ([]byte, error) { return a.Forward(t.Context(), c) }
}

// begin takes down a VM that is to be attested.
func (b *Broker) begin(t testing.TB, tenant, name string) *Attestation {
	t.Helper()
	a, err := b.Attest(tenant, measurements(name), tunnelOf(name))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// send adapts a function to go-tpm's transport.
type send func([]byte) ([]byte, error)

func (f send) Send(command []byte) ([]byte, error) { return f(command) }

func measurements(name string) []pcr.Event {
	return []pcr.Event{{PCR: pcr.VM, Digest: digest.Of([]byte(name)), Name: name}}
}

func tunnelOf(name string) digest.SHA256 { return digest.Of([]byte("tunnel of " + name)) }

// bootSession is what a boot server starts.
func bootSession(b *Broker, t transport.TPM) (tpm2.Session, func() error, error) {
	return tpm2.HMACSession(t, tpm2.TPMAlgSHA256, 16, tpm2.Salted(b.session.Handle, b.session.Public), tpm2.AESEncryption(128, tpm2.EncryptInOut))
}

// bootQuote is what a boot server asks for.
func bootQuote(b *Broker, s tpm2.Session, data digest.SHA256) tpm2.Quote {
	return tpm2.Quote{
		SignHandle:     b.aik.Auth(s),
		QualifyingData: tpm2.TPM2BData{Buffer: data[:]},
		InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgECDSA,
			Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSchemeHash{HashAlg: tpm2.TPMAlgSHA256})},
		PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
			Hash: tpm2.TPMAlgSHA256, PCRSelect: bitmap(pcr.BootSelection())}}},
	}
}

// attest runs a whole boot quote and checks that it proves name and its tunnel.
func attest(b *Broker, through transport.TPM, name string) error {
	s, closeSession, err := bootSession(b, through)
	if err != nil {
		return err
	}
	data := digest.Of([]byte("binding of " + name))
	rsp, err := bootQuote(b, s, data).Execute(through)
	if err != nil {
		return err
	}
	regs := pcr.Replay(append(measurements(name), pcr.Event{PCR: pcr.Tunnel, Digest: tunnelOf(name)}))
	if err := checkQuote(b, rsp.Quoted.Bytes(), rsp.Signature, data, pcr.BootSelection(), regs); err != nil {
		return err
	}
	return closeSession()
}

func checkQuote(b *Broker, raw []byte, sig tpm2.TPMTSignature, data digest.SHA256, selection []int, regs map[int]digest.SHA256) error {
	a, err := tpm2.Unmarshal[tpm2.TPMSAttest](raw)
	if err != nil {
		return err
	}
	info, err := a.Attested.Quote()
	if err != nil {
		return err
	}
	want := pcr.Composite(selection, regs)
	if !bytes.Equal(info.PCRDigest.Buffer, want[:]) || !bytes.Equal(a.ExtraData.Buffer, data[:]) {
		return errors.New("quote is about other registers or other data")
	}
	if sel := info.PCRSelect.PCRSelections; len(sel) != 1 || !bytes.Equal(sel[0].PCRSelect, bitmap(selection)) {
		return fmt.Errorf("quote selects %v", sel)
	}
	pub, err := tpm2.Pub(b.aik.Public)
	if err != nil {
		return err
	}
	ec, err := sig.Signature.ECDSA()
	if err != nil {
		return err
	}
	sum := sha256.Sum256(raw)
	if !ecdsa.Verify(pub.(*ecdsa.PublicKey), sum[:], new(big.Int).SetBytes(ec.SignatureR.Buffer), new(big.Int).SetBytes(ec.SignatureS.Buffer)) {
		return errors.New("signature does not verify")
	}
	return nil
}

// register reads a PCR past the broker.
func register(t testing.TB, b *Broker, index uint) digest.SHA256 {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	rsp, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
		Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(index)}}}}.Execute(b.dev)
	if err != nil {
		t.Fatal(err)
	}
	return digest.SHA256(rsp.PCRValues.Digests[0].Buffer)
}

// clean fails unless the TPM holds nothing of a VM, and no session but the broker's own.
func clean(t testing.TB, b *Broker) {
	t.Helper()
	if r16, r23 := register(t, b, pcr.VM), register(t, b, pcr.Tunnel); !r16.IsZero() || !r23.IsZero() {
		t.Errorf("PCR 16 is %s, PCR 23 is %s after the turn", r16, r23)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for where, first := range map[string]uint32{"in": 0x02000000, "outside": 0x03000000} {
		rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: first, PropertyCount: 64}.Execute(b.dev)
		if err != nil {
			t.Fatal(err)
		}
		list, err := rsp.CapabilityData.Data.Handles()
		if err != nil {
			t.Fatal(err)
		}
		for _, handle := range list.Handle {
			if b.ours == nil || uint32(handle) != b.ours.handle {
				t.Errorf("session %#x is left %s the TPM", uint32(handle), where)
			}
		}
	}
}

func TestManyVMsShareOneTPM(t *testing.T) {
	b, _ := newBroker(t, 30*time.Second)
	var wg sync.WaitGroup
	stop := make(chan struct{})
	statics := make(chan int)
	go func() { // static quotes go between all the time
		n := 0
		for {
			select {
			case <-stop:
				statics <- n
				return
			default:
			}
			data := digest.Of(fmt.Append(nil, n))
			q, err := b.StaticQuote(t.Context(), "tenant-0", data)
			if err != nil {
				t.Errorf("static quote: %v", err)
			} else if sig, err := tpm2.Unmarshal[tpm2.TPMTSignature](q.Signature); err != nil {
				t.Error(err)
			} else if err := checkQuote(b, q.Attest, *sig, data, pcr.StaticSelection(), nil); err != nil {
				t.Errorf("static quote: %v", err)
			}
			n++
		}
	}()
	for i := range 20 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			name := fmt.Sprintf("vm-%d", i)
			a := b.begin(t, fmt.Sprintf("tenant-%d", i%3), name)
			defer a.Release()
			if err := attest(b, commands(t, a), name); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if !a.Quoted() || a.Held() <= 0 {
				t.Errorf("%s: quoted %v, held for %s", name, a.Quoted(), a.Held())
			}
		}()
	}
	wg.Wait()
	close(stop)
	if n := <-statics; n == 0 {
		t.Error("no static quote went between")
	}
	clean(t, b)
}

// TestATurnIsOneVMs: VMs whose sessions are open at the same time each get a quote of their
// own measurement, whatever the order, and nothing more.
func TestATurnIsOneVMs(t *testing.T) {
	b, _ := newBroker(t, 30*time.Second)
	first, second := b.begin(t, "a", "one"), b.begin(t, "b", "two")
	var late func() error
	if err := attest(b, send(func(c []byte) ([]byte, error) {
		if req, err := parse(c); err == nil && req.kind == quote {
			late = func() error { return attest(b, commands(t, second), "two") }
			if err := late(); err != nil { // a whole quote between one's session and its quote
				t.Errorf("in between: %v", err)
			}
		}
		return first.Forward(t.Context(), c)
	}), "one"); err != nil || late == nil {
		t.Fatal(err)
	}
	// Either's attestation is over, whatever it sends now.
	for _, a := range []*Attestation{first, second} {
		if _, _, err := bootSession(b, commands(t, a)); !errors.Is(err, ErrRefused) {
			t.Errorf("after the quote: %v", err)
		}
	}
	clean(t, b)
}

// TestAnothersSessionIsRefused: a VM's quote goes through the session that it started.
func TestAnothersSessionIsRefused(t *testing.T) {
	b, _ := newBroker(t, 30*time.Second)
	first, second := b.begin(t, "a", "one"), b.begin(t, "a", "two")
	s, _, err := bootSession(b, commands(t, first))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := bootSession(b, commands(t, second)); err != nil {
		t.Fatal(err)
	}
	if _, err := bootQuote(b, s, digest.Of(nil)).Execute(commands(t, second)); !errors.Is(err, ErrRefused) {
		t.Errorf("a quote through another VM's session: %v", err)
	}
	first.Release()
	clean(t, b)
}

// TestATPMThatRefusesIsTold: a quote that the TPM refuses ends the attestation, and the
// boot server hears the TPM's answer, to the end of its session.
func TestATPMThatRefusesIsTold(t *testing.T) {
	b, _ := newBroker(t, time.Minute)
	a := b.begin(t, "a", "vm")
	var stale tpm2.TPMRC
	err := attest(b, send(func(c []byte) ([]byte, error) {
		if req, err := parse(c); err == nil && req.kind == quote {
			c = append([]byte(nil), c...)
			c[60] ^= 1 // the session's HMAC
		}
		return a.Forward(t.Context(), c)
	}), "vm")
	if !errors.As(err, &stale) || !errors.Is(a.Cause(), ErrTPM) || a.Quoted() {
		t.Errorf("the boot server hears %v, the cause is %v", err, a.Cause())
	}
	if got, err := a.Forward(t.Context(), flushOf(a.handle)); err != nil || !bytes.Equal(got, flushed()) {
		t.Errorf("the session's flush: %x, %v", got, err)
	}
	if _, err := a.Forward(t.Context(), flushOf(a.handle)); !errors.Is(err, ErrOver) {
		t.Errorf("its second flush: %v", err)
	}
	clean(t, b)
}

func flushOf(session uint32) []byte {
	c := []byte{0x80, 0x01, 0, 0, 0, 14, 0, 0, 0x01, 0x65}
	return append(c, byte(session>>24), byte(session>>16), byte(session>>8), byte(session))
}

func TestAttestationEndsByItself(t *testing.T) {
	b, _ := newBroker(t, 100*time.Millisecond)
	a := b.begin(t, "a", "slow")
	s, _, err := bootSession(b, commands(t, a))
	if err != nil {
		t.Fatal(err)
	}
	<-a.Ended()
	if _, err := bootQuote(b, s, digest.Of(nil)).Execute(commands(t, a)); !errors.Is(err, ErrOver) || !errors.Is(a.Cause(), ErrTimeout) {
		t.Errorf("quote after the time limit: %v, cause %v", err, a.Cause())
	}
	clean(t, b)
}

func TestAttestWantsMeasurements(t *testing.T) {
	b, _ := newBroker(t, time.Second)
	for name, events := range map[string][]pcr.Event{
		"none":           nil,
		"other register": {{PCR: pcr.Platform, Digest: digest.Of(nil)}},
		"empty":          {{PCR: pcr.VM}},
	} {
		if _, err := b.Attest("a", events, tunnelOf("x")); err == nil {
			t.Errorf("%s: taken down", name)
		}
	}
	if _, err := b.Attest("a", measurements("x"), digest.SHA256{}); err == nil {
		t.Error("taken down without a tunnel")
	}
	clean(t, b)
}

func TestNewWantsItsKeys(t *testing.T) {
	keys := enrolled(t, swtpmtest.New(t).Open())
	dev := swtpmtest.New(t).Open()
	if _, err := New(dev, keys, time.Second); !errors.Is(err, tpm.ErrNoKey) {
		t.Errorf("a TPM that is not enrolled: %v", err)
	}
	mine := enrolled(t, dev)
	for name, other := range map[string]Keys{
		"all":         keys,
		"AIK":         {keys.AIK, mine.Session},
		"session key": {mine.AIK, keys.Session},
	} {
		if _, err := New(dev, other, time.Second); !errors.Is(err, ErrOtherKey) {
			t.Errorf("%s of another TPM: %v", name, err)
		}
	}
	if _, err := New(dev, mine, time.Second); err != nil {
		t.Error(err)
	}
}

func TestNewCleansUp(t *testing.T) {
	dev := swtpmtest.New(t).Open()
	keys := enrolled(t, dev)
	old, err := New(dev, keys, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := bootSession(old, commands(t, old.begin(t, "a", "crashed"))); err != nil {
		t.Fatal(err)
	}
	if _, _, err := bootSession(old, dev); err != nil { // one that was loaded
		t.Fatal(err)
	}
	if err := old.measure(append(measurements("crashed"), pcr.Event{PCR: pcr.Tunnel, Digest: tunnelOf("crashed")})); err != nil {
		t.Fatal(err)
	}
	// The agent dies here; its successor finds sessions and measurements.
	b, err := New(dev, keys, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	clean(t, b)
}

func TestALostTPMIsNotUsedAgain(t *testing.T) {
	v := swtpmtest.New(t)
	dev := v.Open()
	b, err := New(dev, enrolled(t, dev), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	a := b.begin(t, "a", "x")
	v.Restart()
	if _, _, err := bootSession(b, commands(t, a)); err == nil {
		t.Error("a session in a TPM that is gone")
	}
	select {
	case <-b.Failed():
	default:
		t.Error("the broker does not say that it has failed")
	}
	if _, err := b.Attest("a", measurements("y"), tunnelOf("y")); !errors.Is(err, ErrFailed) {
		t.Errorf("attest: %v", err)
	}
	if _, err := b.StaticQuote(t.Context(), "a", digest.Of(nil)); !errors.Is(err, ErrFailed) {
		t.Errorf("static quote: %v", err)
	}
	if err := b.Probe(); !errors.Is(err, ErrFailed) {
		t.Errorf("probe: %v", err)
	}
}

// A TPM that ends while nobody uses it is noticed by a probe, and by whatever comes first.
func TestALostTPMIsNoticed(t *testing.T) {
	for what, use := range map[string]func(*Broker) error{
		"probe": (*Broker).Probe,
		"static quote": func(b *Broker) error {
			_, err := b.StaticQuote(context.Background(), "a", digest.Of(nil))
			return err
		},
		"activation": func(b *Broker) error {
			_, err := b.Activate(context.Background(), "a", []byte{1}, []byte{2})
			return err
		},
		"a VM's session": func(b *Broker) error {
			a, err := b.Attest("a", measurements("x"), tunnelOf("x"))
			if err != nil {
				return err
			}
			_, _, err = bootSession(b, send(func(c []byte) ([]byte, error) { return a.Forward(context.Background(), c) }))
			return err
		},
	} {
		v := swtpmtest.New(t)
		dev := v.Open()
		b, err := New(dev, enrolled(t, dev), time.Minute)
		if err != nil {
			t.Fatal(err)
		}
		if err := b.Probe(); err != nil {
			t.Errorf("probe of a TPM that is there: %v", err)
		}
		v.Restart()
		if err := use(b); !errors.Is(err, ErrFailed) {
			t.Errorf("%s: %v", what, err)
		}
		select {
		case <-b.Failed():
		default:
			t.Errorf("%s: the broker does not say that it has failed", what)
		}
	}
}
