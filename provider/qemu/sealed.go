package qemu

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"foothold/protocol/digest"

	"golang.org/x/sys/unix"
)

// Sealed is a memory file that nobody can change any more, not even its maker, with
// the SHA-256 of what it holds. What was hashed is what runs.
type Sealed struct {
	File   *os.File
	SHA256 digest.SHA256
	Size   int64
}

const seals = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE | unix.F_SEAL_SEAL

// Seal copies r, at most limit bytes, into a memory file, seals it, and then hashes
// the sealed content. The name serves people looking at /proc.
func Seal(name string, r io.Reader, limit int64) (*Sealed, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("seal %s: %w", name, err)
	}
	s := &Sealed{File: os.NewFile(uintptr(fd), "memfd:"+name)}
	if err := s.fill(r, limit); err != nil {
		s.File.Close()
		return nil, fmt.Errorf("seal %s: %w", name, err)
	}
	return s, nil
}

func (s *Sealed) fill(r io.Reader, limit int64) error {
	n, err := io.Copy(s.File, io.LimitReader(r, limit+1))
	if err != nil {
		return err
	}
	if n > limit {
		return fmt.Errorf("larger than %d bytes", limit)
	}
	if _, err := unix.FcntlInt(s.File.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return fmt.Errorf("add seals: %w", err)
	}
	h := sha256.New()
	if s.Size, err = io.Copy(h, io.NewSectionReader(s.File, 0, n)); err != nil {
		return err
	}
	h.Sum(s.SHA256[:0])
	return nil
}

// SealFile is Seal for a file of the file system.
func SealFile(path string, limit int64) (*Sealed, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("seal file: %w", err)
	}
	defer f.Close()
	// QEMU finds its modules beside its own path, so a slash in the name would mislead it.
	return Seal(filepath.Base(path), f, limit)
}
