package broker

import (
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/pcr"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// recorded are commands of a real boot quote.
func recorded(t testing.TB) (commands [][]byte) {
	t.Helper()
	b, dev := newBroker(t, time.Minute)
	record := send(func(c []byte) ([]byte, error) {
		commands = append(commands, append([]byte(nil), c...))
		return dev.Send(c)
	})
	s, closeSession, err := bootSession(b, record)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bootQuote(b, s, digest.Of(nil)).Execute(record); err != nil {
		t.Fatal(err)
	}
	if err := closeSession(); err != nil {
		t.Fatal(err)
	}
	return commands
}

func TestParseTakesExactlyTheShape(t *testing.T) {
	commands := recorded(t)
	for i, want := range []kind{startSession, quote, flush} {
		req, err := parse(commands[i])
		if err != nil || req.kind != want {
			t.Fatalf("command %d: %+v, %v", i, req, err)
		}
		for n := range commands[i] {
			if _, err := parse(commands[i][:n]); err == nil {
				t.Errorf("command %d cut to %d bytes was accepted", i, n)
			}
		}
		longer := append(append([]byte(nil), commands[i]...), 0)
		if _, err := parse(longer); err == nil {
			t.Errorf("command %d with a byte behind it was accepted", i)
		}
		binary.BigEndian.PutUint32(longer[2:], uint32(len(longer)))
		if _, err := parse(longer); err == nil {
			t.Errorf("command %d with a byte behind its parameters was accepted", i)
		}
	}
}

// TestEveryFixedByteCounts flips each byte of the three commands. Only nonces, salt,
// HMAC, qualifying data and session handle may vary.
func TestEveryFixedByteCounts(t *testing.T) {
	commands := recorded(t)
	start, q := commands[0], commands[1]
	saltLen := int(binary.BigEndian.Uint16(start[36:]))
	free := []func(i int) bool{
		func(i int) bool { return i >= 20 && i < 36 || i >= 38 && i < 38+saltLen },
		func(i int) bool {
			handle, nonce, mac, data := i >= 18 && i < 22, i >= 24 && i < 40, i >= 43 && i < 75, i >= 77 && i < 109
			return handle || nonce || mac || data
		},
		func(i int) bool { return i >= 10 && i < 14 },
	}
	if len(q) < 109 {
		t.Fatalf("quote has %d bytes", len(q))
	}
	for n, command := range commands {
		for i := range command {
			for bit := range 8 {
				altered := append([]byte(nil), command...)
				altered[i] ^= 1 << bit
				_, err := parse(altered)
				continues := n == 1 && i == 40 && bit == 0 // continueSession
				if accepted := err == nil; accepted != (free[n](i) || continues) {
					t.Errorf("command %d, byte %d, bit %d: accepted %v", n, i, bit, accepted)
				}
			}
		}
	}
}

// TestOtherCommandsEndTheAttestation tries what a VM might want from a TPM.
func TestOtherCommandsEndTheAttestation(t *testing.T) {
	b, _ := newBroker(t, time.Minute)
	password := tpm2.PasswordAuth(nil)
	reg := func(i int) tpm2.AuthHandle { return tpm2.AuthHandle{Handle: tpm2.TPMHandle(i), Auth: password} }
	one := digest.Of([]byte("x"))
	extendOther := func(i int) func(transport.TPM) error {
		return func(v transport.TPM) error {
			_, err := tpm2.PCRExtend{PCRHandle: reg(i), Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: one[:]}}}}.Execute(v)
			return err
		}
	}
	quoteWith := func(change func(*tpm2.Quote)) func(transport.TPM) error {
		return func(v transport.TPM) error {
			s, _, err := bootSession(b, v)
			if err != nil {
				return err
			}
			q := bootQuote(b, s, one)
			change(&q)
			_, err = q.Execute(v)
			return err
		}
	}
	startWith := func(opts ...tpm2.AuthOption) func(transport.TPM) error {
		return func(v transport.TPM) error {
			_, _, err := tpm2.HMACSession(v, tpm2.TPMAlgSHA256, 16, opts...)
			return err
		}
	}
	salted := tpm2.Salted(b.session.Handle, b.session.Public)
	encrypted := tpm2.AESEncryption(128, tpm2.EncryptInOut)
	selected := func(selection ...int) func(*tpm2.Quote) {
		return func(q *tpm2.Quote) { q.PCRSelect.PCRSelections[0].PCRSelect = bitmap(selection) }
	}
	tries := map[string]func(transport.TPM) error{
		"extend PCR 16": extendOther(pcr.VM),
		"extend PCR 23": extendOther(pcr.Tunnel),
		"extend PCR 10": extendOther(pcr.Platform),
		"reset PCR 16":  func(v transport.TPM) error { _, err := tpm2.PCRReset{PCRHandle: reg(pcr.VM)}.Execute(v); return err },
		"read PCRs": func(v transport.TPM) error {
			_, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: []byte{1, 0, 0}}}}}.Execute(v)
			return err
		},
		"get random": func(v transport.TPM) error { _, err := tpm2.GetRandom{BytesRequested: 8}.Execute(v); return err },
		"list handles": func(v transport.TPM) error {
			_, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, PropertyCount: 1}.Execute(v)
			return err
		},
		"read the AIK": func(v transport.TPM) error {
			_, err := tpm2.ReadPublic{ObjectHandle: b.aik.Handle}.Execute(v)
			return err
		},
		"certify with the AIK": func(v transport.TPM) error {
			_, err := tpm2.Certify{ObjectHandle: b.session.Auth(password), SignHandle: b.aik.Auth(password), InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}}.Execute(v)
			return err
		},
		"clear": func(v transport.TPM) error {
			_, err := tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: password}}.Execute(v)
			return err
		},
		"create a key": func(v transport.TPM) error {
			_, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: password}, InPublic: tpm2.New2B(tpm2.ECCSRKTemplate)}.Execute(v)
			return err
		},
		"evict the AIK": func(v transport.TPM) error {
			_, err := tpm2.EvictControl{Auth: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: password}, ObjectHandle: &tpm2.NamedHandle{Handle: b.aik.Handle, Name: b.aik.Name}, PersistentHandle: b.aik.Handle}.Execute(v)
			return err
		},
		"shut down": func(v transport.TPM) error {
			_, err := tpm2.Shutdown{ShutdownType: tpm2.TPMSUClear}.Execute(v)
			return err
		},
		"flush a session not its own": func(v transport.TPM) error {
			_, err := tpm2.FlushContext{FlushHandle: tpm2.TPMHandle(0x02000001)}.Execute(v)
			return err
		},
		"flush before the quote": func(v transport.TPM) error {
			_, closeSession, err := bootSession(b, v)
			if err != nil {
				return err
			}
			return closeSession()
		},
		"quote without a session": func(v transport.TPM) error { _, err := bootQuote(b, password, one).Execute(v); return err },
		"unsalted session":        startWith(encrypted),
		"unencrypted session":     startWith(salted),
		"AES-256 session":         startWith(salted, tpm2.AESEncryption(256, tpm2.EncryptInOut)),
		"bound session":           startWith(salted, encrypted, tpm2.Bound(b.aik.Handle, b.aik.Name, nil)),
		"salt to another key":     startWith(tpm2.Salted(b.aik.Handle, b.session.Public), encrypted),
		"policy session": func(v transport.TPM) error {
			_, _, err := tpm2.PolicySession(v, tpm2.TPMAlgSHA256, 16, salted, encrypted)
			return err
		},
		"session encrypting one way": func(v transport.TPM) error {
			s, _, err := tpm2.HMACSession(v, tpm2.TPMAlgSHA256, 16, salted, tpm2.AESEncryption(128, tpm2.EncryptIn))
			if err != nil {
				return err
			}
			_, err = bootQuote(b, s, one).Execute(v)
			return err
		},
		"two sessions": func(v transport.TPM) error {
			if _, _, err := bootSession(b, v); err != nil {
				return err
			}
			_, _, err := bootSession(b, v)
			return err
		},
		"static selection":      quoteWith(selected(pcr.StaticSelection()...)),
		"only PCR 16 and 23":    quoteWith(selected(pcr.VM, pcr.Tunnel)),
		"one register more":     quoteWith(selected(append(pcr.BootSelection(), 15)...)),
		"short qualifying data": quoteWith(func(q *tpm2.Quote) { q.QualifyingData.Buffer = one[:31] }),
		"two selections": quoteWith(func(q *tpm2.Quote) {
			q.PCRSelect.PCRSelections = append(q.PCRSelect.PCRSelections, q.PCRSelect.PCRSelections[0])
		}),
		"quote by the session key": quoteWith(func(q *tpm2.Quote) {
			auth := q.SignHandle.(tpm2.AuthHandle)
			q.SignHandle = b.session.Auth(auth.Auth)
		}),
		"garbage": func(v transport.TPM) error { _, err := v.Send([]byte("not a TPM command")); return err },
		"nothing": func(v transport.TPM) error { _, err := v.Send(nil); return err },
	}
	for name, try := range tries {
		t.Run(name, func(t *testing.T) {
			a := b.begin(t, "a", name)
			defer a.Release()
			if err := try(commands(t, a)); !errors.Is(err, ErrRefused) {
				t.Errorf("not refused: %v", err)
			}
			select {
			case <-a.Ended():
			default:
				t.Error("the attestation goes on")
			}
			if err := attest(b, commands(t, a), name); !errors.Is(err, ErrOver) {
				t.Errorf("a quote afterwards: %v", err)
			}
			clean(t, b)
		})
	}
}

