package bootimage

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"foothold/internal/cpio"
	"foothold/internal/kmod"

	"github.com/klauspost/compress/zstd"
)

// window is the most history a reader must keep, in bytes. The kernel takes up to
// 128 MiB (ZSTD_WINDOWSIZE_MAX, lib/decompress_unzstd.c); less memory is faster.
const window = 8 << 20

// Spec is what goes into an initramfs.
type Spec struct {
	Init     string       // path of the static program that becomes /init
	Kernel   *Kernel      // whose modules are meant
	Modules  []string     // names, in the order in which they are to be loaded
	OnDemand []string     // names of others, which are loaded by name alone
	Root     string       // tree that programs and their libraries are taken from
	Programs []string     // absolute paths within Root
	Copies   []string     // other files of Root, absolute paths
	Files    []cpio.Entry // further entries as they are
}

// Write writes the initramfs, compressed with zstd. It holds /init, the modules
// with their dependencies under /lib/modules and package kmod's list of them.
func (s *Spec) Write(w io.Writer) error {
	entries, err := s.entries()
	if err != nil {
		return err
	}
	return compress(w, entries)
}

func compress(w io.Writer, entries []cpio.Entry) error {
	enc, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedBetterCompression),
		zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(window))
	if err != nil {
		return fmt.Errorf("compress initramfs: %w", err)
	}
	if err := cpio.Write(enc, entries); err != nil {
		enc.Close()
		return err
	}
	if err := enc.Close(); err != nil {
		return fmt.Errorf("compress initramfs: %w", err)
	}
	return nil
}

func (s *Spec) entries() ([]cpio.Entry, error) {
	init, err := staticProgram(s.Init)
	if err != nil {
		return nil, err
	}
	entries := append([]cpio.Entry{cpio.File("init", 0o755, init)}, s.Files...)
	for _, dir := range []string{"dev", "proc", "run", "sys", "tmp"} {
		entries = append(entries, cpio.Entry{Name: dir, Mode: cpio.Dir | 0o755})
	}
	modules, err := s.moduleEntries()
	if err != nil {
		return nil, err
	}
	entries = append(entries, modules...)
	p := programs{root: s.Root, entries: map[string]cpio.Entry{}}
	for _, name := range s.Programs {
		if err := p.add(name); err != nil {
			return nil, err
		}
	}
	for _, e := range p.entries {
		entries = append(entries, e)
	}
	for _, name := range s.Copies {
		source, err := resolve(s.Root, name)
		if err != nil {
			return nil, fmt.Errorf("find %s in the tree: %w", name, err)
		}
		data, err := os.ReadFile(source)
		if err != nil {
			return nil, fmt.Errorf("read %s: %w", name, err)
		}
		entries = append(entries, cpio.File(strings.TrimPrefix(name, "/"), 0o644, data))
	}
	return entries, nil
}

// moduleEntries are the modules' files and the list of them.
func (s *Spec) moduleEntries() ([]cpio.Entry, error) {
	index, err := indexModules(s.Kernel)
	if err != nil {
		return nil, err
	}
	list, builtin, err := index.closure(s.Modules, s.OnDemand)
	if err != nil {
		return nil, err
	}
	var entries []cpio.Entry
	var lines []kmod.Module
	for _, m := range list {
		data, err := os.ReadFile(m.source)
		if err != nil {
			return nil, fmt.Errorf("read module %s: %w", m.Name, err)
		}
		entries = append(entries, cpio.File(strings.TrimPrefix(m.Path, "/"), 0o644, data))
		lines = append(lines, m.Module)
	}
	var text bytes.Buffer
	if err := kmod.Format(&text, lines, builtin); err != nil {
		return nil, err
	}
	return append(entries, cpio.File(strings.TrimPrefix(kmod.ListFile, "/"), 0o644, text.Bytes())), nil
}

// staticProgram reads a program and refuses one that would need a loader, which
// an initramfs without libraries cannot start.
func staticProgram(path string) ([]byte, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read first process: %w", err)
	}
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, fmt.Errorf("read first process %s: %w", path, err)
	}
	for _, prog := range f.Progs {
		if prog.Type == elf.PT_INTERP {
			return nil, fmt.Errorf("first process %s: %w", path, errors.New("it is not static; build it with CGO_ENABLED=0"))
		}
	}
	return data, nil
}
