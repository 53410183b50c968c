package site

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"io"
	"math/big"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/internal/mtls"
	"foothold/internal/secret"
	"foothold/internal/tpm"
	"foothold/protocol/bootmsg"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/hostapi"
	"foothold/protocol/pcr"
	"foothold/protocol/vmspec"
	"foothold/provider/broker"
	"foothold/tenant/authority"
	"foothold/tenant/ledger"
	"foothold/tenant/orchestrator"
	"foothold/tenant/reservation"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// attack is one VM's boot that somebody meddles with, at the real boot server and
// orchestrator, over real TLS, with real software TPMs.
type attack struct {
	t   *testing.T
	s   *Site
	vm  *VM
	off *host // has a genuine TPM and is not on the inventory
}

// opened connects to the boot server, or to whoever sits at the address, and spends T1.
func (a attack) opened(address string) *Loader {
	a.t.Helper()
	if address == "" {
		address = a.s.boot.String()
	}
	l, err := a.s.dialTo(a.t.Context(), a.vm, address)
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { l.Close() })
	if err := l.Open(); err != nil {
		a.t.Fatal(err)
	}
	return l
}

func (a attack) measured() []pcr.Event { return vmspec.Measurements(a.s.firmware, a.vm.spec.Digest()) }

func (a attack) tunnel(l *Loader) digest.SHA256 {
	a.t.Helper()
	tunnel, err := l.tunnel()
	if err != nil {
		a.t.Fatal(err)
	}
	return tunnel
}

// other is another host of the inventory than the VM's.
func (a attack) other() *host {
	for _, h := range a.s.hosts {
		if h != a.vm.host {
			return h
		}
	}
	a.t.Fatal("there is one host")
	return nil
}

// end is how the ledger says that the VM ended.
func (a attack) end() (r ledger.Reservation) {
	a.t.Helper()
	l, err := a.s.ledger(a.t.Context())
	if err != nil {
		a.t.Fatal(err)
	}
	defer l.Close()
	for limit := time.Now().Add(20 * time.Second); time.Now().Before(limit); time.Sleep(20 * time.Millisecond) {
		if err := l.Read(a.t.Context(), func(t *ledger.Tx) (err error) { r, err = t.Reservation(a.vm.spec.Reservation); return err }); err != nil {
			a.t.Fatal(err)
		}
		if !r.Live() {
			break
		}
	}
	return r
}

// ended demands that the VM has ended for a reason and, in its detail or findings, with
// these words; that the journal has it; and that its host runs it no more.
func (a attack) ended(why event.Reason, says string) {
	a.t.Helper()
	r := a.end()
	text := r.Detail
	for _, f := range r.Findings {
		text += " " + f.Check + ": " + f.Detail
	}
	if r.Phase != reservation.Aborted || r.Reason != why || !strings.Contains(text, says) {
		a.t.Errorf("it is %s for %q: %s; want %q: %s", r.Phase, r.Reason, text, why, says)
	}
	if !slices.ContainsFunc(a.journal(r.ID), func(e event.Event) bool { return e.Kind == "vm.aborted" && e.Reason == why }) {
		a.t.Errorf("the journal does not say that it was ended for %q", why)
	}
	for limit := time.Now().Add(20 * time.Second); a.vm.host.has(r.ID); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(limit) {
			a.t.Error("its host runs it still")
			return
		}
	}
}

// journal lists a reservation's entries; for "", all.
func (a attack) journal(id string) (list []event.Event) {
	a.t.Helper()
	l, err := a.s.ledger(a.t.Context())
	if err != nil {
		a.t.Fatal(err)
	}
	defer l.Close()
	if err := l.Read(a.t.Context(), func(t *ledger.Tx) error {
		entries, err := t.JournalAfter(0, id, 1<<20)
		for _, e := range entries {
			list = append(list, e.Event)
		}
		return err
	}); err != nil {
		a.t.Fatal(err)
	}
	return list
}

// waitJournal waits until some entry is there: daemons send theirs in batches.
func (a attack) waitJournal(id, what string, is func(event.Event) bool) {
	a.t.Helper()
	for limit := time.Now().Add(20 * time.Second); !slices.ContainsFunc(a.journal(id), is); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(limit) {
			a.t.Errorf("the journal does not tell of %s", what)
			return
		}
	}
}

// has reports whether the host runs a VM.
func (h *host) has(id string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	_, ok := h.vms[id]
	return ok
}

// testLease has VMs that are reserved be known after two seconds.
const testLease = 16 * time.Second

// openSite is a site for a test, and its end.
func openSite(t *testing.T, hosts int) *Site {
	t.Helper()
	return openWith(t, Options{Hosts: hosts})
}

