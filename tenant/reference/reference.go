// Package reference makes reference values of a platform release - a platform.Manifest -
// from what known-good hosts measured, and says in component names how two differ.
//
// What a host measured is taken as it is: whoever makes reference values has examined the
// host and the release that it runs. The logs must lead to nothing here; a host that does
// not run what its logs say is refused by its first quote.
package reference

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/imalog"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/systemdlog"
	"foothold/protocol/tcglog"
)

// Add completes a manifest with what one host measured: events that the manifest has not
// become another digest of their component or an optional event, files another file. The
// first host's events are all demanded.
func Add(doc *platform.Manifest, host evidence.Platform) error {
	boot, err := events(host.Firmware)
	if err != nil {
		return err
	}
	kernel, err := imalog.Parse(host.Kernel)
	if err != nil {
		return err
	}
	if len(kernel.Entries) == 0 {
		return errors.New("the kernel's list is empty")
	}
	texts, err := userspace(host.Userspace)
	if err != nil {
		return err
	}
	if texts, err = AddTexts(doc.Userspace, texts); err != nil {
		return err
	}
	var files []platform.File
	for _, e := range kernel.Entries[1:] { // the first is the aggregate of the boot's registers
		if e.Violation || e.Algorithm != "sha256" || len(e.Digest) != len(digest.SHA256{}) {
			return fmt.Errorf("entry %d of the kernel's list, %q, has no digest of sha256", e.Number, e.Path)
		}
		files = append(files, platform.File{Name: e.Path, SHA256: digest.SHA256(e.Digest)})
	}
	addBoot(doc, boot)
	doc.Userspace = texts
	addFiles(doc, files)
	return nil
}

// addBoot lays one host's events beside those that are known, register by register.
func addBoot(doc *platform.Manifest, boot []platform.Event) {
	first := len(doc.Boot) == 0
	var merged []platform.Event
	for _, i := range pcr.Static {
		have, seen := ofRegister(doc.Boot, i), ofRegister(boot, i)
		if first {
			merged = append(merged, seen...)
			continue
		}
		merged = append(merged, merge(have, seen)...)
	}
	doc.Boot = merged
}

// addFiles adds files, each once, in the order of their names.
func addFiles(doc *platform.Manifest, files []platform.File) {
	doc.Files = append(doc.Files, files...)
	slices.SortFunc(doc.Files, func(a, b platform.File) int {
		return cmp.Or(cmp.Compare(a.Name, b.Name), slices.Compare(a.SHA256[:], b.SHA256[:]))
	})
	doc.Files = slices.Compact(doc.Files)
}

// events reads a firmware's log.
func events(log []byte) ([]platform.Event, error) {
	l, err := tcglog.Parse(log)
	if err != nil {
		return nil, err
	}
	if _, err := l.Replay(tcglog.SHA256); err != nil {
		return nil, err
	}
	var list []platform.Event
	for _, e := range l.Events {
		if e.PCR == pcr.Platform || !slices.Contains(pcr.Static, e.PCR) {
			return nil, fmt.Errorf("event %d of the firmware's log extends register %d, which is not the firmware's", e.Number, e.PCR)
		}
		list = append(list, platform.Event{PCR: e.PCR, Component: e.Describe(), SHA256: []digest.SHA256{digest.SHA256(e.Digest(tcglog.SHA256))}, Type: uint32(e.Type)})
	}
	return list, nil
}

// userspace reads a system's log. What it extends a quoted register by must be a text's
// digest: a manifest says in words what a system measures.
func userspace(log []byte) (texts []platform.Text, err error) {
	records, err := systemdlog.Parse(log)
	if err != nil {
		return nil, err
	}
	for _, r := range records {
		switch {
		case !slices.Contains(pcr.Static, r.PCR):
			continue
		case !slices.Contains(platform.UserspaceRegisters, r.PCR):
			return nil, fmt.Errorf("record %d of the system's log extends register %d, which is not the system's", r.Number, r.PCR)
		case !r.Authentic():
			return nil, fmt.Errorf("record %d of the system's log extends register %d by %s, which is not the digest of its text %.80q", r.Number, r.PCR, r.SHA256, r.Text)
		}
		texts = append(texts, platform.Text{PCR: r.PCR, Text: r.Text})
	}
	return texts, nil
}

