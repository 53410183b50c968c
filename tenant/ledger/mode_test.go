package ledger

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestFilesAreTheOwnersAlone: whatever the umask, and whatever mode an old one was left in.
func TestFilesAreTheOwnersAlone(t *testing.T) {
	defer unix.Umask(unix.Umask(0))
	file := filepath.Join(t.TempDir(), "ledger.db")
	c := newClock()
	check := func(when string) {
		t.Helper()
		l := openAt(t, file, c)
		reserve(t, l, c, 1+len(when))
		files, err := filepath.Glob(file + "*")
		if err != nil || len(files) != 3 { // the database, its log and its index
			t.Fatalf("%s: %v, %v", when, files, err)
		}
		for _, name := range files {
			info, err := os.Stat(name)
			if err != nil || info.Mode() != 0o600 {
				t.Errorf("%s: %s has mode %v, %v", when, name, info.Mode(), err)
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	check("new")
	if err := os.Chmod(file, 0o644); err != nil {
		t.Fatal(err)
	}
	check("again")
}
