package store

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"foothold/internal/mtls"
	"foothold/protocol/digest"

	"github.com/klauspost/compress/zstd"
)

// The client of call asks for gzip, as Go's does: it gets the object as it is. The
// copy on disk is there for those that ask for exactly that.
func TestCompressedCopy(t *testing.T) {
	w := newWorld(t)
	plain := bytes.Repeat([]byte("a program, mostly alike. "), 40_000)
	noise := make([]byte, 300_000)
	rand.Read(noise)
	for _, object := range [][]byte{plain, noise} {
		path := "/v1/objects/" + digest.Of(object).String()
		if status, _ := w.call(w.dmz, mtls.Orchestrator, "PUT", path, bytes.NewReader(object)); status != 201 {
			t.Fatalf("status %d", status)
		}
		if _, data := w.call(w.vms, mtls.VM, "GET", path, nil); !bytes.Equal(data, object) {
			t.Error("other bytes without the coding")
		}
	}
	if _, err := os.Stat(filepath.Join(w.dir, digest.Of(noise).String()+".zstd")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("noise has a compressed copy: %v", err)
	}

	s := &store{dir: w.dir}
	for accept, coding := range map[string]string{"zstd": "zstd", "": "", "gzip": "", "br, zstd;q=0": ""} {
		f, got, err := s.open(digest.Of(plain), accept)
		if err != nil || got != coding {
			t.Fatalf("accept %q: coding %q, %v", accept, got, err)
		}
		defer f.Close()
		if coding == "" {
			continue
		}
		z, err := zstd.NewReader(f)
		if err != nil {
			t.Fatal(err)
		}
		defer z.Close()
		var out bytes.Buffer
		if _, err := out.ReadFrom(z); err != nil || !bytes.Equal(out.Bytes(), plain) {
			t.Errorf("the copy holds other bytes: %v", err)
		}
	}
	if _, coding, err := s.open(digest.Of(noise), "zstd"); err != nil || coding != "" {
		t.Errorf("without a copy: coding %q, %v", coding, err)
	}
	if _, _, err := s.open(digest.Of([]byte("absent")), "zstd"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("absent: %v", err)
	}
}
