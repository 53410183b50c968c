package loader

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"foothold/protocol/bootmsg"
	"foothold/protocol/bundle"
	"foothold/protocol/channel"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/frame"
	"foothold/protocol/signed"
	"foothold/protocol/token"
	"foothold/protocol/vmspec"

	"github.com/cavaliergopher/cpio"
)

const serverName = "boot.foothold.internal"

// world is a boot server, a host and what they have in common. Its fields are the
// truth; a test bends one of them before the loader runs.
type world struct {
	t            *testing.T
	spec         vmspec.Spec
	t1           token.Token
	manifestKey  ed25519.PrivateKey
	componentKey ed25519.PrivateKey
	nonce        []byte
	commands     [][]byte
	kernel       []byte // as signed
	initramfs    []byte
	unique       []byte

	bendManifest   func(*bootmsg.Manifest)
	bendComponents func(*bootmsg.Components)
	bendGrant      func(*bootmsg.Grant)
	bendTLS        func(*tls.Config)
	open           func(*bootmsg.OpenResponse)
	sent           map[string][]byte // what is sent instead, by path
	host           func(*hostEnd)
	present        token.Token // what the VM holds instead of T1
	kexec          error

	// What was seen.
	done      *bootmsg.DoneRequest
	responses [][]byte
	conns     atomic.Int32
	measured  digest.SHA256
	expected  digest.SHA256 // by the server's end of the tunnel
	vmKey     []byte
	leaf      []byte
	stop      func()
	heard     []channel.Type
	failed    string
	cmdline   string
	initrd    []byte
	booted    []byte // kernel
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, t1: token.New(token.T1), nonce: bytes.Repeat([]byte{7}, evidence.NonceLen),
		commands: [][]byte{[]byte("start session"), []byte("quote")},
		kernel:   bytes.Repeat([]byte("k"), 70001), initramfs: bytes.Repeat([]byte("i"), 300003), unique: []byte("unique"),
		sent: map[string][]byte{}}
	_, w.manifestKey, _ = ed25519.GenerateKey(rand.Reader)
	_, w.componentKey, _ = ed25519.GenerateKey(rand.Reader)
	w.spec = vmspec.Spec{Reservation: "0f0e0d0c-0b0a-4908-8706-050403020100", Start: 3, Tenant: "acme", Name: "web", VCPUs: 1, MemoryMiB: 1024,
		Network:     vmspec.Network{MAC: "02:fb:00:00:00:01", Address: netip.MustParsePrefix("10.82.0.10/24"), Gateway: netip.MustParseAddr("10.82.0.1"), MTU: 1500},
		Boot:        vmspec.Boot{ServerName: serverName, ManifestKey: w.manifestKey.Public().(ed25519.PublicKey), ComponentKey: w.componentKey.Public().(ed25519.PublicKey)},
		TokenDigest: w.t1.Digest(), Template: digest.Of([]byte("template")), Volume: vmspec.Volume{ID: "0f0e0d0c-0b0a-4908-8706-050403020101", SizeMiB: 64}}
	w.host = (*hostEnd).good
	return w
}

// authority makes a CA and a certificate of it, a server's or of another usage.
func authority(t *testing.T, name string, usage ...x509.ExtKeyUsage) (ca []byte, cert tls.Certificate) {
	t.Helper()
	if usage == nil {
		usage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
	caPub, caKey, _ := ed25519.GenerateKey(rand.Reader)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "boot"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	ca, err := x509.CreateCertificate(rand.Reader, template, template, caPub, caKey)
	if err != nil {
		t.Fatal(err)
	}
	pub, key, _ := ed25519.GenerateKey(rand.Reader)
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), DNSNames: []string{name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: usage}
	der, err := x509.CreateCertificate(rand.Reader, leaf, template, pub, caKey)
	if err != nil {
		t.Fatal(err)
	}
	return ca, tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// serve starts the boot server and fills the settings that name it.
func (w *world) serve() {
	ca, cert := authority(w.t, serverName)
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+bootmsg.PathOpen, w.serveOpen)
	mux.HandleFunc("POST "+bootmsg.PathAttest, w.serveAttest)
	mux.HandleFunc("POST "+bootmsg.PathDone, func(rw http.ResponseWriter, r *http.Request) {
		w.done = &bootmsg.DoneRequest{}
		_ = json.NewDecoder(r.Body).Decode(w.done)
		io.WriteString(rw, "{}")
	})
	for path, data := range map[string][]byte{bootmsg.PathKernel: w.kernel, bootmsg.PathInitramfs: w.initramfs, bootmsg.PathUnique: w.unique} {
		if other, ok := w.sent[path]; ok {
			data = other
		}
		mux.HandleFunc("GET "+path, func(rw http.ResponseWriter, r *http.Request) { rw.Write(data) })
	}
	srv := httptest.NewUnstartedServer(mux)
	srv.Config.ErrorLog = log.New(io.Discard, "", 0)
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			w.conns.Add(1)
		}
	}
	srv.TLS = &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAnyClientCert}
	if w.bendTLS != nil {
		w.bendTLS(srv.TLS)
	}
	w.leaf = srv.TLS.Certificates[0].Certificate[0]
	srv.StartTLS()
	w.stop = srv.Close
	if w.spec.Boot.CA == nil {
		w.spec.Boot.CA = ca
	}
	w.spec.Boot.URL = srv.URL
}

