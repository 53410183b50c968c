package cpio

import (
	"bytes"
	"io"
	"testing"

	reader "github.com/cavaliergopher/cpio"
)

func TestArchiveReadsBack(t *testing.T) {
	entries := []Entry{
		File("init", 0o755, []byte("program")),
		File("etc/foothold/key", 0o600, []byte("k")),
		Link("lib64", "usr/lib64"),
		{Name: "etc/foothold", Mode: Dir | 0o700},
	}
	data, err := Bytes(entries)
	if err != nil {
		t.Fatal(err)
	}
	if len(data)%4 != 0 {
		t.Errorf("archive is %d bytes, not a multiple of four", len(data))
	}
	want := []struct {
		name, data string
		mode       reader.FileMode
	}{
		{"etc", "", Dir | 0o755},
		{"etc/foothold", "", Dir | 0o700},
		{"etc/foothold/key", "k", Regular | 0o600},
		{"init", "program", Regular | 0o755},
		{"lib64", "", Symlink | 0o777},
	}
	r := reader.NewReader(bytes.NewReader(data))
	for i, w := range want {
		h, err := r.Next()
		if err != nil {
			t.Fatalf("entry %d: %v", i, err)
		}
		body, _ := io.ReadAll(r)
		if h.Name != w.name || h.Mode != w.mode || h.Inode != int64(i+1) || h.Uid != 0 {
			t.Errorf("entry %d: %q mode %o inode %d, want %q mode %o", i, h.Name, h.Mode, h.Inode, w.name, w.mode)
		}
		if w.name == "lib64" {
			if h.Linkname != "usr/lib64" {
				t.Errorf("link goes to %q", h.Linkname)
			}
		} else if string(body) != w.data {
			t.Errorf("%s holds %q", w.name, body)
		}
	}
	if _, err := r.Next(); err != io.EOF {
		t.Errorf("after the last entry: %v", err)
	}
}

func TestSameEntriesGiveSameBytes(t *testing.T) {
	a, err := Bytes([]Entry{File("b", 0o644, nil), File("a/c", 0o644, []byte("x"))})
	if err != nil {
		t.Fatal(err)
	}
	b, err := Bytes([]Entry{File("a/c", 0o644, []byte("x")), File("b", 0o644, nil)})
	if err != nil || !bytes.Equal(a, b) {
		t.Errorf("order of entries changes the archive (%v)", err)
	}
}

func TestBadNamesAreRefused(t *testing.T) {
	for _, entries := range [][]Entry{
		{File("/etc/x", 0, nil)},
		{File("../x", 0, nil)},
		{File("a/../b", 0, nil)},
		{File("", 0, nil)},
		{File("a\x00b", 0, nil)},
		{File("TRAILER!!!", 0, nil)},
		{File("a", 0, nil), File("a", 0, nil)},
		{File("a", 0, nil), File("a/b", 0, nil)},
	} {
		if _, err := Bytes(entries); err == nil {
			t.Errorf("%q is accepted", entries[0].Name)
		}
	}
}
