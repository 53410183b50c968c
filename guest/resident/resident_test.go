package resident

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"foothold/internal/mtls"
	"foothold/internal/secret"
	"foothold/protocol/agentmsg"
	"foothold/protocol/audit"
	"foothold/protocol/digest"
	"foothold/protocol/signed"

	"github.com/klauspost/compress/zstd"
)

const reservation = "0f0e0d0c-0b0a-4908-8706-050403020100"

// world is the far end: relay, store and orchestrator.
type world struct {
	t        *testing.T
	manifest ed25519.PrivateKey
	vm       ed25519.PublicKey
	state    *State
	object   []byte
	send     http.HandlerFunc // of the store
	storeAt  netip.AddrPort
	services *fakeServices

	mu      sync.Mutex
	ups     []agentmsg.Up                                     // guarded by mu
	answer  func(up agentmsg.Up, n int) (agentmsg.Down, bool) // false: the connection is cut instead
	bend    func(*signed.Envelope)
	calls   int // guarded by mu
	filters []*agentmsg.Workload
	off     bool
}

type fakeServices struct {
	mu      sync.Mutex
	started []string // guarded by mu
	stopped int      // guarded by mu
	fail    error
}

func (f *fakeServices) Start(_ context.Context, program string, _ *agentmsg.Workload, _ string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	data, err := os.ReadFile(program)
	f.started = append(f.started, string(data))
	return errors.Join(err, f.fail)
}

func (f *fakeServices) State(context.Context) (string, string) { return running, "" }

func (f *fakeServices) Stop(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.stopped++
	return nil
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, object: []byte("#!program"), services: &fakeServices{}}
	caPub, caKey, _ := ed25519.GenerateKey(rand.Reader)
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	caDER, err := x509.CreateCertificate(rand.Reader, ca, ca, caPub, caKey)
	if err != nil {
		t.Fatal(err)
	}
	parsed, _ := x509.ParseCertificate(caDER)
	pool := x509.NewCertPool()
	pool.AddCert(parsed)
	issue := func(role string, usage x509.ExtKeyUsage) (tls.Certificate, ed25519.PrivateKey) {
		pub, key, _ := ed25519.GenerateKey(rand.Reader)
		name, _ := url.Parse(mtls.Identity{Role: role, Name: role}.URI())
		leaf := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{role + ".test"}, URIs: []*url.URL{name}, ExtKeyUsage: []x509.ExtKeyUsage{usage}}
		der, err := x509.CreateCertificate(rand.Reader, leaf, ca, pub, caKey)
		if err != nil {
			t.Fatal(err)
		}
		return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, key
	}
	serve := func(role string, h http.HandlerFunc) netip.AddrPort {
		cert, _ := issue(role, x509.ExtKeyUsageServerAuth)
		srv := httptest.NewUnstartedServer(h)
		srv.TLS = mtls.ServerConfig(cert, pool, mtls.VM)
		srv.StartTLS()
		t.Cleanup(srv.Close)
		return netip.MustParseAddrPort(srv.Listener.Addr().String())
	}
	vmCert, certKey := issue(mtls.VM, x509.ExtKeyUsageClientAuth)
	vmPub, vmKey, _ := ed25519.GenerateKey(rand.Reader)
	var manifestPub ed25519.PublicKey
	manifestPub, w.manifest, _ = ed25519.GenerateKey(rand.Reader)
	w.vm = vmPub
	w.state = &State{Reservation: reservation, Start: 1, ManifestKey: manifestPub, Seed: secret.New(vmKey.Seed()), CertSeed: secret.New(certKey.Seed()), Certificate: vmCert.Certificate[0],
		CA: caDER, ServerName: "gateway.test", Relay: serve(mtls.Gateway, w.relay), Address: netip.MustParseAddr("10.84.0.2")}
	w.send = func(rw http.ResponseWriter, r *http.Request) { rw.Write(w.object) }
	w.storeAt = serve(mtls.Store, func(rw http.ResponseWriter, r *http.Request) { w.send(rw, r) })
	return w
}

