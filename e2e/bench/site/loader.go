package site

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"sync"
	"time"

	"foothold/protocol/bootmsg"
	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/pcr"
	"foothold/protocol/signed"
	"foothold/protocol/token"
	"foothold/protocol/vmspec"
	"foothold/tenant/authority"
	"foothold/tenant/ledger"
	"foothold/tenant/policy"
	"foothold/tenant/reservation"
)

// template is the name of the one that all VMs start from.
const template = "bench"

// conversation bounds one VM's conversation with the boot server.
const conversation = 2 * time.Minute

// ledger opens the orchestrator's database beside it, as a backup does.
func (s *Site) ledger(ctx context.Context) (*ledger.Ledger, error) {
	return ledger.Open(ctx, filepath.Join(s.path("tenant"), "ledger.db"), time.Now)
}

func (s *Site) addTemplate(ctx context.Context) error {
	components, err := json.Marshal(bootmsg.Components{Release: release, Created: time.Now().UTC(),
		Kernel: component("kernel", s.options.Kernel), Initramfs: component("initramfs", s.options.Initramfs)})
	if err != nil {
		return err
	}
	l, err := s.ledger(ctx)
	if err != nil {
		return err
	}
	defer l.Close()
	return l.Write(ctx, func(t *ledger.Tx) error {
		return t.AddTemplate(ledger.Template{Name: template, Version: 1, SHA256: s.image, Size: 1, RootHash: s.image, HashOffset: 4096, Release: release,
			Components: signed.Seal(s.keys.component, signed.Components, components), Audit: []byte("{}"), Created: time.Now()})
	})
}

// VM is one that may boot once.
type VM struct {
	spec vmspec.Spec
	t1   token.Token
	host *host
	from netip.Addr
}

