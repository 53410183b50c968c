package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"
	"time"

	"foothold/client/term"
	"foothold/protocol/api"
	"foothold/protocol/digest"

	"github.com/klauspost/compress/zstd"
)

// defaultPort is the port of a workload that names none, as protocol/api says.
const defaultPort = 8080

// maxWorkload bounds a workload in bytes; it passes a VM's memory.
const maxWorkload = 1 << 30

// workloadFlags name a workload.
type workloadFlags struct {
	file, entry string
	port        int
}

// putWorkload checks a workload file and uploads it to the store.
func (s *session) putWorkload(ctx context.Context, f workloadFlags) (*api.Workload, error) {
	file, size, err := openRegular(f.file)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if size == 0 || size > maxWorkload {
		return nil, usage("workload %s: %s; it must have 1 byte to %s", f.file, bytesText(size), bytesText(maxWorkload))
	}
	if f.port < 1 || f.port > 65535 {
		return nil, usage("--workload-port %d: a port is 1 to 65535", f.port)
	}
	kind, err := workloadKind(file, f.entry)
	if err != nil {
		return nil, usage("workload %s: %w", f.file, err)
	}
	h := sha256.New()
	if err := rewound(file, func(r io.Reader) error { _, err := io.Copy(h, r); return err }); err != nil {
		return nil, fmt.Errorf("hash workload: %w", err)
	}
	w := &api.Workload{Size: size, Kind: kind, Entry: f.entry, Port: f.port}
	w.SHA256 = digest.SHA256(h.Sum(nil))
	began := time.Now()
	err = rewound(file, func(r io.Reader) error { return s.PutObject(ctx, w.SHA256, r, size) })
	if err != nil {
		return nil, fmt.Errorf("upload workload: %w", err)
	}
	s.log.Line("%s workload %s, %s, sha256 %s, in the store after %.1f s",
		s.log.Paint(term.Good, "✓"), f.file, bytesText(size), w.SHA256.Short(), time.Since(began).Seconds())
	return w, nil
}

// rewound runs f on the file from its beginning.
func rewound(file *os.File, f func(io.Reader) error) error {
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return f(file)
}

// workloadKind tells "executable" from "tar" by content and checks that a VM could
// run it, so that a mistake shows now and not after a boot.
func workloadKind(file *os.File, entry string) (string, error) {
	head := make([]byte, 512)
	n, err := io.ReadFull(file, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return "", err
	}
	head = head[:n]
	switch {
	case bytes.HasPrefix(head, []byte("\x7fELF")), bytes.HasPrefix(head, []byte("#!")):
		if entry != "" {
			return "", errors.New("an executable has no --entry")
		}
		return "executable", nil
	case isTar(head), bytes.HasPrefix(head, gzipMagic), bytes.HasPrefix(head, zstdMagic):
		if entry == "" {
			return "", errors.New("a tarball needs --entry PATH, the executable inside")
		}
		err := rewound(file, func(r io.Reader) error { return checkEntry(r, head, entry) })
		return "tar", err
	}
	return "", errors.New("neither an executable (ELF or #!) nor a tarball (plain, gzip, zstd)")
}

var (
	gzipMagic = []byte{0x1f, 0x8b}
	zstdMagic = []byte{0x28, 0xb5, 0x2f, 0xfd}
)

func isTar(head []byte) bool {
	return len(head) >= 262 && string(head[257:262]) == "ustar"
}

// checkEntry looks for the entry point in a tarball.
func checkEntry(r io.Reader, head []byte, entry string) error {
	switch {
	case bytes.HasPrefix(head, gzipMagic):
		z, err := gzip.NewReader(r)
		if err != nil {
			return fmt.Errorf("read tarball: %w", err)
		}
		defer z.Close()
		r = z
	case bytes.HasPrefix(head, zstdMagic):
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1))
		if err != nil {
			return fmt.Errorf("read tarball: %w", err)
		}
		defer z.Close()
		r = z
	}
	want := clean(entry)
	for t := tar.NewReader(r); ; {
		hdr, err := t.Next()
		if errors.Is(err, io.EOF) {
			return fmt.Errorf("the tarball holds no %q", entry)
		}
		if err != nil {
			return fmt.Errorf("read tarball: %w", err)
		}
		if clean(hdr.Name) != want {
			continue
		}
		if hdr.Typeflag != tar.TypeReg || hdr.Mode&0o111 == 0 {
			return fmt.Errorf("%q in the tarball is not an executable file", entry)
		}
		return nil
	}
}

func clean(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }
