package enroll

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"math/big"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/internal/tpm"
	"foothold/internal/tpm/swtpmtest"
	"foothold/protocol/inventory"
	"foothold/protocol/signed"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

func TestEnrolKeepsKeysAndCertifies(t *testing.T) {
	v := swtpmtest.New(t)
	dev := v.Open()
	entry := inventory.Host{Name: "host-1", API: netip.MustParseAddrPort("10.83.0.10:8443"), Location: "site 1"}
	first, err := Enroll(dev, entry)
	if err != nil {
		t.Fatal(err)
	}
	dev.Close()
	v.Restart()
	dev = v.Open()
	second, err := Enroll(dev, entry)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(first.AIK, second.AIK) || !bytes.Equal(first.Session, second.Session) || !bytes.Equal(first.EK, second.EK) {
		t.Error("a second enrolment made other keys")
	}
	if _, err := x509.ParseCertificate(first.EK); err != nil {
		t.Error(err)
	}
	checkCertify(t, first)
	other, err := Enroll(swtpmtest.New(t).Open(), entry)
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Equal(first.AIK, other.AIK) {
		t.Error("two TPMs have the same AIK")
	}
}

func checkCertify(t *testing.T, h inventory.Host) {
	t.Helper()
	aik, err := tpm.ParsePublic(h.AIK)
	if err != nil {
		t.Fatal(err)
	}
	if err := tpm.CheckAIK(aik); err != nil {
		t.Error(err)
	}
	session, err := tpm.ParsePublic(h.Session)
	if err != nil {
		t.Fatal(err)
	}
	if err := tpm.CheckSession(session); err != nil {
		t.Error(err)
	}
	if tpm.CheckAIK(session) == nil || tpm.CheckSession(aik) == nil {
		t.Error("one key passes for the other")
	}
	pub, err := tpm2.Pub(*aik)
	if err != nil {
		t.Fatal(err)
	}
	sig, err := tpm2.Unmarshal[tpm2.TPMTSignature](h.SessionSignature)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := sig.Signature.ECDSA()
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(h.SessionCertify)
	r, s := new(big.Int).SetBytes(ec.SignatureR.Buffer), new(big.Int).SetBytes(ec.SignatureS.Buffer)
	if !ecdsa.Verify(pub.(*ecdsa.PublicKey), sum[:], r, s) {
		t.Error("the AIK's signature over the session key does not verify")
	}
	attest, err := tpm2.Unmarshal[tpm2.TPMSAttest](h.SessionCertify)
	if err != nil {
		t.Fatal(err)
	}
	info, err := attest.Attested.Certify()
	if err != nil {
		t.Fatal(err)
	}
	name, err := tpm2.ObjectName(session)
	if err != nil || !bytes.Equal(info.Name.Buffer, name.Buffer) {
		t.Error("another key was certified")
	}
}

func TestEnrolRefusesAnotherKeyAtItsHandle(t *testing.T) {
	dev := swtpmtest.New(t).Open()
	if err := create(dev, inventory.AIKHandle, tpm.SessionTemplate()); err != nil {
		t.Fatal(err)
	}
	if _, err := Enroll(dev, inventory.Host{Name: "host-1"}); err == nil {
		t.Fatal("a key of another form was taken for the AIK")
	}
}

// exchanged is a TPM whose commands of some codes another answers.
type exchanged struct {
	transport.TPM
	other transport.TPM
	codes []tpm2.TPMCC
}

func (e exchanged) Send(command []byte) ([]byte, error) {
	if slices.Contains(e.codes, tpm2.TPMCC(binary.BigEndian.Uint32(command[6:]))) { // after tag and size
		return e.other.Send(command)
	}
	return e.TPM.Send(command)
}

