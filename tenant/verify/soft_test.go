package verify

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"flag"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"foothold/internal/strictjson"
	"foothold/internal/tpm"
	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/inventory"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/signed"
	"foothold/protocol/vmspec"

	"github.com/google/go-tpm/tpm2"
)

var update = flag.Bool("update", false, "write testdata/bundles anew")

// soft is a tenant with one host whose keys are of software: for what has no time for a TPM.
type soft struct {
	world
	t     testing.TB
	aik   *ecdsa.PrivateKey
	roots []byte // PEM
	host  inventory.Host
	log   []pcr.Event
	v     *Verifier
}

var softTime = time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)

func newSoft(t testing.TB) *soft {
	t.Helper()
	s := &soft{t: t}
	s.world.t, s.now = t, softTime
	s.files = []platform.File{file("foothold-host"), file("qemu"), file("bios"), file("kernel"), file("initramfs")}
	s.firmware = vmspec.Firmware{BIOS: s.files[2].SHA256, LoaderKernel: s.files[3].SHA256, LoaderInitramfs: s.files[4].SHA256}
	_, s.inv, _ = ed25519.GenerateKey(rand.Reader)
	_, s.plat, _ = ed25519.GenerateKey(rand.Reader)
	for _, f := range s.files {
		s.log = append(s.log, pcr.Event{PCR: pcr.Platform, Digest: f.SHA256, Name: f.Name})
	}
	s.enrol()
	s.ca = s.certificate("ca", nil)
	s.server, s.loader = s.certificate("boot.foothold.internal", &s.ca), s.certificate("loader", nil)
	s.vmKey = bytes.Repeat([]byte{7}, 32)
	inv, err := ParseInventory(seal(t, s.inv, signed.Inventory, inventory.Inventory{Provider: "lab", Version: 3, Issued: s.now, Expires: s.now.Add(time.Hour), Hosts: []inventory.Host{s.host}}),
		s.inv.Public().(ed25519.PublicKey), s.makers(), s.now)
	s.must(err)
	if len(inv.hosts["host-1"].problems) > 0 {
		t.Fatal(inv.hosts["host-1"].problems)
	}
	plat, err := ParsePlatform(seal(t, s.plat, signed.Platform, s.manifest()), s.plat.Public().(ed25519.PublicKey), platform.Lab, s.now)
	s.must(err)
	s.v, err = New(Config{Inventory: inv, Platforms: []*Platform{plat}, Profile: platform.Lab, Now: func() time.Time { s.now = s.now.Add(time.Second); return s.now }})
	s.must(err)
	return s
}

func (s *soft) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

func (s *soft) makers() *Manufacturers {
	m, err := ParseManufacturers(s.roots)
	s.must(err)
	return m
}

func (s *soft) pinned() Pinned {
	return Pinned{InventoryKey: s.inv.Public().(ed25519.PublicKey), PlatformKey: s.plat.Public().(ed25519.PublicKey),
		Makers: s.makers(), Profile: platform.Lab, Now: func() time.Time { return s.now }}
}

// certificate is one of a hundred years around softTime.
func (s *soft) certificate(name string, parent *issued, change ...func(*x509.Certificate)) issued {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	s.must(err)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: softTime.AddDate(-1, 0, 0), NotAfter: softTime.AddDate(100, 0, 0),
		BasicConstraintsValid: true, DNSNames: []string{name}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	if name == "ca" {
		tmpl.IsCA, tmpl.KeyUsage, tmpl.ExtKeyUsage, tmpl.DNSNames = true, x509.KeyUsageCertSign, nil, nil
	}
	for _, f := range change {
		f(tmpl)
	}
	signer, signerKey := tmpl, key
	if parent != nil {
		signer, signerKey = parent.cert, parent.key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, signer, key.Public(), signerKey)
	s.must(err)
	cert, err := x509.ParseCertificate(der)
	s.must(err)
	return issued{der, cert, key}
}

