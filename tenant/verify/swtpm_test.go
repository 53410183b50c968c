package verify

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"foothold/internal/tpm"
	"foothold/internal/tpm/swtpmtest"
	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/inventory"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/platform/platformtest"
	"foothold/protocol/signed"
	"foothold/protocol/vmspec"

	"github.com/google/go-tpm/tpm2"
)

const vmID = "0b6c2f4e-5a7d-4c1b-9e57-3d2a8f60c911"

// host is a hypervisor with a real TPM, driven as foothold-host would drive it. The
// keys are made here, since places do not import each other.
type host struct {
	t     testing.TB
	tpm   *swtpmtest.TPM
	dev   *tpm.Device
	aik   tpm.Key
	entry inventory.Host
	log   []pcr.Event
}

func newHost(t testing.TB, name string) *host {
	t.Helper()
	h := &host{t: t, tpm: swtpmtest.New(t)}
	h.dev = h.tpm.Open()
	h.aik = h.makeKey(inventory.AIKHandle, tpm.AIKTemplate())
	session := h.makeKey(inventory.SessionHandle, tpm.SessionTemplate())
	rsp, err := tpm2.Certify{
		ObjectHandle: session.Auth(tpm2.PasswordAuth(nil)),
		SignHandle:   h.aik.Auth(tpm2.PasswordAuth(nil)),
		InScheme:     tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
	}.Execute(h.dev)
	h.must(err)
	h.entry = inventory.Host{
		Name: name, API: netip.MustParseAddrPort("10.83.0.10:8443"), Location: "site 1", Asset: "a1", Software: "release-1",
		AIK: tpm2.Marshal(h.aik.Public), Session: tpm2.Marshal(session.Public),
		SessionCertify: rsp.CertifyInfo.Bytes(), SessionSignature: tpm2.Marshal(rsp.Signature),
	}
	h.entry.EK, h.entry.EKChain = h.tpm.Endorsement(h.dev)
	return h
}

func (h *host) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func (h *host) makeKey(handle tpm2.TPMHandle, template tpm2.TPMTPublic) tpm.Key {
	h.t.Helper()
	rsp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(template),
	}.Execute(h.dev)
	h.must(err)
	_, err = tpm2.EvictControl{
		Auth:             tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		ObjectHandle:     &tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name},
		PersistentHandle: handle,
	}.Execute(h.dev)
	h.must(err)
	_, err = tpm2.FlushContext{FlushHandle: rsp.ObjectHandle}.Execute(h.dev)
	h.must(err)
	key, err := tpm.ReadKey(h.dev, handle)
	h.must(err)
	return key
}

func (h *host) extend(register int, d digest.SHA256) {
	h.t.Helper()
	_, err := tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(register), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: d[:]}}},
	}.Execute(h.dev)
	h.must(err)
}

func (h *host) reset(register int) {
	h.t.Helper()
	_, err := tpm2.PCRReset{PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(register), Auth: tpm2.PasswordAuth(nil)}}.Execute(h.dev)
	h.must(err)
}

// boot measures the platform's files, as the lab's launcher does.
func (h *host) boot(files []platform.File) {
	h.log = nil
	for _, f := range files {
		h.extend(pcr.Platform, f.SHA256)
		h.log = append(h.log, pcr.Event{PCR: pcr.Platform, Digest: f.SHA256, Name: f.Name})
	}
}

// reboot cuts the power.
func (h *host) reboot() {
	h.t.Helper()
	h.dev.Close()
	h.tpm.Restart()
	h.dev = h.tpm.Open()
}

// measure holds the TPM for a VM.
func (h *host) measure(fw vmspec.Firmware, settings, tunnel digest.SHA256) {
	h.reset(pcr.VM)
	h.reset(pcr.Tunnel)
	for _, e := range vmspec.Measurements(fw, settings) {
		h.extend(e.PCR, e.Digest)
	}
	h.extend(pcr.Tunnel, tunnel)
}

func (h *host) quote(qualifying digest.SHA256, selection []int) evidence.Quote {
	return h.quoteOf(qualifying, tpm2.TPMSPCRSelection{Hash: tpm2.TPMAlgSHA256, PCRSelect: bitmap(selection)})
}

