package bootimage

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"foothold/internal/durable"
	"foothold/protocol/digest"
)

// loaderModules are what foothold-loader needs: network, the local channel to the
// host, and fw_cfg.
var loaderModules = []string{"virtio_pci", "virtio_net", "virtio_console", "qemu_fw_cfg"}

// guestModules are what foothold-guest needs, in the order of its steps: network
// and its own filter; disks, encryption and verity; the OS's root; the tunnel; telling
// the host of a panic. The kernel would ask modprobe for algorithms, which an
// initramfs lacks, so they are named.
var guestModules = []string{
	"virtio_pci", "virtio_net", "nf_tables", "nft_ct", "nft_limit", "nft_reject_inet", "nft_log",
	"virtio_blk", "aesni_intel", "xts", "sha256_ssse3", "dm_crypt", "dm_verity",
	"erofs", "overlay", "ext4", "wireguard", "pvpanic_pci",
}

// guestOnDemand drives the local channel to the host, which is the loader's: the agent
// loads it for its last word, when it gives up, so that a VM that computes has no such port.
var guestOnDemand = []string{"virtio_console"}

// authenticatedModules are what a VM with an authenticated volume needs besides: tags
// beside its sectors, the algorithm that makes them, and a RAM disk for what nothing
// authenticates.
var authenticatedModules = []string{"dm_integrity", "authenc", "brd"}

// Kernel command lines. The console is the VM's output-only serial port; a panic
// ends the VM; only the kernel's own entropy sources and clocks are used. The timer
// check counts ticks against a busy loop, which an emulator on a busy machine gets
// wrong: the kernel then finds an "8254 timer not connected" and hangs. On KVM the
// kernel leaves the check out by itself (arch/x86/kernel/kvm.c).
const (
	LoaderCmdline = "console=ttyS0 quiet panic=-1 no_timer_check"
	GuestCmdline  = "console=ttyS0 quiet panic=-1 no_timer_check"
)

// cpuFlags are the CPU flags that some modules are for. Without SHA instructions the
// vector code of sha256_ssse3 is what dm-verity would use, and under emulation (TCG)
// that is five times slower than the kernel's plain code: 20 MiB in 3.9 s, not 1.4 s.
var cpuFlags = map[string]string{"sha256_ssse3": "sha_ni", "aesni_intel": "aes"}

// parameters are what some modules are loaded with: one RAM disk of one block of 4 KiB,
// which package devmapper fills and the tenant's audit expects. By default brd makes 16 of
// 16 MiB.
var parameters = map[string][]string{"brd": {"rd_nr=1", "rd_size=4"}}

// GuestModules lists the modules of the guest image by name, without those that
// they need: the agent loads no other.
func GuestModules() []string { return slices.Clone(guestModules) }

// guestPrograms are the programs of the guest image, from the template's tree. The
// agent opens disks itself.
var guestPrograms = []string{"/usr/sbin/mkfs.ext4"}

// guestCopies are files that guestPrograms read: without this one mkfs.ext4 leaves
// out the features that make the file system ext4.
var guestCopies = []string{"/etc/mke2fs.conf"}

// File names of an image in its folder.
const (
	KernelFile    = "kernel"
	InitramfsFile = "initramfs"
)

// Part is one file of an image.
type Part struct {
	Path   string        `json:"-"`
	SHA256 digest.SHA256 `json:"sha256"`
	Size   int64         `json:"size"`
}

// Image is a bootable pair in a folder.
type Image struct {
	Release   string // of the kernel
	Kernel    Part
	Initramfs Part
}

// BuildLoader writes the provider's loader image into dir: KernelFile and
// InitramfsFile, each replaced whole. init is the path of foothold-loader.
func BuildLoader(k *Kernel, init, dir string) (Image, error) {
	return build(dir, Spec{Init: init, Kernel: k, Modules: loaderModules}, 0o644)
}

// BuildGuest writes the tenant's guest image into dir. init is the path of
// foothold-guest, root the unpacked tree of the template, which the programs for
// disks are taken from. The agent loads all modules before the first audit, so those for
// authenticated volumes are in the images of such templates alone.
func BuildGuest(k *Kernel, init, root, dir string, authenticatedVolume bool) (Image, error) {
	modules := GuestModules()
	if authenticatedVolume {
		modules = append(modules, authenticatedModules...)
	}
	return build(dir, Spec{Init: init, Kernel: k, Modules: modules, OnDemand: guestOnDemand, Root: root, Programs: guestPrograms, Copies: guestCopies}, 0o644)
}

// build writes an image, its initramfs with the mode perm.
func build(dir string, spec Spec, perm os.FileMode) (Image, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return Image{}, fmt.Errorf("make image folder: %w", err)
	}
	kernel, err := os.ReadFile(spec.Kernel.Image())
	if err != nil {
		return Image{}, fmt.Errorf("read kernel: %w", err)
	}
	img := Image{Release: spec.Kernel.Release, Kernel: Part{Path: filepath.Join(dir, KernelFile)}, Initramfs: Part{Path: filepath.Join(dir, InitramfsFile)}}
	if err := durable.WriteFile(img.Kernel.Path, kernel, 0o644); err != nil {
		return Image{}, err
	}
	if err := durable.Write(img.Initramfs.Path, perm, func(f *os.File) error { return spec.Write(f) }); err != nil {
		return Image{}, err
	}
	for _, part := range []*Part{&img.Kernel, &img.Initramfs} {
		info, err := os.Stat(part.Path)
		if err != nil {
			return Image{}, fmt.Errorf("look at image: %w", err)
		}
		part.Size = info.Size()
		if part.SHA256, err = durable.Digest(part.Path); err != nil {
			return Image{}, err
		}
	}
	return img, nil
}
