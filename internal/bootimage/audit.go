package bootimage

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"foothold/internal/cpio"
	"foothold/internal/durable"
)

// AuditFile is the medium of a host audit as one program of EFI's; KernelFile and
// InitramfsFile beside it are the same for other boot loaders.
const AuditFile = "audit.efi"

// AuditCmdline ends on the serial console, where the report is read.
const AuditCmdline = "console=tty0 console=ttyS0,115200 quiet panic=-1 no_timer_check"

// BuildAudit writes a host audit's medium into dir. init is the path of foothold-audit;
// medium, with the key in it, lies at path in the initramfs. The files are their owner's
// alone. Debian's cloud kernel has TPM drivers, serial line and screen built in; the image
// lies in memory whole, so no other driver is needed.
func BuildAudit(ctx context.Context, k *Kernel, init, path string, medium []byte, cacheDir, dir string, progress func(string)) (Image, error) {
	spec := Spec{Init: init, Kernel: k, Files: []cpio.Entry{cpio.File(strings.TrimPrefix(path, "/"), 0o400, medium)}}
	img, err := build(dir, spec, 0o600)
	if err != nil {
		return img, err
	}
	tree, err := FetchTree(ctx, cacheDir, "systemd-boot-efi", progress)
	if err != nil {
		return img, err
	}
	var parts [3][]byte
	for i, file := range []string{filepath.Join(tree, "usr/lib/systemd/boot/efi/linuxx64.efi.stub"), img.Kernel.Path, img.Initramfs.Path} {
		if parts[i], err = os.ReadFile(file); err != nil {
			return img, fmt.Errorf("make audit medium: %w", err)
		}
	}
	uki, err := Unify(parts[0], []Section{{".osrel", []byte("ID=foothold-audit\nNAME=\"Foothold host audit\"\n")},
		{".cmdline", []byte(AuditCmdline)}, {".linux", parts[1]}, {".initrd", parts[2]}})
	if err != nil {
		return img, err
	}
	return img, durable.WriteFile(filepath.Join(dir, AuditFile), uki, 0o600)
}