func (w *world) serveOpen(rw http.ResponseWriter, r *http.Request) {
	var in bootmsg.OpenRequest
	if json.NewDecoder(r.Body).Decode(&in) != nil || in.Token.Digest() != w.t1.Digest() {
		http.Error(rw, `{"error":"refused"}`, http.StatusForbidden)
		return
	}
	w.vmKey = in.VMKey
	out := bootmsg.OpenResponse{Reservation: w.spec.Reservation, Nonce: w.nonce}
	exporter, _ := r.TLS.ExportKeyingMaterial(evidence.ExporterLabel, evidence.ExporterContext(out.Reservation, out.Nonce), evidence.ExporterLen)
	w.expected = evidence.Tunnel(digest.Of(exporter), w.leaf, r.TLS.PeerCertificates[0].Raw, in.VMKey)
	if w.open != nil {
		w.open(&out)
	}
	json.NewEncoder(rw).Encode(out)
}

func (w *world) serveAttest(rw http.ResponseWriter, r *http.Request) {
	var in bootmsg.AttestRequest
	json.NewDecoder(r.Body).Decode(&in)
	if in.Response != nil {
		w.responses = append(w.responses, in.Response)
	}
	if n := len(w.responses); n < len(w.commands) {
		json.NewEncoder(rw).Encode(bootmsg.AttestResponse{Command: w.commands[n]})
		return
	}
	grant := w.grant()
	json.NewEncoder(rw).Encode(bootmsg.AttestResponse{Grant: &grant})
}

func (w *world) grant() bootmsg.Grant {
	part := func(name string, data []byte) bootmsg.Component {
		return bootmsg.Component{Name: name, SHA256: digest.Of(data), Size: int64(len(data))}
	}
	shared := bootmsg.Components{Release: "1", Created: time.Now(), Kernel: part("kernel", w.kernel), Initramfs: part("initramfs", w.initramfs)}
	m := bootmsg.Manifest{Reservation: w.spec.Reservation, Start: w.spec.Start, VMKey: w.vmKey, Tunnel: w.expected, Kernel: shared.Kernel, Initramfs: shared.Initramfs,
		Unique: part("unique", w.unique), Cmdline: "quiet", Expires: time.Now().Add(time.Minute)}
	if w.bendManifest != nil {
		w.bendManifest(&m)
	}
	if w.bendComponents != nil {
		w.bendComponents(&shared)
	}
	seal := func(key ed25519.PrivateKey, label string, v any) signed.Envelope {
		data, _ := json.Marshal(v)
		return signed.Seal(key, label, data)
	}
	g := bootmsg.Grant{Manifest: seal(w.manifestKey, signed.Manifest, m), Components: seal(w.componentKey, signed.Components, shared)}
	if w.bendGrant != nil {
		w.bendGrant(&g)
	}
	return g
}

// hostEnd is the host's side of the channel.
type hostEnd struct {
	w    *world
	port net.Conn
}

func (h *hostEnd) say(m channel.Message) { _ = frame.Write(h.port, channel.MaxFrame, m) }

// hear returns the next message; the channel's end gives one without a type.
func (h *hostEnd) hear() channel.Message {
	var m channel.Message
	if frame.Read(h.port, channel.MaxFrame, &m) != nil {
		return channel.Message{}
	}
	h.w.heard = append(h.w.heard, m.Type)
	if m.Type == channel.Failed {
		h.w.failed = m.Reason
	}
	return m
}

var challenge = bytes.Repeat([]byte{5}, channel.ChallengeLen)

