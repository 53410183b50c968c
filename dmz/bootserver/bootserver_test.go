package bootserver

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
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
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"foothold/dmz/store"
	"foothold/dmz/upstream"
	"foothold/dmz/upstream/upstreamtest"
	"foothold/internal/mtls"
	"foothold/internal/tpm"
	"foothold/internal/tpm/swtpmtest"
	"foothold/protocol/bootmsg"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/inventory"
	"foothold/protocol/pcr"
	"foothold/protocol/signed"
	"foothold/protocol/token"
	wire "foothold/protocol/upstream"
	"foothold/protocol/zone"

	"github.com/google/go-tpm/tpm2"
)

const (
	reservation = "0f0e0d0c-0b0a-4908-8706-050403020100"
	bootDNS     = "boot.foothold.internal"
	storeDNS    = "store.foothold.internal"
)

// world is a boot server between a fake orchestrator, a real store and the test as VM.
type world struct {
	t      *testing.T
	orch   *upstreamtest.Orchestrator
	boot   *upstreamtest.CA
	addr   string
	state  string
	conf   Config
	leaf   []byte // the boot server's
	t1     token.Token
	nonce  []byte
	set    digest.SHA256
	aik    tpm.Key
	key    tpm.Key
	dev    *tpm.Device
	kernel []byte
	initrd []byte
	unique []byte

	mu       sync.Mutex
	verdicts []wire.VerdictRequest // guarded by mu
	dones    []wire.DoneRequest    // guarded by mu
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, orch: upstreamtest.New(t), boot: upstreamtest.NewCA(t, "boot"), t1: token.New(token.T1), nonce: make([]byte, evidence.NonceLen),
		set: digest.Of([]byte("settings")), kernel: make([]byte, 5_000_000), initrd: make([]byte, 9_000_001), unique: []byte("unique part")}
	for _, b := range [][]byte{w.nonce, w.kernel, w.initrd} {
		rand.Read(b)
	}
	w.dev = swtpmtest.New(t).Open()
	w.aik = w.persist(tpm.AIKTemplate(), inventory.AIKHandle)
	w.key = w.persist(tpm.SessionTemplate(), inventory.SessionHandle)
	w.orch.Open, w.orch.Verdict, w.orch.Done = w.open, w.verdict, w.done
	l := listen(t)
	w.orch.Serve(l)
	w.start()
	w.orch.Publish(boots(1, "127.0.0.1", time.Minute))
	w.orch.WaitReport("boots", func(r zone.Report) bool { return r.Revision == 1 && len(r.Live) == 1 && r.Live[0].ID == reservation })
	return w
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// free is an address that nobody listens on.
func free(t *testing.T) netip.AddrPort {
	t.Helper()
	l := listen(t)
	defer l.Close()
	return netip.MustParseAddrPort(l.Addr().String())
}

func boots(revision int64, addr string, ttl time.Duration) zone.Document {
	d := zone.Document{Zone: zone.Boot, Epoch: 1, Revision: revision, Lease: time.Minute}
	if addr != "" {
		d.Boots = []zone.Boots{{Reservation: reservation, Start: 1, Address: netip.MustParseAddr(addr), TTL: ttl}}
	}
	return d
}

