package bootimage

import (
	"bufio"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"foothold/internal/kmod"
)

// moduleIndex knows every module of a kernel by name.
type moduleIndex struct {
	files   map[string]string // name → path of the .ko
	builtin map[string]bool
}

// indexModules reads the module tree and the list of what is built in.
func indexModules(k *Kernel) (*moduleIndex, error) {
	x := &moduleIndex{files: map[string]string{}, builtin: map[string]bool{}}
	err := filepath.WalkDir(filepath.Join(k.Modules(), "kernel"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".ko") {
			x.files[moduleName(path)] = path
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("list kernel modules: %w", err)
	}
	data, err := os.ReadFile(filepath.Join(k.Modules(), "modules.builtin"))
	if err != nil {
		return nil, fmt.Errorf("list built-in modules: %w", err)
	}
	lines := bufio.NewScanner(bytes.NewReader(data))
	for lines.Scan() {
		x.builtin[moduleName(lines.Text())] = true
	}
	return x, lines.Err()
}

func moduleName(path string) string {
	return kmod.Name(strings.TrimSuffix(filepath.Base(path), ".ko"))
}

// chosen is a module and where its file is now.
type chosen struct {
	kmod.Module
	source string
}

// closure lists the wanted modules and all that they need, needs first, then those that
// are wanted on demand and what these alone need; and which of all are built in.
func (x *moduleIndex) closure(wanted, onDemand []string) (list []chosen, builtin []string, err error) {
	seen := map[string]bool{}
	var visit func(name string, soft bool) error
	visit = func(name string, soft bool) error {
		if seen[name] {
			return nil
		}
		seen[name] = true
		file, ok := x.files[name]
		switch {
		case x.builtin[name]:
			builtin = append(builtin, name)
			return nil
		case !ok && soft: // often an algorithm's alias, not a module
			return nil
		case !ok:
			return fmt.Errorf("kernel has no module %s", name)
		}
		needs, hints, err := moduleNeeds(file)
		if err != nil {
			return fmt.Errorf("read module %s: %w", name, err)
		}
		m := chosen{Module: kmod.Module{Name: name, Path: "/lib/modules/" + filepath.Base(file), CPU: cpuFlags[name], With: parameters[name]}, source: file}
		for _, need := range needs {
			if err := visit(need, false); err != nil {
				return err
			}
			if !x.builtin[need] {
				m.Needs = append(m.Needs, need)
			}
		}
		for _, hint := range hints {
			if err := visit(hint, true); err != nil {
				return err
			}
			if x.files[hint] != "" && !x.builtin[hint] {
				m.Needs = append(m.Needs, hint)
			}
		}
		list = append(list, m)
		return nil
	}
	for _, name := range wanted {
		if err := visit(kmod.Name(name), false); err != nil {
			return nil, nil, err
		}
	}
	always := len(list)
	for _, name := range onDemand {
		if err := visit(kmod.Name(name), false); err != nil {
			return nil, nil, err
		}
	}
	for i := range list[always:] {
		list[always+i].OnDemand = true
	}
	slices.Sort(builtin)
	return list, builtin, nil
}

// moduleNeeds reads a module's own statement, the .modinfo section: what it depends
// on, and what its softdep lines want before it.
func moduleNeeds(path string) (needs, soft []string, err error) {
	f, err := elf.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	section := f.Section(".modinfo")
	if section == nil {
		return nil, nil, errors.New("no .modinfo section")
	}
	data, err := section.Data()
	if err != nil {
		return nil, nil, err
	}
	for _, entry := range strings.Split(string(data), "\x00") {
		if text, ok := strings.CutPrefix(entry, "depends="); ok && text != "" {
			needs = strings.Split(text, ",")
		}
		if text, ok := strings.CutPrefix(entry, "softdep=pre:"); ok {
			before, _, _ := strings.Cut(text, "post:")
			soft = append(soft, strings.Fields(before)...)
		}
	}
	for _, names := range [][]string{needs, soft} {
		for i := range names {
			names[i] = kmod.Name(names[i])
		}
	}
	return needs, soft, nil
}
