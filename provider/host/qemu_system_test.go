//go:build system

package host

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"foothold/internal/bootimage"
	"foothold/internal/command"
	"foothold/internal/nstest"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/hostapi"
	"foothold/protocol/inventory"
	"foothold/protocol/pcr"
	"foothold/protocol/vmspec"
	"foothold/provider/qemu"

	"github.com/vishvananda/netlink"
)

// prepare downloads the kernel before the namespace is entered, where apt cannot
// leave root's privileges.
func prepare() {
	if _, err := fetchKernel(context.Background(), nil); err != nil {
		fmt.Fprintln(os.Stderr, "fetch kernel:", err)
	}
}

func fetchKernel(ctx context.Context, progress func(string)) (*bootimage.Kernel, error) {
	cache := os.Getenv("FOOTHOLD_CACHE")
	if cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			return nil, err
		}
		cache = filepath.Join(dir, "foothold")
	}
	return bootimage.FetchKernel(ctx, cache, progress)
}

// buildImage makes a loader image whose first process is the probe.
func buildImage(t *testing.T) (kernelFile, initramfs string) {
	t.Helper()
	kernel, err := fetchKernel(t.Context(), func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	probe := filepath.Join(t.TempDir(), "probe")
	cmd := exec.Command("go", "build", "-trimpath", "-o", probe, "./testdata/probe")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build probe: %v\n%s", err, out)
	}
	path := filepath.Join(t.TempDir(), "initramfs")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// A loader's image, and disks and panics, which the loader itself has no business with.
	spec := bootimage.Spec{Init: probe, Kernel: kernel, Modules: []string{"virtio_pci", "virtio_net", "virtio_console", "qemu_fw_cfg", "virtio_blk", "pvpanic_pci"}}
	if err := spec.Write(f); err != nil {
		t.Fatal(err)
	}
	return kernel.Image(), path
}