// hold is the conversation up to Held.
func (h *hostEnd) hold() bool {
	if h.hear().Type != channel.TunnelUp {
		return false
	}
	h.say(channel.Message{Type: channel.AskTunnel, Challenge: challenge})
	m := h.hear()
	if m.Type != channel.Tunnel || !bytes.Equal(m.Challenge, challenge) {
		return false
	}
	h.w.measured = *m.Measurement
	h.say(channel.Message{Type: channel.Ready})
	return true
}

// good is a host that does its part, to the end.
func (h *hostEnd) good() {
	if h.hold() {
		h.rest()
	}
}

func (h *hostEnd) rest() {
	for {
		switch m := h.hear(); m.Type {
		case channel.Command:
			h.say(channel.Message{Type: channel.Response, Data: append([]byte("answer to "), m.Data...)})
		case channel.Handover:
			h.say(channel.Message{Type: channel.Released})
		case "", channel.Failed:
			return
		}
	}
}

// run lets the loader boot and returns its error.
func (w *world) run() error {
	w.serve()
	near, far := net.Pipe()
	hostDone := make(chan struct{})
	go func() { defer close(hostDone); w.host(&hostEnd{w, far}) }()
	if err := w.spec.Validate(); err != nil {
		w.t.Fatal(err)
	}
	t1 := w.t1
	if !w.present.IsZero() {
		t1 = w.present
	}
	err := Boot(w.t.Context(), Machine{Spec: w.spec, Token: t1, Channel: near, Say: w.t.Logf,
		Kexec: func(kernel, initrd *os.File, cmdline string) error {
			w.cmdline = cmdline
			w.booted, _ = io.ReadAll(io.NewSectionReader(kernel, 0, 1<<30))
			w.initrd, _ = io.ReadAll(io.NewSectionReader(initrd, 0, 1<<30))
			return w.kexec
		}})
	near.Close()
	<-hostDone
	w.stop()
	return err
}

