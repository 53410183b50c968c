//go:build system

package opener_test

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"foothold/internal/bootimage"
	"foothold/internal/command"
	"foothold/internal/cpio"
	"foothold/internal/luks"
	"foothold/internal/secret"
	"foothold/protocol/digest"
	"foothold/protocol/token"
	"foothold/protocol/unlockmsg"
	"foothold/provider/qemu"
)

// disks are a VM's two disks as they lie at the provider, and what the tenant knows of them.
type disks struct {
	t                *testing.T
	kernel           *bootimage.Kernel
	probe            string
	template, volume string
	templateKey      secret.Bytes
	volumeKey        secret.Bytes
	verity           unlockmsg.Verity
	content          digest.SHA256 // of the template's file
	size             int64         // of the template
}

const ownVolume = 32 << 20 // bytes

func newDisks(t *testing.T) *disks {
	m := newMachine(t)
	dir := t.TempDir()
	d := &disks{t: t, kernel: m.kernel, probe: filepath.Join(dir, "probe"), template: filepath.Join(dir, "template"), volume: filepath.Join(dir, "volume"),
		templateKey: luks.NewKey(), volumeKey: luks.NewKey()}
	build := exec.Command("go", "build", "-trimpath", "-o", d.probe, "./testdata/diskprobe")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build probe: %v\n%s", err, out)
	}
	root := filepath.Join(dir, "root")
	for _, name := range []string{"etc", "var", "home", "root", "srv", "tmp"} {
		if err := os.MkdirAll(filepath.Join(root, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	data := make([]byte, 4<<20)
	rand.Read(data)
	d.content = digest.Of(data)
	plain := filepath.Join(dir, "plain")
	err := errors.Join(os.WriteFile(filepath.Join(root, "data"), data, 0o644), command.Run(t.Context(), "mkfs.erofs", "--all-root", plain, root))
	if err != nil {
		t.Fatal(err)
	}
	d.seal(plain)
	d.encrypt(plain)
	if err := errors.Join(os.WriteFile(d.volume, nil, 0o600), os.Truncate(d.volume, ownVolume)); err != nil {
		t.Fatal(err)
	}
	return d
}

// seal appends the hash tree, as the build of a template does.
func (d *disks) seal(plain string) {
	info, err := os.Stat(plain)
	if err != nil {
		d.t.Fatal(err)
	}
	d.verity.HashOffset = (info.Size() + luks.SectorSize - 1) / luks.SectorSize * luks.SectorSize
	if err := os.Truncate(plain, d.verity.HashOffset); err != nil {
		d.t.Fatal(err)
	}
	n := func(v int64) string { data, _ := json.Marshal(v); return string(data) }
	out, err := command.Output(d.t.Context(), "veritysetup", "format", "--hash=sha256", "--data-block-size=4096", "--hash-block-size=4096",
		"--data-blocks="+n(d.verity.HashOffset/luks.SectorSize), "--hash-offset="+n(d.verity.HashOffset), plain, plain)
	if err != nil {
		d.t.Fatal(err)
	}
	_, text, _ := strings.Cut(string(out), "Root hash:")
	text, _, _ = strings.Cut(strings.TrimSpace(text), "\n")
	if d.verity.RootHash, err = digest.Parse(text); err != nil {
		d.t.Fatal(err)
	}
}

func (d *disks) encrypt(plain string) {
	data, err := os.ReadFile(plain)
	if err != nil {
		d.t.Fatal(err)
	}
	data = append(data, make([]byte, -len(data)&(luks.SectorSize-1))...)
	d.size = int64(len(data))
	var out bytes.Buffer
	if _, err := luks.Encrypt(&out, bytes.NewReader(data), d.templateKey); err != nil {
		d.t.Fatal(err)
	}
	if err := os.WriteFile(d.template, out.Bytes(), 0o600); err != nil {
		d.t.Fatal(err)
	}
}

// start has a VM open the disks by an order, and returns the console.
func (d *disks) start(what string, bend func(*unlockmsg.Handover), template, volume string) string {
	d.t.Helper()
	disk := func(device string, size int64, key secret.Bytes) unlockmsg.Disk {
		pass := secret.Random(32)
		header, err := luks.Header(d.t.Context(), size, key, pass)
		if err != nil {
			d.t.Fatal(err)
		}
		return unlockmsg.Disk{Device: device, Header: header, Passphrase: pass}
	}
	h := unlockmsg.Handover{Template: disk("vda", d.size, d.templateKey), Volume: disk("vdb", ownVolume, d.volumeKey), Verity: d.verity, T3: token.New(token.T3)}
	bend(&h)
	order, err := json.Marshal(h)
	if err != nil {
		d.t.Fatal(err)
	}
	spec := bootimage.Spec{Init: d.probe, Kernel: d.kernel, Modules: []string{"virtio_pci", "virtio_blk", "xts", "dm_crypt", "dm_verity", "erofs", "overlay", "ext4"},
		Root: "/", Programs: []string{"/usr/sbin/mkfs.ext4"}, Copies: []string{"/etc/mke2fs.conf"}, Files: []cpio.Entry{cpio.File("order.json", 0o600, order)}}
	initrd := filepath.Join(d.t.TempDir(), "initramfs")
	f, err := os.Create(initrd)
	if err != nil {
		d.t.Fatal(err)
	}
	if err := errors.Join(spec.Write(f), f.Close()); err != nil {
		d.t.Fatal(err)
	}
	cmd, err := command.New(d.t.Context(), "qemu-system-x86_64", "-machine", "q35", "-cpu", qemu.EmulatedCPU, "-m", "512", "-bios", "qboot.rom",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", d.kernel.Image(), "-initrd", initrd,
		"-append", "console=ttyS0 loglevel=4 panic=-1 no_timer_check",
		"-drive", "if=none,id=a,format=raw,readonly=on,file="+template, "-device", "virtio-blk-pci,drive=a",
		"-drive", "if=none,id=b,format=raw,file="+volume, "-device", "virtio-blk-pci,drive=b")
	if err != nil {
		d.t.Fatal(err)
	}
	out, err := command.Wait(cmd)
	if err != nil {
		d.t.Fatalf("qemu: %v", err)
	}
	console := strings.ReplaceAll(string(out), "\r", "")
	d.t.Logf("%s:\n%s", what, console)
	if !strings.Contains(console, "PROBE done\n") {
		d.t.Fatal("the probe did not come to its end")
	}
	return console
}

// altered is a copy of a disk with one bit flipped.
func (d *disks) altered(path string, at int64) string {
	d.t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		d.t.Fatal(err)
	}
	data[at] ^= 1
	copied := filepath.Join(d.t.TempDir(), "altered")
	if err := os.WriteFile(copied, data, 0o600); err != nil {
		d.t.Fatal(err)
	}
	return copied
}

// TestOtherDisksAreNotOpened: a VM's first process opens its own two disks, and neither a
// template that was altered, nor one with another root hash than the tenant's, nor the
// volume of another VM.
func TestOtherDisksAreNotOpened(t *testing.T) {
	d := newDisks(t)
	asOrdered := func(*unlockmsg.Handover) {}
	good := "PROBE read " + d.content.String() + "\n"
	if console := d.start("first start", func(h *unlockmsg.Handover) { h.Volume.Format = true }, d.template, d.volume); !strings.Contains(console, good) {
		t.Fatal("the right disks do not open")
	}
	if console := d.start("next start", asOrdered, d.template, d.volume); !strings.Contains(console, good) {
		t.Fatal("the right disks do not open again")
	}
	for what, c := range map[string]struct {
		bend     func(*unlockmsg.Handover)
		template string
		want     string
	}{
		"another root hash": {func(h *unlockmsg.Handover) { h.Verity.RootHash[0] ^= 1 }, d.template, "PROBE refused disk-refused: "},
		"altered template":  {asOrdered, d.altered(d.template, d.verity.HashOffset/2), "PROBE unreadable: "},
		"altered tree":      {asOrdered, d.altered(d.template, d.verity.HashOffset+2*luks.SectorSize), "PROBE refused disk-refused: "},
		"altered beginning": {asOrdered, d.altered(d.template, 1030), "PROBE refused disk-refused: "},
		"volume of another VM": {func(h *unlockmsg.Handover) {
			pass := secret.Random(32)
			header, err := luks.Header(t.Context(), ownVolume, luks.NewKey(), pass)
			if err != nil {
				t.Fatal(err)
			}
			h.Volume.Header, h.Volume.Passphrase = header, pass
		}, d.template, "PROBE refused disk-refused: "},
		"disks swapped": {func(h *unlockmsg.Handover) {
			h.Template.Header, h.Volume.Header = h.Volume.Header, h.Template.Header
			h.Template.Passphrase, h.Volume.Passphrase = h.Volume.Passphrase, h.Template.Passphrase
		}, d.template, "PROBE refused disk-refused: "},
	} {
		if console := d.start(what, c.bend, c.template, d.volume); !strings.Contains(console, c.want) || strings.Contains(console, good) {
			t.Errorf("%s: want %q", what, c.want)
		}
	}
}