// start runs store and boot server.
func (w *world) start() {
	t := w.t
	vms := upstreamtest.NewCA(t, "vm")
	storeAddr, bootAddr := free(t), free(t)
	objects := filepath.Join(t.TempDir(), "objects")
	if err := os.Mkdir(objects, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, data := range [][]byte{w.kernel, w.initrd} {
		if err := os.WriteFile(filepath.Join(objects, digest.Of(data).String()), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	w.run(func(ctx context.Context) error {
		return store.Run(ctx, store.Config{State: objects, Listen: storeAddr, VMCA: vms.File(), Upstream: w.orch.Config(mtls.Store, "store"),
			TLS: w.orch.DMZ.Files(upstreamtest.Leaf{ID: mtls.Identity{Role: mtls.Store, Name: "store"}, Server: true, DNS: storeDNS}, w.orch.DMZ)})
	})
	self := mtls.Identity{Role: mtls.BootServer, Name: "boot-1"}
	files := w.boot.Files(upstreamtest.Leaf{ID: self, Server: true, DNS: bootDNS}, w.boot)
	var err error
	if w.leaf, err = mtls.LoadDER(files.Cert); err != nil {
		t.Fatal(err)
	}
	w.addr, w.state = bootAddr.String(), t.TempDir()
	w.conf = Config{State: w.state, Listen: bootAddr, Cert: files.Cert, Key: files.Key, Upstream: w.orch.Config(mtls.BootServer, "boot-1"),
		Store: storeAddr, StoreName: storeDNS, StoreTLS: w.orch.DMZ.Files(upstreamtest.Leaf{ID: self}, w.orch.DMZ)}
	w.run(func(ctx context.Context) error { return Run(ctx, w.conf) })
}

func (w *world) run(f func(context.Context) error) {
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- f(ctx) }()
	w.t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				w.t.Error(err)
			}
		case <-time.After(10 * time.Second):
			w.t.Error("daemon does not end")
		}
	})
}

// persist makes a key as the provider's enrolment does.
func (w *world) persist(template tpm2.TPMTPublic, handle tpm2.TPMHandle) tpm.Key {
	w.t.Helper()
	rsp, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)}, InPublic: tpm2.New2B(template)}.Execute(w.dev)
	w.must(err)
	_, err = tpm2.EvictControl{Auth: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		ObjectHandle: &tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name}, PersistentHandle: handle}.Execute(w.dev)
	w.must(err)
	_, err = tpm2.FlushContext{FlushHandle: rsp.ObjectHandle}.Execute(w.dev)
	w.must(err)
	key, err := tpm.ReadKey(w.dev, handle)
	w.must(err)
	return key
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) open(r wire.OpenRequest) (wire.OpenResponse, error) {
	if r.Token.Digest() != w.t1.Digest() || r.Source != netip.MustParseAddr("127.0.0.1") {
		return wire.OpenResponse{}, event.Refuse(event.TokenUnknown, "no such token")
	}
	return wire.OpenResponse{Reservation: reservation, Nonce: w.nonce, Settings: w.set,
		AIK: tpm2.Marshal(w.aik.Public), Session: tpm2.Marshal(w.key.Public)}, nil
}

func (w *world) verdict(r wire.VerdictRequest) (wire.VerdictResponse, error) {
	w.mu.Lock()
	w.verdicts = append(w.verdicts, r)
	w.mu.Unlock()
	if err := w.check(r); err != nil {
		return wire.VerdictResponse{}, event.Refuse(event.QuoteRefused, "%v", err)
	}
	part := func(name string, data []byte) bootmsg.Component {
		return bootmsg.Component{Name: name, SHA256: digest.Of(data), Size: int64(len(data))}
	}
	return wire.VerdictResponse{Kernel: part("kernel", w.kernel), Initramfs: part("initramfs", w.initrd), Unique: w.unique,
		Grant: bootmsg.Grant{Manifest: signed.Envelope{Payload: []byte("manifest")}}}, nil
}

func (w *world) done(r wire.DoneRequest) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.dones = append(w.dones, r)
	return nil
}