func TestBootDeliversExactlyWhatWasSigned(t *testing.T) {
	w := newWorld(t)
	if err := w.run(); err != nil {
		t.Fatal(err)
	}
	if w.measured != w.expected || w.measured.IsZero() {
		t.Error("the two ends measure different tunnels")
	}
	if !bytes.Equal(w.booted, w.kernel) || w.cmdline != "quiet" {
		t.Error("another kernel or command line is loaded")
	}
	if n := w.conns.Load(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
	if w.done == nil || w.done.Reason != "" {
		t.Errorf("done: %+v", w.done)
	}
	if len(w.responses) != 2 || string(w.responses[1]) != "answer to quote" {
		t.Errorf("TPM responses: %q", w.responses)
	}
	want := []channel.Type{channel.TunnelUp, channel.Tunnel, channel.Command, channel.Command, channel.Handover}
	if !slices.Equal(w.heard, want) {
		t.Errorf("the host heard %v, want %v", w.heard, want)
	}
	padded := append(append(bytes.Clone(w.initramfs), 0), w.unique...)
	padded = append(padded, 0, 0)
	rest, ok := bytes.CutPrefix(w.initrd, padded)
	if !ok {
		t.Fatal("the initramfs does not begin with the shared and the unique part")
	}
	r := cpio.NewReader(bytes.NewReader(rest))
	for {
		h, err := r.Next()
		if err != nil {
			t.Fatalf("the VM's key is not there: %v", err)
		}
		if h.Name != bundle.PrivateKeyPath {
			continue
		}
		seed, _ := io.ReadAll(r)
		if key := ed25519.NewKeyFromSeed(seed); !bytes.Equal(key.Public().(ed25519.PublicKey), w.vmKey) {
			t.Error("another key is carried over")
		}
		return
	}
}

func TestBootRefuses(t *testing.T) {
	_, otherKey, _ := ed25519.GenerateKey(rand.Reader)
	flip := func(b []byte) []byte { c := bytes.Clone(b); c[len(c)/2] ^= 1; return c }
	for name, tc := range map[string]struct {
		bend   func(*world)
		reason event.Reason
	}{
		"another authority": {func(w *world) { w.spec.Boot.CA, _ = authority(t, serverName) }, event.ServerUntrusted},
		"another name": {func(w *world) {
			ca, cert := authority(t, "other.foothold.internal")
			w.spec.Boot.CA = ca
			w.bendTLS = func(c *tls.Config) { c.Certificates = []tls.Certificate{cert} }
		}, event.ServerUntrusted},
		"a client's certificate as the server's": {func(w *world) {
			ca, cert := authority(t, serverName, x509.ExtKeyUsageClientAuth)
			w.spec.Boot.CA = ca
			w.bendTLS = func(c *tls.Config) { c.Certificates = []tls.Certificate{cert} }
		}, event.ServerUntrusted},
		"TLS 1.2": {func(w *world) { w.bendTLS = func(c *tls.Config) { c.MinVersion, c.MaxVersion = 0, tls.VersionTLS12 } }, event.BootServerFailed},
		"pin is no authority": {func(w *world) {
			_, cert := authority(t, serverName)
			w.spec.Boot.CA = cert.Certificate[0]
			w.bendTLS = func(c *tls.Config) { c.Certificates = []tls.Certificate{cert} }
		}, event.BootServerFailed},
		"token refused": {func(w *world) { w.present = token.New(token.T1) }, event.BootServerFailed},
		"another reservation": {func(w *world) {
			w.open = func(o *bootmsg.OpenResponse) { o.Reservation = "0f0e0d0c-0b0a-4908-8706-0504030201ff" }
		}, event.BootServerFailed},
		"short nonce": {func(w *world) { w.open = func(o *bootmsg.OpenResponse) { o.Nonce = o.Nonce[1:] } }, event.BootServerFailed},
		"kernel and initramfs swapped": {func(w *world) {
			w.sent[bootmsg.PathKernel], w.sent[bootmsg.PathInitramfs] = w.initramfs, w.kernel
		}, event.BootServerFailed},
		"swapped, of one size": {func(w *world) {
			w.kernel = bytes.Repeat([]byte("K"), len(w.initramfs))
			w.sent[bootmsg.PathKernel], w.sent[bootmsg.PathInitramfs] = w.initramfs, w.kernel
		}, event.DigestMismatch},
		"unique part of another VM": {func(w *world) { w.sent[bootmsg.PathUnique] = []byte("Unique") }, event.DigestMismatch},
		"unsigned manifest":         {func(w *world) { w.bendGrant = func(g *bootmsg.Grant) { g.Manifest.Signature = nil } }, event.SignatureInvalid},
		"unsigned components":       {func(w *world) { w.bendGrant = func(g *bootmsg.Grant) { g.Components.Signature = nil } }, event.SignatureInvalid},
		"altered manifest": {func(w *world) {
			w.bendGrant = func(g *bootmsg.Grant) { g.Manifest.Payload = append(g.Manifest.Payload, ' ') }
		}, event.SignatureInvalid},
		"altered components": {func(w *world) {
			w.bendGrant = func(g *bootmsg.Grant) { g.Components.Payload = append(g.Components.Payload, ' ') }
		}, event.SignatureInvalid},
		"altered kernel":        {func(w *world) { w.sent[bootmsg.PathKernel] = flip(w.kernel) }, event.DigestMismatch},
		"altered initramfs":     {func(w *world) { w.sent[bootmsg.PathInitramfs] = flip(w.initramfs) }, event.DigestMismatch},
		"altered unique part":   {func(w *world) { w.sent[bootmsg.PathUnique] = flip(w.unique) }, event.DigestMismatch},
		"short kernel":          {func(w *world) { w.sent[bootmsg.PathKernel] = w.kernel[1:] }, event.BootServerFailed},
		"long kernel":           {func(w *world) { w.sent[bootmsg.PathKernel] = append(bytes.Clone(w.kernel), 'x') }, event.BootServerFailed},
		"manifest by another":   {func(w *world) { w.manifestKey = otherKey }, event.SignatureInvalid},
		"components by another": {func(w *world) { w.componentKey = otherKey }, event.SignatureInvalid},
		"signatures swapped": {func(w *world) {
			w.bendGrant = func(g *bootmsg.Grant) { g.Manifest, g.Components = g.Components, g.Manifest }
		}, event.SignatureInvalid},
		"signature cut": {func(w *world) {
			w.bendGrant = func(g *bootmsg.Grant) { g.Manifest.Signature = g.Manifest.Signature[:63] }
		}, event.SignatureInvalid},
		"manifest for another key":         {func(w *world) { w.bendManifest = func(m *bootmsg.Manifest) { m.VMKey = flip(m.VMKey) } }, event.SignatureInvalid},
		"manifest for another tunnel":      {func(w *world) { w.bendManifest = func(m *bootmsg.Manifest) { m.Tunnel[0] ^= 1 } }, event.SignatureInvalid},
		"manifest for another start":       {func(w *world) { w.bendManifest = func(m *bootmsg.Manifest) { m.Start-- } }, event.SignatureInvalid},
		"manifest for another reservation": {func(w *world) { w.bendManifest = func(m *bootmsg.Manifest) { m.Reservation = "x" } }, event.SignatureInvalid},
		"expired manifest":                 {func(w *world) { w.bendManifest = func(m *bootmsg.Manifest) { m.Expires = time.Now() } }, event.SignatureInvalid},
		"no command line":                  {func(w *world) { w.bendManifest = func(m *bootmsg.Manifest) { m.Cmdline = "" } }, event.SignatureInvalid},
		"manifest's kernel is not the signed one": {func(w *world) {
			w.bendComponents = func(c *bootmsg.Components) { c.Kernel.SHA256[0] ^= 1 }
		}, event.DigestMismatch},
		"unique part over its limit": {func(w *world) { w.unique = make([]byte, bootmsg.MaxUnique+1) }, event.SignatureInvalid},
		"too many TPM commands": {func(w *world) {
			for range 20 {
				w.commands = append(w.commands, []byte("more"))
			}
		}, event.BootServerFailed},
		"empty TPM command": {func(w *world) { w.commands[1] = []byte{} }, event.BootServerFailed},
		"tunnel asked twice": {func(w *world) {
			w.host = func(h *hostEnd) {
				h.hear()
				h.say(channel.Message{Type: channel.AskTunnel, Challenge: challenge})
				h.hear()
				h.say(channel.Message{Type: channel.AskTunnel, Challenge: challenge})
				h.rest()
			}
		}, event.ChannelMisuse},
		"held unasked": {func(w *world) {
			w.host = func(h *hostEnd) { h.hear(); h.say(channel.Message{Type: channel.Ready}); h.rest() }
		}, event.ChannelMisuse},
		"asked again while held": {func(w *world) {
			w.host = func(h *hostEnd) {
				h.hold()
				h.hear() // a TPM command, which gets no answer
				h.say(channel.Message{Type: channel.AskTunnel, Challenge: challenge})
				h.rest()
			}
		}, event.ChannelMisuse},
		"short challenge": {func(w *world) {
			w.host = func(h *hostEnd) {
				h.hear()
				h.say(channel.Message{Type: channel.AskTunnel, Challenge: challenge[1:]})
				h.rest()
			}
		}, event.ChannelMisuse},
		"host refuses": {func(w *world) {
			w.host = func(h *hostEnd) {
				h.hear()
				h.say(channel.Message{Type: channel.Refused, Reason: string(event.TPMBusy)})
				h.rest()
			}
		}, event.HostRefused},
		"host goes away": {func(w *world) { w.host = func(h *hostEnd) { h.hear(); h.port.Close() } }, event.ChannelMisuse},
		"frame over its limit": {func(w *world) {
			w.host = func(h *hostEnd) { h.hear(); h.port.Write([]byte{0xff, 0xff, 0xff, 0xff}); h.rest() }
		}, event.ChannelMisuse},
		"fields that are not due": {func(w *world) {
			w.host = func(h *hostEnd) {
				h.hear()
				h.say(channel.Message{Type: channel.AskTunnel, Challenge: challenge, Data: []byte("x")})
				h.rest()
			}
		}, event.ChannelMisuse},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			tc.bend(w)
			err := w.run()
			if err == nil {
				t.Fatal("booted")
			}
			if Reason(err) != tc.reason {
				t.Errorf("reason %s, want %s: %v", Reason(err), tc.reason, err)
			}
			if w.initrd != nil {
				t.Error("a kernel was loaded all the same")
			}
			if strings.Contains(err.Error(), w.t1.Reveal()) {
				t.Error("the error shows T1")
			}
			if w.done != nil && w.done.Reason != string(tc.reason) {
				t.Errorf("the boot server was told %q", w.done.Reason)
			}
		})
	}
}