// enrol makes the host's keys, with all that the inventory has of them.
func (s *soft) enrol() {
	maker := s.certificate("ca", nil)
	s.roots = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: maker.der})
	ek := s.certificate("ek", &maker, func(c *x509.Certificate) {
		c.ExtKeyUsage, c.UnknownExtKeyUsage, c.DNSNames = nil, []asn1.ObjectIdentifier{ekCertificate}, nil
	})
	key := func(template tpm2.TPMTPublic) (tpm2.TPMTPublic, *ecdsa.PrivateKey) {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		s.must(err)
		template.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
			X: tpm2.TPM2BECCParameter{Buffer: k.X.FillBytes(make([]byte, 32))}, Y: tpm2.TPM2BECCParameter{Buffer: k.Y.FillBytes(make([]byte, 32))}})
		return template, k
	}
	aik, private := key(tpm.AIKTemplate())
	session, _ := key(tpm.SessionTemplate())
	s.aik = private
	name, err := tpm2.ObjectName(&session)
	s.must(err)
	certify := tpm2.Marshal(tpm2.TPMSAttest{Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestCertify,
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestCertify, &tpm2.TPMSCertifyInfo{Name: *name, QualifiedName: *name})})
	s.host = inventory.Host{Name: "host-1", API: netip.MustParseAddrPort("10.83.0.10:8443"), Location: "site 1", Asset: "a1", Software: "release-1",
		EK: ek.der, AIK: tpm2.Marshal(aik), Session: tpm2.Marshal(session), SessionCertify: certify, SessionSignature: s.sign(certify)}
}

func (s *soft) sign(data []byte) []byte {
	sum := sha256.Sum256(data)
	r, v, err := ecdsa.Sign(rand.Reader, s.aik, sum[:])
	s.must(err)
	return tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{Hash: tpm2.TPMAlgSHA256,
		SignatureR: tpm2.TPM2BECCParameter{Buffer: r.FillBytes(make([]byte, 32))}, SignatureS: tpm2.TPM2BECCParameter{Buffer: v.FillBytes(make([]byte, 32))}})})
}

// quote is what a TPM with these registers would say.
func (s *soft) quote(binding digest.SHA256, selection []int, regs map[int]digest.SHA256) evidence.Quote {
	sum := pcr.Composite(selection, regs)
	data := tpm2.Marshal(tpm2.TPMSAttest{Magic: tpm2.TPMGeneratedValue, Type: tpm2.TPMSTAttestQuote, ExtraData: tpm2.TPM2BData{Buffer: binding[:]},
		ClockInfo: tpm2.TPMSClockInfo{Clock: uint64(s.now.UnixMilli()), ResetCount: 5, Safe: true},
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{
			PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: bitmap(selection)}}},
			PCRDigest: tpm2.TPM2BDigest{Buffer: sum[:]}})})
	return evidence.Quote{Attest: data, Signature: s.sign(data)}
}

// chain is a start up to its second watch, which is refused: the host measured one thing more.
func (s *soft) chain() (verdicts []Verdict) {
	x := BootExpectation{Reservation: vmID, Start: 1, Host: "host-1", Settings: s.settings(), Nonce: bytes.Repeat([]byte{1}, 32)}
	e := BootEvidence{ExporterHash: digest.Of([]byte("exporter")), ServerLeaf: s.server.der, LoaderLeaf: s.loader.der, VMKey: s.vmKey, Platform: evidence.Platform{Log: s.log}}
	settings, tunnel := x.Settings.Digest(), evidence.Tunnel(e.ExporterHash, e.ServerLeaf, e.LoaderLeaf, e.VMKey)
	regs := pcr.Replay(s.log)
	regs[pcr.VM], regs[pcr.Tunnel] = vm(s.firmware, settings), pcr.Extend(digest.SHA256{}, tunnel)
	e.Quote = s.quote(evidence.Binding(evidence.RoleBoot, vmID, tunnel, settings, x.Nonce), pcr.BootSelection(), regs)
	_, last := s.v.Boot(x, e)
	verdicts = append(verdicts, last)
	log := slices.Clone(s.log)
	for i, role := range []string{evidence.RoleUnlock, evidence.RoleConnect, evidence.RoleWatch, evidence.RoleWatch} {
		if i == 3 {
			log = append(log, pcr.Event{PCR: pcr.Platform, Digest: digest.Of([]byte("rogue")), Name: "rogue"})
		}
		x := StaticExpectation{Role: role, Reservation: vmID, Start: 1, Host: "host-1", Previous: last.Digest, Nonce: bytes.Repeat([]byte{byte(i + 2)}, 32), Clock: last.Clock}
		q := s.quote(evidence.StaticBinding(role, vmID, x.Previous, x.Nonce), pcr.StaticSelection(), pcr.Replay(log))
		_, last = s.v.Static(x, StaticEvidence{Quote: q, Platform: evidence.Platform{Log: log}})
		verdicts = append(verdicts, last)
	}
	for i, v := range verdicts {
		if v.Good() != (i < 4) {
			s.t.Fatalf("verdict %d: %v", i, v.Err())
		}
	}
	return verdicts
}

