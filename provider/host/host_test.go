package host

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"foothold/internal/mtls"
	"foothold/internal/nstest"
	"foothold/internal/tpm/swtpmtest"
	"foothold/protocol/digest"
	"foothold/protocol/hostapi"
	"foothold/protocol/inventory"
	"foothold/protocol/token"
	"foothold/protocol/vmspec"
	"foothold/provider/enroll"
	"foothold/provider/measure"
)

func TestMain(m *testing.M) {
	prepare()
	os.Exit(nstest.Main(m))
}

// authority issues certificates for the tests.
type authority struct {
	cert *x509.Certificate
	key  ed25519.PrivateKey
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	public, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &authority{cert, key}
}

func (a *authority) issue(t testing.TB, id mtls.Identity, dns string, usage x509.ExtKeyUsage) tls.Certificate {
	t.Helper()
	public, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	uri, err := url.Parse(id.URI())
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(2), NotAfter: time.Now().Add(time.Hour), URIs: []*url.URL{uri}, ExtKeyUsage: []x509.ExtKeyUsage{usage}}
	if dns != "" {
		template.DNSNames = []string{dns}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, public, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func writePEM(t testing.TB, path, kind string, der []byte) string {
	t.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// world is an enrolled, measured host whose agent is about to run.
type world struct {
	t            testing.TB
	tpm          *swtpmtest.TPM
	conf         Config
	sum          digest.SHA256 // of the configuration
	provider     *authority
	tenants      *authority
	entry        inventory.Host
	inventoryKey ed25519.PrivateKey
	cancel       context.CancelFunc
	done         chan error
	gateway      net.Listener // port 80 of the cloud network's gateway; for real VMs alone
}

// newWorld enrols a host and measures files, whose paths may be changed by adjust.
func newWorld(t testing.TB, adjust func(*Config, inventory.Host)) *world {
	t.Helper()
	w := &world{t: t, tpm: swtpmtest.New(t), provider: newAuthority(t), tenants: newAuthority(t)}
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"qemu", "module", "bios", "kernel", "initramfs"} {
		if err := os.WriteFile(at(name), []byte("this is "+name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cert := w.provider.issue(t, mtls.Identity{Role: mtls.Host, Name: "host-1"}, "host-1.host.provider.internal", x509.ExtKeyUsageServerAuth)
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	dev := w.tpm.Open()
	defer dev.Close()
	if w.entry, err = enroll.Enroll(dev, inventory.Host{Name: "host-1"}); err != nil {
		t.Fatal(err)
	}
	w.conf = Config{
		Name: "host-1", State: at("state"), Listen: netip.MustParseAddrPort(freePort(t)),
		TLS: mtls.Files{Cert: writePEM(t, at("cert.pem"), "CERTIFICATE", cert.Certificate[0]), Key: writePEM(t, at("key.pem"), "PRIVATE KEY", key),
			CA: writePEM(t, at("ca.pem"), "CERTIFICATE", w.tenants.cert.Raw)},
		Tenants: []Tenant{{"acme-orchestrator", "acme"}, {"other-orchestrator", "other"}},
		TPM:     w.tpm.Socket, Log: at("log.json"), Inventory: at("inventory.json"),
		QEMU: at("qemu"), QEMUModule: at("module"), BIOS: at("bios"), LoaderKernel: at("kernel"), LoaderInitramfs: at("initramfs"),
		Bridge: "cloud0", Accel: "tcg",
	}
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	w.inventoryKey, w.conf.InventoryKey = private, hex.EncodeToString(public)
	w.publish(w.inventoryKey, w.entry)
	if adjust != nil {
		adjust(&w.conf, w.entry)
	}
	encoded, err := json.Marshal(w.conf)
	if err != nil {
		t.Fatal(err)
	}
	config := at("config")
	if err := os.WriteFile(config, encoded, 0o600); err != nil {
		t.Fatal(err)
	}
	w.sum = digest.Of(encoded)
	w.measure(config)
	return w
}

// publish signs an inventory.
func (w *world) publish(key ed25519.PrivateKey, hosts ...inventory.Host) {
	w.t.Helper()
	env, err := enroll.Publish(key, "provider", 1, time.Now(), time.Hour, hosts)
	if err != nil {
		w.t.Fatal(err)
	}
	data, err := json.Marshal(env)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := os.WriteFile(w.conf.Inventory, data, 0o600); err != nil {
		w.t.Fatal(err)
	}
}

// measure adds the platform's files to the TPM, as a launcher does at boot, and
// replaces the log.
func (w *world) measure(config string) {
	w.t.Helper()
	w.tpm.Restart()
	dev := w.tpm.Open()
	defer dev.Close()
	var files []measure.File
	for _, path := range []string{w.conf.QEMU, w.conf.QEMUModule, w.conf.BIOS, w.conf.LoaderKernel, w.conf.LoaderInitramfs, config} {
		f, err := os.Open(path)
		if err != nil {
			w.t.Fatal(err)
		}
		defer f.Close()
		files = append(files, measure.File{Name: filepath.Base(path), File: f})
	}
	events, err := measure.Launch(dev, files)
	if err != nil {
		w.t.Fatal(err)
	}
	if err := measure.WriteLog(w.conf.Log, events); err != nil {
		w.t.Fatal(err)
	}
}

func freePort(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// run runs the agent and waits until it serves.
func (w *world) run() {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	w.cancel, w.done = cancel, make(chan error, 1)
	go func() { w.done <- Run(ctx, w.conf, w.sum) }()
	w.t.Cleanup(w.stop)
	w.wait()
}

// wait returns once the agent listens.
func (w *world) wait() {
	w.t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for time.Now().Before(deadline) {
		select {
		case err := <-w.done:
			w.done <- err
			w.t.Fatalf("the agent ended: %v", err)
		case <-time.After(10 * time.Millisecond):
		}
		if conn, err := net.Dial("tcp", w.conf.Listen.String()); err == nil {
			conn.Close()
			return
		}
	}
	w.t.Fatal("the agent does not listen")
}

func (w *world) stop() {
	w.cancel()
	if err := <-w.done; err != nil {
		w.t.Errorf("the agent ended with %v", err)
	}
	w.done <- nil
}

// client calls as the named orchestrator.
type client struct {
	t    testing.TB
	base string
	http *http.Client
}

func (w *world) client(identity string) *client {
	return w.clientOf(w.tenants, mtls.Identity{Role: mtls.Orchestrator, Name: identity})
}

func (w *world) clientOf(a *authority, id mtls.Identity) *client {
	pool := x509.NewCertPool()
	pool.AddCert(w.provider.cert)
	conf := mtls.ClientConfig(a.issue(w.t, id, "", x509.ExtKeyUsageClientAuth), pool, "host-1.host.provider.internal", mtls.Host)
	transport := &http.Transport{TLSClientConfig: conf}
	w.t.Cleanup(transport.CloseIdleConnections)
	return &client{w.t, "https://" + w.conf.Listen.String(), &http.Client{Transport: transport}}
}

// call makes a call and returns status and body.
func (c *client) call(method, path string, body any) (int, []byte) {
	c.t.Helper()
	var r io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		r = strings.NewReader(b)
	default:
		data, err := json.Marshal(b)
		if err != nil {
			c.t.Fatal(err)
		}
		r = strings.NewReader(string(data))
	}
	req, err := http.NewRequest(method, c.base+path, r)
	if err != nil {
		c.t.Fatal(err)
	}
	rsp, err := c.http.Do(req)
	if err != nil {
		return 0, []byte(err.Error())
	}
	defer rsp.Body.Close()
	data, err := io.ReadAll(rsp.Body)
	if err != nil {
		c.t.Fatal(err)
	}
	return rsp.StatusCode, data
}

// ok makes a call that must succeed and decodes its answer.
func (c *client) ok(method, path string, body, answer any) {
	c.t.Helper()
	status, data := c.call(method, path, body)
	if status != http.StatusOK {
		c.t.Fatalf("%s %s: %d %s", method, path, status, data)
	}
	if answer != nil {
		if err := json.Unmarshal(data, answer); err != nil {
			c.t.Fatalf("%s %s: %v", method, path, err)
		}
	}
}

// refused makes a call that must be refused for reason.
func (c *client) refused(method, path string, body any, reason string) {
	c.t.Helper()
	status, data := c.call(method, path, body)
	if status < 400 || !strings.Contains(string(data), `"`+reason+`"`) {
		c.t.Errorf("%s %s: %d %s, want refusal %s", method, path, status, data, reason)
	}
}

const templateBytes = "template of a test"

// request is a creation that is right in every respect.
func request(name string, start int) hostapi.CreateRequest {
	t1 := token.New(token.T1)
	id := digest.Of([]byte(name)).String()
	mac := "02:f0:00:00:" + id[:2] + ":" + id[2:4]
	uuid := id[:8] + "-" + id[8:12] + "-" + id[12:16] + "-" + id[16:20] + "-" + id[20:32]
	return hostapi.CreateRequest{Token: t1, Spec: vmspec.Spec{
		Reservation: uuid, Start: start, Tenant: "acme", Name: name, VCPUs: 1, MemoryMiB: 256,
		Network: vmspec.Network{MAC: mac, Address: netip.MustParsePrefix("10.82.0.10/24"), Gateway: netip.MustParseAddr("10.82.0.1"), MTU: 1500},
		Boot: vmspec.Boot{URL: "https://10.81.0.10:443", ServerName: "boot.foothold.internal", CA: []byte{1},
			ManifestKey: make([]byte, 32), ComponentKey: make([]byte, 32)},
		TokenDigest: t1.Digest(), Template: digest.Of([]byte(templateBytes)), Volume: vmspec.Volume{ID: uuid, SizeMiB: 64},
	}}
}

func (c *client) putTemplate() {
	c.t.Helper()
	c.ok("PUT", "/v1/templates/"+digest.Of([]byte(templateBytes)).String(), templateBytes, nil)
}
