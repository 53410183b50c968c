// Package kmod loads kernel modules from an initramfs without kmod's programs.
//
// The initramfs carries ListFile: one line a module, its name, the path of its file
// and the names of the modules it needs, separated by blanks. Package bootimage
// writes it. A module that the kernel has built in is not listed; naming one is no
// error if it is in the list's "builtin" line. A need "cpu=FLAG" is a flag of
// /proc/cpuinfo without which the module is left out: loading it is no error and does
// nothing. A need "with=NAME=VALUE" is a parameter that the module is loaded with. A need
// "load=on-demand" leaves the module to who names it: LoadAll passes it by.
package kmod

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// ListFile is the list's place in an initramfs.
const ListFile = "/lib/modules.list"

// builtin starts the line that names wanted modules which the kernel has built in.
const builtin = "builtin:"

// What starts the words of a line that are not needs.
const (
	cpuFlag   = "cpu="           // a CPU's flag
	parameter = "with="          // a parameter of the module
	onDemand  = "load=on-demand" // not with the others
)

// Module is one line of the list.
type Module struct {
	Name  string   // with underscores, as the kernel shows it
	Path  string   // of its file
	Needs []string // names to be loaded before it
	CPU   string   // flag of /proc/cpuinfo that it is for, or ""
	With  []string // parameters, NAME=VALUE

	OnDemand bool // LoadAll leaves it out
}

// Set is the modules of an initramfs, and which of them were loaded.
type Set struct {
	modules map[string]Module
	order   []string
	builtin map[string]bool
	insert  func(path, parameters string) error
	cpuHas  func(flag string) (bool, error)

	mu     sync.Mutex
	loaded map[string]bool // guarded by mu
}

// Open reads the list of the running initramfs.
func Open() (*Set, error) {
	f, err := os.Open(ListFile)
	if err != nil {
		return nil, fmt.Errorf("open module list: %w", err)
	}
	defer f.Close()
	return Parse(f)
}

// Name is a module's name as the kernel shows it: dashes become underscores.
func Name(name string) string { return strings.ReplaceAll(name, "-", "_") }

// Format writes a list.
func Format(w io.Writer, modules []Module, builtins []string) error {
	var b strings.Builder
	fmt.Fprintln(&b, strings.TrimSpace(builtin+" "+strings.Join(builtins, " ")))
	for _, m := range modules {
		words := append([]string{m.Name, m.Path}, m.Needs...)
		if m.CPU != "" {
			words = append(words, cpuFlag+m.CPU)
		}
		for _, p := range m.With {
			words = append(words, parameter+p)
		}
		if m.OnDemand {
			words = append(words, onDemand)
		}
		fmt.Fprintln(&b, strings.Join(words, " "))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// Parse reads a list and checks that what a module needs is listed before it, so
// that loading always ends.
func Parse(r io.Reader) (*Set, error) {
	s := &Set{modules: map[string]Module{}, builtin: map[string]bool{}, insert: insertFile, cpuHas: cpuHas, loaded: map[string]bool{}}
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		words := strings.Fields(lines.Text())
		if len(words) > 0 && words[0] == builtin {
			for _, name := range words[1:] {
				s.builtin[name] = true
			}
			continue
		}
		if len(words) < 2 {
			return nil, errors.New("module list: a line without name and path")
		}
		m := parseModule(words)
		if _, ok := s.modules[m.Name]; ok {
			return nil, fmt.Errorf("module list: %s is there twice", m.Name)
		}
		for _, need := range m.Needs {
			n, ok := s.modules[need]
			if !ok {
				return nil, fmt.Errorf("module list: %s needs %s, which is not listed before it", m.Name, need)
			}
			if n.OnDemand && !m.OnDemand {
				return nil, fmt.Errorf("module list: %s needs %s, which is loaded on demand alone", m.Name, need)
			}
		}
		s.modules[m.Name] = m
		s.order = append(s.order, m.Name)
	}
	return s, lines.Err()
}

// parseModule reads the words of a line, of which there are two at the least.
func parseModule(words []string) Module {
	m := Module{Name: words[0], Path: words[1]}
	for _, word := range words[2:] {
		if flag, ok := strings.CutPrefix(word, cpuFlag); ok {
			m.CPU = flag
		} else if p, ok := strings.CutPrefix(word, parameter); ok {
			m.With = append(m.With, p)
		} else if word == onDemand {
			m.OnDemand = true
		} else {
			m.Needs = append(m.Needs, word)
		}
	}
	return m
}

// LoadAll loads every listed module that is not for demand alone.
func (s *Set) LoadAll() error { return s.Load(s.Names()...) }

// Load loads the named modules and all that they need, each at most once.
func (s *Set) Load(names ...string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range names {
		if err := s.load(Name(name)); err != nil {
			return err
		}
	}
	return nil
}

// load holds mu.
func (s *Set) load(name string) error {
	if s.loaded[name] || s.builtin[name] {
		return nil
	}
	m, ok := s.modules[name]
	if !ok {
		return fmt.Errorf("load module %s: it is not in the initramfs", name)
	}
	if m.CPU != "" {
		if has, err := s.cpuHas(m.CPU); err != nil || !has {
			return err
		}
	}
	for _, need := range m.Needs {
		if err := s.load(need); err != nil {
			return err
		}
	}
	if err := s.insert(m.Path, strings.Join(m.With, " ")); err != nil {
		return fmt.Errorf("load module %s: %w", name, err)
	}
	s.loaded[name] = true
	return nil
}

// insertFile is finit_module(2); a module that is there already is fine.
func insertFile(path, parameters string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), parameters, 0); err != nil && err != unix.EEXIST {
		return err
	}
	return nil
}

// Names lists what LoadAll loads in the list's order, as /proc/modules writes the names.
func (s *Set) Names() []string {
	return slices.DeleteFunc(slices.Clone(s.order), func(name string) bool { return s.modules[name].OnDemand })
}

// cpuHas looks for a flag of the first CPU.
func cpuHas(flag string) (bool, error) {
	data, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return false, fmt.Errorf("read the CPU's flags: %w", err)
	}
	for _, line := range strings.Split(string(data), "\n") {
		if name, flags, _ := strings.Cut(line, ":"); strings.TrimSpace(name) == "flags" {
			return slices.Contains(strings.Fields(flags), flag), nil
		}
	}
	return false, nil
}
