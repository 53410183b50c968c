package bootimage

import (
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"foothold/internal/cpio"
)

// maxLinks bounds symbolic links on the way to one file, as the kernel does.
const maxLinks = 40

// libraryDirs are where Debian's loader looks on amd64.
var libraryDirs = []string{"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib"}

// programs collects files from a root tree: programs, their loader and libraries.
type programs struct {
	root    string
	entries map[string]cpio.Entry
}

// add takes the program at an absolute path of the tree with all its libraries.
func (p *programs) add(name string) error {
	source, err := resolve(p.root, name)
	if err != nil {
		return fmt.Errorf("find %s in the tree: %w", name, err)
	}
	return p.take(name, source)
}

// take adds the ELF file source as name, then what it needs.
func (p *programs) take(name, source string) error {
	key := strings.TrimPrefix(name, "/")
	if _, ok := p.entries[key]; ok {
		return nil
	}
	data, err := os.ReadFile(source)
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	p.entries[key] = cpio.File(key, 0o755, data)
	f, err := elf.Open(source)
	if err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	defer f.Close()
	for _, prog := range f.Progs {
		if prog.Type != elf.PT_INTERP {
			continue
		}
		interp := make([]byte, prog.Filesz)
		if _, err := prog.ReadAt(interp, 0); err != nil {
			return fmt.Errorf("read interpreter of %s: %w", name, err)
		}
		if err := p.add(strings.TrimRight(string(interp), "\x00")); err != nil {
			return err
		}
	}
	libraries, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("read libraries of %s: %w", name, err)
	}
	for _, library := range libraries {
		if err := p.addLibrary(library); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// addLibrary puts a library under the first of libraryDirs, whichever it is from.
// The loader itself, which the C library names as a need, stays at its own path.
func (p *programs) addLibrary(library string) error {
	if strings.Contains(library, "/") {
		return fmt.Errorf("library %q is named by path", library)
	}
	if strings.HasPrefix(library, "ld-linux-") {
		return p.add("/lib64/" + library)
	}
	for _, dir := range libraryDirs {
		source, err := resolve(p.root, path.Join(dir, library))
		if err == nil {
			return p.take(path.Join(libraryDirs[0], library), source)
		}
	}
	return fmt.Errorf("library %s is not in the tree", library)
}

// resolve follows name below root, taking every symbolic link, absolute ones too,
// as inside root.
func resolve(root, name string) (string, error) {
	rest := strings.Split(path.Clean("/"+name), "/")[1:]
	at := "/"
	for links := 0; len(rest) > 0; {
		at, rest = path.Join(at, rest[0]), rest[1:]
		real := filepath.Join(root, at)
		info, err := os.Lstat(real)
		if err != nil {
			return "", err
		}
		if info.Mode()&fs.ModeSymlink == 0 {
			continue
		}
		if links++; links > maxLinks {
			return "", errors.New("too many symbolic links")
		}
		target, err := os.Readlink(real)
		if err != nil {
			return "", err
		}
		if !path.IsAbs(target) {
			target = path.Join(path.Dir(at), target)
		}
		rest = append(strings.Split(path.Clean("/"+target), "/")[1:], rest...)
		at = "/"
	}
	return filepath.Join(root, at), nil
}
