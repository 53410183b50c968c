package facts

import (
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"foothold/protocol/audit"
	"foothold/protocol/digest"

	"golang.org/x/sys/unix"
)

// digests remembers files' digests by what changes with their content. A change of
// content changes ctime, which no program can set.
type digests struct {
	mu    sync.Mutex
	known map[fileID]digest.SHA256 // guarded by mu
}

type fileID struct {
	dev, ino uint64
	size     int64
	ctime    unix.Timespec
}

// of hashes an open file.
func (d *digests) of(f *os.File) (digest.SHA256, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return digest.SHA256{}, err
	}
	id := fileID{st.Dev, st.Ino, st.Size, st.Ctim}
	d.mu.Lock()
	known, ok := d.known[id]
	d.mu.Unlock()
	if ok {
		return known, nil
	}
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return digest.SHA256{}, err
	}
	var sum digest.SHA256
	h.Sum(sum[:0])
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.known == nil {
		d.known = map[fileID]digest.SHA256{}
	}
	d.known[id] = sum
	return sum, nil
}

func (d *digests) path(path string) (digest.SHA256, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return digest.SHA256{}, err
	}
	defer f.Close()
	return d.of(f)
}

// files lists regular files, symbolic links and device nodes of each scope, not going into other mounts.
// A link's digest is that of its target's text.
func (g *Gatherer) files(scopes []Scope) ([]audit.File, error) {
	var out []audit.File
	for _, scope := range scopes {
		var top unix.Stat_t
		if err := unix.Lstat(scope.Dir, &top); err != nil {
			return nil, fmt.Errorf("%s: %w", scope.Dir, err)
		}
		err := filepath.WalkDir(scope.Dir, func(path string, e fs.DirEntry, err error) error {
			if os.IsNotExist(err) { // gone since its directory was read
				return nil
			}
			if err != nil {
				return err
			}
			f, skip, err := g.file(path, top.Dev)
			if skip {
				return fs.SkipDir
			}
			if err != nil || f == nil {
				return err
			}
			f.Path = filepath.Join(scope.As, strings.TrimPrefix(path, scope.Dir))
			out = append(out, *f)
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	slices.SortFunc(out, func(a, b audit.File) int { return strings.Compare(a.Path, b.Path) })
	return out, nil
}

// file is one entry, or nil for a directory or socket.
func (g *Gatherer) file(path string, dev uint64) (f *audit.File, skip bool, err error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		if err == unix.ENOENT {
			return nil, false, nil
		}
		return nil, false, err
	}
	f = &audit.File{Mode: st.Mode}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return nil, st.Dev != dev, nil
	case unix.S_IFSOCK:
		return nil, false, nil
	case unix.S_IFREG:
		f.SHA256, err = g.digests.path(path)
		if os.IsNotExist(err) {
			return nil, false, nil
		}
	case unix.S_IFLNK:
		var target string
		target, err = os.Readlink(path)
		f.SHA256 = digest.Of([]byte(target))
	}
	return f, false, err
}