func (w *world) waitDone() wire.DoneRequest {
	w.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for {
		w.mu.Lock()
		n := len(w.dones)
		var last wire.DoneRequest
		if n > 0 {
			last = w.dones[n-1]
		}
		w.mu.Unlock()
		if n > 0 {
			return last
		}
		if time.Now().After(deadline) {
			w.t.Fatal("the orchestrator was not told of the end")
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// check is what a verifier does with the quote, from the orchestrator's end.
func (w *world) check(r wire.VerdictRequest) error {
	attest, err := tpm2.Unmarshal[tpm2.TPMSAttest](r.Quote.Attest)
	if err != nil {
		return err
	}
	sig, err := tpm2.Unmarshal[tpm2.TPMTSignature](r.Quote.Signature)
	if err != nil {
		return err
	}
	ec, err := sig.Signature.ECDSA()
	if err != nil {
		return err
	}
	pub, err := tpm2.Pub(w.aik.Public)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(r.Quote.Attest)
	if !ecdsa.Verify(pub.(*ecdsa.PublicKey), sum[:], new(big.Int).SetBytes(ec.SignatureR.Buffer), new(big.Int).SetBytes(ec.SignatureS.Buffer)) {
		return errors.New("signature")
	}
	tunnel := evidence.Tunnel(r.ExporterHash, r.ServerLeaf, r.LoaderLeaf, r.VMKey)
	want := evidence.Binding(evidence.RoleBoot, reservation, tunnel, w.set, w.nonce)
	if !bytes.Equal(attest.ExtraData.Buffer, want[:]) {
		return errors.New("qualifying data")
	}
	if !bytes.Equal(r.ServerLeaf, w.leaf) {
		return errors.New("server leaf")
	}
	info, err := attest.Attested.Quote()
	if err != nil {
		return err
	}
	composite := pcr.Composite(pcr.BootSelection(), pcr.Replay([]pcr.Event{{PCR: pcr.Tunnel, Digest: tunnel}}))
	if !bytes.Equal(info.PCRDigest.Buffer, composite[:]) {
		return errors.New("PCR values")
	}
	return nil
}

// vm is the loader's end: one connection.
type vm struct {
	w     *world
	conn  *tls.Conn
	in    *bufio.Reader
	key   ed25519.PublicKey
	leaf  []byte
	nonce []byte
}

func (w *world) dial(change ...func(*tls.Config)) (*vm, error) {
	pub, key, _ := ed25519.GenerateKey(rand.Reader)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, pub, key)
	w.must(err)
	conf := &tls.Config{RootCAs: w.boot.Pool(), ServerName: bootDNS, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	for _, f := range change {
		f(conf)
	}
	c, err := tls.Dial("tcp", w.addr, conf)
	if err != nil {
		return nil, err
	}
	w.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(30 * time.Second))
	vmKey, _, _ := ed25519.GenerateKey(rand.Reader)
	return &vm{w: w, conn: c, in: bufio.NewReader(c), key: vmKey, leaf: der}, nil
}

func (w *world) connect() *vm {
	w.t.Helper()
	v, err := w.dial()
	w.must(err)
	return v
}

// call is one exchange; out takes the body of a 200.
func (v *vm) call(method, path string, in any, out any) (int, error) {
	var body []byte
	switch b := in.(type) {
	case nil:
	case []byte:
		body = b
	default:
		body, _ = json.Marshal(in)
	}
	req, err := http.NewRequest(method, "https://"+bootDNS+path, bytes.NewReader(body))
	v.w.must(err)
	if err := req.Write(v.conn); err != nil {
		return 0, err
	}
	res, err := http.ReadResponse(v.in, req)
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	if err != nil {
		return res.StatusCode, err
	}
	if res.StatusCode != http.StatusOK {
		if string(bytes.TrimSpace(data)) != `{"error":"refused"}` {
			v.w.t.Errorf("%s: refusal says %q", path, data)
		}
		return res.StatusCode, nil
	}
	switch o := out.(type) {
	case nil:
	case *[]byte:
		*o = data
	default:
		v.w.must(json.Unmarshal(data, out))
	}
	return res.StatusCode, nil
}

func (v *vm) ok(method, path string, in, out any) {
	v.w.t.Helper()
	if status, err := v.call(method, path, in, out); err != nil || status != 200 {
		v.w.t.Fatalf("%s: status %d, %v", path, status, err)
	}
}

func (v *vm) refused(method, path string, in any) {
	v.w.t.Helper()
	if status, err := v.call(method, path, in, nil); err != nil || status != 403 {
		v.w.t.Fatalf("%s: status %d, %v; want 403", path, status, err)
	}
}

func (v *vm) open() {
	v.w.t.Helper()
	var out bootmsg.OpenResponse
	v.ok("POST", bootmsg.PathOpen, bootmsg.OpenRequest{Token: v.w.t1, VMKey: v.key}, &out)
	if out.Reservation != reservation || !bytes.Equal(out.Nonce, v.w.nonce) {
		v.w.t.Fatalf("open: %+v", out)
	}
	v.nonce = out.Nonce
}

// measure does the host's part: PCR 23 takes the tunnel as this end sees it.
func (v *vm) measure() {
	v.w.t.Helper()
	state := v.conn.ConnectionState()
	exporter, err := state.ExportKeyingMaterial(evidence.ExporterLabel, evidence.ExporterContext(reservation, v.nonce), evidence.ExporterLen)
	v.w.must(err)
	tunnel := evidence.Tunnel(digest.Of(exporter), state.PeerCertificates[0].Raw, v.leaf, v.key)
	_, err = tpm2.PCRReset{PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr.Tunnel), Auth: tpm2.PasswordAuth(nil)}}.Execute(v.w.dev)
	v.w.must(err)
	_, err = tpm2.PCRExtend{PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(pcr.Tunnel), Auth: tpm2.PasswordAuth(nil)},
		Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: tunnel[:]}}}}.Execute(v.w.dev)
	v.w.must(err)
}