// Reserve makes n VMs as they are when their host has just started them, and returns
// when the boot server lets the last of them connect.
func (s *Site) Reserve(ctx context.Context, n int) ([]*VM, error) {
	boot, err := s.tenant.Certificate(authority.Boot)
	if err != nil {
		return nil, err
	}
	l, err := s.ledger(ctx)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	s.mu.Lock()
	first := s.next
	s.next += n
	s.mu.Unlock()
	var vms []*VM
	for i := first; i < first+n; i++ {
		vms = append(vms, s.newVM(i, boot))
	}
	deadline := time.Now().Add(phaseLimit)
	if err := l.Write(ctx, func(t *ledger.Tx) error {
		for _, vm := range vms {
			r := ledger.Reservation{ID: vm.spec.Reservation, Name: vm.spec.Name, Template: template, Restart: reservation.Never, Size: policy.DefaultSize,
				MemoryMiB: vm.spec.MemoryMiB, Start: 1, Deadline: deadline, MAC: vm.spec.Network.MAC, Address: vm.from, Volume: vm.spec.Volume.ID}
			if err := errors.Join(t.AddReservation(r), t.SetPlace(r.ID, vm.host.entry.Name, 1),
				t.PutStart(r.ID, 1, ledger.Start{Spec: vm.spec, HostStarted: time.Now()}),
				t.Move(r.ID, 1, reservation.Reserved, reservation.Booting, deadline),
				t.AddToken(ledger.Token{Digest: vm.t1.Digest(), Kind: token.T1, Reservation: r.ID, Start: 1, Phase: reservation.Booting, Source: r.Address})); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return nil, err
	}
	for _, vm := range vms {
		vm.host.add(vm.spec, s.firmware)
	}
	return vms, s.waitOpen(ctx, vms[n-1])
}

func (s *Site) newVM(i int, boot []byte) *VM {
	b := firstVM.As4()
	address := netip.AddrFrom4([4]byte{b[0], b[1], b[2] + byte(i>>8), byte(i)})
	vm := &VM{t1: token.New(token.T1), host: s.hosts[i%len(s.hosts)], from: address}
	size, _ := policy.SizeOf(policy.DefaultSize) // there is one
	vm.spec = vmspec.Spec{Reservation: fmt.Sprintf("00000000-0000-4000-8000-%012d", i), Start: 1, Tenant: tenantName, Name: fmt.Sprintf("vm-%d", i),
		VCPUs: size.VCPUs, MemoryMiB: size.MemoryMiB,
		Network: vmspec.Network{MAC: policy.MAC(address), Address: netip.PrefixFrom(address, vmPrefix.Bits()), Gateway: s.conf.Network.Gateway, MTU: 1500},
		Boot: vmspec.Boot{URL: "https://" + s.boot.String(), ServerName: bootDNS, CA: boot,
			ManifestKey: s.tenant.Public(authority.ManifestKey), ComponentKey: s.keys.component.Public().(ed25519.PublicKey)},
		TokenDigest: vm.t1.Digest(), Template: s.image, Volume: vmspec.Volume{ID: fmt.Sprintf("10000000-0000-4000-8000-%012d", i), SizeMiB: size.VolumeMiB}}
	return vm
}

// waitOpen waits until the boot server's gate knows a VM: before, it cuts connections off.
func (s *Site) waitOpen(ctx context.Context, vm *VM) error {
	limit := time.Now().Add(time.Minute)
	for {
		l, err := s.Dial(ctx, vm)
		if err == nil {
			return l.Close()
		}
		if time.Now().After(limit) {
			return fmt.Errorf("the boot server admits no VM after a minute: %w", err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Loader is a VM's end of its connection to the boot server.
type Loader struct {
	vm    *VM
	conn  *tls.Conn
	in    *bufio.Reader
	out   *bufio.Writer
	leaf  []byte
	key   ed25519.PublicKey
	nonce []byte
	// alter, if set, makes another message of each.
	alter func(path string, message []byte) []byte
}

// Dial connects as a loader does: a fresh key pair and certificate, TLS 1.3 in full.
func (s *Site) Dial(ctx context.Context, vm *VM) (*Loader, error) {
	return s.dialTo(ctx, vm, s.boot.String())
}

func (s *Site) dialTo(ctx context.Context, vm *VM, address string) (*Loader, error) {
	return s.dialWith(ctx, vm, address, func(*tls.Config) {})
}

func (s *Site) dialWith(ctx context.Context, vm *VM, address string, change func(*tls.Config)) (*Loader, error) {
	der, key, err := newCertificate()
	if err != nil {
		return nil, err
	}
	vmKey, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: vm.from.AsSlice()}}
	raw, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	conf := &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: s.roots, ServerName: bootDNS,
		Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	change(conf)
	conn := tls.Client(raw, conf)
	_ = conn.SetDeadline(time.Now().Add(conversation)) // an open socket takes a deadline
	if err := conn.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, err
	}
	return &Loader{vm: vm, conn: conn, in: bufio.NewReader(conn), out: bufio.NewWriter(conn), leaf: der, key: vmKey}, nil
}

// form is a certificate of Ed25519 by which others are made: all have the same length, with
// the key in the middle and the signature at the end.
var form = sync.OnceValues(func() (f struct {
	der        []byte
	body, key  int // where the signed part and the key begin
	bodyLength int
}, err error) {
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return f, err
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0)}
	if f.der, err = x509.CreateCertificate(rand.Reader, tmpl, tmpl, public, key); err != nil {
		return f, err
	}
	made, err := x509.ParseCertificate(f.der)
	if err != nil {
		return f, err
	}
	f.body, f.bodyLength, f.key = bytes.Index(f.der, made.RawTBSCertificate), len(made.RawTBSCertificate), bytes.Index(f.der, public)
	return f, nil
})

// newCertificate signs a certificate for a fresh key. x509.CreateCertificate would encode it
// anew each time and check its own signature, which takes several times as long.
func newCertificate() (der []byte, key ed25519.PrivateKey, err error) {
	f, err := form()
	if err != nil {
		return nil, nil, err
	}
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	der = bytes.Clone(f.der)
	copy(der[f.key:], public)
	copy(der[len(der)-ed25519.SignatureSize:], ed25519.Sign(key, der[f.body:f.body+f.bodyLength]))
	return der, key, nil
}

// Cipher is the connection's cipher suite.
func (l *Loader) Cipher() uint16 { return l.conn.ConnectionState().CipherSuite }

// Close ends the connection.
func (l *Loader) Close() error { return l.conn.Close() }

// Open spends T1 and takes the nonce.
func (l *Loader) Open() error {
	var out bootmsg.OpenResponse
	if err := l.post(bootmsg.PathOpen, bootmsg.OpenRequest{Token: l.vm.t1, VMKey: l.key}, &out); err != nil {
		return err
	}
	l.nonce = out.Nonce
	return nil
}

// Attest has the host take down what this VM's quote is to prove, and passes the boot
// server's commands to it, until the orchestrator has judged the quote and the grant is there.
func (l *Loader) Attest(ctx context.Context, s *Site) error {
	tunnel, err := l.tunnel()
	if err != nil {
		return err
	}
	return l.attestAt(ctx, l.vm.host, vmspec.Measurements(s.firmware, l.vm.spec.Digest()), tunnel)
}

// tunnel measures this connection.
func (l *Loader) tunnel() (digest.SHA256, error) {
	state := l.conn.ConnectionState()
	exporter, err := state.ExportKeyingMaterial(evidence.ExporterLabel, evidence.ExporterContext(l.vm.spec.Reservation, l.nonce), evidence.ExporterLen)
	if err != nil {
		return digest.SHA256{}, err
	}
	return evidence.Tunnel(digest.Of(exporter), state.PeerCertificates[0].Raw, l.leaf, l.key), nil
}

// attestAt has a host's TPM quote what it is told.
func (l *Loader) attestAt(ctx context.Context, h *host, events []pcr.Event, tunnel digest.SHA256) error {
	a, err := h.broker.Attest(tenantName, events, tunnel)
	if err != nil {
		return err
	}
	defer a.Release()
	return l.session(func(command []byte) ([]byte, error) { return a.Forward(ctx, command) })
}

// session answers the boot server's commands.
func (l *Loader) session(answer func(command []byte) ([]byte, error)) error {
	var in bootmsg.AttestRequest
	for range 4 { // session, quote, grant, and one that is one too many
		var out bootmsg.AttestResponse
		if err := l.post(bootmsg.PathAttest, in, &out); err != nil {
			return err
		}
		if out.Grant != nil {
			return nil
		}
		response, err := answer(out.Command)
		if err != nil {
			return err
		}
		in.Response = response
	}
	return errors.New("the TPM session does not end")
}

// Fetch reads a component to its end and returns its size.
func (l *Loader) Fetch(path string) (int64, error) {
	return Get(l.conn, l.in, path)
}

// Get makes one request on an open connection and reads the answer's body to its end.
func Get(conn io.Writer, in *bufio.Reader, path string) (int64, error) {
	req, err := http.NewRequest(http.MethodGet, "https://"+bootDNS+path, nil)
	if err != nil {
		return 0, err
	}
	if err := req.Write(conn); err != nil {
		return 0, err
	}
	res, err := http.ReadResponse(in, req)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	n, err := drain(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("get %s: %s", path, res.Status)
	}
	return n, err
}

// drained takes whole TLS records.
var drained = sync.Pool{New: func() any { return new([64 << 10]byte) }}

// drain reads to the end with a buffer that is large and kept, so that reading costs less
// than what is measured.
func drain(r io.Reader) (total int64, err error) {
	buffer := drained.Get().(*[64 << 10]byte)
	defer drained.Put(buffer)
	for {
		n, err := r.Read(buffer[:])
		total += int64(n)
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// Finish fetches what is still to be fetched and says so, as a loader does that boots on.
func (l *Loader) Finish(fetched ...string) error {
	for _, path := range []string{bootmsg.PathKernel, bootmsg.PathInitramfs, bootmsg.PathUnique} {
		if len(fetched) > 0 && fetched[0] == path {
			continue
		}
		if _, err := l.Fetch(path); err != nil {
			return err
		}
	}
	return errors.Join(l.post(bootmsg.PathDone, bootmsg.DoneRequest{}, &struct{}{}), l.Close())
}

func (l *Loader) post(path string, in, out any) error {
	data, err := json.Marshal(in)
	if err != nil {
		return err
	}
	if l.alter != nil {
		data = l.alter(path, data)
	}
	req, err := http.NewRequest(http.MethodPost, "https://"+bootDNS+path, bytes.NewReader(data))
	if err != nil {
		return err
	}
	if err := errors.Join(req.Write(l.out), l.out.Flush()); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	res, err := http.ReadResponse(l.in, req)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, bootmsg.MaxMessage))
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s: %s", path, res.Status)
	}
	return json.Unmarshal(body, out)
}
