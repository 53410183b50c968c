package verify

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"maps"
	"slices"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/imalog"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/tcglog"
)

// measured is what a host's static registers hold if its logs are true: in a lab what the
// reference values lead to, in production what logs lead to whose every entry was found in
// the reference values.
type measured struct {
	regs map[int]digest.SHA256
	// userspace are the events by which the host's system extended regs once the kernel ran: a
	// beginning of them, since they grow.
	userspace []pcr.Event
	// texts, for an explanation: other texts than the expected ones, where no log says which.
	texts [][]platform.Text
	// kernel leads to pcr.Platform from some beginning of it, since it grows; nil in a lab,
	// where regs has that register.
	kernel *imalog.List
}

// leads reports whether these registers, with others of the VM, have the quoted digest.
func (m measured) leads(selection []int, others map[int]digest.SHA256, quoted []byte) bool {
	// Nearly every host has come to the end of what its system measures.
	for n := len(m.userspace); n >= 0; n-- {
		regs := maps.Clone(m.regs)
		for _, e := range m.userspace[:n] {
			regs[e.PCR] = pcr.Extend(regs[e.PCR], e.Digest)
		}
		maps.Copy(regs, others)
		if m.kernelLeads(selection, pcr.Values(selection, regs), quoted) {
			return true
		}
	}
	return false
}

// kernelLeads reports whether these registers' values and the kernel's list have the quoted
// digest.
func (m measured) kernelLeads(selection []int, values, quoted []byte) bool {
	same := func() bool {
		sum := digest.Of(values)
		return subtle.ConstantTimeCompare(quoted, sum[:]) == 1
	}
	if m.kernel == nil {
		return same()
	}
	at := slices.Index(selection, pcr.Platform)
	if at < 0 {
		return false // it would prove nothing of the list
	}
	n, ok := m.kernel.Prefix(func(value digest.SHA256) bool {
		copy(values[at*len(value):], value[:])
		return same()
	})
	return ok && n > 0 // an empty register proves nothing of the list: the kernel measured nothing
}

// readLogs holds the host's logs against the reference values. The first result is what the
// registers must hold; the second, what they hold by the host's own word, explains.
func (j *judgement) readLogs(p evidence.Platform) (expected, claimed measured) {
	if j.v.profile == platform.Lab {
		if len(p.Firmware) > 0 || len(p.Kernel) > 0 || len(p.Userspace) > 0 {
			j.find("log", "a host of profile lab has no log of firmware or kernel, and none of its system")
		}
		j.log(p.Log)
		return j.launched(p.Log)
	}
	if len(p.Log) > 0 {
		j.find("log", "a launcher's log counts in a lab alone")
	}
	m := measured{kernel: &imalog.List{}}
	var boot bootLog
	m.regs, boot = j.firmwareLog(p.Firmware)
	j.bootPolicy(boot)
	kernel, err := imalog.Parse(p.Kernel)
	if err != nil {
		j.find("log", "%v", err)
		return m, m
	}
	m.kernel = kernel
	j.kernelList(kernel, m.regs)
	m.userspace = j.userspaceLog(p.Userspace)
	if len(p.Userspace) == 0 {
		m.texts = otherTexts(j.reference().doc.Userspace)
	}
	return m, m
}

// launched gives a lab's registers, by the reference values and by the host's log.
func (j *judgement) launched(log []pcr.Event) (expected, claimed measured) {
	expected.regs, claimed.regs = map[int]digest.SHA256{}, map[int]digest.SHA256{}
	if j.platform != nil {
		expected.regs = j.platform.static()
	}
	if len(log) <= pcr.MaxEvents {
		for i, v := range pcr.Replay(log) {
			if slices.Contains(pcr.Static, i) {
				claimed.regs[i] = v
			}
		}
	}
	return expected, claimed
}

// firmwareLog holds the firmware's log against the reference values and replays it.
// Types, numbers and data in the log decide nothing: each register's digests must be
// those of the release, in order.
func (j *judgement) firmwareLog(data []byte) (map[int]digest.SHA256, bootLog) {
	regs, boot := map[int]digest.SHA256{}, bootLog{map[int][]tcglog.Event{}, map[int][]platform.Event{}}
	if len(data) == 0 {
		j.find("log", "there is no log of the firmware")
		return regs, boot
	}
	l, err := tcglog.Parse(data)
	if err != nil {
		j.find("log", "%v", err)
		return regs, boot
	}
	values, err := l.Replay(tcglog.SHA256)
	if err != nil {
		j.find("log", "%v", err)
		return regs, boot
	}
	boot.events = l.ByRegister()
	for _, i := range slices.Sorted(maps.Keys(values)) {
		if i == pcr.Platform || !slices.Contains(pcr.Static, i) {
			j.find("log", "the firmware's log extends register %d, which is not the firmware's", i)
			continue
		}
		regs[i] = digest.SHA256(values[i])
	}
	for _, i := range pcr.Static {
		if i != pcr.Platform {
			boot.named[i] = j.register(i, boot.events[i])
		}
	}
	return regs, boot
}

