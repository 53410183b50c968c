package verify

import (
	"bytes"
	"crypto/ed25519"
	"fmt"
	"slices"
	"strings"
	"testing"

	"foothold/protocol/evidence"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/platform/platformtest"
	"foothold/protocol/signed"
)

// words are texts of the boot's phases; one of another register says so: "9:text".
func words(list ...string) (texts []platform.Text) {
	for _, w := range list {
		t := platform.Text{PCR: platform.PhaseRegister, Text: w}
		if rest, ok := strings.CutPrefix(w, "9:"); ok {
			t = platform.Text{PCR: 9, Text: rest}
		}
		texts = append(texts, t)
	}
	return texts
}

func TestPhasesOfTheBoot(t *testing.T) {
	w := newWorld(t)
	good := []string{"enter-initrd", "9:nvpcr-init:hardware", "leave-initrd", "sysinit", "ready"}
	doc := newMachine().manifest(w)
	none := w.production(t, doc)
	doc.Userspace = words(good...)
	v := w.production(t, doc)
	for _, c := range []struct {
		name string
		by   *Verifier
		says string // "": accepted
		log  string // what is said where a log is kept; "": as without one
		did  []string
	}{
		{"the whole way", v, "", "", good},
		{"a part of the way", v, "", "", good[:3]},
		{"no step of it", v, "", "", nil},
		{"none, where none is named", none, "", "", nil},

		{"a way where none is named", none, `has measured boot phase "sysinit", PCR 11, then boot phase "ready", PCR 11, and the`, `log: boot phase "ready", PCR 11`, good[3:]},
		{"one step more", v, `then boot phase "shutdown", PCR 11, and the`, `log: boot phase "shutdown", PCR 11: seen record 6`, append(slices.Clone(good), "shutdown")},
		{"an unknown step", v, "neither the host's log", `log: boot phase "debug-shell", PCR 11: seen record 6 of the system's log, want not to be there`, append(slices.Clone(good), "debug-shell")},
		{"a step left out", v, `has measured boot phase "enter-initrd", PCR 11, then the system's text "nvpcr-init:hardware", PCR 9, then boot phase "sysinit"`,
			`boot phase "leave-initrd", PCR 11: seen no such record before it, want to come before boot phase "sysinit"`, slices.Delete(slices.Clone(good), 2, 3)},
		{"two steps in another order", v, "neither the host's log", `boot phase "leave-initrd", PCR 11: seen no such record before it`, []string{"enter-initrd", "9:nvpcr-init:hardware", "sysinit", "leave-initrd", "ready"}},
		{"a step twice", v, `then boot phase "leave-initrd", PCR 11, then boot phase "leave-initrd", PCR 11, and the`, `boot phase "leave-initrd", PCR 11: seen record 4 of the system's log, want to be measured once`, []string{"enter-initrd", "9:nvpcr-init:hardware", "leave-initrd", "leave-initrd"}},
		{"another text of another register", v, "neither the host's log", `the system's text "nvpcr-init:other", PCR 9`, []string{"enter-initrd", "9:nvpcr-init:other"}},
	} {
		for _, noLog := range []bool{false, true} {
			m := newMachine()
			m.Texts, m.NoLog = words(c.did...), noLog
			verdict := m.prove(w, c.by, nil)
			name, says := fmt.Sprintf("%s, no log: %v", c.name, noLog), c.says
			if !noLog && c.log != "" {
				says = c.log
			}
			if says == "" {
				if err := verdict.Err(); err != nil {
					t.Errorf("%s: %v", name, err)
				}
			} else if verdict.Good() || !strings.Contains(verdict.Err().Error(), says) {
				t.Errorf("%s: does not say %q: %v", name, says, verdict.Findings)
			}
		}
	}
	// The order of two registers' texts is no register's: units run side by side.
	m := newMachine()
	m.Texts = words("9:nvpcr-init:hardware", "enter-initrd", "leave-initrd")
	if err := m.prove(w, v, nil).Err(); err != nil {
		t.Errorf("registers in another order: %v", err)
	}
}