// openWith is a site that differs from openSite's in its options.
func openWith(t *testing.T, o Options) *Site {
	t.Helper()
	o.Dir, o.Kernel, o.Initramfs, o.Lease = t.TempDir(), []byte("kernel"), []byte("initramfs"), testLease
	s, err := Open(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // t's context has ended then, and all that runs under it
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func reserve(t *testing.T, s *Site, n int) []*VM {
	t.Helper()
	vms, err := s.Reserve(t.Context(), n)
	if err != nil {
		t.Fatal(err)
	}
	return vms
}

// TestAttacksOnABoot: none of these gets a grant, and each ends the VM, with its reason.
func TestAttacksOnABoot(t *testing.T) {
	s := openSite(t, 2)
	off, err := s.newHost(t.Context(), "stranger")
	if err != nil {
		t.Fatal(err)
	}
	cases := map[string]struct {
		do   func(attack) error
		says string // in the reason's detail or findings
	}{
		"relay to a genuine TPM on the inventory": {func(a attack) error {
			l := a.opened("")
			return l.attestAt(t.Context(), a.other(), a.measured(), a.tunnel(l))
		}, "as the boot server reports"},
		"relay to a genuine TPM off the inventory": {func(a attack) error {
			l := a.opened("")
			return l.attestAt(t.Context(), a.off, a.measured(), a.tunnel(l))
		}, "as the boot server reports"},
		"man in the middle with another certificate of the same CA": {func(a attack) error {
			l := a.opened(a.middle())
			return l.attestAt(t.Context(), a.vm.host, a.measured(), a.tunnel(l))
		}, "registers: "},
		"loader that gives the middle's tunnel for its own": {func(a attack) error {
			l := a.opened("")
			l.leaf = a.leaf()
			return l.attestAt(t.Context(), a.vm.host, a.measured(), a.tunnel(l))
		}, "registers: "},
		"loader that lies about its exporter": {func(a attack) error {
			l := a.opened("")
			state := l.conn.ConnectionState()
			return l.attestAt(t.Context(), a.vm.host, a.measured(), evidence.Tunnel(digest.Of([]byte("a lie")), state.PeerCertificates[0].Raw, l.leaf, l.key))
		}, "registers: "},
		"our own end of the tunnel, reflected": {func(a attack) error {
			l := a.opened("")
			state := l.conn.ConnectionState()
			exporter, err := state.ExportKeyingMaterial(evidence.ExporterLabel, evidence.ExporterContext(a.vm.spec.Reservation, l.nonce), evidence.ExporterLen)
			if err != nil {
				return err
			}
			return l.attestAt(t.Context(), a.vm.host, a.measured(), evidence.Tunnel(digest.Of(exporter), l.leaf, state.PeerCertificates[0].Raw, l.key))
		}, "registers: "},
		"the exporter of another connection": {func(a attack) error {
			l := a.opened("")
			second, err := a.s.Dial(t.Context(), a.vm)
			if err != nil {
				return err
			}
			defer second.Close()
			second.nonce, second.leaf, second.key = l.nonce, l.leaf, l.key
			return l.attestAt(t.Context(), a.vm.host, a.measured(), a.tunnel(second))
		}, "registers: "},
		"the exporter for another nonce": {func(a attack) error {
			l := a.opened("")
			nonce := l.nonce
			l.nonce = make([]byte, len(nonce))
			rand.Read(l.nonce)
			return l.attestAt(t.Context(), a.vm.host, a.measured(), a.tunnel(l))
		}, "registers: "},
		"another VM's settings": {func(a attack) error {
			l := a.opened("")
			spec := a.vm.spec
			spec.MemoryMiB *= 2
			return l.attestAt(t.Context(), a.vm.host, vmspec.Measurements(a.s.firmware, spec.Digest()), a.tunnel(l))
		}, "registers: "},
		"another loader": {func(a attack) error {
			l := a.opened("")
			firmware := a.s.firmware
			firmware.LoaderInitramfs[0] ^= 1
			return l.attestAt(t.Context(), a.vm.host, vmspec.Measurements(firmware, a.vm.spec.Digest()), a.tunnel(l))
		}, "registers: "},
		"PCR 16 reset and extended again by another process": {func(a attack) error { return a.beside(pcr.VM) }, "registers: "},
		"PCR 23 reset and extended again by another process": {func(a attack) error { return a.beside(pcr.Tunnel) }, "registers: "},
		"recorded responses of an earlier quote": {func(a attack) error {
			l := a.opened("")
			return l.session(func(command []byte) ([]byte, error) { return a.recorded(command) })
		}, "as the boot server reports"},
		"quote whose signature was altered on its way": {func(a attack) error {
			l := a.opened("")
			at, err := a.vm.host.broker.Attest(tenantName, a.measured(), a.tunnel(l))
			if err != nil {
				return err
			}
			return l.session(func(command []byte) ([]byte, error) {
				r, err := at.Forward(t.Context(), command)
				if len(r) > 100 {
					r[100] ^= 1
				}
				return r, err
			})
		}, "as the boot server reports"},
	}
	// Whoever stands between the host and its TPM alters the boot server's command.
	for name, alter := range map[string]func(quote []byte){
		"registers left out on the way to the TPM": func(c []byte) { c[len(c)-1] = 0 },
		"another bank on the way to the TPM":       func(c []byte) { binary.BigEndian.PutUint16(c[len(c)-6:], uint16(tpm2.TPMAlgSHA384)) },
		"SHA-1 on the way to the TPM":              func(c []byte) { binary.BigEndian.PutUint16(c[len(c)-12:], uint16(tpm2.TPMAlgSHA1)) },
	} {
		cases[name] = struct {
			do   func(attack) error
			says string
		}{func(a attack) error {
			return a.onQuote(func(_ transport.TPM, c []byte) { alter(c) })
		}, "as the boot server reports"}
	}
	vms, next := reserve(t, s, len(cases)+2), 0
	take := func() *VM { next++; return vms[next-1] }
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			a := attack{t, s, take(), off}
			if err := c.do(a); err == nil || !strings.Contains(err.Error(), "403") {
				t.Errorf("no refusal of the boot server's: %v", err)
			}
			a.ended(event.QuoteRefused, c.says)
		})
	}
	t.Run("two VMs claim one reservation", func(t *testing.T) {
		a := attack{t, s, take(), off}
		won := make(chan error, 2)
		for range 2 {
			go func() {
				l, err := s.Dial(t.Context(), a.vm)
				if err == nil {
					t.Cleanup(func() { l.Close() })
					err = l.Open()
				}
				won <- err
			}()
		}
		if first, second := <-won, <-won; (first == nil) == (second == nil) {
			t.Errorf("one: %v, the other: %v", first, second)
		}
		a.ended(event.TokenSpent, "presented again")
		a.waitJournal("", "the token's second use", func(e event.Event) bool {
			return e.Kind == "token.rejected" && e.Reason == event.TokenSpent && e.Detail["from"] == a.vm.from.String()
		})
	})
	// What was done to others harms nobody else.
	if err := (attack{t, s, take(), off}).opened("").Attest(t.Context(), s); err != nil {
		t.Errorf("a good VM afterwards: %v", err)
	}
}

