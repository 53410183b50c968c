package hunt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Kinds of places.
const (
	File        = "file"
	Arguments   = "arguments"
	Environment = "environment"
	Memory      = "memory"
)

// Find is a secret in a place.
type Find struct {
	Kind string `json:"kind"`
	Name string `json:"name"` // of the file; or the process's arguments
	PID  int    `json:"pid,omitempty"`
	Hit
	Times int `json:"times"` // Offset is the first
}

// finds gathers hits, one for each secret and form in a place.
type finds struct {
	place Find
	list  []Find
}

func (f *finds) add(h Hit) {
	for i := range f.list {
		if f.list[i].Secret == h.Secret && f.list[i].Form == h.Form {
			f.list[i].Times++
			return
		}
	}
	found := f.place
	found.Hit, found.Times = h, 1
	f.list = append(f.list, found)
}

// Files searches every file below a folder. One that goes away meanwhile is passed over.
func (m *Matcher) Files(dir string) (all []Find, err error) {
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		file, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		defer file.Close()
		f := finds{place: Find{Kind: File, Name: path}}
		err = m.Reader(file, f.add)
		all = append(all, f.list...)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("search files: %w", err)
	}
	return all, nil
}

// Process searches a process's arguments, environment and memory. Where it is a VM,
// memory regions of the guest's size and more are the guest's own and left out; 0 leaves
// nothing out. A process that has ended has nothing.
func (m *Matcher) Process(pid int, guest int64) ([]Find, error) {
	name, err := processName(pid)
	if err != nil {
		return nil, nil
	}
	var all []Find
	for kind, file := range map[string]string{Arguments: "cmdline", Environment: "environ"} {
		data, err := os.ReadFile(procFile(pid, file))
		if ended(err) {
			return all, nil
		}
		if err != nil {
			return nil, fmt.Errorf("search %s: %w", name, err)
		}
		f := finds{place: Find{Kind: kind, Name: name, PID: pid}}
		m.Bytes(data, 0, f.add)
		all = append(all, f.list...)
	}
	f := finds{place: Find{Kind: Memory, Name: name, PID: pid}}
	err = ReadMemory(pid, m.longest, func(r Region) bool { return guest == 0 || r.Size() < guest || r.Path != "" || r.Executable },
		func(data []byte, address int64) { m.Bytes(data, address, f.add) })
	if err != nil && !ended(err) {
		return nil, fmt.Errorf("search %s: %w", name, err)
	}
	return append(all, f.list...), nil
}

// Processes lists the processes of this PID namespace but this one.
func Processes() ([]int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil && pid != os.Getpid() {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

func procFile(pid int, name string) string { return fmt.Sprintf("/proc/%d/%s", pid, name) }

// ended reports whether the error says that the process has gone.
func ended(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH)
}

// processName is the process's arguments.
func processName(pid int) (string, error) {
	data, err := os.ReadFile(procFile(pid, "cmdline"))
	if err != nil {
		return "", fmt.Errorf("name process: %w", err)
	}
	const longest = 80 // bytes; the rest says little, or is a control's secret
	text := strings.TrimSpace(string(bytes.ReplaceAll(data, []byte{0}, []byte(" "))))
	return text[:min(len(text), longest)], nil
}

// Region is one line of /proc/PID/maps.
type Region struct {
	Begin, End uint64
	Executable bool
	Path       string
}

// Size in bytes.
func (r Region) Size() int64 { return int64(r.End - r.Begin) }

// ReadMemory calls f for the process's memory in the wanted regions, in pieces that
// overlap by so many bytes. Pages that were never touched are passed over.
func ReadMemory(pid, overlap int, want func(Region) bool, f func(data []byte, address int64)) error {
	list, err := regions(pid)
	if err != nil {
		return err
	}
	mem, err := os.Open(procFile(pid, "mem"))
	if err != nil {
		return err
	}
	defer mem.Close()
	pages, err := os.Open(procFile(pid, "pagemap"))
	if err != nil {
		return err
	}
	defer pages.Close()
	buf := make([]byte, chunk+overlap)
	for _, r := range list {
		if strings.HasPrefix(r.Path, "[v") || !want(r) { // vvar, vsyscall: the kernel's
			continue
		}
		for at := r.Begin; at < r.End; at += chunk {
			if touched, err := anyTouched(pages, at, min(at+chunk, r.End)); err != nil || !touched {
				continue
			}
			piece := buf[:min(uint64(len(buf)), r.End-at)]
			n, err := mem.ReadAt(piece, int64(at))
			if n == 0 && err != nil {
				continue // unmapped since, or a device's
			}
			f(piece[:n], int64(at))
		}
	}
	return nil
}

// ReadAt reads size bytes of the process's memory.
func ReadAt(pid int, address int64, size int) ([]byte, error) {
	mem, err := os.Open(procFile(pid, "mem"))
	if err != nil {
		return nil, err
	}
	defer mem.Close()
	data := make([]byte, size)
	_, err = mem.ReadAt(data, address)
	return data, err
}

// anyTouched asks the page map (proc(5)) for a page that is present or swapped.
func anyTouched(pages *os.File, begin, end uint64) (bool, error) {
	const entry, there = 8, 3 << 62 // bytes; bits 62 and 63
	page := uint64(os.Getpagesize())
	buf := make([]byte, (end-begin+page-1)/page*entry)
	n, err := pages.ReadAt(buf, int64(begin/page*entry))
	for i := 0; i+entry <= n; i += entry {
		if binary.LittleEndian.Uint64(buf[i:])&there != 0 {
			return true, nil
		}
	}
	return false, err
}

func regions(pid int) ([]Region, error) {
	data, err := os.ReadFile(procFile(pid, "maps"))
	if err != nil {
		return nil, err
	}
	var list []Region
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line)
		if len(fields) < 5 {
			continue
		}
		begin, end, _ := strings.Cut(fields[0], "-")
		b, err1 := strconv.ParseUint(begin, 16, 63)
		e, err2 := strconv.ParseUint(end, 16, 63)
		if err1 != nil || err2 != nil {
			continue // the vsyscall page lies beyond
		}
		r := Region{Begin: b, End: e, Executable: strings.Contains(fields[1], "x")}
		if len(fields) > 5 {
			r.Path = strings.Join(fields[5:], " ")
		}
		list = append(list, r)
	}
	return list, nil
}