// A response opens a session only if all of it is one that does.
func FuzzStartedSession(f *testing.F) {
	good := append([]byte{0x80, 1, 0, 0, 0, 48, 0, 0, 0, 0, 2, 0, 0, 1, 0, 32}, make([]byte, 32)...)
	f.Add(good)
	f.Add(good[:20])
	f.Add(flushed())
	f.Fuzz(func(t *testing.T, response []byte) {
		if handle, ok := startedSession(response); ok && (handle>>24 != handleTypeHMAC || !succeeded(response) || int(binary.BigEndian.Uint32(response[2:])) != len(response)) {
			t.Errorf("session %#x of %x", handle, response)
		}
	})
}

func FuzzParse(f *testing.F) {
	for _, c := range recorded(f) {
		f.Add(c)
	}
	f.Fuzz(func(t *testing.T, command []byte) {
		req, err := parse(command)
		if err != nil {
			return
		}
		code := binary.BigEndian.Uint32(command[6:])
		if want := map[kind]uint32{startSession: ccStartAuthSession, quote: ccQuote, flush: ccFlushContext}[req.kind]; code != want {
			t.Errorf("command %#x was taken for %#x", code, want)
		}
		if int(binary.BigEndian.Uint32(command[2:])) != len(command) {
			t.Error("accepted with a wrong size")
		}
	})
}