// The system's log lies: the registers hold something else, or texts are not what was measured.
func TestSystemLogsThatLie(t *testing.T) {
	w := newWorld(t)
	m := newMachine()
	doc := m.manifest(w)
	doc.Userspace = words("enter-initrd", "leave-initrd", "sysinit", "ready")
	v := w.production(t, doc)
	m.Texts = words("enter-initrd", "leave-initrd", "sysinit")
	record := platformtest.Record
	sysinit := record(11, "sysinit", "sysinit")
	add := func(r []byte) func(*evidence.Platform) {
		return func(p *evidence.Platform) { p.Userspace = append(bytes.Clone(p.Userspace), r...) }
	}
	swap := func(r []byte) func(*evidence.Platform) {
		return func(p *evidence.Platform) { p.Userspace = bytes.Replace(p.Userspace, sysinit, r, 1) }
	}
	for name, c := range map[string]struct {
		forge func(*evidence.Platform)
		says  string // "": accepted
	}{
		"as it is":                                           {func(*evidence.Platform) {}, ""},
		"a named step after the quote":                       {add(record(11, "ready", "ready")), ""},
		"a text that is none of the digest":                  {swap(record(11, "final", "sysinit")), ""},
		"what no quote has":                                  {add(record(15, "machine-id:1", "x")), ""},
		"an unknown step after the quote":                    {add(record(11, "debug-shell", "debug-shell")), `boot phase "debug-shell", PCR 11`},
		"a step after the quote by a digest that is not its": {add(record(11, "ready", "debug-shell")), `which says "ready" and is not its digest`},
		"a true step hidden":                                 {swap(nil), "registers"},
		"another digest, true text":                          {swap(record(11, "sysinit", "debug-shell")), `which says "sysinit" and is not its digest`},
		"another step":                                       {swap(record(11, "ready", "ready")), "registers"},
		"two in another order": {func(p *evidence.Platform) {
			p.Userspace = slices.Concat(sysinit, record(11, "enter-initrd", "enter-initrd"), record(11, "leave-initrd", "leave-initrd"))
		}, "registers"},
		"another register":          {swap(record(12, "sysinit", "sysinit")), `the system's text "sysinit", PCR 12`},
		"the firmware's register":   {add(record(4, "x", "x")), "PCR 4"},
		"the kernel's register":     {add(record(pcr.Platform, "x", "x")), "PCR 10"},
		"cut in a record":           {func(p *evidence.Platform) { p.Userspace = p.Userspace[:len(p.Userspace)-1] }, "in the middle"},
		"more than may be measured": {add(bytes.Repeat(record(11, "ready", "ready"), platform.MaxTexts)), "more than 32 times"},
	} {
		verdict := m.prove(w, v, c.forge)
		if c.says == "" {
			if err := verdict.Err(); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		} else if verdict.Good() || !strings.Contains(verdict.Err().Error(), c.says) {
			t.Errorf("%s: does not say %q: %v", name, c.says, verdict.Findings)
		}
	}
	// Logs of a good boot beside registers that another one extended.
	bad := newMachine()
	bad.Texts = words("enter-initrd", "leave-initrd", "debug-shell")
	if verdict := bad.prove(w, v, swapLog(m)); verdict.Good() || checks(verdict) != "registers " {
		t.Errorf("a good host's log: %v", verdict.Findings)
	}
	// No log at all, which is a lie here too.
	if verdict := bad.prove(w, v, func(p *evidence.Platform) { p.Userspace = nil }); verdict.Good() || checks(verdict) != "registers " {
		t.Errorf("no log of an unknown step: %v", verdict.Findings)
	}
}

// swapLog gives a host the system's log of another one.
func swapLog(m *machine) func(*evidence.Platform) {
	return func(p *evidence.Platform) {
		p.Userspace = nil
		for _, t := range m.Texts {
			p.Userspace = append(p.Userspace, platformtest.Record(t.PCR, t.Text, t.Text)...)
		}
	}
}

func TestTextsOfReferenceValues(t *testing.T) {
	w := newWorld(t)
	m := newMachine()
	public := w.plat.Public().(ed25519.PublicKey)
	for name, list := range map[string][]platform.Text{
		"an empty text":           {{PCR: 11}},
		"a long text":             {{PCR: 11, Text: strings.Repeat("x", maxText+1)}},
		"the firmware's register": {{PCR: 7, Text: "x"}},
		"the kernel's register":   {{PCR: pcr.Platform, Text: "x"}},
		"a VM's register":         {{PCR: pcr.VM, Text: "x"}},
		"a register of nobody":    {{PCR: 15, Text: "x"}},
		"too many":                slices.Repeat([]platform.Text{{PCR: 11, Text: "x"}}, platform.MaxTexts+1),
	} {
		doc := m.manifest(w)
		doc.Userspace = list
		if _, err := ParsePlatform(seal(t, w.plat, signed.Platform, doc), public, doc.Profile, w.now); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	lab := w.manifest()
	lab.Userspace = words("ready")
	if _, err := ParsePlatform(seal(t, w.plat, signed.Platform, lab), public, platform.Lab, w.now); err == nil {
		t.Error("a lab's reference values with phases: accepted")
	}
	a := w.attempt()
	a.ev.Platform.Userspace = platformtest.Record(11, "ready", "ready")
	a.quote()
	if _, verdict := w.verifier().Boot(a.expect, a.ev); verdict.Good() || checks(verdict) != "log " {
		t.Errorf("a lab's host with a system's log: %v", verdict.Findings)
	}
}