// makeBridge makes the cloud network, and behind a port of it its gateway, a machine
// of its own: the host has no address there. It listens on the gateway's port 80.
func makeBridge(t *testing.T) net.Listener {
	t.Helper()
	br := &netlink.Bridge{LinkAttrs: netlink.NewLinkAttrs()}
	br.Name = "cloud0"
	if err := netlink.LinkAdd(br); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(br) })
	gateway := nstest.New(t)
	nstest.Link(t, nstest.End{Place: nstest.Here(t), Name: "uplink0"}, nstest.End{Place: gateway, Name: "vpc0", Address: "10.82.0.1/24"})
	uplink, err := netlink.LinkByName("uplink0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(uplink) })
	if err := netlink.LinkSetMaster(uplink, br); err != nil {
		t.Fatal(err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range []netlink.Link{br, lo} {
		if err := netlink.LinkSetUp(l); err != nil {
			t.Fatal(err)
		}
	}
	var l net.Listener
	gateway.Do(t, func() (err error) { l, err = net.Listen("tcp", "10.82.0.1:80"); return err })
	t.Cleanup(func() { l.Close() })
	return l
}

func realWorld(t *testing.T) *world {
	kernel, initramfs := buildImage(t)
	gateway := makeBridge(t)
	w := newWorld(t, func(c *Config, entry inventory.Host) {
		path, err := command.Find("qemu-system-x86_64")
		if err != nil {
			t.Fatal(err)
		}
		c.QEMU, c.BIOS, c.LoaderKernel, c.LoaderInitramfs = path, "/usr/share/qemu/qboot.rom", kernel, initramfs
		c.QEMUModule = filepath.Join(qemu.ModuleDir, qemu.TCGModule)
		c.LoaderCmdline = fmt.Sprintf(bootimage.LoaderCmdline+" probe.session=%s probe.aik=%s", encodeKey(entry.Session), encodeKey(entry.AIK))
	})
	w.gateway = gateway
	return w
}

func encodeKey(public []byte) string { return base64.RawURLEncoding.EncodeToString(public) }

// start creates and starts a VM.
func (c *client) start(req hostapi.CreateRequest) string {
	c.t.Helper()
	c.ok("POST", "/v1/vms", req, nil)
	path := "/v1/vms/" + req.Spec.Reservation
	var vm hostapi.VM
	c.ok("POST", path+"/start", nil, &vm)
	if vm.State != hostapi.Running {
		c.t.Fatalf("started: %+v", vm)
	}
	return path
}

// await waits until the VM has reached a state or stage.
func (c *client) await(path, want string) hostapi.VM {
	c.t.Helper()
	var vm hostapi.VM
	for range 3 {
		if c.ok("GET", path+"?wait="+want, nil, &vm); reached(vm, want) {
			return vm
		}
	}
	_, console := c.call("GET", path+"/console", nil)
	c.t.Fatalf("%s is not reached: %+v\n%s", want, vm, console)
	return vm
}

func (c *client) console(path string) string {
	c.t.Helper()
	_, data := c.call("GET", path+"/console", nil)
	return strings.ReplaceAll(string(data), "\r", "")
}

func TestVMBootsQuotesAndConnects(t *testing.T) {
	w := realWorld(t)
	connected := make(chan string, 1)
	go func() {
		conn, err := w.gateway.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		connected <- conn.RemoteAddr().(*net.TCPAddr).IP.String()
	}()
	w.run()
	c := w.client("acme-orchestrator")
	c.putTemplate()
	req := request("good", 1)
	began := time.Now()
	path := c.start(req)
	t.Logf("started in %s", time.Since(began))
	vm := c.await(path, hostapi.Delivered)
	t.Logf("delivered after %s, TPM held for %s", time.Since(began), vm.TPMHeld)
	if vm.State != hostapi.Running || vm.TPMHeld <= 0 {
		t.Fatalf("%+v\n%s", vm, c.console(path))
	}
	select {
	case from := <-connected:
		if from != "10.82.0.10" {
			t.Errorf("the VM calls from %s", from)
		}
	case <-time.After(30 * time.Second):
		t.Errorf("the VM does not reach its gateway")
	}
	console := c.console(path)
	events := append(vmspec.Measurements(vm.Firmware, req.Spec.Digest()), pcr.Event{PCR: pcr.Tunnel, Digest: digest.Of([]byte("tunnel"))})
	var platform struct {
		Log []pcr.Event `json:"log"`
	}
	c.ok("GET", "/v1/platform", nil, &platform)
	want := pcr.Composite(pcr.BootSelection(), pcr.Replay(append(platform.Log, events...)))
	if !strings.Contains(console, fmt.Sprintf("PROBE quote %s\n", want)) {
		t.Errorf("the quote is not over the predicted registers %s:\n%s", want, console)
	}
	checkProcess(t, w, req)
	c.refused("DELETE", "/v1/volumes/"+req.Spec.Volume.ID, nil, "in-use")
	second := request("second", 1)
	second.Spec.Volume = req.Spec.Volume
	c.ok("POST", "/v1/vms", second, nil)
	c.refused("POST", "/v1/vms/"+second.Spec.Reservation+"/start", nil, "in-use")

	c.ok("DELETE", path, nil, &vm)
	if vm.State != hostapi.Stopped || vm.Dropped != (hostapi.Dropped{}) {
		t.Errorf("destroyed as %+v", vm)
	}
	if links := taps(t); len(links) != 0 {
		t.Errorf("taps %v are left", links)
	}
	volume, err := os.ReadFile(w.conf.State + "/volumes/acme/" + req.Spec.Volume.ID + ".img")
	if err != nil || !bytes.HasPrefix(volume, []byte("written")) {
		t.Errorf("the volume lost what the VM wrote: %v", err)
	}
}

// checkProcess looks at QEMU from outside: no secret among its arguments, no TPM.
func checkProcess(t *testing.T, w *world, req hostapi.CreateRequest) {
	t.Helper()
	if n := running(t, req.Spec.Network.MAC); n != 1 {
		t.Errorf("%d QEMU processes run this VM", n)
	}
	lines, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, line := range lines {
		data, err := os.ReadFile(line)
		if err != nil || !bytes.HasPrefix(data, []byte("qemu-system-x86_64\x00-L")) || !bytes.Contains(data, []byte(req.Spec.Network.MAC)) {
			continue
		}
		if bytes.Contains(data, []byte(req.Token.Reveal())) || bytes.Contains(data, []byte("tpm")) {
			t.Errorf("QEMU's arguments hold T1 or a TPM")
		}
		status, err := os.ReadFile(filepath.Dir(line) + "/status")
		if err != nil || !strings.Contains(string(status), "Seccomp:\t2") || !strings.Contains(string(status), "NoNewPrivs:\t1") {
			t.Errorf("QEMU is not sandboxed (%v)", err)
		}
	}
}

func taps(t *testing.T) (names []string) {
	t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		if strings.HasPrefix(l.Attrs().Name, "fh-") {
			names = append(names, l.Attrs().Name)
		}
	}
	return names
}

// TestVMCannotSpoofItsAddress lets a VM that behaves otherwise change its MAC address. What
// it sends is dropped and counted, while it runs, at its end and with its destruction.
func TestVMCannotSpoofItsAddress(t *testing.T) {
	w := realWorld(t)
	connected := make(chan struct{})
	go func() {
		if conn, err := w.gateway.Accept(); err == nil {
			conn.Close()
			close(connected)
		}
	}()
	w.run()
	c := w.client("acme-orchestrator")
	c.putTemplate()
	path := c.start(request("spoofing", 1))
	for end := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		var vm hostapi.VM
		c.ok("GET", path, nil, &vm)
		if vm.State == hostapi.Running && vm.Dropped.OtherSource > 0 {
			break
		}
		if vm.State == hostapi.Stopped || time.Now().After(end) {
			t.Fatalf("while it runs nothing is counted: %+v\n%s", vm, c.console(path))
		}
	}
	if vm := c.await(path, hostapi.Stopped); !strings.Contains(c.console(path), "PROBE failed: dial") {
		t.Errorf("%+v\n%s", vm, c.console(path))
	} else if vm.Dropped.OtherSource == 0 || vm.Dropped.Neighbour != 0 {
		t.Errorf("counted as %+v", vm.Dropped)
	}
	select {
	case <-connected:
		t.Error("frames of a spoofed address passed")
	default:
	}
	var list []hostapi.VM
	c.ok("GET", "/v1/vms", nil, &list)
	var last hostapi.VM
	c.ok("DELETE", path, nil, &last)
	if len(list) != 1 || list[0].Dropped.OtherSource == 0 || last != list[0] {
		t.Errorf("listed as %+v, destroyed as %+v", list, last)
	}
}

