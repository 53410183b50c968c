// Package cpio writes the archives that a Linux kernel unpacks as its first root
// file system: format newc (Documentation/driver-api/early-userspace/buffer-format.rst
// of the kernel).
//
// The same entries always give the same bytes: entries are sorted, owners are root,
// times are zero, inode numbers count from one. The kernel takes archives one behind
// the other, each compressed or not, and a later entry replaces an earlier one of
// the same name.
package cpio

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
)

// Type bits of Entry.Mode, as in stat(2).
const (
	Dir     = 0o040000
	Regular = 0o100000
	Symlink = 0o120000
	typeBit = 0o170000
)

// maxSize is what a newc header can say in eight hexadecimal digits.
const maxSize = 1<<32 - 1

// Entry is one file. Name is relative, without a leading slash. A symbolic link
// keeps its target in Data.
type Entry struct {
	Name string
	Mode uint32 // type and permission bits
	Data []byte
}

// File is a regular file.
func File(name string, perm uint32, data []byte) Entry {
	return Entry{Name: name, Mode: Regular | perm, Data: data}
}

// Link is a symbolic link.
func Link(name, target string) Entry {
	return Entry{Name: name, Mode: Symlink | 0o777, Data: []byte(target)}
}

// Write writes one archive with the entries and the directories above them (mode
// 0755 unless an entry says otherwise), ended by the trailer.
func Write(w io.Writer, entries []Entry) error {
	all, err := complete(entries)
	if err != nil {
		return err
	}
	for i, e := range all {
		links := uint32(1)
		if e.Mode&typeBit == Dir {
			links = 2
		}
		if err := writeEntry(w, uint32(i+1), links, e); err != nil {
			return fmt.Errorf("write archive entry %s: %w", e.Name, err)
		}
	}
	return writeEntry(w, 0, 1, Entry{Name: "TRAILER!!!"})
}

// Bytes is Write into memory.
func Bytes(entries []Entry) ([]byte, error) {
	var b bytes.Buffer
	err := Write(&b, entries)
	return b.Bytes(), err
}

// complete checks names, adds missing directories, and sorts so that each
// directory comes before what it holds.
func complete(entries []Entry) ([]Entry, error) {
	byName := map[string]Entry{}
	for _, e := range entries {
		if e.Name == "" || e.Name != path.Clean(e.Name) || strings.HasPrefix(e.Name, "/") || e.Name == ".." ||
			strings.HasPrefix(e.Name, "../") || strings.ContainsRune(e.Name, 0) || e.Name == "TRAILER!!!" {
			return nil, fmt.Errorf("archive entry name %q is not a clean relative path", e.Name)
		}
		if _, ok := byName[e.Name]; ok {
			return nil, fmt.Errorf("archive entry %q is there twice", e.Name)
		}
		byName[e.Name] = e
	}
	for _, e := range entries {
		for dir := path.Dir(e.Name); dir != "."; dir = path.Dir(dir) {
			above, ok := byName[dir]
			if ok && above.Mode&typeBit != Dir {
				return nil, fmt.Errorf("archive entry %q lies below %q, which is no directory", e.Name, dir)
			}
			if !ok {
				byName[dir] = Entry{Name: dir, Mode: Dir | 0o755}
			}
		}
	}
	all := make([]Entry, 0, len(byName))
	for _, e := range byName {
		all = append(all, e)
	}
	slices.SortFunc(all, func(a, b Entry) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

func writeEntry(w io.Writer, inode, links uint32, e Entry) error {
	if uint64(len(e.Data)) > maxSize {
		return errors.New("file is larger than the format can say")
	}
	head := fmt.Sprintf("070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
		inode, e.Mode, 0, 0, links, 0, len(e.Data), 0, 0, 0, 0, len(e.Name)+1, 0, e.Name)
	for _, part := range [][]byte{[]byte(head), padding(len(head)), e.Data, padding(len(e.Data))} {
		if _, err := w.Write(part); err != nil {
			return err
		}
	}
	return nil
}

// padding fills up to a multiple of four.
func padding(n int) []byte { return make([]byte, (4-n%4)%4) }