// register compares one register's events with the reference values, and gives for each
// event the one that it was found to be.
func (j *judgement) register(index int, events []tcglog.Event) []platform.Event {
	want, named := j.reference().boot[index], make([]platform.Event, 0, len(events))
	for _, e := range events {
		var is platform.Event
		got := digest.SHA256(e.Digest(tcglog.SHA256))
		at := slices.IndexFunc(want, func(w platform.Event) bool { return slices.Contains(w.SHA256, got) })
		// Between here and there only optional ones may be missing.
		missing := slices.IndexFunc(want, func(w platform.Event) bool { return !w.Optional })
		switch {
		case at >= 0 && (missing < 0 || at <= missing):
			is, want = want[at], want[at+1:]
		case missing >= 0:
			j.differ("log", fmt.Sprintf("%s, PCR %d", want[missing].Component, index), list(want[missing].SHA256),
				fmt.Sprintf("%s (event %d, which says %v)", got, e.Number, e.Type), changedPlatform)
			want = want[missing+1:]
		default:
			j.differ("log", fmt.Sprintf("PCR %d", index), "no further event",
				fmt.Sprintf("%s (event %d, which says %v)", got, e.Number, e.Type), changedPlatform)
		}
		named = append(named, is)
	}
	for _, w := range want {
		if !w.Optional {
			j.differ("log", fmt.Sprintf("%s, PCR %d", w.Component, index), list(w.SHA256), "no such event", changedPlatform)
		}
	}
	return named
}

// kernelList compares each file that the kernel measured with the reference values. All of
// the list counts, also what came after the quote.
func (j *judgement) kernelList(l *imalog.List, regs map[int]digest.SHA256) {
	if len(l.Entries) == 0 {
		j.find("log", "the kernel's list is empty")
		return
	}
	files := j.reference().files
	for i, e := range l.Entries {
		if i == 0 {
			j.aggregate(e, regs)
			continue
		}
		known := files[e.Path]
		switch {
		case e.Violation:
			j.differ("log", fmt.Sprintf("file %q", e.Path), "a file that nobody writes to while it is measured", "one that was being written to", changedPlatform)
		case e.Algorithm != "sha256" || len(e.Digest) != sha256.Size:
			j.differ("log", fmt.Sprintf("file %q", e.Path), "a digest of sha256", fmt.Sprintf("one of %.20q", e.Algorithm), "have the host's kernel measure with ima_hash=sha256")
		case len(known) == 0:
			j.differ("log", fmt.Sprintf("file %q", e.Path), "not to be there", digest.SHA256(e.Digest).String(), changedPlatform)
		case !slices.Contains(known, digest.SHA256(e.Digest)):
			j.differ("log", fmt.Sprintf("file %q", e.Path), list(known), digest.SHA256(e.Digest).String(), changedPlatform)
		}
	}
}

// aggregate checks the kernel's first entry, its word on the firmware's registers: SHA-256
// over registers 0 to 9. It ties the list to this boot.
func (j *judgement) aggregate(e imalog.Entry, regs map[int]digest.SHA256) {
	h := sha256.New()
	for i := range 10 {
		value := regs[i]
		h.Write(value[:])
	}
	if want := h.Sum(nil); e.Path != "boot_aggregate" || e.Violation || e.Algorithm != "sha256" || !bytes.Equal(e.Digest, want) {
		j.differ("log", "boot_aggregate", fmt.Sprintf("%x", want), fmt.Sprintf("%x of %.40q", e.Digest, e.Path),
			"the two logs are not of one boot, or firmware measured after the kernel began")
	}
}

// reference is empty where there are no reference values, which is a finding of its own.
func (j *judgement) reference() *Platform {
	if j.platform == nil {
		return &Platform{}
	}
	return j.platform
}

const changedPlatform = "compare with the release that the provider announced; if the change is wanted, sign reference values for it"

// list is digests for people, however many there are.
func list(sums []digest.SHA256) string {
	const most = 4
	text := ""
	for i, s := range sums {
		if i == most {
			return fmt.Sprintf("%s or one of %d others", text, len(sums)-most)
		}
		if i > 0 {
			text += " or "
		}
		text += s.String()
	}
	return text
}