func (w *world) relay(rw http.ResponseWriter, r *http.Request) {
	var e signed.Envelope
	var up agentmsg.Up
	if json.NewDecoder(r.Body).Decode(&e) != nil || e.Open(w.vm, signed.AgentUp, &up) != nil {
		w.t.Error("a message that the VM's key did not sign")
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.calls++
	w.ups = append(w.ups, up)
	down, ok := w.answer(up, w.calls)
	if !ok {
		panic(http.ErrAbortHandler)
	}
	data, _ := json.Marshal(down)
	out := signed.Seal(w.manifest, signed.AgentDown, data)
	if w.bend != nil {
		w.bend(&out)
	}
	json.NewEncoder(rw).Encode(out)
}

// down is a good answer.
func down(up agentmsg.Up) agentmsg.Down {
	return agentmsg.Down{Reservation: reservation, Seq: up.Seq, Nonce: bytes.Repeat([]byte{byte(up.Seq)}, 32), Interval: 1}
}

func (w *world) agent() *Agent {
	a := &Agent{state: w.state, key: w.state.key(), say: w.t.Logf,
		gather:   func(nonce []byte) (audit.Report, error) { return audit.Report{Stage: audit.OS, Nonce: nonce}, nil },
		filter:   func(wl *agentmsg.Workload) error { w.filters = append(w.filters, wl); return nil },
		powerOff: func() error { w.off = true; return nil },
		workload: newRunner(w.services, w.state, filepath.Join(w.t.TempDir(), "workload"), w.t.Logf)}
	return a
}

func (w *world) workload() *agentmsg.Workload {
	return &agentmsg.Workload{SHA256: digest.Of(w.object), Size: int64(len(w.object)), Kind: "executable", Store: w.storeAt, StoreName: "store.test", Port: 8080}
}

func TestConversation(t *testing.T) {
	w := newWorld(t)
	w.answer = func(up agentmsg.Up, n int) (agentmsg.Down, bool) {
		d := down(up)
		switch {
		case n == 1:
			d.Audit = true
		case n == 2: // lost on the way: the same message comes again
			return d, false
		case n == 3:
			if up.Audit == nil || !bytes.Equal(up.Audit.Nonce, bytes.Repeat([]byte{1}, 32)) {
				t.Error("the audit does not answer the nonce")
			}
			d.Workload = w.workload()
		case up.Workload != nil && up.Workload.State == running:
			d.Workload, d.Stop = w.workload(), true
		default:
			d.Workload = w.workload()
		}
		return d, true
	}
	if err := w.agent().Run(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !w.off {
		t.Error("told to stop, the VM is not powered off")
	}
	if w.state.Seed.Len() != 0 || w.state.CertSeed.Len() != 0 {
		t.Error("keys are left after the stop")
	}
	if w.ups[1].Seq != 2 || w.ups[2].Seq != 2 || w.ups[3].Seq != 3 {
		t.Errorf("sequence numbers %d, %d, %d", w.ups[1].Seq, w.ups[2].Seq, w.ups[3].Seq)
	}
	for i, up := range w.ups[3:] {
		if !bytes.Equal(up.Nonce, bytes.Repeat([]byte{byte(up.Seq - 1)}, 32)) {
			t.Errorf("message %d carries another nonce than the last answer's", i+3)
		}
	}
	if !slices.Equal(w.services.started, []string{"#!program"}) || w.services.stopped == 0 || len(w.filters) != 1 {
		t.Errorf("started %q, stopped %d times, %d filters", w.services.started, w.services.stopped, len(w.filters))
	}
}

// None of these is believed: the agent goes on asking, and starts nothing.
func TestForgedAnswersChangeNothing(t *testing.T) {
	_, stranger, _ := ed25519.GenerateKey(rand.Reader)
	for name, bend := range map[string]func(w *world, d *agentmsg.Down){
		"signed by another": func(w *world, _ *agentmsg.Down) {
			w.bend = func(e *signed.Envelope) { *e = signed.Seal(stranger, signed.AgentDown, e.Payload) }
		},
		"signed for another purpose": func(w *world, _ *agentmsg.Down) {
			w.bend = func(e *signed.Envelope) { *e = signed.Seal(w.manifest, signed.Manifest, e.Payload) }
		},
		"altered": func(w *world, _ *agentmsg.Down) {
			w.bend = func(e *signed.Envelope) { e.Payload[len(e.Payload)-2] ^= 1 }
		},
		"for another VM":     func(_ *world, d *agentmsg.Down) { d.Reservation = "x" },
		"to another message": func(_ *world, d *agentmsg.Down) { d.Seq++ },
		"without a nonce":    func(_ *world, d *agentmsg.Down) { d.Nonce = nil },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			ctx, cancel := context.WithCancel(t.Context())
			w.answer = func(up agentmsg.Up, n int) (agentmsg.Down, bool) {
				if n == 3 {
					cancel()
				}
				d := down(up)
				d.Workload, d.Stop = w.workload(), true
				bend(w, &d)
				return d, true
			}
			if err := w.agent().Run(ctx); err == nil || w.off || len(w.services.started) > 0 || len(w.filters) > 0 {
				t.Errorf("%v; off %v, started %v", err, w.off, w.services.started)
			}
			if slices.ContainsFunc(w.ups, func(up agentmsg.Up) bool { return up.Seq != 1 }) {
				t.Error("the agent went on to a second message")
			}
		})
	}
}

