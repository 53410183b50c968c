// Package verdicts measures how many quotes a second are judged, end to end: over
// kept-alive mutual TLS, with the replay of a log of a hundred events and the nonce spent.
//
// The parts are the orchestrator's own - its TLS, its decoding, its ledger, its verifier -
// behind one call that does nothing else. The evidence is of a software TPM, one quote
// for each nonce, through the provider's broker. The same call also judges by
// google/go-attestation, and by nothing but signature and hashing, which is the limit.
package verdicts

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"foothold/internal/mtls"
	"foothold/internal/tpm"
	"foothold/internal/tpm/swtpm"
	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/inventory"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/signed"
	"foothold/protocol/token"
	"foothold/protocol/vmspec"
	"foothold/provider/broker"
	"foothold/provider/enroll"
	"foothold/tenant/authority"
	"foothold/tenant/ledger"
	"foothold/tenant/orchestrator"
	"foothold/tenant/policy"
	"foothold/tenant/reservation"
	"foothold/tenant/verify"

	"github.com/google/go-tpm/tpm2"
)

// Events is the number of events in the log of a host's firmware and boot loader.
const Events = 100

const (
	vmID     = "0b6c2f4e-5a7d-4c1b-9e57-3d2a8f60c911"
	hostName = "host-1"
	release  = "bench"
	bootDNS  = "boot.foothold.internal"
	orchDNS  = "orchestrator.foothold.internal"
	day      = 24 * time.Hour
	// nonceAge is longer than a measurement.
	nonceAge = day
)

// Evidence is what is judged: one VM's, quoted for as many nonces as are to be spent.
type Evidence struct {
	// Held is how long the broker held the TPM for each quote, Own how long TPM2_Quote
	// alone takes of the same registers; in the order of measuring.
	Held, Own []time.Duration

	dir      string
	tenant   *authority.Set
	keys     broker.Keys
	verifier *verify.Verifier
	settings vmspec.Spec
	requests []request
	regs     map[int]digest.SHA256
}

// request is one call.
type request struct {
	Nonce    []byte              `json:"nonce"`
	Evidence verify.BootEvidence `json:"evidence"`
}

// Make quotes n times in an empty folder.
func Make(ctx context.Context, dir string, n int) (*Evidence, error) {
	e := &Evidence{dir: dir}
	if err := e.make(ctx, n); err != nil {
		return nil, fmt.Errorf("make evidence: %w", err)
	}
	return e, nil
}

func (e *Evidence) make(ctx context.Context, n int) error {
	if _, err := orchestrator.Init(ctx, e.path("tenant")); err != nil {
		return err
	}
	var err error
	if _, e.tenant, err = orchestrator.Open(e.path("tenant")); err != nil {
		return err
	}
	// The TPM's process dies with the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := swtpm.Manufacture(ctx, e.path(hostName)); err != nil {
		return err
	}
	sockets, err := os.MkdirTemp("", "foothold-") // sockets' paths are short
	if err != nil {
		return err
	}
	defer os.RemoveAll(sockets)
	proc, err := swtpm.Start(ctx, e.path(hostName), filepath.Join(sockets, "tpm"))
	if err != nil {
		return err
	}
	defer proc.Stop()
	dev, err := tpm.Open(proc.Socket)
	if err != nil {
		return err
	}
	defer dev.Close()
	entry := inventory.Host{Name: hostName, API: netip.MustParseAddrPort("127.0.0.1:8443"), Location: "bench", Asset: "bench", Software: release}
	if entry.EKChain, err = swtpm.Chain(e.path(hostName)); err != nil {
		return err
	}
	if entry, err = enroll.Enroll(dev, entry); err != nil {
		return err
	}
	if e.keys, err = broker.KeysOf(entry); err != nil {
		return err
	}
	m := newMachine()
	if err := m.boot(dev); err != nil {
		return err
	}
	if e.verifier, err = e.believe(entry, m); err != nil {
		return err
	}
	return e.quotes(ctx, dev, m, n)
}

func (e *Evidence) path(name string) string { return filepath.Join(e.dir, name) }