// beside lets another process reset a register and extend it again, between the host's
// extend and the quote.
func (a attack) beside(register int) error {
	return a.onQuote(func(dev transport.TPM, _ []byte) {
		if err := extendAnew(dev, register, digest.Of([]byte("evil"))); err != nil {
			a.t.Error(err)
		}
	})
}

// extendAnew resets a register and extends it.
func extendAnew(dev transport.TPM, register int, digests ...digest.SHA256) error {
	reg := tpm2.AuthHandle{Handle: tpm2.TPMHandle(register), Auth: tpm2.PasswordAuth(nil)}
	_, err := tpm2.PCRReset{PCRHandle: reg}.Execute(dev)
	for _, d := range digests {
		_, failed := tpm2.PCRExtend{PCRHandle: reg, Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: d[:]}}}}.Execute(dev)
		err = errors.Join(err, failed)
	}
	return err
}

// onQuote boots a VM whose host has somebody on the way to its TPM, who meddles when the
// quote command comes.
func (a attack) onQuote(meddle func(dev transport.TPM, quote []byte)) error {
	l := a.opened("")
	met := false
	a.vm.host.bus.before = func(dev transport.TPM, command []byte) {
		if binary.BigEndian.Uint32(command[6:]) == uint32(tpm2.TPMCCQuote) {
			met = true
			meddle(dev, command)
		}
	}
	defer func() {
		a.vm.host.bus.before = nil
		if !met {
			a.t.Error("no quote came to the TPM")
		}
	}()
	return l.attestAt(a.t.Context(), a.vm.host, a.measured(), a.tunnel(l))
}

// recorded answers as another session was answered.
func (a attack) recorded(command []byte) ([]byte, error) {
	dev := a.vm.host.bus
	if binary.BigEndian.Uint32(command[6:]) == uint32(tpm2.TPMCCStartAuthSession) {
		at, err := a.vm.host.broker.Attest(tenantName, a.measured(), digest.Of([]byte("earlier")))
		if err != nil {
			return nil, err
		}
		defer at.Release()
		return at.Forward(a.t.Context(), command)
	}
	// The quote's answer comes from a session of the attacker's own.
	aik, session := a.vm.host.broker.Keys()
	var answer []byte
	through := recorder(func(c []byte) ([]byte, error) {
		r, err := dev.Send(c)
		if binary.BigEndian.Uint32(c[6:]) == uint32(tpm2.TPMCCQuote) {
			answer = r
		}
		return r, err
	})
	auth := tpm2.HMAC(tpm2.TPMAlgSHA256, 32, tpm2.Salted(session.Handle, session.Public), tpm2.AESEncryption(128, tpm2.EncryptInOut))
	_, err := tpm2.Quote{SignHandle: aik.Auth(auth), QualifyingData: tpm2.TPM2BData{Buffer: make([]byte, 32)}, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: []byte{0xff, 0x7f, 0x87}}}}}.Execute(through)
	return answer, err
}

