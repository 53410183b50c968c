package broker

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"foothold/internal/tpm"
	"foothold/internal/tpm/swtpmtest"
	"foothold/protocol/digest"

	"github.com/google/go-tpm/tpm2"
)

// listening gives a broker and the commands that have come to its TPM, with their responses.
func listening(t *testing.T) (b *Broker, dev *tpm.Device, heard *[][2][]byte) {
	t.Helper()
	dev = swtpmtest.New(t).Open()
	line, heard := &bus{TPM: dev}, new([][2][]byte)
	line.meddle = func(c []byte) ([]byte, error) {
		r, err := dev.Send(c)
		*heard = append(*heard, [2][]byte{slices.Clone(c), slices.Clone(r)})
		return r, err
	}
	b, err := New(line, enrolled(t, dev), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	return b, dev, heard
}

// quoteOnce is a boot quote as a boot server asks for it: its session ends with it.
func quoteOnce(t *testing.T, b *Broker, name string) error {
	t.Helper()
	a := b.begin(t, "a", name)
	s := tpm2.HMAC(tpm2.TPMAlgSHA256, 32, tpm2.Salted(b.session.Handle, b.session.Public), tpm2.AESEncryption(128, tpm2.EncryptInOut))
	_, err := bootQuote(b, s, digest.Of([]byte(name))).Execute(commands(t, a))
	if err == nil && !a.Quoted() {
		err = errors.New("there is no quote")
	}
	return err
}

// TestTheBrokersSessionServesManyVMs: a boot takes one session's start, the VM's own, and none to
// flush; the broker's is begun anew when it has served its time.
func TestTheBrokersSessionServesManyVMs(t *testing.T) {
	b, _, heard := listening(t)
	boot := func(name string) (starts, flushes, all int) {
		t.Helper()
		*heard = nil
		if err := quoteOnce(t, b, name); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, h := range *heard {
			switch codeOf(h[0]) {
			case ccStartAuthSession:
				starts++
			case ccFlushContext:
				flushes++
			}
		}
		return starts, flushes, len(*heard)
	}
	first := b.ours.handle
	for i := range 3 {
		if starts, flushes, all := boot(fmt.Sprint(i)); starts != 1 || flushes != 0 || all != 10 {
			t.Errorf("boot %d: %d sessions begun, %d flushed, %d commands in all", i, starts, flushes, all)
		}
	}
	if b.ours.handle != first || b.ours.uses != 1+2*3 {
		t.Errorf("it is session %#x after %d uses, was %#x", b.ours.handle, b.ours.uses, first)
	}
	clean(t, b)
	for what, age := range map[string]func(){
		"used up": func() { b.ours.uses = ownUses },
		"old":     func() { b.ours.began = time.Now().Add(-ownTime) },
	} {
		age()
		old := b.ours
		if starts, flushes, _ := boot(what); starts != 2 || flushes != 1 || b.ours == old {
			t.Errorf("%s: %d sessions begun, %d flushed", what, starts, flushes)
		}
		clean(t, b)
	}
}

// TestALostSessionIsBegunAnew: a TPM that has forgotten the broker's session, as after the
// host's sleep, or has lost it to somebody else's flush, costs no VM its boot.
func TestALostSessionIsBegunAnew(t *testing.T) {
	b, dev, heard := listening(t)
	lost := b.ours
	flush := func() {
		if _, err := (tpm2.FlushContext{FlushHandle: tpm2.TPMHandle(b.ours.handle)}).Execute(dev); err != nil {
			t.Fatal(err)
		}
	}
	flush()
	*heard = nil
	if err := attest(b, commands(t, b.begin(t, "a", "vm")), "vm"); err != nil {
		t.Errorf("without its session: %v", err)
	}
	if b.ours == lost {
		t.Error("the session is not another one")
	}
	clean(t, b)

	// Whoever takes each new one away too gets an end, and no quote.
	line := b.dev.(watched).TPM.(*bus)
	extends, quotes := 0, 0
	line.meddle = func(c []byte) ([]byte, error) {
		switch codeOf(c) {
		case ccPCRExtend:
			extends++
			flush()
		case ccQuote:
			quotes++
		}
		return dev.Send(c)
	}
	if err := attest(b, commands(t, b.begin(t, "a", "robbed")), "robbed"); err == nil || extends != 2 || quotes != 0 {
		t.Errorf("without any session: %d extends, %d quotes, %v", extends, quotes, err)
	}
}

// TestNothingIsTakenTwice: what once crossed the bus in the broker's session is of no use to
// whoever keeps it, though the session lives on: not a command to the TPM, nor a response to
// the broker.
func TestNothingIsTakenTwice(t *testing.T) {
	b, dev, heard := listening(t)
	if err := attest(b, commands(t, b.begin(t, "a", "vm")), "vm"); err != nil {
		t.Fatal(err)
	}
	replayed := 0
	recorded := map[uint32][]byte{}
	for _, h := range *heard {
		code := codeOf(h[0])
		if code != ccPCRExtend && code != ccPCRReset {
			continue
		}
		replayed++
		recorded[code] = h[1]
		if r, err := dev.Send(h[0]); err != nil || succeeded(r) {
			t.Errorf("the TPM took command %#x a second time (%v)", code, err)
		}
	}
	if replayed < 6 {
		t.Fatalf("%d commands in the broker's session", replayed)
	}
	clean(t, b)
	line := b.dev.(watched).TPM.(*bus)
	for code, response := range recorded {
		quotes, met := 0, false
		line.meddle = func(c []byte) ([]byte, error) {
			switch {
			case codeOf(c) == code && !met:
				met = true
				return slices.Clone(response), nil
			case codeOf(c) == ccQuote:
				quotes++
			}
			return dev.Send(c)
		}
		err := attest(b, commands(t, b.begin(t, "a", "next")), "next")
		if !errors.Is(err, errNotTheTPM) || !met || quotes != 0 {
			t.Errorf("an old response to %#x: %v, %d quotes", code, err, quotes)
		}
		line.meddle = nil
		clean(t, b)
	}
	if err := attest(b, commands(t, b.begin(t, "a", "last")), "last"); err != nil {
		t.Errorf("the next VM: %v", err)
	}
}
