package foldertest

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// TestCopies: copies are as the folder was, and each is one's own.
func TestCopies(t *testing.T) {
	var place string
	f, err := Make(func(dir string) error {
		place = dir
		if err := os.MkdirAll(filepath.Join(dir, "sub"), 0o750); err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, "sub", "key"), []byte("one"), 0o640)
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(place); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder is still there: %v", err)
	}
	for range 2 {
		dir := filepath.Join(t.TempDir(), "copy")
		f.Copy(t, dir)
		key := filepath.Join(dir, "sub", "key")
		for path, mode := range map[string]os.FileMode{key: 0o640, filepath.Dir(key): 0o750} {
			if info, err := os.Stat(path); err != nil || info.Mode().Perm() != mode {
				t.Errorf("%s: %v, %v", path, info, err)
			}
		}
		if data, err := os.ReadFile(key); err != nil || string(data) != "one" {
			t.Errorf("%q, %v", data, err)
		}
		if err := os.WriteFile(key, []byte("two"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	failed := errors.New("failed")
	if _, err := Make(func(string) error { return failed }); err != failed {
		t.Errorf("a folder that could not be made: %v", err)
	}
}