// AddTexts completes what hosts of a release have measured by what another one has: of each
// register one is a beginning of the other.
func AddTexts(have, seen []platform.Text) ([]platform.Text, error) {
	out := slices.Clone(have)
	for _, i := range platform.UserspaceRegisters {
		a, b := textsOf(have, i), textsOf(seen, i)
		for n := range min(len(a), len(b)) {
			if a[n] != b[n] {
				return nil, fmt.Errorf("hosts differ in what their systems measure into register %d: one has %s where another has %s; make reference values for each", i, b[n].Component(), a[n].Component())
			}
		}
		if len(b) > len(a) {
			out = append(out, b[len(a):]...)
		}
	}
	if len(out) > platform.MaxTexts {
		return nil, fmt.Errorf("systems measured %d texts, at most %d are read", len(out), platform.MaxTexts)
	}
	return out, nil
}

func textsOf(list []platform.Text, index int) (out []platform.Text) {
	for _, t := range list {
		if t.PCR == index {
			out = append(out, t)
		}
	}
	return out
}

// textEvents are texts as events, to be compared as such.
func textEvents(list []platform.Text, index int) (out []platform.Event) {
	for _, t := range textsOf(list, index) {
		out = append(out, platform.Event{PCR: t.PCR, Component: t.Component(), SHA256: []digest.SHA256{t.Digest()}})
	}
	return out
}

func ofRegister(list []platform.Event, index int) []platform.Event {
	var out []platform.Event
	for _, e := range list {
		if e.PCR == index {
			out = append(out, e)
		}
	}
	return out
}

// merge lays a register's events of another host beside those that are known: the longest
// common sequence stays as it is; between its members, what stands at the same place is
// another digest of one component, and what stands alone may be missing.
func merge(have, seen []platform.Event) []platform.Event {
	var out []platform.Event
	i, j := 0, 0
	for _, p := range append(common(have, seen), [2]int{len(have), len(seen)}) {
		for ; i < p[0] && j < p[1]; i, j = i+1, j+1 {
			e := have[i]
			e.SHA256 = append(slices.Clone(e.SHA256), seen[j].SHA256...)
			if e.Type != seen[j].Type {
				e.Type = 0 // nothing may be read from what is one thing here and another there
			}
			out = append(out, e)
		}
		for ; i < p[0]; i++ {
			out = append(out, optional(have[i]))
		}
		for ; j < p[1]; j++ {
			out = append(out, optional(seen[j]))
		}
		if i < len(have) && j < len(seen) {
			out = append(out, have[i])
			i, j = i+1, j+1
		}
	}
	return out
}

func optional(e platform.Event) platform.Event { e.Optional = true; return e }

// common gives the places of the longest common sequence in both lists.
func common(a, b []platform.Event) [][2]int {
	same := func(i, j int) bool { return slices.Contains(a[i].SHA256, b[j].SHA256[0]) }
	length := make([][]int, len(a)+1)
	for i := range length {
		length[i] = make([]int, len(b)+1)
	}
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			length[i][j] = max(length[i+1][j], length[i][j+1])
			if same(i, j) {
				length[i][j] = length[i+1][j+1] + 1
			}
		}
	}
	var places [][2]int
	for i, j := 0, 0; i < len(a) && j < len(b); {
		switch {
		case same(i, j) && length[i][j] == length[i+1][j+1]+1:
			places = append(places, [2]int{i, j})
			i, j = i+1, j+1
		case length[i+1][j] >= length[i][j+1]:
			i++
		default:
			j++
		}
	}
	return places
}