// attest passes TPM commands until the grant; alter may change each response.
func (v *vm) attest(alter func([]byte) []byte) (*bootmsg.Grant, int) {
	v.w.t.Helper()
	var in bootmsg.AttestRequest
	for range 10 {
		var out bootmsg.AttestResponse
		status, err := v.call("POST", bootmsg.PathAttest, in, &out)
		v.w.must(err)
		if status != 200 {
			return nil, status
		}
		if out.Grant != nil {
			return out.Grant, status
		}
		response, err := v.w.dev.Send(out.Command)
		v.w.must(err)
		if alter != nil {
			response = alter(response)
		}
		in.Response = response
	}
	v.w.t.Fatal("attestation does not end")
	return nil, 0
}

func TestBootConversation(t *testing.T) {
	w := newWorld(t)
	v := w.connect()
	v.open()
	v.measure()
	grant, _ := v.attest(nil)
	if grant == nil || string(grant.Manifest.Payload) != "manifest" {
		t.Fatalf("no grant")
	}
	for path, want := range map[string][]byte{bootmsg.PathKernel: w.kernel, bootmsg.PathInitramfs: w.initrd, bootmsg.PathUnique: w.unique} {
		var got []byte
		v.ok("GET", path, nil, &got)
		if !bytes.Equal(got, want) {
			t.Fatalf("%s: other bytes", path)
		}
	}
	v.ok("POST", bootmsg.PathDone, bootmsg.DoneRequest{}, nil)
	done := w.waitDone()
	if done.Reason != "" || len(done.Delivered) != 3 || done.Reservation != reservation {
		t.Errorf("done: %+v", done)
	}
	for _, part := range []struct {
		name string
		data []byte
	}{{"kernel", w.kernel}, {"initramfs", w.initrd}, {"unique", w.unique}} {
		w.orch.WaitEvent(part.name, func(e event.Event) bool {
			return e.Kind == "component.delivered" && e.Reservation == reservation && e.Detail["name"] == part.name && e.Detail["sha256"] == digest.Of(part.data).String()
		})
	}
	v.refused("GET", bootmsg.PathUnique, nil) // over is over

	// The delivered system reports on a connection of its own.
	report := signed.Envelope{Payload: []byte("report"), Signature: []byte("by the VM")}
	var relayed []wire.ReadyRequest
	w.orch.Ready = func(r wire.ReadyRequest) error { relayed = append(relayed, r); return nil }
	w.connect().ok("POST", bootmsg.PathReady, report, nil)
	if len(relayed) != 1 || relayed[0].Source.String() != "127.0.0.1" || string(relayed[0].Report.Payload) != "report" || string(relayed[0].Report.Signature) != "by the VM" {
		t.Errorf("relayed: %+v", relayed)
	}
}

