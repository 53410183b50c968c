// Package bundle writes the small archives that are appended to a VM's initramfs.
// The kernel unpacks concatenated archives in order (Linux,
// Documentation/driver-api/early-userspace/buffer-format.rst), so the shared part is
// made, compressed and signed once, and what is unique to a VM is a few hundred bytes
// of uncompressed "newc" behind it.
//
// The same files always give the same bytes, because their digest is signed.
package bundle

import (
	"bytes"
	"fmt"

	"github.com/cavaliergopher/cpio"
)

// Paths inside the initramfs.
const (
	UniquePath     = "foothold/unique.json" // bootmsg.Unique, written by the orchestrator
	PrivateKeyPath = "foothold/vm.key"      // the VM's Ed25519 seed, 32 bytes, written by the loader
)

// File is one regular file of an archive, mode 0400, owner root.
type File struct {
	Path string // relative, no leading slash
	Data []byte
}

// Archive returns a "newc" archive of files in a directory "foothold", padded to four bytes.
func Archive(files ...File) ([]byte, error) {
	var out bytes.Buffer
	w := cpio.NewWriter(&out)
	if err := w.WriteHeader(&cpio.Header{Name: "foothold", Mode: cpio.TypeDir | 0o700, Links: 2}); err != nil {
		return nil, fmt.Errorf("write archive: %w", err)
	}
	for _, f := range files {
		h := &cpio.Header{Name: f.Path, Mode: cpio.TypeReg | 0o400, Size: int64(len(f.Data)), Links: 1}
		if err := w.WriteHeader(h); err != nil {
			return nil, fmt.Errorf("write archive: %w", err)
		}
		if _, err := w.Write(f.Data); err != nil {
			return nil, fmt.Errorf("write archive: %w", err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("write archive: %w", err)
	}
	return out.Bytes(), nil
}