func TestFailureIsReportedToBothSides(t *testing.T) {
	w := newWorld(t)
	w.sent[bootmsg.PathUnique] = []byte("UNIQUE")
	if err := w.run(); err == nil {
		t.Fatal("booted")
	}
	if w.failed != string(event.DigestMismatch) || w.done == nil || w.done.Reason != string(event.DigestMismatch) {
		t.Errorf("host heard %q, boot server %+v", w.failed, w.done)
	}
}

func TestFailedLoadIsNotSurvived(t *testing.T) {
	w := newWorld(t)
	w.kexec = errors.New("no")
	if err := w.run(); Reason(err) != event.LoaderFailed || slices.Contains(w.heard, channel.Handover) {
		t.Errorf("%v; host heard %v", err, w.heard)
	}
}

func TestSettings(t *testing.T) {
	w := newWorld(t)
	w.spec.Boot.URL, w.spec.Boot.CA = "https://10.81.0.10:443", []byte("ca")
	encode := func(s vmspec.Spec) []byte { data, _ := json.Marshal(s); return data }
	if _, got, err := Settings(encode(w.spec), []byte(w.t1.Reveal())); err != nil || got.Digest() != w.t1.Digest() {
		t.Fatal(err)
	}
	dhcp, start := w.spec, w.spec
	dhcp.Network.DHCP = true
	start.Start = 0
	for name, tc := range map[string]struct{ settings, token []byte }{
		"another token":  {encode(w.spec), []byte(token.New(token.T1).Reveal())},
		"another kind":   {encode(w.spec), []byte(token.New(token.T2).Reveal())},
		"token and more": {encode(w.spec), []byte(w.t1.Reveal() + "\n")},
		"DHCP":           {encode(dhcp), []byte(w.t1.Reveal())},
		"bad settings":   {encode(start), []byte(w.t1.Reveal())},
		"unknown field":  {append(bytes.TrimSuffix(encode(w.spec), []byte("}")), `,"x":1}`...), []byte(w.t1.Reveal())},
		"trailing":       {append(encode(w.spec), '1'), []byte(w.t1.Reveal())},
		"too large":      {append(encode(w.spec), make([]byte, maxSettings)...), []byte(w.t1.Reveal())},
	} {
		if _, _, err := Settings(tc.settings, tc.token); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzSettings(f *testing.F) {
	f.Add([]byte(`{"reservation":"x"}`), []byte("fht1_"))
	f.Fuzz(func(t *testing.T, settings, text []byte) { _, _, _ = Settings(settings, text) })
}

// Whatever is signed as a manifest passes only if it is this VM's, and names good components.
func FuzzManifest(f *testing.F) {
	public, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		f.Fatal(err)
	}
	now, part := time.Now(), func(name string) bootmsg.Component {
		return bootmsg.Component{Name: name, SHA256: digest.Of([]byte(name)), Size: 9}
	}
	good := bootmsg.Manifest{Reservation: "r", Start: 1, VMKey: public, Tunnel: digest.SHA256{1}, Expires: now.Add(time.Hour), Cmdline: "quiet",
		Kernel: part("kernel"), Initramfs: part("initramfs"), Unique: part("unique")}
	shared, err := json.Marshal(bootmsg.Components{Kernel: good.Kernel, Initramfs: good.Initramfs})
	if err != nil {
		f.Fatal(err)
	}
	b := &boot{reserved: "r", public: public, tunnel: good.Tunnel}
	b.Spec.Reservation, b.Spec.Start, b.Spec.Boot.ManifestKey, b.Spec.Boot.ComponentKey = "r", 1, public, public
	passes := func(t testing.TB, manifest, components []byte) (bootmsg.Manifest, error) {
		return b.check(&bootmsg.Grant{Manifest: signed.Seal(key, signed.Manifest, manifest), Components: signed.Seal(key, signed.Components, components)}, now)
	}
	payload, err := json.Marshal(good)
	if err != nil {
		f.Fatal(err)
	}
	if _, err := passes(f, payload, shared); err != nil {
		f.Fatal(err)
	}
	f.Add(payload, shared)
	f.Add([]byte(`{"reservation":"r","reservation":"x"}`), []byte(`{}`))
	f.Fuzz(func(t *testing.T, manifest, components []byte) {
		m, err := passes(t, manifest, components)
		if err != nil {
			return
		}
		if m.Reservation != "r" || m.Start != 1 || m.Tunnel != good.Tunnel || !bytes.Equal(m.VMKey, public) || m.Kernel.Size > bootmsg.MaxKernel || m.Unique.SHA256.IsZero() {
			t.Fatalf("passed: %+v", m)
		}
	})
}

func FuzzLocalChannel(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x10{\"type\":\"ready\"}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		l := &local{port: struct {
			io.Reader
			io.Writer
		}{bytes.NewReader(data), io.Discard}}
		if l.announce(t.Context(), digest.SHA256{1}) == nil && !bytes.Contains(data, []byte("ask-tunnel")) {
			t.Error("ready without having been asked")
		}
	})
}
