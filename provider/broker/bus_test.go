package broker

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"foothold/internal/tpm/swtpmtest"
	"foothold/protocol/digest"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

const (
	ccReadPublic = 0x173
)

func codeOf(command []byte) uint32 { return binary.BigEndian.Uint32(command[6:]) }

// bus stands between broker and TPM.
type bus struct {
	transport.TPM
	meddle func(command []byte) ([]byte, error) // instead of the TPM; nil passes
}

func (m *bus) Send(command []byte) ([]byte, error) {
	if m.meddle != nil {
		return m.meddle(command)
	}
	return m.TPM.Send(command)
}

// TestTheSessionKeyIsTheInventorys: who shows the broker a key of his own learns no salt,
// and who shows the inventory's before another TPM does not get past the first session.
func TestTheSessionKeyIsTheInventorys(t *testing.T) {
	mine, theirs := swtpmtest.New(t).Open(), swtpmtest.New(t).Open()
	keys := enrolled(t, mine)
	enrolled(t, theirs)
	liar := &bus{TPM: mine}
	liar.meddle = func(c []byte) ([]byte, error) {
		switch codeOf(c) {
		case ccReadPublic:
			return theirs.Send(c)
		case ccStartAuthSession:
			t.Error("a session was begun on the liar's word")
		}
		return mine.Send(c)
	}
	if _, err := New(liar, keys, time.Second); !errors.Is(err, ErrOtherKey) {
		t.Errorf("another key shown: %v", err)
	}
	relay := &bus{TPM: theirs}
	relay.meddle = func(c []byte) ([]byte, error) {
		if codeOf(c) == ccReadPublic {
			return mine.Send(c)
		}
		return theirs.Send(c)
	}
	if _, err := New(relay, keys, time.Second); err == nil {
		t.Error("another TPM behind the right keys was taken")
	}
}

// TestNobodyOnTheBusExchangesAMeasurement: an extend that was altered, dropped or answered
// by somebody else ends the attestation without a quote.
func TestNobodyOnTheBusExchangesAMeasurement(t *testing.T) {
	for name, meddle := range map[string]func(dev transport.TPM, command []byte) ([]byte, error){
		"altered": func(dev transport.TPM, c []byte) ([]byte, error) {
			c[len(c)-1] ^= 1
			return dev.Send(c)
		},
		"answered for": func(_ transport.TPM, c []byte) ([]byte, error) {
			r := binary.BigEndian.AppendUint16(nil, tagSessions)
			r = binary.BigEndian.AppendUint32(r, 10+4+2+16+1+2+macLen)
			r = append(r, make([]byte, 8)...) // success, no parameters
			r = append(r, 0, 16)
			r = append(r, make([]byte, 16)...)
			r = append(r, attrContinue, 0, macLen)
			return append(r, make([]byte, macLen)...), nil
		},
		"another PCR": func(dev transport.TPM, c []byte) ([]byte, error) {
			c[13] ^= 1
			return dev.Send(c)
		},
	} {
		t.Run(name, func(t *testing.T) {
			dev := swtpmtest.New(t).Open()
			line := &bus{TPM: dev}
			b, err := New(line, enrolled(t, dev), time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			if err := attest(b, commands(t, b.begin(t, "a", "good")), "good"); err != nil {
				t.Fatal(err)
			}
			a := b.begin(t, "a", "vm")
			s, _, err := bootSession(b, commands(t, a))
			if err != nil {
				t.Fatal(err)
			}
			met, quotes := 0, 0
			line.meddle = func(c []byte) ([]byte, error) {
				switch codeOf(c) {
				case ccPCRExtend:
					met++
					return meddle(dev, append([]byte(nil), c...))
				case ccQuote:
					quotes++
				}
				return dev.Send(c)
			}
			_, err = bootQuote(b, s, digest.Of(nil)).Execute(commands(t, a))
			if met == 0 || err == nil || a.Quoted() || quotes > 0 {
				t.Errorf("met %d extends: quoted %v, %d quotes reached the TPM, %v", met, a.Quoted(), quotes, err)
			}
			line.meddle = nil
			clean(t, b)
			if err := attest(b, commands(t, b.begin(t, "a", "next")), "next"); err != nil {
				t.Errorf("the next VM: %v", err)
			}
		})
	}
}

// TestParametersAreEncrypted: what a static quote and a boot quote are about does not
// cross the bus in clear.
func TestParametersAreEncrypted(t *testing.T) {
	dev := swtpmtest.New(t).Open()
	line := &bus{TPM: dev}
	b, err := New(line, enrolled(t, dev), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	var crossed []byte
	line.meddle = func(c []byte) ([]byte, error) {
		r, err := dev.Send(c)
		crossed = append(append(crossed, c...), r...)
		return r, err
	}
	data := digest.Of([]byte("what is asked"))
	q, err := b.StaticQuote(t.Context(), "a", data)
	if err != nil {
		t.Fatal(err)
	}
	a := b.begin(t, "a", "vm")
	s, _, err := bootSession(b, commands(t, a))
	if err != nil {
		t.Fatal(err)
	}
	rsp, err := bootQuote(b, s, data).Execute(commands(t, a))
	if err != nil {
		t.Fatal(err)
	}
	for what, secret := range map[string][]byte{"qualifying data": data[:], "static quote": q.Attest, "boot quote": rsp.Quoted.Bytes()} {
		if len(secret) < 32 || bytes.Contains(crossed, secret) {
			t.Errorf("%s crossed the bus in clear", what)
		}
	}
	if !bytes.Contains(crossed, tpm2.Marshal(rsp.Signature)) { // not the first parameter: this look finds what there is
		t.Error("nothing of the quotes was recorded")
	}
}