func TestManyVMsGetWholeComponents(t *testing.T) {
	w := newWorld(t)
	for range 3 { // the second and third from the cache
		v := w.connect()
		v.open()
		v.measure()
		if grant, _ := v.attest(nil); grant == nil {
			t.Fatal("no grant")
		}
		var got []byte
		v.ok("GET", bootmsg.PathKernel, nil, &got)
		if !bytes.Equal(got, w.kernel) {
			t.Fatal("other bytes")
		}
		v.conn.Close()
	}
	// What lies in the cache is not believed: spoilt on disk, it is fetched again.
	file := filepath.Join(w.state, "components", digest.Of(w.kernel).String())
	data, err := os.ReadFile(file)
	w.must(err)
	data[17] ^= 1
	w.must(os.WriteFile(file+".bad", data, 0o600))
	w.must(os.Rename(file+".bad", file))
	dir := filepath.Dir(file)
	kernel := bootmsg.Component{Name: "kernel", SHA256: digest.Of(w.kernel), Size: int64(len(w.kernel))}
	again, err := openCache(dir, w.conf)
	w.must(err)
	f, err := again.open(t.Context(), kernel)
	w.must(err)
	defer f.Close()
	got, err := io.ReadAll(f)
	w.must(err)
	if !bytes.Equal(got, w.kernel) {
		t.Error("the spoilt file was used")
	}
	if data, err = os.ReadFile(file); err != nil || !bytes.Equal(data, w.kernel) {
		t.Errorf("the spoilt file stays (%v)", err)
	}
	kernel.Size++
	if _, err := again.open(t.Context(), kernel); err == nil {
		t.Error("a component of another size than asked for is given")
	}
}