func TestEnrolRefusesTheCertificateOfAnotherTPM(t *testing.T) {
	dev, other := swtpmtest.New(t).Open(), swtpmtest.New(t).Open()
	theirs, err := tpm.EndorsementCertificate(other)
	if err != nil {
		t.Fatal(err)
	}
	liar := exchanged{dev, other, []tpm2.TPMCC{tpm2.TPMCCNVReadPublic, tpm2.TPMCCNVRead}}
	if shown, err := tpm.EndorsementCertificate(liar); err != nil || !bytes.Equal(shown, theirs) {
		t.Fatalf("the other's certificate is not shown: %v", err)
	}
	h, err := Enroll(liar, inventory.Host{Name: "host-1"})
	if err == nil || !strings.Contains(err.Error(), "activate credential") || !strings.Contains(err.Error(), "do not enrol it") {
		t.Errorf("refusal: %v", err)
	}
	if len(h.EK) > 0 || len(h.AIK) > 0 {
		t.Error("an entry was made")
	}
	if _, err := Enroll(dev, inventory.Host{Name: "host-1"}); err != nil {
		t.Errorf("with its own certificate: %v", err)
	}
}

func TestEnrolSaysHowToMakeTheEndorsementKey(t *testing.T) {
	dev := swtpmtest.New(t).Open()
	const handle = 0x81010001
	public, err := tpm2.ReadPublic{ObjectHandle: tpm2.TPMHandle(handle)}.Execute(dev)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.EvictControl{
		Auth:             tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		ObjectHandle:     tpm2.NamedHandle{Handle: handle, Name: public.Name},
		PersistentHandle: handle,
	}.Execute(dev)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Enroll(dev, inventory.Host{Name: "host-1"}); err == nil || !strings.Contains(err.Error(), "tpm2_createek") {
		t.Errorf("without its endorsement key: %v", err)
	}
}

func TestPublish(t *testing.T) {
	public, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	env, err := Publish(private, "lab", 3, now, time.Hour, []inventory.Host{{Name: "a"}, {Name: "b"}})
	if err != nil {
		t.Fatal(err)
	}
	var inv inventory.Inventory
	if err := env.Open(public, signed.Inventory, &inv); err != nil || inv.Version != 3 || len(inv.Hosts) != 2 {
		t.Errorf("%v %+v", err, inv)
	}
	env.Payload[10] ^= 1
	if err := env.Open(public, signed.Inventory, &inv); !errors.Is(err, signed.ErrSignature) {
		t.Errorf("altered: %v", err)
	}
	if _, err := Publish(private, "lab", 1, now, time.Hour, []inventory.Host{{Name: "a"}, {Name: "a"}}); err == nil {
		t.Error("a host twice was published")
	}
}

func TestCredentialActivationNeedsThatTPMAndThatKey(t *testing.T) {
	dev, other := swtpmtest.New(t).Open(), swtpmtest.New(t).Open()
	mine, err := Enroll(dev, inventory.Host{Name: "host-1"})
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := Enroll(other, inventory.Host{Name: "host-2"})
	if err != nil {
		t.Fatal(err)
	}
	secret := bytes.Repeat([]byte{7}, tpm.SecretLen)
	challenge := func(host inventory.Host, key []byte) (blob, encrypted []byte) {
		cert, err := x509.ParseCertificate(host.EK)
		if err != nil {
			t.Fatal(err)
		}
		pub, err := tpm.ParsePublic(key)
		if err != nil {
			t.Fatal(err)
		}
		if blob, encrypted, err = tpm.Challenge(cert, pub, secret); err != nil {
			t.Fatal(err)
		}
		return blob, encrypted
	}
	aik, err := tpm.ReadKey(dev, inventory.AIKHandle)
	if err != nil {
		t.Fatal(err)
	}
	blob, encrypted := challenge(mine, mine.AIK)
	if got, err := tpm.Activate(dev, aik, blob, encrypted); err != nil || !bytes.Equal(got, secret) {
		t.Fatalf("answer %x, %v", got, err)
	}
	for name, c := range map[string][2][]byte{
		"another TPM's endorsement key": func() [2][]byte { b, e := challenge(theirs, mine.AIK); return [2][]byte{b, e} }(),
		"another TPM's AIK":             func() [2][]byte { b, e := challenge(mine, theirs.AIK); return [2][]byte{b, e} }(),
		"altered":                       {append([]byte{blob[0] ^ 1}, blob[1:]...), encrypted},
		"empty":                         {nil, nil},
	} {
		if got, err := tpm.Activate(dev, aik, c[0], c[1]); err == nil {
			t.Errorf("%s: answered %x", name, got)
		}
	}
	if got, err := tpm.Activate(dev, aik, blob, encrypted); err != nil || !bytes.Equal(got, secret) {
		t.Errorf("after the failures: %x, %v", got, err)
	}
}
