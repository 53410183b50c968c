//go:build system

// Package guestboot boots the real loader and the real agent in QEMU against a host,
// a boot server, an orchestrator, a gateway and a store that are this test: what goes
// in and comes out of one VM, from fw_cfg to the workload's page, without the daemons.
package guestboot

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"foothold/internal/bootimage"
	"foothold/internal/command"
	"foothold/internal/mtls"
	"foothold/internal/nstest"
	"foothold/internal/secret"
	"foothold/internal/serve"
	"foothold/internal/wg"
	"foothold/internal/wg/userspace"
	"foothold/protocol/token"
	"foothold/protocol/vmspec"
	"foothold/tenant/expect"
	"foothold/tenant/template"

	"foothold/provider/qemu"
	"github.com/vishvananda/netlink"
	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

// run builds what needs the network and the ordinary namespaces, then enters its own.
func run(m *testing.M) int {
	if os.Getenv("FOOTHOLD_TEST_NAMESPACE") == "" {
		dir, err := os.MkdirTemp("", "guestboot-")
		if err != nil {
			panic(err)
		}
		defer os.RemoveAll(dir)
		if err := build(dir); err != nil {
			os.Stderr.WriteString("build: " + err.Error() + "\n")
			return 1
		}
		os.Setenv("GUESTBOOT_DIR", dir)
	}
	return nstest.Main(m)
}

func cacheDir() string {
	if dir := os.Getenv("FOOTHOLD_CACHE"); dir != "" {
		return dir
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		panic(err)
	}
	return filepath.Join(dir, "foothold")
}

// build makes loader image, template and workload. The template's OS image is kept in
// the cache; its initramfs is made anew of the agent as it is now.
func build(dir string) error {
	ctx := context.Background()
	for _, p := range []string{"cmd/foothold-loader", "cmd/foothold-guest", "lab/sample/web"} {
		cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", filepath.Join(dir, filepath.Base(p)), "foothold/"+p)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		cmd.Stderr = os.Stderr
		if err := cmd.Run(); err != nil {
			return err
		}
	}
	kernel, err := bootimage.FetchKernel(ctx, cacheDir(), nil)
	if err != nil {
		return err
	}
	if _, err := bootimage.BuildLoader(kernel, filepath.Join(dir, "foothold-loader"), filepath.Join(dir, "loader")); err != nil {
		return err
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "component.key"), key.Seed(), 0o600); err != nil {
		return err
	}
	_, err = template.Build(ctx, template.Options{Dir: filepath.Join(cacheDir(), "guestboot", "debian"), Name: "debian", CacheDir: cacheDir(),
		Init: filepath.Join(dir, "foothold-guest"), ComponentKey: key, AuthenticatedVolume: true})
	return err
}

// Addresses, as in the lab.
var (
	vmAddr       = netip.MustParseAddr("10.82.0.10")
	router       = netip.MustParseAddr("10.82.0.1")
	bootAddr     = netip.MustParseAddr("10.81.0.10")
	gatewayAddr  = netip.MustParseAddr("10.81.0.20")
	storeAddr    = netip.MustParseAddr("10.81.0.30")
	orchAddr     = netip.MustParseAddr("10.80.0.10")
	tunnelSelf   = netip.MustParseAddr("10.84.0.1")
	tunnelVM     = netip.MustParseAddr("10.84.0.2")
	tunnelPrefix = netip.MustParsePrefix("10.84.0.0/16")
)

const mac = "02:fb:00:00:00:0a"

// world is everything but the VM. A field with a lock is shared by its servers.
type world struct {
	t         *testing.T
	dir       string
	spec      vmspec.Spec
	t1        token.Token
	t2        token.Token
	t3        token.Token
	manifest  ed25519.PrivateKey
	component ed25519.PrivateKey
	login     ssh.Signer
	template  *template.Template
	expected  expect.Template
	ca        *authority
	volumeKey secret.Bytes
	password  secret.Bytes
	wg        *wg.Device
	web       []byte // the workload
	began     time.Time

	mu    sync.Mutex
	vmKey ed25519.PublicKey // guarded by mu

	ready   chan struct{} // the report came
	admit   chan struct{} // the VM was admitted
	audited chan struct{} // the second audit passed
	running chan struct{} // the workload runs
	again   chan struct{} // an audit passed while it runs
	stop    chan struct{} // closed: the VM is told to stop
	ended   chan struct{} // QEMU is gone
	console *consoleLog
}

