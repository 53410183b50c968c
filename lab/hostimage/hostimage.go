// Package hostimage builds and boots a whole host as a provider in production has it, so
// that its measurements are those of real software and not a launcher's:
//
//	firmware   OVMF, with a TPM                          measures itself, its settings, the UKI
//	UKI        systemd-stub, Debian's cloud kernel,      the stub measures each section,
//	           an initramfs with a first process         the kernel the initramfs again
//	OS disk    erofs: foothold-host, kernel modules      IMA measures files before they run
//
// The first process (package init below) lets the foothold-host of the disk enrol and
// quote, runs it as the host's agent, asks that for a quote over its API, and hands out what
// came of it. The machine has no network. OVMF and the stub are
// taken from their packages without installing them.
//
// What such a host logs, by register, in the order of each (OVMF 2022.11, systemd 252,
// Linux 6.1; the test of this package prints it):
//
//	0    version, two firmware volumes (digests of what their data point to), separator
//	1    BootOrder and each Boot#### (the digest is of the variable alone), separator
//	2,3  separator
//	4    "Calling EFI Application from Boot Option", separator, the UKI, the kernel in it
//	5    separator, two events of leaving the boot services
//	6    separator
//	7    SecureBoot, PK, KEK, db, dbx, separator
//	9    the kernel's command line and the initramfs, by the kernel's own EFI stub
//	11   .linux, .osrel, .cmdline, .initrd: each section's name, then its content
//	     then the phases of the boot, by the first process in systemd's place
//	10   boot_aggregate over registers 0 to 9, then files, by IMA
//
// Registers 12 to 14 stay zero: a command line, credentials or extensions from outside
// the image would be there. The initramfs is a memory file system, which IMA's policy
// passes over; registers 4, 9 and 11 hold it.
package hostimage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"foothold/internal/bootimage"
	"foothold/internal/command"
	"foothold/internal/cpio"
	"foothold/internal/durable"
)

// Cmdline is the kernel's command line: what foothold's VMs have, and IMA's policy "tcb",
// which measures programs, libraries, modules, and what root reads.
const Cmdline = bootimage.GuestCmdline + " ima_policy=tcb"

// osRelease names the image for systemd-stub and boot menus.
const osRelease = "ID=foothold-host\nNAME=\"Foothold lab host\"\n"

// firstModules are in the initramfs: what the OS disk and the way out need.
var firstModules = []string{"virtio_pci", "virtio_blk", "virtio_console", "erofs"}

// Options of one image. Every path is a file.
type Options struct {
	CacheDir string
	Dir      string   // where the image goes
	Init     string   // lab/hostimage/init, static
	Agent    string   // foothold-host, static
	Modules  []string // of the OS disk, paths below the kernel's module folder, such as drivers/net/tun.ko
	Cmdline  string   // arguments after [Cmdline]
	Progress func(string)
}

// Image is a host's firmware and disks.
type Image struct {
	Firmware  string // OVMF's code
	Variables string // OVMF's empty variable store, to be copied
	ESP       string // folder of the EFI system partition's files
	Root      string // folder of the OS disk's files
	Disk      string // erofs, of Root
}

// UKI is the path of the unified kernel image.
func (i Image) UKI() string { return filepath.Join(i.ESP, "EFI", "BOOT", "BOOTX64.EFI") }

// Build makes an image. The same inputs give the same bytes.
func Build(ctx context.Context, o Options) (Image, error) {
	kernel, err := bootimage.FetchKernel(ctx, o.CacheDir, o.Progress)
	if err != nil {
		return Image{}, err
	}
	ovmf, err := bootimage.FetchTree(ctx, o.CacheDir, "ovmf", o.Progress)
	if err != nil {
		return Image{}, err
	}
	stub, err := bootimage.FetchTree(ctx, o.CacheDir, "systemd-boot-efi", o.Progress)
	if err != nil {
		return Image{}, err
	}
	image := Image{
		Firmware:  filepath.Join(ovmf, "usr/share/OVMF/OVMF_CODE_4M.fd"),
		Variables: filepath.Join(ovmf, "usr/share/OVMF/OVMF_VARS_4M.fd"),
		ESP:       filepath.Join(o.Dir, "esp"),
		Root:      filepath.Join(o.Dir, "os"),
		Disk:      filepath.Join(o.Dir, "os.erofs"),
	}
	if err := o.writeUKI(kernel, filepath.Join(stub, "usr/lib/systemd/boot/efi/linuxx64.efi.stub"), image.UKI()); err != nil {
		return Image{}, err
	}
	if err := o.writeRoot(kernel, image.Root); err != nil {
		return Image{}, fmt.Errorf("make OS disk: %w", err)
	}
	return image, command.Run(ctx, "mkfs.erofs", "--quiet", "-T0", "-U00000000-0000-4000-8000-000000000001", "--all-root", image.Disk, image.Root)
}

// writeUKI puts kernel, initramfs and command line behind the stub.
func (o *Options) writeUKI(kernel *bootimage.Kernel, stubFile, path string) error {
	stub, err := os.ReadFile(stubFile)
	if err != nil {
		return fmt.Errorf("read systemd-stub: %w", err)
	}
	linux, err := os.ReadFile(kernel.Image())
	if err != nil {
		return fmt.Errorf("read kernel: %w", err)
	}
	var initramfs strings.Builder
	spec := bootimage.Spec{Init: o.Init, Kernel: kernel, Modules: firstModules, Files: []cpio.Entry{{Name: "host", Mode: cpio.Dir | 0o755}}}
	if err := spec.Write(&initramfs); err != nil {
		return err
	}
	uki, err := bootimage.Unify(stub, []bootimage.Section{
		{Name: ".osrel", Data: []byte(osRelease)},
		{Name: ".cmdline", Data: []byte(strings.TrimSpace(Cmdline + " " + o.Cmdline))},
		{Name: ".linux", Data: linux},
		{Name: ".initrd", Data: []byte(initramfs.String())},
	})
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("make boot partition: %w", err)
	}
	return durable.WriteFile(path, uki, 0o644)
}

// writeRoot writes the OS disk's files.
func (o *Options) writeRoot(kernel *bootimage.Kernel, tree string) error {
	modules := filepath.Join(tree, "modules")
	err := errors.Join(os.Mkdir(tree, 0o755), os.Chmod(tree, 0o755), os.Mkdir(modules, 0o755), copyFile(filepath.Join(tree, "foothold-host"), o.Agent, 0o755))
	for _, name := range o.Modules {
		err = errors.Join(err, copyFile(filepath.Join(modules, filepath.Base(name)), filepath.Join(kernel.Modules(), "kernel", name), 0o644))
	}
	return errors.Join(err, writeAgent(tree))
}

func copyFile(to, from string, perm os.FileMode) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, data, perm)
}
