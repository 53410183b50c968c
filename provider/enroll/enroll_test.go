package enroll

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
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

// guesser is a bus that answers a challenge with something else than the TPM does, and as
// the TPM would: the policy's session has no secret that a bus does not know.
type guesser struct{ transport.TPM }

func (g guesser) Send(command []byte) ([]byte, error) {
	response, err := g.TPM.Send(command)
	code := command[6:10]
	if err != nil || tpm2.TPMCC(binary.BigEndian.Uint32(code)) != tpm2.TPMCCActivateCredential {
		return response, err
	}
	sized := func(b []byte) (head, rest []byte) {
		n := 2 + int(binary.BigEndian.Uint16(b))
		return b[2:n], b[n:]
	}
	_, rest := sized(command[10+8+4+4:]) // behind header, two handles, the sessions' size, and the password's handle
	_, rest = sized(rest[1:])
	asked, _ := sized(rest[4:])
	const params = 10 + 4 // behind header and the parameters' size
	end := params + int(binary.BigEndian.Uint32(response[10:]))
	response[params+2] ^= 1
	_, rest = sized(response[end:])
	_, rest = sized(rest[1:])
	answered, rest := sized(rest)
	sum := sha256.Sum256(slices.Concat(response[6:10], code, response[params:end]))
	mac := hmac.New(sha256.New, nil)
	mac.Write(slices.Concat(sum[:], answered, asked, rest[:1]))
	mac.Sum(rest[3:3])
	return response, nil
}

