//go:build system

package opener_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"foothold/internal/bootimage"
	"foothold/internal/command"
	"foothold/internal/cpio"
	"foothold/internal/luks"
	"foothold/internal/secret"
	"foothold/protocol/audit"
	"foothold/protocol/digest"
	"foothold/protocol/unlockmsg"
	"foothold/provider/qemu"
	"foothold/tenant/expect"
)

const volumeSize = 136 << 20 // bytes: more than one group of ext4

// machine is a VM that opens one volume, start after start.
type machine struct {
	t            *testing.T
	kernel       *bootimage.Kernel
	probe, image string
	key          secret.Bytes
}

func newMachine(t *testing.T) *machine {
	cache := os.Getenv("FOOTHOLD_CACHE")
	if cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			t.Fatal(err)
		}
		cache = filepath.Join(dir, "foothold")
	}
	kernel, err := bootimage.FetchKernel(t.Context(), cache, nil)
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, kernel: kernel, probe: filepath.Join(t.TempDir(), "probe"), image: filepath.Join(t.TempDir(), "volume"), key: luks.NewKey()}
	build := exec.Command("go", "build", "-trimpath", "-o", m.probe, "./testdata/volumeprobe")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build probe: %v\n%s", err, out)
	}
	if err := os.WriteFile(m.image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(m.image, volumeSize); err != nil {
		t.Fatal(err)
	}
	return m
}

// start boots the probe with a fresh header around the same key and returns the console.
func (m *machine) start(what string, disk unlockmsg.Disk) string {
	m.t.Helper()
	disk.Device, disk.Passphrase = "vdb", secret.Random(32)
	var err error
	if disk.Header, err = luks.Header(m.t.Context(), volumeSize, m.key, disk.Passphrase); err != nil {
		m.t.Fatal(err)
	}
	order, err := json.Marshal(disk)
	if err != nil {
		m.t.Fatal(err)
	}
	spec := bootimage.Spec{Init: m.probe, Kernel: m.kernel, Modules: []string{"virtio_pci", "virtio_blk", "xts", "dm_crypt", "dm_integrity", "authenc", "brd", "ext4"},
		Root: "/", Programs: []string{"/usr/sbin/mkfs.ext4"}, Copies: []string{"/etc/mke2fs.conf"}, Files: []cpio.Entry{cpio.File("disk.json", 0o600, order)}}
	initrd := filepath.Join(m.t.TempDir(), "initramfs")
	f, err := os.Create(initrd)
	if err != nil {
		m.t.Fatal(err)
	}
	if err := spec.Write(f); err != nil {
		m.t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		m.t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(m.t.Context(), 3*time.Minute)
	defer cancel()
	cmd, err := command.New(ctx, "qemu-system-x86_64", "-machine", "q35", "-cpu", qemu.EmulatedCPU, "-m", "512", "-bios", "qboot.rom",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", m.kernel.Image(), "-initrd", initrd,
		"-append", "console=ttyS0 loglevel=4 panic=-1 no_timer_check probe="+what,
		"-drive", "if=none,id=a,format=raw,readonly=on,file="+m.probe, "-device", "virtio-blk-pci,drive=a",
		"-drive", "if=none,id=b,format=raw,file="+m.image, "-device", "virtio-blk-pci,drive=b")
	if err != nil {
		m.t.Fatal(err)
	}
	begin := time.Now()
	out, err := command.Wait(cmd)
	if err != nil {
		m.t.Fatalf("qemu: %v", err)
	}
	console := strings.ReplaceAll(string(out), "\r", "")
	m.t.Logf("%s: %.1f s\n%s", what, time.Since(begin).Seconds(), console)
	if !strings.Contains(console, "PROBE done\n") {
		m.t.Fatal("the probe did not come to its end")
	}
	return console
}

// spoil flips one bit in every block of a part of the volume, as its provider could.
func (m *machine) spoil(from, to int64) {
	m.t.Helper()
	f, err := os.OpenFile(m.image, os.O_RDWR, 0)
	if err != nil {
		m.t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1)
	for at := from; at < to; at += 4096 {
		if _, err := f.ReadAt(b, at); err != nil {
			m.t.Fatal(err)
		}
		b[0] ^= 1
		if _, err := f.WriteAt(b, at); err != nil {
			m.t.Fatal(err)
		}
	}
}

// result is what the probe read: pieces that are good, that are noise, that are errors.
func result(t *testing.T, console string) (good, noise, refused int) {
	t.Helper()
	_, text, ok := strings.Cut(console, "PROBE read ")
	if !ok {
		t.Fatal("the probe read nothing")
	}
	if _, err := fmt.Sscanf(text, "good=%d noise=%d refused=%d", &good, &noise, &refused); err != nil {
		t.Fatal(err)
	}
	return good, noise, refused
}

// TestAuthenticatedVolume: a volume with tags is made, filled and opened again under
// another header, without one block that cannot be read; what its provider altered
// afterwards is an error to who reads it, and never noise.
func TestAuthenticatedVolume(t *testing.T) {
	m := newMachine(t)
	first := m.start("fill", unlockmsg.Disk{Format: true, Authenticated: true})
	if strings.Contains(first, "ERROR") || strings.Contains(first, "PROBE failed") {
		t.Error("making and filling it meets errors")
	}
	judged(t, first)
	again := m.start("read", unlockmsg.Disk{Authenticated: true})
	good, noise, refused := result(t, again)
	if good == 0 || noise != 0 || refused != 0 || strings.Contains(again, "ERROR") {
		t.Errorf("unspoilt: %d good, %d noise, %d refused", good, noise, refused)
	}
	// Twice what the journal holds: a start writes that to its place once more.
	m.spoil(volumeSize/4, volumeSize/4+16<<20)
	good, noise, refused = result(t, m.start("read", unlockmsg.Disk{Authenticated: true}))
	if good == 0 || noise != 0 || refused < 100 {
		t.Errorf("spoilt: %d good, %d noise, %d refused", good, noise, refused)
	}
	if console := m.start("read", unlockmsg.Disk{}); !strings.Contains(console, "PROBE failed: mount: ") {
		t.Error("it opens without its tags")
	}
}

// judged holds the report of the opened volume against what the tenant expects of it.
func judged(t *testing.T, console string) {
	t.Helper()
	_, text, _ := strings.Cut(console, "PROBE disks ")
	text, _, _ = strings.Cut(text, "\n")
	r := audit.Report{Stage: audit.OS}
	if err := json.Unmarshal([]byte(text), &r.Disks); err != nil {
		t.Fatalf("disks %q: %v", text, err)
	}
	for _, f := range expect.OS(expect.Template{AuthenticatedVolume: true}, expect.Instance{VolumeSize: volumeSize, RootHash: digest.Of(nil)}, r) {
		if f.Check == "disk" && !strings.Contains(f.Detail, "template") && !strings.Contains(f.Detail, "vda") {
			t.Errorf("audit: %s", f)
		}
	}
}