func TestVMsThatMisbehaveAreStopped(t *testing.T) {
	w := realWorld(t)
	w.conf.BootTimeout = "20s"
	w.run()
	c := w.client("acme-orchestrator")
	c.putTemplate()
	for i, try := range []struct{ name, reason string }{
		{"unasked", "channel-misuse"},
		{"talkative", "channel-misuse"},
		{"shutdown", "vm-stopped"},
		{"reset", "vm-stopped"},
		{"silent", "deadline-passed"},
	} {
		req := request(try.name, 1)
		req.Spec.Network.Address = netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 82, 0, byte(20 + i)}), 24)
		path := c.start(req)
		vm := c.await(path, hostapi.Stopped)
		if string(vm.Reason) != try.reason || vm.Ended.IsZero() {
			t.Errorf("%s: %+v\n%s", try.name, vm, c.console(path))
		}
		if links := taps(t); len(links) != 0 {
			t.Errorf("%s: taps %v are left", try.name, links)
		}
		again := request(try.name, 2)
		c.ok("POST", "/v1/vms", again, nil)
		c.ok("DELETE", path, nil, nil)
	}
}

// TestAVMsOwnEnd: what a delivered system does to its own VM ends it at once, and the
// host tells which it was.
func TestAVMsOwnEnd(t *testing.T) {
	w := realWorld(t)
	w.run()
	c := w.client("acme-orchestrator")
	c.putTemplate()
	for name, reason := range map[string]event.Reason{"powers-off": event.GuestPoweredOff, "reboots": event.GuestReset, "crashes": event.GuestCrashed} {
		req := request(name, 1)
		path := c.start(req)
		vm := c.await(path, hostapi.Stopped)
		if vm.Reason != reason || vm.Boot != hostapi.Delivered || vm.Ended.IsZero() {
			t.Errorf("%s: %+v\n%s", name, vm, c.console(path))
		}
		if n := running(t, req.Spec.Network.MAC); n != 0 {
			t.Errorf("%s: %d QEMU processes are left", name, n)
		}
		c.ok("DELETE", path, nil, nil)
	}
}