// believe makes the verifier of an installation that knows this host and its release.
func (e *Evidence) believe(entry inventory.Host, m *machine) (*verify.Verifier, error) {
	now := time.Now()
	provider, providerKey, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	env, err := enroll.Publish(providerKey, "bench", 1, now, day, []inventory.Host{entry})
	if err != nil {
		return nil, err
	}
	inventoryFile, err := json.Marshal(env)
	if err != nil {
		return nil, err
	}
	makers, err := verify.OpenManufacturers(filepath.Join(e.path(hostName), swtpm.RootFile))
	if err != nil {
		return nil, err
	}
	inv, err := verify.ParseInventory(inventoryFile, provider, makers, now)
	if err != nil {
		return nil, err
	}
	signer, signerKey, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	doc, err := json.Marshal(platform.Manifest{Name: release, Profile: platform.Production, ValidFrom: now.Add(-time.Hour), ValidUntil: now.Add(day),
		Boot: m.Reference(), Files: m.Files, Firmware: m.firmware})
	if err != nil {
		return nil, err
	}
	platformFile, err := json.Marshal(signed.Seal(signerKey, signed.Platform, doc))
	if err != nil {
		return nil, err
	}
	p, err := verify.ParsePlatform(platformFile, signer, platform.Production, now)
	if err != nil {
		return nil, err
	}
	return verify.New(verify.Config{Inventory: inv, Platforms: []*verify.Platform{p}, Profile: platform.Production,
		Policies: verify.Policies{Default: verify.Policy{Locations: []string{entry.Location}}}, Now: time.Now})
}

// quotes stores n nonces and has the VM quoted for each.
func (e *Evidence) quotes(ctx context.Context, dev *tpm.Device, m *machine, n int) error {
	nonces, err := e.nonces(ctx, n)
	if err != nil {
		return err
	}
	if err := e.settle(); err != nil {
		return err
	}
	b, err := broker.New(dev, e.keys, time.Minute)
	if err != nil {
		return err
	}
	leaf, err := loaderLeaf()
	if err != nil {
		return err
	}
	server, err := e.tenant.WriteFiles(e.dir, "boot", authority.Boot,
		authority.Request{Identity: mtls.Identity{Role: mtls.BootServer, Name: "b"}, Usage: authority.Server, Lifetime: day, DNS: []string{bootDNS}})
	if err != nil {
		return err
	}
	serverLeaf, err := mtls.LoadDER(server.Cert)
	if err != nil {
		return err
	}
	ev := verify.BootEvidence{ExporterHash: digest.Of([]byte("exporter")), ServerLeaf: serverLeaf, LoaderLeaf: leaf, VMKey: make([]byte, ed25519.PublicKeySize), Platform: m.logs}
	rand.Read(ev.VMKey)
	tunnel := evidence.Tunnel(ev.ExporterHash, ev.ServerLeaf, ev.LoaderLeaf, ev.VMKey)
	events := vmspec.Measurements(m.firmware, e.settings.Digest())
	e.regs = pcr.Replay(append(append(m.measured, events...), pcr.Event{PCR: pcr.Tunnel, Digest: tunnel}))
	for _, nonce := range nonces {
		if err := ctx.Err(); err != nil {
			return err
		}
		a, err := b.Attest("bench", events, tunnel)
		if err != nil {
			return err
		}
		ev.Quote, err = quote(forwarder(func(c []byte) ([]byte, error) { return a.Forward(ctx, c) }), e.keys,
			evidence.Binding(evidence.RoleBoot, vmID, tunnel, e.settings.Digest(), nonce))
		if err != nil {
			return err
		}
		e.Held = append(e.Held, a.Held())
		e.requests = append(e.requests, request{nonce, ev})
	}
	return e.ownTime(dev)
}

