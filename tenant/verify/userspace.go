package verify

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/systemdlog"
)

// maxText bounds a text of the reference values in bytes.
const maxText = 1024

// textsComplete checks what the host's system may measure.
func textsComplete(texts []platform.Text) error {
	if len(texts) > platform.MaxTexts {
		return fmt.Errorf("they name %d texts of the host's system, at most %d are read", len(texts), platform.MaxTexts)
	}
	for _, t := range texts {
		if t.Text == "" || len(t.Text) > maxText {
			return fmt.Errorf("a text of register %d is empty, or longer than %d bytes", t.PCR, maxText)
		}
		if !slices.Contains(platform.UserspaceRegisters, t.PCR) {
			return fmt.Errorf("%s extends register %d, which is not the system's", t.Component(), t.PCR)
		}
	}
	return nil
}

// userspaceLog holds what the host's system says that it measured against the reference
// values, and gives the events by which it extended the registers. A host without such a log
// may have measured what they name, as far as it has come; nothing else explains a register.
//
// Every record counts, also one that came after the quote. Texts and types in the log decide
// nothing: each register's digests must be a beginning of the named ones, in order.
func (j *judgement) userspaceLog(data []byte) (events []pcr.Event) {
	texts := j.reference().doc.Userspace
	if len(data) == 0 {
		return extensions(texts)
	}
	records, err := systemdlog.Parse(data)
	if err != nil {
		j.find("log", "%v", err)
		return nil
	}
	at := map[int]int{} // how many texts of a register were seen
	for _, r := range records {
		if !slices.Contains(pcr.Static, r.PCR) {
			continue // no quote has it
		}
		if len(events) == platform.MaxTexts {
			j.find("log", "the host's system extended quoted registers more than %d times", platform.MaxTexts)
			return nil
		}
		events = append(events, pcr.Event{PCR: r.PCR, Digest: r.SHA256})
		at[r.PCR] = j.text(r, ofTexts(texts, r.PCR), at[r.PCR])
	}
	return events
}

// text holds a record against its register's texts, of which the first seen have come
// already, and gives how many have come with it.
func (j *judgement) text(r systemdlog.Record, texts []platform.Text, seen int) int {
	where := slices.IndexFunc(texts[seen:], func(t platform.Text) bool { return t.Digest() == r.SHA256 })
	if where < 0 {
		expected := "not to be there"
		if slices.ContainsFunc(texts[:seen], func(t platform.Text) bool { return t.Digest() == r.SHA256 }) {
			expected = "to be measured once, in its place"
		}
		j.differ("log", fmt.Sprintf("%s, PCR %d", nameOf(r), r.PCR), expected, fmt.Sprintf("record %d of the system's log", r.Number), changedTexts)
		return seen
	}
	for _, t := range texts[seen : seen+where] {
		j.differ("log", fmt.Sprintf("%s, PCR %d", t.Component(), t.PCR), "to come before "+nameOf(r), "no such record before it", changedTexts)
	}
	return seen + where + 1
}

// nameOf is what a record is about, for people: its text only if that was measured.
func nameOf(r systemdlog.Record) string {
	if r.Authentic() {
		return platform.Text{PCR: r.PCR, Text: r.Text}.Component()
	}
	return fmt.Sprintf("sha256 %s, which says %.80q and is not its digest", r.SHA256, r.Text)
}

const changedTexts = "if the host's system is to measure that, make reference values that name it, of such a host's evidence or by --phases"

func ofTexts(texts []platform.Text, index int) (out []platform.Text) {
	for _, t := range texts {
		if t.PCR == index {
			out = append(out, t)
		}
	}
	return out
}

// extensions are what the texts extend their registers by.
func extensions(texts []platform.Text) (events []pcr.Event) {
	for _, t := range texts {
		events = append(events, pcr.Event{PCR: t.PCR, Digest: t.Digest()})
	}
	return events
}

// phases are the words that systemd's own units measure (systemd-pcrphase.service(8)). An
// image without systemd in its initramfs begins with the third.
var phases = []string{"enter-initrd", "leave-initrd", "sysinit", "ready", "shutdown", "final"}

// otherTexts are what a host's system, which keeps no log, may have measured instead of the
// texts: systemd's own phases, the texts and one phase more, the texts without one.
func otherTexts(texts []platform.Text) (list [][]platform.Text) {
	word := func(w string) platform.Text { return platform.Text{PCR: platform.PhaseRegister, Text: w} }
	add := func(t ...platform.Text) {
		if len(t) > 0 && !slices.ContainsFunc(list, func(l []platform.Text) bool { return slices.Equal(l, t) }) {
			list = append(list, t)
		}
	}
	for _, first := range []int{0, 2} {
		for n := first + 1; n <= len(phases); n++ {
			var t []platform.Text
			for _, w := range phases[first:n] {
				t = append(t, word(w))
			}
			add(t...)
		}
	}
	for n := range len(texts) + 1 {
		for _, w := range phases {
			add(append(slices.Clone(texts[:n]), word(w))...)
		}
		if n < len(texts) {
			add(slices.Delete(slices.Clone(texts), n, n+1)...)
		}
	}
	return list
}

// maxTried bounds the kernel's list up to which other texts are tried, in entries: each costs
// as many digests.
const maxTried = 2048

// explainTexts finds the texts that lead to the quoted digest where no log says which the
// host's system measured; empty if none do.
func explainTexts(got []byte, want quoteExpectation) string {
	m := want.static
	if m.kernel != nil && len(m.kernel.Entries) > maxTried {
		return ""
	}
	for _, texts := range m.texts {
		other := measured{regs: maps.Clone(m.regs), kernel: m.kernel}
		for _, e := range extensions(texts) {
			other.regs[e.PCR] = pcr.Extend(other.regs[e.PCR], e.Digest)
		}
		if other.leads(want.selection, want.registers, got) {
			var words []string
			for _, t := range texts {
				words = append(words, fmt.Sprintf("%s, PCR %d", t.Component(), t.PCR))
			}
			return fmt.Sprintf("the host's system has measured %s, and the reference values name other texts; %s", strings.Join(words, ", then "), changedTexts)
		}
	}
	return ""
}
