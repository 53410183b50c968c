package site

import (
	"bytes"
	"encoding/binary"
	"slices"

	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/imalog"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/platform/platformtest"
	"foothold/protocol/tcglog"
)

// lie is what a host's logs say instead of what they hold.
type lie struct {
	name  string
	forge func(*evidence.Platform)
	why   event.Reason // empty: it is no lie that matters
	says  string
}

func truth(*evidence.Platform) {}

// honest gives the logs of a good host.
func honest(p *evidence.Platform) { *p = launched().Logs() }

// firmware forges the firmware's log.
func firmware(forge func(log []byte)) func(*evidence.Platform) {
	return func(p *evidence.Platform) { forge(p.Firmware) }
}

// events has a firmware's log of other events.
func events(change func([]platformtest.Event) []platformtest.Event) func(*evidence.Platform) {
	return func(p *evidence.Platform) { p.Firmware = platformtest.FirmwareLog(change(launched().Events)) }
}

// list forges the kernel's list.
func list(forge func(list []byte) []byte) func(*evidence.Platform) {
	return func(p *evidence.Platform) { p.Kernel = forge(p.Kernel) }
}

// system forges the system's log.
func system(forge func(log []byte) []byte) func(*evidence.Platform) {
	return func(p *evidence.Platform) { p.Userspace = forge(p.Userspace) }
}

func refused(name string, forge func(*evidence.Platform), says string) lie {
	return lie{name, forge, event.QuoteRefused, says}
}