// TestRefusals: what comes out of turn, or is not what was asked for, ends its conversation
// and is told to the journal once, under its reason and with the check that it failed.
func TestRefusals(t *testing.T) {
	w := newWorld(t)
	refused := func(r event.Reason) (n int) {
		for _, e := range w.orch.Events() {
			if e.Kind == "boot.refused" && e.Reason == r {
				n++
			}
		}
		return n
	}
	ended := func(v *vm) {
		t.Helper()
		if status, err := v.call("POST", bootmsg.PathOpen, bootmsg.OpenRequest{Token: w.t1, VMKey: v.key}, nil); err == nil && status == 200 {
			t.Error("the conversation goes on after a refusal")
		}
	}
	for name, c := range map[string]struct {
		f    func(v *vm)
		want event.Reason
		says string
	}{
		"unknown token": {func(v *vm) {
			v.refused("POST", bootmsg.PathOpen, bootmsg.OpenRequest{Token: token.New(token.T1), VMKey: v.key})
		}, event.TokenUnknown, ""},
		"token of another kind": {func(v *vm) {
			v.refused("POST", bootmsg.PathOpen, bootmsg.OpenRequest{Token: token.New(token.T2), VMKey: v.key})
		}, event.BadRequest, "without a T1"},
		"short key":     {func(v *vm) { v.refused("POST", bootmsg.PathOpen, bootmsg.OpenRequest{Token: w.t1, VMKey: v.key[1:]}) }, event.BadRequest, "Ed25519"},
		"unknown field": {func(v *vm) { v.refused("POST", bootmsg.PathOpen, []byte(`{"token":"","vm_key":"","x":1}`)) }, event.BadRequest, "unknown field"},
		"duplicate key": {func(v *vm) { v.refused("POST", bootmsg.PathOpen, []byte(`{"token":"","token":""}`)) }, event.BadRequest, "duplicate key"},
		"too large":     {func(v *vm) { v.refused("POST", bootmsg.PathOpen, bytes.Repeat([]byte(" "), bootmsg.MaxMessage+1)) }, event.BadRequest, "limit"},
		"attest first":  {func(v *vm) { v.refused("POST", bootmsg.PathAttest, bootmsg.AttestRequest{}) }, event.BadRequest, "out of turn"},
		"kernel first":  {func(v *vm) { v.refused("GET", bootmsg.PathKernel, nil) }, event.BadRequest, "before admission"},
		"unique first":  {func(v *vm) { v.refused("GET", bootmsg.PathUnique, nil) }, event.BadRequest, "before admission"},
		"done first":    {func(v *vm) { v.refused("POST", bootmsg.PathDone, bootmsg.DoneRequest{}) }, event.BadRequest, "before open"},
		"no such call":  {func(v *vm) { v.refused("GET", "/", nil) }, event.BadRequest, "no such call"},
		"wrong method":  {func(v *vm) { v.refused("GET", bootmsg.PathOpen, nil) }, event.BadRequest, "no such call"},
		"unopened kernel": {func(v *vm) {
			v.open()
			v.refused("GET", bootmsg.PathKernel, nil)
		}, event.BadRequest, "before admission"},
		"second open": {func(v *vm) {
			v.open()
			v.refused("POST", bootmsg.PathOpen, bootmsg.OpenRequest{Token: w.t1, VMKey: v.key})
		}, event.BadRequest, "second open"},
		"response unasked": {func(v *vm) {
			v.open()
			v.refused("POST", bootmsg.PathAttest, bootmsg.AttestRequest{Response: []byte{1}})
		}, event.BadRequest, "out of turn"},
		"altered TPM response": {func(v *vm) {
			v.open()
			v.measure()
			if _, status := v.attest(func(r []byte) []byte { r[len(r)-1] ^= 1; return r }); status != 403 {
				t.Errorf("status %d", status)
			}
		}, event.QuoteRefused, "TPM session"},
		"unmeasured tunnel": {func(v *vm) {
			v.open()
			if _, status := v.attest(nil); status != 403 {
				t.Errorf("status %d", status)
			}
		}, event.QuoteRefused, ""},
		"done too early": {func(v *vm) {
			v.open()
			v.measure()
			v.attest(nil)
			v.refused("POST", bootmsg.PathDone, bootmsg.DoneRequest{})
		}, event.BadRequest, "before everything was delivered"},
		"kernel twice": {func(v *vm) {
			v.open()
			v.measure()
			v.attest(nil)
			v.ok("GET", bootmsg.PathKernel, nil, nil)
			v.refused("GET", bootmsg.PathKernel, nil)
		}, event.BadRequest, "a second time"},
	} {
		t.Run(name, func(t *testing.T) {
			before := refused(c.want)
			v := w.connect()
			c.f(v)
			ended(v)
			v.conn.Close()
			w.orch.WaitEvent(name, func(e event.Event) bool {
				return refused(c.want) == before+1 && e.Kind == "boot.refused" && e.Reason == c.want && strings.Contains(e.Detail["error"], c.says)
			})
		})
	}
	for _, e := range w.orch.Events() {
		for _, text := range e.Detail {
			if bytes.Contains([]byte(text), []byte(w.t1.Reveal()[:12])) {
				t.Errorf("a token in an event: %v", e.Kind)
			}
		}
	}
}