// bundleFiles are a chain that an earlier build made, with the keys to audit it by.
const bundleFiles = "testdata/bundles"

// TestKeptBundles: what an earlier build exported is still derived to the same verdicts.
// Where that must not be so any more, -update makes new ones, and the format's number changes.
func TestKeptBundles(t *testing.T) {
	if *update {
		s := newSoft(t)
		s.must(os.MkdirAll(bundleFiles, 0o755))
		write := func(name string, data []byte) { s.must(os.WriteFile(filepath.Join(bundleFiles, name), data, 0o644)) }
		chain := Chain{Format: ChainFormat}
		for i, v := range s.chain() {
			write([]string{"1-boot.json", "2-unlock.json", "3-connect.json", "4-watch.json", "5-refused.json"}[i], v.bundle(t))
			chain.Links = append(chain.Links, v.Parts.Link)
		}
		data, err := json.Marshal(chain)
		s.must(err)
		write("chain.json", data)
		write("roots.pem", s.roots)
		write("inventory-key", []byte(hex.EncodeToString(s.inv.Public().(ed25519.PublicKey))))
		write("platform-key", []byte(hex.EncodeToString(s.plat.Public().(ed25519.PublicKey))))
	}
	read := func(name string) []byte {
		t.Helper()
		data, err := os.ReadFile(filepath.Join(bundleFiles, name))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	key := func(name string) []byte {
		data, err := hex.DecodeString(string(read(name)))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	makers, err := ParseManufacturers(read("roots.pem"))
	if err != nil {
		t.Fatal(err)
	}
	p := Pinned{InventoryKey: key("inventory-key"), PlatformKey: key("platform-key"), Makers: makers, Profile: platform.Lab, Now: time.Now}
	var list []Audited
	for _, name := range []string{"1-boot.json", "2-unlock.json", "3-connect.json", "4-watch.json", "5-refused.json"} {
		a := p.audit(t, read(name))
		if !a.Holds() || a.Derived != (name != "5-refused.json") {
			t.Errorf("%s: %+v", name, a)
		}
		list = append(list, a)
	}
	chain, err := ParseChain(bytes.NewReader(read("chain.json")))
	if err != nil {
		t.Fatal(err)
	}
	if c := AuditChain(list, chain.Links); !c.Holds() || !c.Complete || c.Verdicts != 5 || c.Bundles != 5 {
		t.Errorf("%+v", c)
	}
}

// Whatever is read as a bundle has one form and is audited without a panic; nothing but the
// bundles that were really made holds.
func FuzzBundle(f *testing.F) {
	s := newSoft(f)
	made := map[string]bool{}
	for _, v := range s.chain() {
		data := v.bundle(f)
		made[string(data)] = true
		f.Add(data)
		f.Add(bytes.Replace(data, []byte(`"accepted":true`), []byte(`"accepted":false`), 1))
		f.Add(bytes.Replace(data, []byte(`"start":1`), []byte(`"start":2`), -1))
	}
	f.Add([]byte(`{"format":"foothold/evidence-bundle/v2","record":{"static":{}}}`))
	p := s.pinned()
	f.Fuzz(func(t *testing.T, data []byte) {
		ParseChain(bytes.NewReader(data))
		b, err := ParseBundle(data)
		if err == nil {
			again, err := b.encode()
			if err != nil || !bytes.Equal(again, data) {
				t.Fatalf("it has another form: %v", err)
			}
		} else { // what would be one in its one form goes on
			var loose Bundle
			if strictjson.Unmarshal(data, &loose) != nil {
				return
			}
			if data, err = loose.encode(); err != nil {
				return
			}
			if b, err = ParseBundle(data); err != nil {
				return
			}
		}
		a, err := p.Audit(b)
		if err != nil {
			t.Fatal(err)
		}
		if a.Holds() && !made[string(data)] {
			t.Fatal("a bundle holds that nobody made")
		}
		AuditChain([]Audited{a}, []Link{a.Link})
	})
}
