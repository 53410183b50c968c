package store

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"foothold/internal/durable"
	"foothold/protocol/digest"

	"github.com/klauspost/compress/zstd"
)

// packed is the content coding of an object's smaller copy (RFC 8878; IANA "zstd"),
// and the suffix of its file.
const packed = "zstd"

// pack keeps a compressed copy beside an object where it saves an eighth or more. A
// VM's tunnel is narrower than its processor. Nobody trusts the copy: who unpacks it
// compares the digest of what comes out. Without it the object is sent as it is.
func (s *store) pack(path string) {
	err := durable.Write(path+"."+packed, 0o400, func(f *os.File) error { return compress(f, path) })
	if err != nil && !errors.Is(err, errIncompressible) {
		slog.Warn("object not compressed", "object", filepath.Base(path), "err", err)
	}
}

var errIncompressible = errors.New("compression saves too little")

func compress(f *os.File, path string) error {
	in, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("compress: %w", err)
	}
	defer in.Close()
	w, err := zstd.NewWriter(f, zstd.WithEncoderLevel(zstd.SpeedBetterCompression), zstd.WithWindowSize(1<<20))
	if err != nil {
		return fmt.Errorf("compress: %w", err)
	}
	n, err := io.Copy(w, in)
	if err := errors.Join(err, w.Close()); err != nil {
		return fmt.Errorf("compress: %w", err)
	}
	size, err := f.Seek(0, io.SeekCurrent)
	if err != nil {
		return fmt.Errorf("compress: %w", err)
	}
	if size > n-n/8 {
		return errIncompressible
	}
	return nil
}

// open finds the object, or its compressed copy for a client that takes exactly that.
func (s *store) open(sum digest.SHA256, accept string) (f *os.File, encoding string, err error) {
	path := filepath.Join(s.dir, sum.String())
	if accept == packed {
		if f, err = os.Open(path + "." + packed); !errors.Is(err, fs.ErrNotExist) {
			return f, packed, err
		}
	}
	f, err = os.Open(path)
	return f, "", err
}
