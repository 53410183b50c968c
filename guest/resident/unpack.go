package resident

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/klauspost/compress/zstd"
)

// Limits of an archive, unpacked: it lies in memory.
const (
	maxUnpacked = 1 << 30 // bytes
	maxEntries  = 50_000
)

// unpack writes a tar, plain or compressed by gzip or zstd, into a new folder. It
// takes files, folders and links that stay inside; modes keep their execute bits,
// owners are root.
func unpack(archive io.Reader, dir string) error {
	plain, done, err := decompress(archive)
	if err != nil {
		return err
	}
	defer done()
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir) // keeps every path inside, links included
	if err != nil {
		return err
	}
	defer root.Close()
	in := tar.NewReader(plain)
	left := int64(maxUnpacked)
	for range maxEntries {
		h, err := in.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if left -= h.Size; h.Size < 0 || left < 0 {
			return errors.New("the archive is too large")
		}
		if err := entry(root, h, in); err != nil {
			return fmt.Errorf("%q: %w", h.Name, err)
		}
	}
	return errors.New("the archive has too many entries")
}

func entry(root *os.Root, h *tar.Header, in io.Reader) error {
	name := filepath.Clean(h.Name)
	if name == "." && h.Typeflag == tar.TypeDir {
		return nil
	}
	if !filepath.IsLocal(name) {
		return errors.New("the path leads outside")
	}
	if err := root.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeDir:
		return root.MkdirAll(name, 0o755)
	case tar.TypeSymlink:
		if filepath.IsAbs(h.Linkname) || !filepath.IsLocal(filepath.Join(filepath.Dir(name), h.Linkname)) {
			return errors.New("the link leads outside")
		}
		return root.Symlink(h.Linkname, name)
	case tar.TypeReg:
		f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := io.Copy(f, in); err != nil {
			return err
		}
		return f.Chmod(os.FileMode(h.Mode)&0o111 | 0o444)
	}
	return errors.New("neither file, folder nor link")
}

func decompress(archive io.Reader) (io.Reader, func(), error) {
	in := bufio.NewReader(archive)
	magic, _ := in.Peek(4)
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(in)
		return z, func() {}, err
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(in, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(128<<20))
		if err != nil {
			return nil, nil, err
		}
		return z, z.Close, nil
	}
	return in, func() {}, nil
}
