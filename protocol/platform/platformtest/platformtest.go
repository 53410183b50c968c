// Package platformtest is a host of profile production in small, for tests and measurements:
// what its firmware, kernel and system measure, the logs that they keep of it, and what
// reference values have of it.
package platformtest

import (
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/imalog/imalogtest"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/tcglog"
)

// Machine is such a host. Whoever changes it has another that logs the truth about itself.
type Machine struct {
	Events []Event         // of firmware, boot loader and dynamic launch
	Files  []platform.File // that its kernel measures
	Late   []platform.File // that its kernel measures and logs after a quote
	Texts  []platform.Text // that its system measures
	NoLog  bool            // its system keeps no log of Texts
	Silent bool            // its kernel measures nothing, and the list is made up
	// Aggregate, if set, takes the place of the kernel's word on registers 0 to 9.
	Aggregate []byte
}

// Event is one of the firmware's, which extends a register by the digest of its data.
type Event struct {
	PCR  int
	Type tcglog.Type
	Data string
}

// CommandLine is the one that the kernel of New gets.
const CommandLine = "quiet lockdown"

// New measures as a PC does whose firmware calls itself "firmware 1.0".
func New() *Machine {
	m := &Machine{Events: []Event{{0, tcglog.CRTMVersion, "firmware 1.0"}, {7, tcglog.VariableConfig, SecureBoot(1)}}}
	for i := range 8 {
		m.Events = append(m.Events, Event{i, tcglog.Separator, "\x00\x00\x00\x00"})
	}
	m.Events = append(m.Events,
		Event{4, 0x80000003, "boot loader"}, Event{11, tcglog.IPL, ".linux"}, Event{11, tcglog.IPL, "kernel"},
		Event{11, tcglog.IPL, ".cmdline"}, Event{11, tcglog.IPL, CommandLine},
		Event{9, tcglog.EventTag, string(tcglog.UTF16(CommandLine))})
	for _, path := range []string{"/usr/bin/foothold-host", "/usr/lib/modules/tun.ko", "/usr/bin/qemu-system-x86_64"} {
		m.Files = append(m.Files, File(path))
	}
	return m
}

// File is a file whose content is told by its name.
func File(name string) platform.File {
	return platform.File{Name: name, SHA256: digest.Of([]byte(name + " content"))}
}

// Variable is UEFI_VARIABLE_DATA.
func Variable(vendor tcglog.GUID, name string, data ...byte) string {
	wide := tcglog.UTF16(name)
	wide = wide[:len(wide)-2]
	out := binary.LittleEndian.AppendUint64(vendor[:], uint64(len(wide)/2))
	out = append(binary.LittleEndian.AppendUint64(out, uint64(len(data))), wide...)
	return string(append(out, data...))
}

// SecureBoot is the firmware's variable of that name: 1 for on.
func SecureBoot(state ...byte) string { return Variable(tcglog.GlobalVariable, "SecureBoot", state...) }

// Reference are the events as reference values have them.
func (m *Machine) Reference() (list []platform.Event) {
	for i, e := range m.Events {
		list = append(list, platform.Event{PCR: e.PCR, Component: fmt.Sprintf("part %d", i+1), SHA256: []digest.SHA256{e.digest()}, Type: uint32(e.Type)})
	}
	return list
}

// Replace has the first event with that data measure other.
func (m *Machine) Replace(data, other string) {
	m.Events[slices.IndexFunc(m.Events, func(e Event) bool { return e.Data == data })].Data = other
}

func (e Event) digest() digest.SHA256 { return digest.Of([]byte(e.Data)) }