func (h *host) quoteOf(qualifying digest.SHA256, selections ...tpm2.TPMSPCRSelection) evidence.Quote {
	h.t.Helper()
	rsp, err := tpm2.Quote{
		SignHandle:     h.aik.Auth(tpm2.PasswordAuth(nil)),
		QualifyingData: tpm2.TPM2BData{Buffer: qualifying[:]},
		InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		PCRSelect:      tpm2.TPMLPCRSelection{PCRSelections: selections},
	}.Execute(h.dev)
	h.must(err)
	return evidence.Quote{Attest: rsp.Quoted.Bytes(), Signature: tpm2.Marshal(rsp.Signature)}
}

func bitmap(selection []int) []byte {
	b := make([]byte, 3)
	for _, i := range selection {
		b[i/8] |= 1 << (i % 8)
	}
	return b
}

// issued is a certificate with its key.
type issued struct {
	der  []byte
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func selfSigned(t testing.TB, name string, parent *issued) issued {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		BasicConstraintsValid: true, DNSNames: []string{name}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	signer, signerKey := tmpl, key
	if parent != nil {
		signer, signerKey = parent.cert, parent.key
	} else if name == "ca" {
		tmpl.IsCA, tmpl.KeyUsage = true, x509.KeyUsageCertSign
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, signer, key.Public(), signerKey)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return issued{der, cert, key}
}

// world is a tenant with one good host, and a second one with a TPM of its own.
type world struct {
	t        testing.TB
	host     *host
	rogue    *host
	files    []platform.File
	firmware vmspec.Firmware
	inv      ed25519.PrivateKey
	plat     ed25519.PrivateKey
	now      time.Time
	ca       issued
	server   issued
	loader   issued
	vmKey    []byte
}

func file(name string) platform.File { return platformtest.File(name) }

func newWorld(t testing.TB) *world {
	t.Helper()
	if testing.Short() {
		t.Skip("needs two TPM processes")
	}
	w := &world{t: t, host: newHost(t, "host-1"), rogue: newHost(t, "host-2"), now: time.Now()}
	w.files = []platform.File{file("foothold-host"), file("qemu-system-x86_64"), file("bios"), file("loader-kernel"), file("loader-initramfs"), file("host-config")}
	w.firmware = vmspec.Firmware{BIOS: w.files[2].SHA256, LoaderKernel: w.files[3].SHA256, LoaderInitramfs: w.files[4].SHA256, LoaderCmdline: "console=ttyS0"}
	_, w.inv, _ = ed25519.GenerateKey(rand.Reader)
	_, w.plat, _ = ed25519.GenerateKey(rand.Reader)
	w.host.boot(w.files)
	w.rogue.boot(w.files)
	w.ca = selfSigned(t, "ca", nil)
	w.server = selfSigned(t, "boot.foothold.internal", &w.ca)
	w.loader = selfSigned(t, "loader", nil)
	w.vmKey = make([]byte, 32)
	rand.Read(w.vmKey)
	return w
}

func seal(t testing.TB, key ed25519.PrivateKey, label string, doc any) []byte {
	t.Helper()
	payload, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(signed.Seal(key, label, payload))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func (w *world) inventory() inventory.Inventory {
	return inventory.Inventory{Provider: "lab", Version: 1, Issued: w.now, Expires: w.now.Add(time.Hour), Hosts: []inventory.Host{w.host.entry, w.rogue.entry}}
}

// makers trusts the authorities of both hosts' TPMs: each has one of its own.
func (w *world) makers() *Manufacturers {
	w.t.Helper()
	var roots []byte
	for _, h := range []*host{w.host, w.rogue} {
		data, err := os.ReadFile(h.tpm.Roots())
		h.must(err)
		roots = append(roots, data...)
	}
	m, err := ParseManufacturers(roots)
	w.host.must(err)
	return m
}

func (w *world) manifest() platform.Manifest {
	return platform.Manifest{Name: "release-1", Profile: platform.Lab, ValidFrom: w.now.Add(-time.Hour), ValidUntil: w.now.Add(2 * time.Hour), Files: w.files, Firmware: w.firmware}
}

func (w *world) verifier() *Verifier { return w.verifierAt(&w.now) }

func (w *world) verifierAt(now *time.Time) *Verifier {
	w.t.Helper()
	dir := w.t.TempDir()
	invFile, platFile := filepath.Join(dir, "inventory"), filepath.Join(dir, "platform")
	os.WriteFile(invFile, seal(w.t, w.inv, signed.Inventory, w.inventory()), 0o644)
	os.WriteFile(platFile, seal(w.t, w.plat, signed.Platform, w.manifest()), 0o644)
	inv, err := OpenInventory(invFile, w.inv.Public().(ed25519.PublicKey), w.makers(), w.now)
	if err != nil {
		w.t.Fatal(err)
	}
	plat, err := OpenPlatform(platFile, w.plat.Public().(ed25519.PublicKey), platform.Lab, w.now)
	if err != nil {
		w.t.Fatal(err)
	}
	v, err := New(Config{Inventory: inv, Platforms: []*Platform{plat}, Profile: platform.Lab, Now: func() time.Time { return *now }})
	if err != nil {
		w.t.Fatal(err)
	}
	return v
}

func (w *world) settings() vmspec.Spec {
	return vmspec.Spec{
		Reservation: vmID, Start: 1, Tenant: "bank", Name: "web-1", VCPUs: 1, MemoryMiB: 1024,
		Network: vmspec.Network{MAC: "02:00:00:00:00:0a", Address: netip.MustParsePrefix("10.82.0.10/24"), Gateway: netip.MustParseAddr("10.82.0.1"), MTU: 1500},
		Boot: vmspec.Boot{URL: "https://10.81.0.10:443", ServerName: "boot.foothold.internal", CA: w.ca.der,
			ManifestKey: make([]byte, 32), ComponentKey: make([]byte, 32)},
		TokenDigest: digest.Of([]byte("t1")), Template: digest.Of([]byte("template")),
		Volume: vmspec.Volume{ID: "5a1d6a0e-6f0b-4f3e-8d2a-1c9b7e3f4a55", SizeMiB: 1024},
	}
}

func nonce() []byte {
	n := make([]byte, evidence.NonceLen)
	rand.Read(n)
	return n
}

// attempt is one boot attempt with everything right; tests change parts before or
// after the host has quoted.
type attempt struct {
	expect BootExpectation
	ev     BootEvidence

	// What host and loader really do.
	onHost    *host
	firmware  vmspec.Firmware
	settings  vmspec.Spec
	tunnel    digest.SHA256
	nonce     []byte
	selection []tpm2.TPMSPCRSelection
}

func (w *world) attempt() *attempt {
	settings := w.settings()
	a := &attempt{
		expect: BootExpectation{Reservation: vmID, Start: 1, Host: "host-1", Settings: settings, Nonce: nonce()},
		ev: BootEvidence{ExporterHash: digest.Of([]byte("exporter")), ServerLeaf: w.server.der, LoaderLeaf: w.loader.der, VMKey: w.vmKey,
			Platform: evidence.Platform{Log: slices.Clone(w.host.log)}},
		onHost: w.host, firmware: w.firmware, settings: settings,
		selection: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: bitmap(pcr.BootSelection())}},
	}
	a.tunnel = evidence.Tunnel(a.ev.ExporterHash, a.ev.ServerLeaf, a.ev.LoaderLeaf, a.ev.VMKey)
	a.nonce = a.expect.Nonce
	return a
}

// quote lets the host measure and quote. The boot server computes the binding from
// what the orchestrator told it; a host alone cannot change that.
func (a *attempt) quote() {
	settings := a.settings.Digest()
	a.onHost.measure(a.firmware, settings, a.tunnel)
	expected := a.expect.Settings.Digest()
	a.ev.Quote = a.onHost.quoteOf(evidence.Binding(evidence.RoleBoot, a.expect.Reservation, a.tunnel, expected, a.nonce), a.selection...)
}

func checks(v Verdict) string {
	seen := map[string]bool{}
	text := ""
	for _, f := range v.Findings {
		if !seen[f.Check] {
			seen[f.Check] = true
			text += f.Check + " "
		}
	}
	return text
}