func TestWorkloadIsVerified(t *testing.T) {
	w := newWorld(t)
	for name, bend := range map[string]func(*agentmsg.Workload){
		"altered object":    func(wl *agentmsg.Workload) { wl.SHA256[0] ^= 1 },
		"shorter than said": func(wl *agentmsg.Workload) { wl.Size++ },
		"longer than said":  func(wl *agentmsg.Workload) { wl.Size-- },
		"another store":     func(wl *agentmsg.Workload) { wl.StoreName = "other.test" },
		"gateway as store":  func(wl *agentmsg.Workload) { wl.Store, wl.StoreName = w.state.Relay, "gateway.test" },
	} {
		wl := w.workload()
		bend(wl)
		r := newRunner(w.services, w.state, filepath.Join(t.TempDir(), "w"), t.Logf)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		if err := r.run(ctx, wl); err == nil {
			t.Errorf("%s: run", name)
		}
		cancel()
	}
	if len(w.services.started) > 0 {
		t.Error("a program was started")
	}
}

func packed(t *testing.T, data []byte) []byte {
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	return z.EncodeAll(data, nil)
}

// The store may send a compressed copy; what comes out is held to size and digest.
func TestWorkloadMayComeCompressed(t *testing.T) {
	w := newWorld(t)
	w.object = bytes.Repeat([]byte("#!program"), 10_000)
	for name, tc := range map[string]struct {
		coding  string
		content []byte
		good    bool
	}{
		"zstd":            {"zstd", packed(t, w.object), true},
		"none":            {"", w.object, true},
		"other content":   {"zstd", packed(t, bytes.Repeat([]byte("#!Program"), 10_000)), false},
		"unpacks to more": {"zstd", packed(t, make([]byte, 256<<20)), false},
		"unpacks to less": {"zstd", packed(t, w.object[:1000]), false},
		"not zstd":        {"zstd", w.object, false},
		"cut":             {"zstd", packed(t, w.object)[:20], false},
		"unasked coding":  {"gzip", w.object, false},
		"two codings":     {"zstd, zstd", packed(t, packed(t, w.object)), false},
	} {
		w.send = func(rw http.ResponseWriter, r *http.Request) {
			if got := r.Header.Get("Accept-Encoding"); got != "zstd" {
				t.Errorf("%s: the agent accepts %q", name, got)
			}
			if tc.coding != "" {
				rw.Header().Set("Content-Encoding", tc.coding)
			}
			rw.Write(tc.content)
		}
		var out bytes.Buffer
		r := newRunner(w.services, w.state, t.TempDir(), t.Logf)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		err := r.download(ctx, w.workload(), &out)
		cancel()
		if good := err == nil; good != tc.good || good && !bytes.Equal(out.Bytes(), w.object) {
			t.Errorf("%s: %v", name, err)
		}
		if out.Len() > len(w.object)+1 {
			t.Errorf("%s: %d bytes were written", name, out.Len())
		}
	}
}