func TestEnrolRefusesAWrongAnswer(t *testing.T) {
	dev := swtpmtest.New(t).Open()
	h, err := Enroll(guesser{dev}, inventory.Host{Name: "host-1"})
	if err == nil || !strings.Contains(err.Error(), "answered the challenge wrongly") || len(h.AIK) > 0 {
		t.Errorf("enrolled %d bytes of a key: %v", len(h.AIK), err)
	}
	if _, err := Enroll(dev, inventory.Host{Name: "host-1"}); err != nil {
		t.Errorf("with the TPM's own answer: %v", err)
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

// store puts data into an index of the TPM's NV memory that anybody may read.
func store(t *testing.T, dev transport.TPM, index tpm2.TPMHandle, data []byte) {
	t.Helper()
	owner := tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)}
	area := tpm2.TPMSNVPublic{NVIndex: index, NameAlg: tpm2.TPMAlgSHA256, DataSize: uint16(len(data)),
		Attributes: tpm2.TPMANV{OwnerWrite: true, AuthRead: true, NoDA: true, NT: tpm2.TPMNTOrdinary}}
	if public, err := (tpm2.NVReadPublic{NVIndex: index}).Execute(dev); err == nil {
		if _, err := (tpm2.NVUndefineSpace{AuthHandle: owner, NVIndex: tpm2.NamedHandle{Handle: index, Name: public.NVName}}).Execute(dev); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := (tpm2.NVDefineSpace{AuthHandle: owner, PublicInfo: tpm2.New2B(area)}).Execute(dev); err != nil {
		t.Fatal(err)
	}
	public, err := tpm2.NVReadPublic{NVIndex: index}.Execute(dev)
	if err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(data); at += 512 {
		_, err := tpm2.NVWrite{AuthHandle: owner, NVIndex: tpm2.NamedHandle{Handle: index, Name: public.NVName}, Offset: uint16(at),
			Data: tpm2.TPM2BMaxNVBuffer{Buffer: data[at:min(at+512, len(data))]}}.Execute(dev)
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestEnrolRecordsTheChain: what is given, then what the TPM holds from 0x01c00100 on.
func TestEnrolRecordsTheChain(t *testing.T) {
	v := swtpmtest.New(t)
	dev := v.Open()
	ek, issuers := v.Endorsement(dev)
	_, others := func() ([]byte, [][]byte) { o := swtpmtest.New(t); return o.Endorsement(o.Open()) }()
	issuer, other := issuers[0], others[0]
	enrolled := func(given ...[]byte) ([][]byte, error) {
		h, err := Enroll(dev, inventory.Host{Name: "host-1", EKChain: given})
		return h.EKChain, err
	}
	want := func(what string, got [][]byte, err error, chain ...[]byte) {
		t.Helper()
		if err != nil || !slices.EqualFunc(got, chain, bytes.Equal) {
			t.Errorf("%s: %d certificates, want %d; %v", what, len(got), len(chain), err)
		}
	}
	got, err := enrolled()
	want("a TPM that holds none", got, err)
	got, err = enrolled(issuer)
	want("one given", got, err, issuer)

	held := slices.Concat(issuer, make([]byte, 7), other, ek, bytes.Repeat([]byte{0xff}, 9))
	store(t, dev, 0x01c00100, held[:700]) // within the first
	store(t, dev, 0x01c00101, held[700:1500])
	store(t, dev, 0x01c00102, held[1500:])
	store(t, dev, 0x01c00104, []byte("behind a gap"))
	got, err = enrolled()
	want("over three indices", got, err, issuer, other)
	got, err = enrolled(other)
	want("one given again", got, err, other, issuer)
	many := [][]byte{}
	for i := range inventory.MaxEKChain - 1 {
		many = append(many, []byte{byte(i)})
	}
	if _, err := enrolled(many...); err == nil || !strings.Contains(err.Error(), "--ek-chain") {
		t.Errorf("more than are read: %v", err)
	}

	store(t, dev, 0x01c00103, []byte("no certificate"))
	if _, err := enrolled(); err == nil || !strings.Contains(err.Error(), "--ek-chain") {
		t.Errorf("no chain in the TPM: %v", err)
	}
	got, err = enrolled(issuer)
	want("no chain in the TPM, one given", got, err, issuer)
}

func TestReadChain(t *testing.T) {
	v := swtpmtest.New(t)
	_, issuers := v.Endorsement(v.Open())
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: issuers[0]})
	file := func(content []byte) string {
		name := filepath.Join(t.TempDir(), "chain.pem")
		if err := os.WriteFile(name, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	two := slices.Concat([]byte("\n"), text, []byte("\n"), text, []byte("\n\n"))
	if chain, err := ReadChain([]string{file(two), file(text)}); err != nil || len(chain) != 3 || !bytes.Equal(chain[2], issuers[0]) {
		t.Errorf("%d certificates, %v", len(chain), err)
	}
	if chain, err := ReadChain(nil); err != nil || chain != nil {
		t.Errorf("of no file: %v, %v", chain, err)
	}
	for says, files := range map[string][]string{
		"no such file":          {filepath.Join(t.TempDir(), "absent")},
		"holds no certificate":  {file([]byte("\n"))},
		"no PEM certificate":    {file(issuers[0])},
		"is no PEM certificate": {file(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: issuers[0]}))},
		"malformed":             {file(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: []byte{1}}))},
		"bytes; give":           {file(make([]byte, maxChainFile+1))},
		"something that is":     {file(append(slices.Clone(text), "and more"...))},
		"leave out the root":    {file(bytes.Repeat(text, inventory.MaxEKChain)), file(text)},
	} {
		if chain, err := ReadChain(files); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("want %q: %d certificates, %v", says, len(chain), err)
		}
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
	whole := inventory.Host{Name: "a", EK: []byte{1}, AIK: []byte{2}, Session: []byte{3}}
	for what, other := range map[string]inventory.Host{
		"endorsement certificate": {Name: "b", EK: []byte{1}, AIK: []byte{4}, Session: []byte{5}},
		"attestation key":         {Name: "b", EK: []byte{6}, AIK: []byte{2}, Session: []byte{5}},
		"session key":             {Name: "b", EK: []byte{6}, AIK: []byte{4}, Session: []byte{3}},
	} {
		if _, err := Publish(private, "lab", 1, now, time.Hour, []inventory.Host{whole, other}); err == nil || !strings.Contains(err.Error(), "a and b have one TPM") {
			t.Errorf("two hosts with one %s: %v", what, err)
		}
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
