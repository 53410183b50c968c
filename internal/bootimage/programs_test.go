package bootimage

import (
	"os"
	"path/filepath"
	"testing"

	"foothold/internal/cpio"
)

func TestResolveStaysInTheTree(t *testing.T) {
	root := t.TempDir()
	os.MkdirAll(filepath.Join(root, "usr/lib"), 0o755)
	os.WriteFile(filepath.Join(root, "usr/lib/x.so.1"), nil, 0o644)
	os.Symlink("usr/lib", filepath.Join(root, "lib"))
	os.Symlink("/usr/lib/x.so.1", filepath.Join(root, "usr/lib/absolute"))
	os.Symlink("../../../../usr/lib/x.so.1", filepath.Join(root, "usr/lib/above"))
	os.Symlink("loop", filepath.Join(root, "loop"))
	want := filepath.Join(root, "usr/lib/x.so.1")
	for _, name := range []string{"/lib/x.so.1", "/lib/absolute", "/lib/above", "/../lib/x.so.1"} {
		if got, err := resolve(root, name); err != nil || got != want {
			t.Errorf("%s leads to %s, %v", name, got, err)
		}
	}
	for _, name := range []string{"/loop", "/lib/none"} {
		if got, err := resolve(root, name); err == nil {
			t.Errorf("%s leads to %s", name, got)
		}
	}
}

func TestProgramBringsItsLibraries(t *testing.T) {
	p := programs{root: "/", entries: map[string]cpio.Entry{}}
	if err := p.add("/bin/ls"); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"bin/ls", "lib64/ld-linux-x86-64.so.2", "lib/x86_64-linux-gnu/libc.so.6"} {
		if len(p.entries[want].Data) == 0 {
			t.Errorf("%s is missing", want)
		}
	}
}

func TestFirstProcessMustBeStatic(t *testing.T) {
	if _, err := staticProgram("/bin/ls"); err == nil {
		t.Error("a dynamic first process is accepted")
	}
}