// Measured is by what its TPM is extended until a quote; names are what is measured. The first of
// pcr.Launch is the processor's own work, the others of pcr.Dynamic are extended at locality 2.
func (m *Machine) Measured() (list []pcr.Event) {
	for _, e := range m.Events {
		list = append(list, pcr.Event{PCR: e.PCR, Digest: e.digest(), Name: e.Data})
	}
	if !m.Silent {
		_, extended := imalogtest.Entry(m.aggregate())
		list = append(list, pcr.Event{PCR: pcr.Platform, Digest: extended, Name: "boot_aggregate"})
		for _, f := range m.Files {
			_, extended := imalogtest.Entry(f.Name, f.SHA256[:])
			list = append(list, pcr.Event{PCR: pcr.Platform, Digest: extended, Name: f.Name})
		}
	}
	for _, t := range m.Texts {
		list = append(list, pcr.Event{PCR: t.PCR, Digest: t.Digest(), Name: t.Text})
	}
	return list
}

// aggregate is what the kernel measures first (security/integrity/ima/ima_crypto.c).
func (m *Machine) aggregate() (path string, sum []byte) {
	if m.Aggregate != nil {
		return "boot_aggregate", m.Aggregate
	}
	regs := map[int]digest.SHA256{}
	for _, e := range m.Events {
		regs[e.PCR] = pcr.Extend(regs[e.PCR], e.digest())
	}
	h := sha256.New()
	for i := range 10 {
		value := regs[i]
		h.Write(value[:])
	}
	return "boot_aggregate", h.Sum(nil)
}

// Logs are what it gives of itself.
func (m *Machine) Logs() evidence.Platform {
	p := evidence.Platform{Firmware: FirmwareLog(m.Events)}
	p.Kernel, _ = imalogtest.Entry(m.aggregate())
	for _, f := range slices.Concat(m.Files, m.Late) {
		p.Kernel = append(p.Kernel, Measurement(f)...)
	}
	for _, t := range m.Texts {
		if !m.NoLog {
			p.Userspace = append(p.Userspace, Record(t.PCR, t.Text, t.Text)...)
		}
	}
	return p
}

// FirmwareLog writes events as firmware does: one bank, SHA-256 (TCG PC Client Platform
// Firmware Profile, section 10.4.5.1, "Specification ID Version Event").
func FirmwareLog(events []Event) []byte {
	spec := append([]byte("Spec ID Event03\x00"), 0, 0, 0, 0, 0, 2, 0, 2, 1, 0, 0, 0, 0x0b, 0, 32, 0, 0)
	out := append(words(0, uint32(tcglog.NoAction)), make([]byte, 20)...)
	out = append(append(out, words(uint32(len(spec)))...), spec...)
	for _, e := range events {
		sum := e.digest()
		out = append(append(out, words(uint32(e.PCR), uint32(e.Type), 1)...), 0x0b, 0)
		out = append(append(out, sum[:]...), words(uint32(len(e.Data)))...)
		out = append(out, e.Data...)
	}
	return out
}

// Measurement is a file's entry in the kernel's list.
func Measurement(f platform.File) []byte {
	entry, _ := imalogtest.Entry(f.Name, f.SHA256[:])
	return entry
}

// Violation is an entry of the kernel's list for a file that was being written to.
func Violation(path string) []byte {
	entry := Measurement(platform.File{Name: path})
	copy(entry[4:24], make([]byte, 20)) // register u32 | template's digest
	return entry
}

// Record is a record of systemd's log, as version 257 writes it, which says text and has the
// digest of what was measured.
func Record(register int, text, measured string) []byte {
	return fmt.Appendf(nil, "\x1e"+`{"pcr":%d,"digests":[{"hashAlg":"sha256","digest":"%s"}],"content_type":"systemd","content":{"string":%q,"bootId":"7d5a4b7c2f6e4d1c9b8a7f6e5d4c3b2a","timestamp":4061113,"eventType":"phase"}}`+"\n",
		register, digest.Of([]byte(measured)), text)
}

func words(list ...uint32) (out []byte) {
	for _, n := range list {
		out = binary.LittleEndian.AppendUint32(out, n)
	}
	return out
}