// nonces stores what the calls will spend, in a ledger that is copied for each run.
func (e *Evidence) nonces(ctx context.Context, n int) (nonces [][]byte, err error) {
	l, err := ledger.Open(ctx, e.path("nonces.db"), time.Now)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	deadline := time.Now().Add(day)
	return nonces, l.Write(ctx, func(t *ledger.Tx) error {
		r := ledger.Reservation{ID: vmID, Name: "web", Template: "debian", Restart: reservation.Never, Size: policy.DefaultSize, MemoryMiB: 1024,
			Start: 1, Deadline: deadline, MAC: "02:fb:00:00:00:10", Address: netip.MustParseAddr("10.82.0.10"), Volume: "10000000-0000-4000-8000-000000000001"}
		if err := errors.Join(t.AddReservation(r), t.PutStart(r.ID, 1, ledger.Start{}), t.Move(r.ID, 1, reservation.Reserved, reservation.Booting, deadline)); err != nil {
			return err
		}
		for range n {
			nonce, err := t.NewNonce(vmID, 1, evidence.RoleBoot)
			if err != nil {
				return err
			}
			nonces = append(nonces, nonce)
		}
		return nil
	})
}

// settle makes the VM's settings.
func (e *Evidence) settle() error {
	ca, err := e.tenant.Certificate(authority.Boot)
	if err != nil {
		return err
	}
	key := e.tenant.Public(authority.ManifestKey)
	size, _ := policy.SizeOf(policy.DefaultSize) // there is one
	e.settings = vmspec.Spec{Reservation: vmID, Start: 1, Tenant: "bench", Name: "web", VCPUs: size.VCPUs, MemoryMiB: size.MemoryMiB,
		Network:     vmspec.Network{MAC: "02:fb:00:00:00:10", Address: netip.MustParsePrefix("10.82.0.10/24"), Gateway: netip.MustParseAddr("10.82.0.1"), MTU: 1500},
		Boot:        vmspec.Boot{URL: "https://10.81.0.10:443", ServerName: bootDNS, CA: ca, ManifestKey: key, ComponentKey: key},
		TokenDigest: token.New(token.T1).Digest(), Template: digest.Of([]byte("template")),
		Volume: vmspec.Volume{ID: "10000000-0000-4000-8000-000000000001", SizeMiB: size.VolumeMiB}}
	return e.settings.Validate()
}

// forwarder is a TPM far away.
type forwarder func([]byte) ([]byte, error)

// Send implements go-tpm's transport.TPM.
func (f forwarder) Send(command []byte) ([]byte, error) { return f(command) }

// quote asks as a boot server does.
func quote(t forwarder, keys broker.Keys, binding digest.SHA256) (evidence.Quote, error) {
	name, err := tpm2.ObjectName(&keys.AIK)
	if err != nil {
		return evidence.Quote{}, err
	}
	auth := tpm2.HMAC(tpm2.TPMAlgSHA256, 32, tpm2.Salted(inventory.SessionHandle, keys.Session), tpm2.AESEncryption(128, tpm2.EncryptInOut))
	return ask(t, tpm2.AuthHandle{Handle: inventory.AIKHandle, Name: *name, Auth: auth}, binding)
}

func ask(t interface{ Send([]byte) ([]byte, error) }, aik tpm2.AuthHandle, binding digest.SHA256) (evidence.Quote, error) {
	bits := make([]byte, 3)
	for _, i := range pcr.BootSelection() {
		bits[i/8] |= 1 << (i % 8)
	}
	rsp, err := tpm2.Quote{SignHandle: aik, QualifyingData: tpm2.TPM2BData{Buffer: binding[:]}, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: bits}}}}.Execute(t)
	if err != nil {
		return evidence.Quote{}, err
	}
	return evidence.Quote{Attest: rsp.Quoted.Bytes(), Signature: tpm2.Marshal(rsp.Signature)}, nil
}

// ownTime measures TPM2_Quote without a session.
func (e *Evidence) ownTime(dev *tpm.Device) error {
	name, err := tpm2.ObjectName(&e.keys.AIK)
	if err != nil {
		return err
	}
	for range 200 {
		began := time.Now()
		if _, err := ask(dev, tpm2.AuthHandle{Handle: inventory.AIKHandle, Name: *name, Auth: tpm2.PasswordAuth(nil)}, digest.Of(nil)); err != nil {
			return err
		}
		e.Own = append(e.Own, time.Since(began))
	}
	return nil
}

// loaderLeaf is a certificate as a loader makes it.
func loaderLeaf() ([]byte, error) {
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	return x509.CreateCertificate(rand.Reader, tmpl, tmpl, public, key)
}