// others are hosts that are not as they must be, with the logs that they give.
func others() []struct {
	name   string
	change func(*platformtest.Machine)
	lies   []lie
} {
	const hidden = "registers: "
	add := func(e platformtest.Event) func(*platformtest.Machine) {
		return func(m *platformtest.Machine) { m.Events = append(m.Events, e) }
	}
	swap := func(data, other string) func(*platformtest.Machine) {
		return func(m *platformtest.Machine) { m.Replace(data, other) }
	}
	without := func(is func(platformtest.Event) bool) func(*platformtest.Machine) {
		return func(m *platformtest.Machine) { m.Events = slices.DeleteFunc(m.Events, is) }
	}
	return []struct {
		name   string
		change func(*platformtest.Machine)
		lies   []lie
	}{
		{"other firmware and another module", func(m *platformtest.Machine) { m.Replace(version, "firmware 6.6"); m.Files[1] = spy }, []lie{
			refused("another machine's logs", honest, hidden),
			refused("another machine's firmware log", func(p *evidence.Platform) { p.Firmware = launched().Logs().Firmware }, hidden),
			refused("another machine's list", func(p *evidence.Platform) { p.Kernel = launched().Logs().Kernel }, hidden),
			refused("truth", truth, `file "/usr/lib/modules/spy.ko"`),
		}},
		{"an unknown event", add(platformtest.Event{PCR: 4, Type: 0x80000003, Data: "rootkit"}), []lie{
			refused("truth", truth, "PCR 4: seen "+digest.Of([]byte("rootkit")).String()),
			refused("left out", honest, hidden),
			refused("by its type extending nothing", firmware(func(log []byte) { platformtest.Relabel(log, "rootkit", tcglog.NoAction) }), hidden),
			refused("said to extend another register", firmware(func(log []byte) { platformtest.Move(log, "rootkit", 15) }), "extends register 15, which is not the firmware's"),
			refused("with a known one's data", firmware(func(log []byte) { platformtest.Falsify(log, "rootkit", bootLoader) }), "PCR 4: seen "+digest.Of([]byte("rootkit")).String()),
		}},
		{"no separator of register 1", without(func(e platformtest.Event) bool { return e.PCR == 1 }), []lie{
			refused("truth", truth, "PCR 1: seen no such event"),
			refused("in the log alone", honest, hidden),
		}},
		{"a separator that tells of an error", func(m *platformtest.Machine) {
			m.Events[slices.IndexFunc(m.Events, func(e platformtest.Event) bool { return e.PCR == 7 && e.Data == separator })].Data = "\xff\xff\xff\xff"
		}, []lie{
			refused("truth", truth, "PCR 7: seen "+digest.Of([]byte("\xff\xff\xff\xff")).String()),
			refused("with a good one's data", firmware(func(log []byte) { platformtest.Falsify(log, "\xff\xff\xff\xff", separator) }), "PCR 7: seen "),
		}},
		{"a database whose list has a header", swap(db, otherDB), []lie{
			refused("truth", truth, "PCR 7: seen "+digest.Of([]byte(otherDB)).String()),
			refused("with the known one's data", firmware(func(log []byte) { platformtest.Falsify(log, otherDB, db) }), "PCR 7: seen "),
		}},
		{"secure boot off", swap(on, off), []lie{
			refused("truth", truth, "policy: secure boot: seen disabled, want enabled"),
			refused("on by its data", firmware(func(log []byte) { platformtest.Falsify(log, off, on) }), "policy: secure boot: seen no variable"),
			refused("on by an event that extends nothing", events(func(list []platformtest.Event) []platformtest.Event {
				list[1].Data = off
				return slices.Insert(list, 1, platformtest.Event{PCR: 7, Type: tcglog.NoAction, Data: on})
			}), "policy: secure boot: seen disabled, want enabled"),
			refused("on by its digest, too", honest, hidden),
		}},
		{"an earlier firmware", swap(version, oldVersion), []lie{
			refused("truth", truth, `policy: firmware version: seen "firmware 0.9", want firmware 1.0 or later`),
			refused("a later one by its data", firmware(func(log []byte) { platformtest.Falsify(log, oldVersion, "firmware 9.0") }), "policy: firmware version: seen a version that is no text, or not what was measured"),
			refused("by its type no version", firmware(func(log []byte) { platformtest.Relabel(log, oldVersion, tcglog.IPL) }), `policy: firmware version: seen "firmware 0.9"`),
			refused("another event by its type", firmware(func(log []byte) { platformtest.Relabel(log, separator, tcglog.CRTMVersion) }), `policy: firmware version: seen "firmware 0.9"`),
		}},
		{"another command line", func(m *platformtest.Machine) {
			m.Replace(platformtest.CommandLine, otherLine)
			m.Replace(wide(platformtest.CommandLine), wide(otherLine))
		}, []lie{
			refused("truth", truth, "policy: kernel command line: seen another"),
			refused("the allowed one's data", firmware(func(log []byte) { platformtest.Falsify(log, wide(otherLine), wide(platformtest.CommandLine)) }), "policy: kernel command line: seen another"),
		}},
		{"no dynamic launch", without(func(e platformtest.Event) bool { return e.PCR >= pcr.Launch }), []lie{
			refused("truth", truth, "policy: dynamic launch, PCR 17"),
			refused("in the log alone", honest, hidden),
		}},
		{"a dynamic launch without its policy", without(func(e platformtest.Event) bool { return e.Data == authorities }), []lie{
			refused("truth", truth, "policy: dynamic launch, PCR 18"),
		}},
		{"a dynamic launch of another module", swap(module, "another SINIT"), []lie{
			refused("truth", truth, "PCR 17: seen "+digest.Of([]byte("another SINIT")).String()),
			refused("by the log of a good one", honest, hidden),
		}},
		{"a dynamic launch with more than is named", add(platformtest.Event{PCR: 22, Type: 0x501, Data: "more"}), []lie{
			refused("truth", truth, "PCR 22: seen "+digest.Of([]byte("more")).String()),
			refused("left out", honest, hidden),
		}},
		{"another module", func(m *platformtest.Machine) { m.Files = append(m.Files, spy) }, []lie{
			refused("truth", truth, `file "/usr/lib/modules/spy.ko"`),
			refused("left out", honest, hidden),
			refused("under a good file's name", list(func(l []byte) []byte {
				return append(bytes.TrimSuffix(l, platformtest.Measurement(spy)), platformtest.Measurement(platform.File{Name: "/usr/lib/modules/tun.ko", SHA256: spy.SHA256})...)
			}), `file "/usr/lib/modules/tun.ko": seen `+spy.SHA256.String()),
		}},
		{"a kernel that measures nothing", func(m *platformtest.Machine) { m.Silent = true }, []lie{refused("with a list", truth, hidden)}},
		{"a kernel that says of another boot", func(m *platformtest.Machine) { m.Aggregate = make([]byte, 32) }, []lie{
			refused("truth", truth, "boot_aggregate: seen "),
			refused("with a good one's word", honest, hidden),
		}},
		{"a shell in its initramfs", func(m *platformtest.Machine) { m.Texts = phases("enter-initrd", "debug-shell", "leave-initrd") }, []lie{
			refused("truth", truth, `boot phase "debug-shell", PCR 11`),
			refused("a good system's log", honest, hidden),
			refused("no log", func(p *evidence.Platform) { p.Userspace = nil }, hidden),
			refused("another text by that digest", system(func(log []byte) []byte {
				return bytes.Replace(log, []byte(`"string":"debug-shell"`), []byte(`"string":"ready"`), 1)
			}), `which says "ready" and is not its digest`),
		}},
	}
}