func (w *world) since() float64 { return time.Since(w.began).Seconds() }

// authority is one CA for every role here.
type authority struct {
	cert *x509.Certificate
	der  []byte
	key  ed25519.PrivateKey
	pool *x509.CertPool
}

func newAuthority(t *testing.T) *authority {
	pub, key, _ := ed25519.GenerateKey(rand.Reader)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, pub, key)
	check(t, err)
	cert, err := x509.ParseCertificate(der)
	check(t, err)
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return &authority{cert, der, key, pool}
}

// issue signs a template for a key.
func (a *authority) issue(t *testing.T, tmpl *x509.Certificate, public any) []byte {
	t.Helper()
	tmpl.SerialNumber, _ = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, public, a.key)
	check(t, err)
	return der
}

func (a *authority) server(t *testing.T, role string) tls.Certificate {
	t.Helper()
	pub, key, _ := ed25519.GenerateKey(rand.Reader)
	name, _ := url.Parse(mtls.Identity{Role: role, Name: role}.URI())
	der := a.issue(t, &x509.Certificate{DNSNames: []string{role + ".foothold.internal"}, URIs: []*url.URL{name}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, pub)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, dir: os.Getenv("GUESTBOOT_DIR"), t1: token.New(token.T1), t2: token.New(token.T2), t3: token.New(token.T3), ca: newAuthority(t),
		volumeKey: secret.Random(64), password: secret.Random(16), began: time.Now(), ready: make(chan struct{}), admit: make(chan struct{}), audited: make(chan struct{}),
		running: make(chan struct{}), again: make(chan struct{}), stop: make(chan struct{}), ended: make(chan struct{}), console: &consoleLog{t: t, began: time.Now()}}
	_, w.manifest, _ = ed25519.GenerateKey(rand.Reader)
	seed, err := os.ReadFile(filepath.Join(w.dir, "component.key"))
	check(t, err)
	w.component = ed25519.NewKeyFromSeed(seed)
	_, login, _ := ed25519.GenerateKey(rand.Reader)
	w.login, err = ssh.NewSignerFromKey(login)
	check(t, err)
	w.template, err = template.Open(filepath.Join(cacheDir(), "guestboot", "debian"))
	check(t, err)
	w.expected, err = w.template.Expectations()
	check(t, err)
	w.web, err = os.ReadFile(filepath.Join(w.dir, "web"))
	check(t, err)
	w.spec = vmspec.Spec{Reservation: "0f0e0d0c-0b0a-4908-8706-050403020100", Start: 1, Tenant: "acme", Name: "web1", VCPUs: 1, MemoryMiB: 1024,
		Network: vmspec.Network{MAC: mac, Address: netip.PrefixFrom(vmAddr, 24), Gateway: router, MTU: 1500},
		Boot: vmspec.Boot{URL: "https://10.81.0.10:443", ServerName: "bootserver.foothold.internal", CA: w.ca.der,
			ManifestKey: w.manifest.Public().(ed25519.PublicKey), ComponentKey: w.component.Public().(ed25519.PublicKey)},
		TokenDigest: w.t1.Digest(), Template: w.template.Ciphertext, Volume: vmspec.Volume{ID: "0f0e0d0c-0b0a-4908-8706-050403020101", SizeMiB: volumeMiB}}
	check(t, w.spec.Validate())
	w.network()
	return w
}

// network gives this namespace the tap and every server's address.
func (w *world) network() {
	t := w.t
	tap := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: "tap0"}, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_ONE_QUEUE | netlink.TUNTAP_VNET_HDR}
	check(t, netlink.LinkAdd(tap))
	add := func(name string, addrs ...string) {
		link, err := netlink.LinkByName(name)
		check(t, err)
		for _, a := range addrs {
			addr, err := netlink.ParseAddr(a)
			check(t, err)
			check(t, netlink.AddrAdd(link, addr))
		}
		check(t, netlink.LinkSetUp(link))
	}
	add("lo")
	add("tap0", router.String()+"/24")
	add("lo", bootAddr.String()+"/32", gatewayAddr.String()+"/32", storeAddr.String()+"/32", orchAddr.String()+"/32")
	// The one machine here has every address; packets to the VM that name no source come
	// from the gateway's, as they would if it were a machine of its own.
	tapLink, err := netlink.LinkByName("tap0")
	check(t, err)
	check(t, netlink.RouteReplace(&netlink.Route{LinkIndex: tapLink.Attrs().Index, Scope: netlink.SCOPE_LINK, Src: gatewayAddr.AsSlice(),
		Dst: &net.IPNet{IP: net.IPv4(10, 82, 0, 0), Mask: net.CIDRMask(24, 32)}, Protocol: unix.RTPROT_KERNEL}))
	private, _ := wg.GenerateKey()
	w.wg, err = wg.Open(wg.Config{Name: "wg0", PrivateKey: private, ListenPort: 51820, MTU: 1420, Address: []netip.Prefix{netip.PrefixFrom(tunnelSelf, 16)}, Fallback: userspace.Start})
	check(t, err)
	t.Cleanup(func() { w.wg.Close() })
}

