// Package foldertest gives tests copies of a folder that is costly to make: it is made
// once by a test binary, and each test changes a copy of its own.
package foldertest

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// Folder is what was in a folder: its directories and regular files, with their
// permissions.
type Folder struct{ items []item }

type item struct {
	name string // under the folder
	mode fs.FileMode
	data []byte
}

// Make has fill fill a folder, which is gone when Make returns.
func Make(fill func(dir string) error) (Folder, error) {
	dir, err := os.MkdirTemp("", "folder-")
	if err != nil {
		return Folder{}, err
	}
	defer os.RemoveAll(dir)
	if err := fill(dir); err != nil {
		return Folder{}, err
	}
	return read(dir)
}

func read(dir string) (f Folder, err error) {
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := e.Info()
		if err != nil {
			return err
		}
		it := item{mode: info.Mode()}
		if it.name, err = filepath.Rel(dir, path); err != nil {
			return err
		}
		switch {
		case e.IsDir():
		case info.Mode().IsRegular():
			if it.data, err = os.ReadFile(path); err != nil {
				return err
			}
		default:
			return nil // a socket that its owner left
		}
		f.items = append(f.items, it)
		return nil
	})
	return f, err
}

// Copy makes dir, which may exist, as the folder was.
func (f Folder) Copy(t testing.TB, dir string) {
	t.Helper()
	for _, it := range f.items {
		path, err := filepath.Join(dir, it.name), error(nil)
		if it.mode.IsDir() {
			err = os.MkdirAll(path, 0o700)
		} else {
			err = os.WriteFile(path, it.data, 0o600)
		}
		if err == nil {
			err = os.Chmod(path, it.mode.Perm())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}