func TestCheckWorkload(t *testing.T) {
	w := newWorld(t)
	if err := checkWorkload(w.workload()); err != nil {
		t.Fatal(err)
	}
	for name, bend := range map[string]func(*agentmsg.Workload){
		"no digest":      func(wl *agentmsg.Workload) { wl.SHA256 = digest.SHA256{} },
		"huge":           func(wl *agentmsg.Workload) { wl.Size = maxWorkload + 1 },
		"kind":           func(wl *agentmsg.Workload) { wl.Kind = "script" },
		"entry outside":  func(wl *agentmsg.Workload) { wl.Kind, wl.Entry = "tar", "../bin/sh" },
		"entry absolute": func(wl *agentmsg.Workload) { wl.Kind, wl.Entry = "tar", "/bin/sh" },
		"port":           func(wl *agentmsg.Workload) { wl.Port = 65536 },
		"newline":        func(wl *agentmsg.Workload) { wl.Env = []string{"A=b\nC=d"} },
		"no name":        func(wl *agentmsg.Workload) { wl.Env = []string{"=b"} },
	} {
		wl := w.workload()
		bend(wl)
		if checkWorkload(wl) == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestEnvironmentIsQuoted(t *testing.T) {
	got := string(environment(&agentmsg.Workload{Port: 80, Env: []string{"A=x \"y\" $z `q` \\"}}, "10.84.0.2"))
	want := "PORT=\"80\"\nADDRESS=\"10.84.0.2\"\nA=\"x \\\"y\\\" \\$z \\`q\\` \\\\\"\n"
	if got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func archive(t *testing.T, headers ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	for _, h := range headers {
		if h.Typeflag == tar.TypeReg {
			h.Size = 2
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			w.Write([]byte("hi"))
		}
	}
	w.Close()
	z.Close()
	return b.Bytes()
}

func TestUnpack(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tree")
	good := archive(t, tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o777}, tar.Header{Name: "bin/run", Typeflag: tar.TypeReg, Mode: 0o4755},
		tar.Header{Name: "data", Typeflag: tar.TypeReg, Mode: 0o600}, tar.Header{Name: "bin/link", Typeflag: tar.TypeSymlink, Linkname: "run"})
	if err := unpack(bytes.NewReader(good), dir); err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]os.FileMode{"bin/run": 0o555, "data": 0o444, "bin/link": 0o555} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode() != mode {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	for name, headers := range map[string][]tar.Header{
		"path outside":  {{Name: "../x", Typeflag: tar.TypeReg}},
		"absolute path": {{Name: "/etc/x", Typeflag: tar.TypeReg}},
		"link outside":  {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "../x"}},
		"absolute link": {{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "/etc"}},
		"device":        {{Name: "d", Typeflag: tar.TypeChar}},
		"hard link":     {{Name: "h", Typeflag: tar.TypeLink, Linkname: "/etc/passwd"}},
		"twice":         {{Name: "a", Typeflag: tar.TypeReg}, {Name: "a", Typeflag: tar.TypeReg}},
	} {
		outside := t.TempDir()
		if err := unpack(bytes.NewReader(archive(t, headers...)), filepath.Join(outside, "tree")); err == nil {
			t.Errorf("%s: unpacked", name)
		}
		if entries, _ := os.ReadDir(outside); len(entries) != 1 {
			t.Errorf("%s: something lies outside", name)
		}
	}
}

func FuzzUnpack(f *testing.F) {
	f.Add([]byte("\x1f\x8b"))
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		_ = unpack(bytes.NewReader(data), filepath.Join(dir, "tree"))
		if entries, _ := os.ReadDir(dir); len(entries) > 1 {
			t.Error("something lies outside")
		}
	})
}

func TestStateIsHandedOverAndWiped(t *testing.T) {
	w := newWorld(t)
	data, _ := json.Marshal(w.state)
	f, err := memoryFile("state", 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	f.Write(data)
	s, err := read(f)
	if err != nil || !s.Seed.Equal(w.state.Seed) || s.Relay != w.state.Relay {
		t.Fatalf("%v", err)
	}
	left := make([]byte, len(data))
	f.ReadAt(left, 0)
	if !bytes.Equal(left, make([]byte, len(data))) {
		t.Error("the state stays in its file")
	}
	if _, err := read(f); err == nil {
		t.Error("an empty state is accepted")
	}
}

func TestQuarantinedFlows(t *testing.T) {
	w := newWorld(t)
	w.state.Outside, w.state.Endpoint = "eth0", netip.MustParseAddrPort("10.81.0.20:51820")
	for _, f := range w.state.Flows(nil) {
		if f.Inbound || f.Peer != w.state.Relay && f.Peer != w.state.Endpoint {
			t.Errorf("open before there is a workload: %+v", f)
		}
	}
	inbound := 0
	for _, f := range w.state.Flows(w.workload()) {
		if f.Inbound {
			inbound++
			if f.Port != 8080 || f.Interface != "wg0" {
				t.Errorf("open to the outside: %+v", f)
			}
		}
		if f.Interface == "eth0" && f.Peer != w.state.Endpoint {
			t.Errorf("the cloud network carries more than the tunnel: %+v", f)
		}
	}
	if inbound != 1 {
		t.Errorf("%d inbound flows, want 1", inbound)
	}
}

func TestSystemdPropertiesConfine(t *testing.T) {
	low, high := strings.Join(properties(&agentmsg.Workload{Port: 80}), "\n"), strings.Join(properties(&agentmsg.Workload{Port: 8080}), "\n")
	for _, want := range []string{"DynamicUser=yes", "NoNewPrivileges=yes", "ProtectSystem=strict"} {
		if !strings.Contains(low, want) || !strings.Contains(high, want) {
			t.Errorf("%s is missing", want)
		}
	}
	if !strings.Contains(high, "CapabilityBoundingSet=\n") && !strings.HasSuffix(high, "CapabilityBoundingSet=") || !strings.Contains(low, "CapabilityBoundingSet=CAP_NET_BIND_SERVICE") {
		t.Error("capabilities are not the least")
	}
}