// serve runs an HTTPS server until the test ends.
func (w *world) serve(at string, conf *tls.Config, h http.Handler) {
	l, err := net.Listen("tcp4", at)
	check(w.t, err)
	ctx, cancel := context.WithCancel(context.Background())
	w.t.Cleanup(cancel)
	go serve.HTTPS(ctx, l, conf, h)
}

const volumeMiB = 128

// qemu starts the VM and returns the host's end of its channel.
func (w *world) qemu() net.Conn {
	t, dir := w.t, w.t.TempDir()
	settings, err := json.Marshal(w.spec)
	check(t, err)
	file := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		check(t, os.WriteFile(path, data, 0o600))
		return path
	}
	volume := file("volume", nil)
	check(t, os.Truncate(volume, volumeMiB<<20))
	socket := filepath.Join(dir, "channel")
	l, err := net.Listen("unix", socket)
	check(t, err)
	defer l.Close()
	cmd, err := command.New(context.Background(), "qemu-system-x86_64", "-machine", "q35", "-cpu", qemu.EmulatedCPU, "-m", "1024", "-bios", "qboot.rom",
		"-nodefaults", "-no-user-config", "-display", "none", "-action", "reboot=shutdown", "-serial", "stdio",
		"-kernel", filepath.Join(w.dir, "loader", bootimage.KernelFile), "-initrd", filepath.Join(w.dir, "loader", bootimage.InitramfsFile),
		"-append", "console=ttyS0 quiet panic=-1",
		"-fw_cfg", "name="+vmspec.FwCfgSettings+",file="+file("settings", settings), "-fw_cfg", "name="+vmspec.FwCfgToken+",file="+file("token", []byte(w.t1.Reveal())),
		"-netdev", "tap,id=n,ifname=tap0,script=no,downscript=no", "-device", "virtio-net-pci,netdev=n,romfile=,mac="+mac,
		"-device", "virtio-serial-pci", "-chardev", "socket,id=c,path="+socket, "-device", "virtserialport,chardev=c,name="+vmspec.ChannelPort,
		"-drive", "if=none,id=a,format=raw,readonly=on,file="+w.template.Image(), "-device", "virtio-blk-pci,drive=a",
		"-drive", "if=none,id=b,format=raw,file="+volume, "-device", "virtio-blk-pci,drive=b", "-device", "virtio-rng-pci")
	check(t, err)
	cmd.Stdout, cmd.Stderr = w.console, os.Stderr
	check(t, cmd.Start())
	t.Cleanup(func() { cmd.Process.Kill(); <-w.ended })
	go func() { cmd.Wait(); close(w.ended) }()
	conn, err := l.Accept()
	check(t, err)
	return conn
}

// consoleLog shows the VM's lines with the time, and keeps them.
type consoleLog struct {
	t     *testing.T
	began time.Time
	mu    sync.Mutex
	part  []byte // guarded by mu
	all   strings.Builder
}

func (c *consoleLog) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.part = append(c.part, p...)
	for {
		line, rest, ok := bytes.Cut(c.part, []byte("\n"))
		if !ok {
			return len(p), nil
		}
		c.part = bytes.Clone(rest)
		text := strings.TrimRight(string(line), "\r")
		c.all.WriteString(text + "\n")
		os.Stderr.WriteString(time.Since(c.began).Truncate(10*time.Millisecond).String() + " | " + text + "\n")
	}
}

func (c *consoleLog) text() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.all.String()
}

func answer(rw http.ResponseWriter, v any) { _ = json.NewEncoder(rw).Encode(v) }

func decode(r *http.Request, v any) error {
	data, err := io.ReadAll(r.Body)
	if err != nil {
		return err
	}
	return json.Unmarshal(data, v)
}