// lies are what the logs of a good host say in its place.
func lies() []lie {
	shift := func(at int, register int) func([]platformtest.Event) []platformtest.Event {
		return func(list []platformtest.Event) []platformtest.Event { list[at].PCR = register; return list }
	}
	record := func(register int, text, measured string) func([]byte) []byte {
		return func(log []byte) []byte {
			return append(log, platformtest.Record(register, text, measured)...)
		}
	}
	files, sysinit := launched().Files, platformtest.Record(platform.PhaseRegister, "sysinit", "sysinit")
	unknown := bytes.Repeat(platformtest.Measurement(spy), imalog.MaxEntries)
	swap := func(text, measured string) func([]byte) []byte {
		return func(log []byte) []byte {
			return bytes.Replace(log, sysinit, platformtest.Record(platform.PhaseRegister, text, measured), 1)
		}
	}
	return []lie{
		refused("no firmware log", func(p *evidence.Platform) { p.Firmware = nil }, "there is no log of the firmware"),
		refused("a firmware log that is cut", func(p *evidence.Platform) { p.Firmware = p.Firmware[:len(p.Firmware)-60] }, "the log ends in the middle"),
		refused("a firmware log of the form before", func(p *evidence.Platform) { p.Firmware = make([]byte, 32) }, "no digest of SHA-256"),
		refused("an event left out", events(func(list []platformtest.Event) []platformtest.Event { return slices.Delete(list, 0, 1) }), "part 1, PCR 0: seen "),
		refused("an event twice", events(func(list []platformtest.Event) []platformtest.Event { return slices.Insert(list, 0, list[0]) }), "part 4, PCR 0: seen "),
		refused("two events in another order", events(func(list []platformtest.Event) []platformtest.Event {
			list[1], list[2] = list[2], list[1]
			return list
		}), "PCR 7: seen "),
		refused("a separator left out", events(func(list []platformtest.Event) []platformtest.Event {
			return slices.DeleteFunc(list, func(e platformtest.Event) bool { return e.PCR == 3 })
		}), "PCR 3: seen no such event"),
		refused("a separator that extends nothing", firmware(func(log []byte) { platformtest.Relabel(log, separator, tcglog.NoAction) }), "PCR 0: seen no such event"),
		refused("an event of the kernel's register", events(shift(0, pcr.Platform)), "extends register 10, which is not the firmware's"),
		refused("an event of a VM's register", events(shift(0, pcr.VM)), "extends register 16, which is not the firmware's"),
		refused("a register that there is not", events(shift(0, 24)), "there is no register 24"),
		refused("a launch left out", events(func(list []platformtest.Event) []platformtest.Event { return list[:len(list)-2] }), "policy: dynamic launch, PCR 17"),
		refused("a launch that does not begin", events(func(list []platformtest.Event) []platformtest.Event {
			n := len(list)
			list[n-1], list[n-2] = list[n-2], list[n-1]
			return list
		}), "before a dynamic launch"),
		refused("started from another locality", events(func(list []platformtest.Event) []platformtest.Event {
			return slices.Insert(list, 0, platformtest.Event{Type: tcglog.NoAction, Data: "StartupLocality\x00\x03"})
		}), "registers: "),
		refused("an event of a gigabyte", firmware(func(log []byte) { platformtest.Resize(log, bootLoader, 1<<30) }), "the log ends in the middle"),
		refused("more events than are read", events(func([]platformtest.Event) []platformtest.Event {
			return make([]platformtest.Event, tcglog.MaxEvents+1)
		}), "more than 4096 events"),
		{"a million events", events(func([]platformtest.Event) []platformtest.Event { return make([]platformtest.Event, 1e6) }), event.HostRefused, "larger than its limit"},

		refused("no list", list(func([]byte) []byte { return nil }), "the kernel's list is empty"),
		refused("a list from its middle", list(func(l []byte) []byte { return l[1:] }), "kernel's list: entry 1: it extends register"),
		refused("an entry of the list left out", list(func(l []byte) []byte { return bytes.Replace(l, platformtest.Measurement(files[1]), nil, 1) }), "registers: "),
		refused("two entries in another order", list(func(l []byte) []byte {
			one, two := platformtest.Measurement(files[1]), platformtest.Measurement(files[2])
			return bytes.Replace(l, slices.Concat(one, two), slices.Concat(two, one), 1)
		}), "registers: "),
		refused("a list behind the quote", list(func(l []byte) []byte { return bytes.TrimSuffix(l, platformtest.Measurement(files[2])) }), "registers: "),
		refused("a list ahead of the quote by an unknown file", list(func(l []byte) []byte { return append(l, platformtest.Measurement(spy)...) }), `file "/usr/lib/modules/spy.ko"`),
		refused("a file that was written to", list(func(l []byte) []byte { return append(l, platformtest.Violation(files[0].Name)...) }), "one that was being written to"),
		refused("an entry of a gigabyte", list(func(l []byte) []byte {
			binary.LittleEndian.PutUint32(l[24:], 1<<30) // register u32 | template's digest | size of its name
			return l
		}), "a part has 1073741824 bytes, at most 32 are read"),
		refused("a longer list than is read", list(func([]byte) []byte { return unknown }), "at most 4194304 are read"),
		refused("a launcher's log", func(p *evidence.Platform) {
			*p = evidence.Platform{Log: []pcr.Event{{PCR: pcr.Platform, Digest: spy.SHA256, Name: spy.Name}}}
		}, "a launcher's log counts in a lab alone"),
		refused("a launcher's log beside them", func(p *evidence.Platform) {
			p.Log = []pcr.Event{{PCR: pcr.Platform, Digest: spy.SHA256, Name: spy.Name}}
		}, "a launcher's log counts in a lab alone"),

		refused("a phase hidden", system(func(log []byte) []byte { return bytes.Replace(log, sysinit, nil, 1) }), "registers: "),
		refused("a phase in another's place", system(swap("ready", "ready")), "registers: "),
		refused("a phase by another digest", system(swap("sysinit", "debug-shell")), `which says "sysinit" and is not its digest`),
		refused("a phase twice", system(record(platform.PhaseRegister, "sysinit", "sysinit")), "to be measured once, in its place"),
		refused("a phase before its time", system(func(log []byte) []byte { return slices.Concat(sysinit, bytes.Replace(log, sysinit, nil, 1)) }), "to come before"),
		refused("an unknown phase after the quote", system(record(platform.PhaseRegister, "debug-shell", "debug-shell")), `boot phase "debug-shell", PCR 11`),
		refused("a text of the firmware's register", system(record(4, "x", "x")), "PCR 4: seen record"),
		refused("a text of the kernel's register", system(record(pcr.Platform, "x", "x")), "PCR 10: seen record"),
		refused("a system's log that is cut", system(func(log []byte) []byte { return log[:len(log)-1] }), "in the middle"),
		refused("more texts than may be", system(func(log []byte) []byte { return append(log, bytes.Repeat(sysinit, platform.MaxTexts)...) }), "more than 32 times"),

		// What is said and not proved decides nothing: these are accepted.
		{"every type swapped", events(func(list []platformtest.Event) []platformtest.Event {
			for i := range list {
				list[i].Type = tcglog.IPL
			}
			return list
		}), "", ""},
		{"a false name of the boot loader", firmware(func(log []byte) { platformtest.Falsify(log, bootLoader, "b00t l0ader") }), "", ""},
		{"a database's data with a list that has a header", firmware(func(log []byte) { platformtest.Falsify(log, db, otherDB) }), "", ""},
		{"a named phase after the quote", system(record(platform.PhaseRegister, "ready", "ready")), "", ""},
		{"true", truth, "", ""},
	}
}