func TestOnlyFreshMutualTLS13(t *testing.T) {
	w := newWorld(t)
	for name, change := range map[string]func(*tls.Config){
		"TLS 1.2":        func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 },
		"no certificate": func(c *tls.Config) { c.Certificates = nil },
	} {
		v, err := w.dial(change)
		if err == nil { // in TLS 1.3 the client learns of its refusal with the first read
			_, err = v.call("POST", bootmsg.PathOpen, bootmsg.OpenRequest{Token: w.t1, VMKey: v.key}, nil)
		}
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestLostVMIsReported(t *testing.T) {
	w := newWorld(t)
	v := w.connect()
	v.open()
	v.conn.Close()
	if d := w.waitDone(); d.Reason != event.LoaderFailed || d.Reservation != reservation {
		t.Errorf("done: %+v", d)
	}
}

func TestGivingUpKeepsItsReason(t *testing.T) {
	w := newWorld(t)
	v := w.connect()
	v.open()
	v.ok("POST", bootmsg.PathDone, bootmsg.DoneRequest{Reason: string(event.SignatureInvalid)}, nil)
	if d := w.waitDone(); d.Reason != event.SignatureInvalid {
		t.Errorf("done: %+v", d)
	}
}

// Addresses without a live reservation get no handshake, nor do too many connections.
func TestGateBeforeHandshake(t *testing.T) {
	w := newWorld(t)
	var conns []net.Conn
	for range maxPerAddress {
		c, err := net.Dial("tcp", w.addr)
		w.must(err)
		defer c.Close()
		conns = append(conns, c)
	}
	// Connections are accepted in order: the third is decided behind these.
	silent := func(why string) {
		t.Helper()
		c, err := net.Dial("tcp", w.addr)
		if err == nil {
			defer c.Close()
			c.SetDeadline(time.Now().Add(5 * time.Second))
			_, err = c.Read(make([]byte, 1))
		}
		var timeout net.Error
		if err == nil || (errors.As(err, &timeout) && timeout.Timeout()) {
			t.Errorf("%s: the connection stays (%v)", why, err)
		}
	}
	silent("third connection")
	for _, c := range conns {
		c.Close()
	}
	w.orch.Publish(boots(2, "127.0.0.7", time.Minute))
	w.orch.WaitReport("other address", func(r zone.Report) bool { return r.Revision == 2 })
	silent("no reservation")
	w.orch.Publish(boots(3, "127.0.0.1", 300*time.Millisecond))
	w.orch.WaitReport("short window", func(r zone.Report) bool { return r.Revision == 3 })
	time.Sleep(300 * time.Millisecond)
	silent("window over")
	w.orch.WaitEvent("dropped", func(e event.Event) bool { return e.Kind == "boot.dropped" && e.Detail["why"] == "no live reservation" })
}

func TestWindowEndsConversations(t *testing.T) {
	g := newGate(func(event.Event) {})
	here := netip.MustParseAddr("127.0.0.1")
	near, far := net.Pipe()
	defer far.Close()
	c := &gatedConn{Conn: near, gate: g, from: here}
	g.boots[here] = boot{reservation, 1, 1} // long over
	if why := g.admit(c); why != "boot window over" {
		t.Errorf("admitted: %q", why)
	}
	g.boots[here] = boot{reservation, 1, upstream.Boottime() + time.Minute}
	if why := g.admit(c); why != "" {
		t.Fatalf("not admitted: %q", why)
	}
	c.boot.until = 1
	c.begin(t.Context())
	select {
	case <-c.ctx.Done():
	case <-time.After(5 * time.Second):
		t.Fatal("connection outlives its window")
	}
	if _, err := far.Read(make([]byte, 1)); err == nil {
		t.Error("connection is open")
	}
	c.Close() // a second time
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.total != 0 || len(g.open) != 0 {
		t.Error(fmt.Sprint("count is wrong: ", g.total, g.open))
	}
}

// TestNextStartIsNotInTheWay: connections that a VM's last start left without a word, as
// one does that was killed, do not keep its next start out.
func TestNextStartIsNotInTheWay(t *testing.T) {
	w := newWorld(t)
	var left []net.Conn
	for range maxPerAddress {
		c, err := net.Dial("tcp", w.addr)
		w.must(err)
		defer c.Close()
		left = append(left, c)
	}
	next := boots(2, "127.0.0.1", time.Minute)
	w.orch.Publish(next)
	w.orch.WaitReport("window moved", func(r zone.Report) bool { return r.Revision == 2 })
	left[0].SetReadDeadline(time.Now().Add(100 * time.Millisecond))
	var timeout net.Error
	if _, err := left[0].Read(make([]byte, 1)); !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("a connection of the same start ended: %v", err)
	}
	next.Revision, next.Boots[0].Start = 3, 2
	w.orch.Publish(next)
	for _, c := range left {
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.As(err, &timeout) && timeout.Timeout() {
			t.Errorf("a connection of the last start stays: %v", err)
		}
	}
	w.connect().open()
}
