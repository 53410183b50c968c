package lab

import (
	"os"
	"path/filepath"
	"testing"
)

// TestOpenKeepsOthersOut: the state holds every key of the lab.
func TestOpenKeepsOthersOut(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	open := filepath.Join(dir, "tenant")
	if err := os.MkdirAll(open, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"run", "logs", "tenant", "dmz", "provider"} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v %v", name, info.Mode(), err)
		}
	}
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); err == nil {
		t.Error("a directory that everybody may write to was accepted")
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(open); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(t.TempDir(), open); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); err == nil {
		t.Error("a link in the place of a folder was accepted")
	}
}

// TestOpenRefusesAnothersDirectory needs a folder of someone else's.
func TestOpenRefusesAnothersDirectory(t *testing.T) {
	dir := t.TempDir()
	if os.Geteuid() != 0 {
		dir = "/var" // root's
	} else if err := os.Chown(dir, 12345, 12345); err != nil {
		t.Skip("cannot give a folder away")
	}
	s := State{dir}
	if err := s.own(""); err == nil {
		t.Errorf("%s was accepted", dir)
	}
}