// Change is one component in which two sets of reference values differ.
type Change struct {
	Component string          `json:"component"`
	Before    []digest.SHA256 `json:"before,omitempty"` // none: it is new
	After     []digest.SHA256 `json:"after,omitempty"`  // none: it is gone
	Note      string          `json:"note,omitempty"`
}

// Diff says what b changes in a: components in the order of the boot, then files by name.
func Diff(a, b platform.Manifest) []Change {
	var list []Change
	for _, i := range pcr.Static {
		list = append(list, diffRegister(i, ofRegister(a.Boot, i), ofRegister(b.Boot, i))...)
	}
	for _, i := range platform.UserspaceRegisters {
		list = append(list, diffRegister(i, textEvents(a.Userspace, i), textEvents(b.Userspace, i))...)
	}
	before, after := byName(a.Files), byName(b.Files)
	for _, name := range names(a.Files, b.Files) {
		if !sameSet(before[name], after[name]) {
			list = append(list, Change{Component: name, Before: before[name], After: after[name]})
		}
	}
	for _, p := range []struct {
		name          string
		before, after digest.SHA256
	}{
		{"VMs' firmware", a.Firmware.BIOS, b.Firmware.BIOS},
		{"VMs' loader kernel", a.Firmware.LoaderKernel, b.Firmware.LoaderKernel},
		{"VMs' loader initramfs", a.Firmware.LoaderInitramfs, b.Firmware.LoaderInitramfs},
	} {
		if p.before != p.after {
			list = append(list, Change{Component: p.name, Before: []digest.SHA256{p.before}, After: []digest.SHA256{p.after}})
		}
	}
	if a.Firmware.LoaderCmdline != b.Firmware.LoaderCmdline {
		list = append(list, Change{Component: "VMs' loader command line", Note: fmt.Sprintf("%q, before %q", b.Firmware.LoaderCmdline, a.Firmware.LoaderCmdline)})
	}
	return list
}

func diffRegister(index int, a, b []platform.Event) []Change {
	name := func(e platform.Event) string { return fmt.Sprintf("%s, PCR %d", e.Component, index) }
	var list []Change
	i, j := 0, 0
	for _, p := range append(common(a, b), [2]int{len(a), len(b)}) {
		for ; i < p[0] && j < p[1]; i, j = i+1, j+1 {
			list = append(list, Change{Component: name(a[i]), Before: a[i].SHA256, After: b[j].SHA256})
		}
		for ; i < p[0]; i++ {
			list = append(list, Change{Component: name(a[i]), Before: a[i].SHA256})
		}
		for ; j < p[1]; j++ {
			list = append(list, Change{Component: name(b[j]), After: b[j].SHA256})
		}
		if i < len(a) && j < len(b) {
			if !sameSet(a[i].SHA256, b[j].SHA256) || a[i].Optional != b[j].Optional {
				c := Change{Component: name(a[i]), Before: a[i].SHA256, After: b[j].SHA256}
				if a[i].Optional != b[j].Optional {
					c.Note = map[bool]string{true: "may be missing now", false: "must be there now"}[b[j].Optional]
				}
				list = append(list, c)
			}
			i, j = i+1, j+1
		}
	}
	return list
}

func byName(files []platform.File) map[string][]digest.SHA256 {
	m := map[string][]digest.SHA256{}
	for _, f := range files {
		m[f.Name] = append(m[f.Name], f.SHA256)
	}
	return m
}

func names(lists ...[]platform.File) []string {
	var out []string
	for _, files := range lists {
		for _, f := range files {
			out = append(out, f.Name)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func sameSet(a, b []digest.SHA256) bool {
	in := func(list []digest.SHA256) func(digest.SHA256) bool {
		return func(d digest.SHA256) bool { return !slices.Contains(list, d) }
	}
	return !slices.ContainsFunc(a, in(b)) && !slices.ContainsFunc(b, in(a))
}