type recorder func([]byte) ([]byte, error)

func (r recorder) Send(c []byte) ([]byte, error) { return r(c) }

// leaf is a certificate that the boot server never saw.
func (a attack) leaf() []byte {
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, public, key)
	if err != nil {
		a.t.Fatal(err)
	}
	return der
}

// middle terminates the VM's TLS with a certificate of the boot servers' authority, name
// and usage, connects to the boot server itself, from the VM's address, and passes on
// what both say. It returns where it listens.
func (a attack) middle() string {
	files, err := a.s.issue(a.s.tenant, authority.Boot, mtls.BootServer, "middle", authority.Server, bootDNS)
	if err != nil {
		a.t.Fatal(err)
	}
	cert, err := tls.LoadX509KeyPair(files.Cert, files.Key)
	if err != nil {
		a.t.Fatal(err)
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAnyClientCert})
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { l.Close() })
	go func() {
		victim, err := l.Accept()
		if err != nil {
			return
		}
		defer victim.Close()
		up, err := a.s.Dial(a.t.Context(), a.vm)
		if err != nil {
			a.t.Error(err)
			return
		}
		defer up.Close()
		go func() {
			io.Copy(up.conn, victim)
			up.conn.Close()
		}()
		io.Copy(victim, up.conn)
	}()
	return l.Addr().(*net.TCPAddr).String()
}

// TestOwnSessionKey: VMs boot in sessions that are salted to the tenant's own key, migrated
// into the host's TPM; at a host without it, or given another, none does.
func TestOwnSessionKey(t *testing.T) {
	s, err := Open(t.Context(), Options{Dir: t.TempDir(), Hosts: 2, Kernel: []byte("kernel"), Initramfs: []byte("initramfs"), Lease: testLease, OwnSessionKey: true})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}()
	v, _, err := orchestrator.Open(s.path("tenant"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := v.Get("session-key")
	if err != nil {
		t.Fatal(err)
	}
	give := func(h *host, key secret.Bytes) {
		t.Helper()
		public, err := tpm.MigratedPublic(key)
		if err != nil {
			t.Fatal(err)
		}
		parent, err := tpm.ParsePublic(h.entry.Session)
		if err != nil {
			t.Fatal(err)
		}
		m := hostapi.MigratedKey{Public: tpm2.Marshal(public)}
		if m.Duplicate, m.Seed, err = tpm.Duplicate(parent, key); err != nil {
			t.Fatal(err)
		}
		if _, err := h.broker.Import(t.Context(), tenantName, m); err != nil {
			t.Fatal(err)
		}
	}
	vms, err := s.Reserve(t.Context(), 4) // in turn at either host
	if err != nil {
		t.Fatal(err)
	}
	boot := func(vm *VM) error { return (attack{t, s, vm, nil}).opened("").Attest(t.Context(), s) }
	give(vms[0].host, key)
	if err := boot(vms[0]); err != nil {
		t.Errorf("with the key: %v", err)
	}
	if err := boot(vms[1]); !errors.Is(err, broker.ErrRefused) {
		t.Errorf("at a host that was not given it: %v", err)
	}
	other, err := tpm.NewMigrated()
	if err != nil {
		t.Fatal(err)
	}
	give(vms[3].host, other)
	if err := boot(vms[3]); err == nil || !strings.Contains(err.Error(), "403") {
		t.Errorf("at a host that was given another: %v", err)
	}
	if err := boot(vms[2]); err != nil {
		t.Errorf("with the key, again: %v", err)
	}
}

// TestNoComponentWithoutAGrant is what each attack is after.
func TestNoComponentWithoutAGrant(t *testing.T) {
	s, err := Open(t.Context(), Options{Dir: t.TempDir(), Hosts: 1, Kernel: []byte("kernel"), Initramfs: []byte("initramfs"), Lease: testLease})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	vms, err := s.Reserve(t.Context(), 3)
	if err != nil {
		t.Fatal(err)
	}
	for i, path := range []string{bootmsg.PathKernel, bootmsg.PathInitramfs, bootmsg.PathUnique} {
		if n, err := (attack{t, s, vms[i], nil}).opened("").Fetch(path); err == nil {
			t.Errorf("%s: %d bytes without a grant", path, n)
		}
	}
}
