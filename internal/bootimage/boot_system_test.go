//go:build system

package bootimage

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/internal/command"
)

// cacheDir holds what the network gave, over many runs.
func cacheDir(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("FOOTHOLD_CACHE"); dir != "" {
		return dir
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "foothold")
}

func buildProbe(t *testing.T) string {
	t.Helper()
	probe := filepath.Join(t.TempDir(), "probe")
	cmd := exec.Command("go", "build", "-trimpath", "-o", probe, "./testdata/probe")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build probe: %v\n%s", err, out)
	}
	return probe
}

// boot runs an image until it powers off and returns the console.
func boot(t *testing.T, img Image) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd, err := command.New(ctx, "qemu-system-x86_64", "-machine", "q35", "-cpu", "max", "-m", "512", "-bios", "qboot.rom",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-kernel", img.Kernel.Path, "-initrd", img.Initramfs.Path, "-append", "console=ttyS0 quiet panic=-1",
		"-fw_cfg", "name=opt/foothold/probe,string=hello",
		"-netdev", "user,id=n,restrict=on", "-device", "virtio-net-pci,netdev=n,romfile=",
		"-device", "virtio-serial-pci", "-chardev", "null,id=c", "-device", "virtserialport,chardev=c,name=foothold.channel.0")
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	out, err := command.Wait(cmd)
	if err != nil {
		t.Fatalf("qemu: %v", err)
	}
	console := strings.ReplaceAll(string(out), "\r", "")
	t.Logf("%.1f s\n%s", time.Since(start).Seconds(), console)
	if !strings.Contains(console, "PROBE good\n") {
		t.Fatal("the probe did not finish well")
	}
	return console
}

func TestLoaderImageBoots(t *testing.T) {
	k, err := FetchKernel(t.Context(), cacheDir(t), func(s string) { t.Log(s) })
	if err != nil {
		t.Fatal(err)
	}
	probe := buildProbe(t)
	img, err := BuildLoader(k, probe, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("kernel %s, %d bytes; initramfs %d bytes", img.Release, img.Kernel.Size, img.Initramfs.Size)
	console := boot(t, img)
	for _, want := range []string{"module virtio_pci", "module qemu_fw_cfg", "fw_cfg hello", "port foothold.channel.0", "network"} {
		if !strings.Contains(console, "PROBE "+want+"\n") {
			t.Errorf("console lacks %q", want)
		}
	}
	again, err := BuildLoader(k, probe, t.TempDir())
	if err != nil || again.Initramfs.SHA256 != img.Initramfs.SHA256 {
		t.Errorf("built twice, the initramfs differs (%v)", err)
	}
}

func TestModuleClosureIsOrdered(t *testing.T) {
	k, err := FetchKernel(t.Context(), cacheDir(t), nil)
	if err != nil {
		t.Fatal(err)
	}
	index, err := indexModules(k)
	if err != nil {
		t.Fatal(err)
	}
	list, builtin, err := index.closure(guestModules, guestOnDemand)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(builtin, "ext4") {
		t.Errorf("ext4 is built into this kernel, but the list says %v", builtin)
	}
	seen := map[string]bool{}
	for _, m := range list {
		for _, need := range m.Needs {
			if !seen[need] {
				t.Errorf("%s comes before %s, which it needs", m.Name, need)
			}
		}
		seen[m.Name] = true
	}
	if !seen["dm_mod"] || !seen["ecb"] {
		t.Error("the closure lacks dm_mod (hard need) or ecb (soft need of xts)")
	}
	if _, _, err := index.closure([]string{"nosuch"}, nil); err == nil {
		t.Error("a module that the kernel lacks is no error")
	}
	var a, b bytes.Buffer
	spec := Spec{Init: buildProbe(t), Kernel: k, Modules: guestModules}
	if err := spec.Write(&a); err != nil {
		t.Fatal(err)
	}
	if err := spec.Write(&b); err != nil || !bytes.Equal(a.Bytes(), b.Bytes()) {
		t.Errorf("written twice, the initramfs differs (%v)", err)
	}
}
