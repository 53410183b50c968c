package reference

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"
	"strings"
	"testing"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/imalog/imalogtest"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/platform/platformtest"
	"foothold/protocol/tcglog"
)

// events of a register from a text: one event a letter.
func boot(register int, text string) []platform.Event {
	var list []platform.Event
	for _, c := range text {
		list = append(list, platform.Event{PCR: register, Component: string(c), SHA256: []digest.SHA256{digest.Of([]byte(string(c)))}})
	}
	return list
}

// write shows events as a text: alternatives in brackets, optional ones with a question mark.
func write(list []platform.Event) string {
	letters := map[digest.SHA256]string{}
	for c := 'a'; c <= 'z'; c++ {
		letters[digest.Of([]byte(string(c)))] = string(c)
	}
	text := ""
	for _, e := range list {
		part := ""
		for _, s := range e.SHA256 {
			part += letters[s]
		}
		if len(e.SHA256) > 1 {
			part = "[" + part + "]"
		}
		if e.Optional {
			part += "?"
		}
		text += part
	}
	return text
}

func TestMerge(t *testing.T) {
	for _, c := range []struct{ have, seen, want string }{
		{"abc", "abc", "abc"},
		{"abc", "axc", "a[bx]c"},
		{"abc", "ac", "ab?c"},
		{"ac", "abc", "ab?c"},
		{"", "ab", "a?b?"},
		{"ab", "", "a?b?"},
		{"abcd", "axyd", "a[bx][cy]d"},
		{"abcd", "axd", "a[bx]c?d"},
		{"abcabc", "abcbc", "abca?bc"},
	} {
		if got := write(merge(boot(1, c.have), boot(1, c.seen))); got != c.want {
			t.Errorf("%q and %q: %s, want %s", c.have, c.seen, got, c.want)
		}
	}
}

func TestDiff(t *testing.T) {
	a := platform.Manifest{Boot: append(boot(0, "ab"), boot(4, "xyz")...), Files: []platform.File{
		{Name: "/a", SHA256: digest.Of([]byte("1"))}, {Name: "/b", SHA256: digest.Of([]byte("2"))}, {Name: "/c", SHA256: digest.Of([]byte("3"))}}}
	if d := Diff(a, a); len(d) != 0 {
		t.Errorf("a document and itself: %v", d)
	}
	b := platform.Manifest{Boot: append(boot(0, "ac"), boot(4, "xzw")...), Files: []platform.File{
		{Name: "/a", SHA256: digest.Of([]byte("1"))}, {Name: "/b", SHA256: digest.Of([]byte("new"))}, {Name: "/d", SHA256: digest.Of([]byte("4"))}}}
	b.Boot[0].Optional = true
	b.Firmware.LoaderCmdline = "quiet"
	var lines []string
	for _, c := range Diff(a, b) {
		lines = append(lines, fmt.Sprintf("%s %d>%d %s", c.Component, len(c.Before), len(c.After), c.Note))
	}
	want := []string{"a, PCR 0 1>1 may be missing now", "b, PCR 0 1>1 ", "y, PCR 4 1>0 ", "w, PCR 4 0>1 ", "/b 1>1 ", "/c 1>0 ", "/d 0>1 ",
		`VMs' loader command line 0>0 "quiet", before ""`}
	if !slices.Equal(lines, want) {
		t.Errorf("%s\nwant\n%s", strings.Join(lines, "\n"), strings.Join(want, "\n"))
	}
}

func word(list ...uint32) []byte {
	var out []byte
	for _, n := range list {
		out = binary.LittleEndian.AppendUint32(out, n)
	}
	return out
}

// host makes logs: events of registers 0 and 7 from texts, files by name and content.
func host(zero, seven string, files ...string) evidence.Platform {
	var events []platformtest.Event
	for register, text := range map[int]string{0: zero, 7: seven} {
		for _, c := range text {
			events = append(events, platformtest.Event{PCR: register, Type: tcglog.IPL, Data: string(c)})
		}
	}
	var kernel []byte
	for _, f := range append([]string{"boot_aggregate=registers"}, files...) {
		path, content, _ := strings.Cut(f, "=")
		sum := digest.Of([]byte(content))
		entry, _ := imalogtest.Entry(path, sum[:])
		kernel = append(kernel, entry...)
	}
	return evidence.Platform{Firmware: platformtest.FirmwareLog(events), Kernel: kernel}
}

func TestAdd(t *testing.T) {
	var doc platform.Manifest
	for _, h := range []evidence.Platform{host("ab", "s", "/sh=1", "/agent=1"), host("ax", "s", "/sh=2", "/agent=1")} {
		if err := Add(&doc, h); err != nil {
			t.Fatal(err)
		}
	}
	if got := write(doc.Boot); got != "a[bx]s" {
		t.Errorf("events %s", got)
	}
	if doc.Boot[0].Component != "EV_IPL a" || doc.Boot[2].PCR != 7 {
		t.Errorf("events %+v", doc.Boot)
	}
	var files []string
	for _, f := range doc.Files {
		files = append(files, f.Name)
	}
	if !slices.Equal(files, []string{"/agent", "/sh", "/sh"}) {
		t.Errorf("files %v", files)
	}

	bad := host("ab", "s", "/sh=1")
	for name, p := range map[string]evidence.Platform{
		"no firmware log": {Kernel: bad.Kernel},
		"no kernel list":  {Firmware: bad.Firmware},
		"garbled":         {Firmware: bad.Firmware, Kernel: bad.Kernel[1:]},
	} {
		if err := Add(&platform.Manifest{}, p); err == nil {
			t.Errorf("%s: taken for a host's", name)
		}
	}
	if err := Add(&platform.Manifest{}, evidence.Platform{Firmware: bytes.Replace(bad.Firmware, word(7, uint32(tcglog.IPL)), word(pcr.Platform, uint32(tcglog.IPL)), 1), Kernel: bad.Kernel}); err == nil {
		t.Error("a firmware that extends the kernel's register was taken for a host")
	}
	violated := host("a", "s", "/sh=1")
	at := len(host("a", "s").Kernel)
	copy(violated.Kernel[at+4:at+24], make([]byte, 20))
	if err := Add(&platform.Manifest{}, violated); err == nil {
		t.Error("a file that was being written to became a reference value")
	}
}

// systemRecord is a record of systemd's log.
func systemRecord(register int, text string, sum digest.SHA256) []byte {
	return fmt.Appendf(nil, "\x1e"+`{"pcr":%d,"digests":[{"hashAlg":"sha256","digest":"%s"}],"content_type":"systemd","content":{"string":%q}}`+"\n", register, sum, text)
}

func TestTextsOfTheSystem(t *testing.T) {
	with := func(texts ...platform.Text) (p evidence.Platform) {
		p = host("a", "s", "/sh=1")
		for _, text := range texts {
			p.Userspace = append(p.Userspace, systemRecord(text.PCR, text.Text, text.Digest())...)
		}
		return p
	}
	enter, leave, index, machine := platform.Text{PCR: 11, Text: "enter-initrd"}, platform.Text{PCR: 11, Text: "leave-initrd"}, platform.Text{PCR: 9, Text: "nvpcr-init"}, platform.Text{PCR: 15, Text: "machine-id"}
	var doc platform.Manifest
	for n, seen := range [][]platform.Text{{enter, machine}, {enter, index, leave}, {}, {index, enter}} {
		if err := Add(&doc, with(seen...)); err != nil {
			t.Fatalf("host %d: %v", n+1, err)
		}
	}
	if want := []platform.Text{enter, index, leave}; !slices.Equal(doc.Userspace, want) {
		t.Errorf("%v, want %v", doc.Userspace, want)
	}
	before := len(doc.Boot)
	for name, p := range map[string]evidence.Platform{
		"another way":             with(enter, enter),
		"a digest of another":     {Firmware: with().Firmware, Kernel: with().Kernel, Userspace: systemRecord(11, "enter-initrd", digest.Of([]byte("x")))},
		"the firmware's register": with(platform.Text{PCR: 4, Text: "x"}),
		"a garbled log":           {Firmware: with().Firmware, Kernel: with().Kernel, Userspace: []byte("x")},
	} {
		if err := Add(&doc, p); err == nil || len(doc.Boot) != before || len(doc.Userspace) != 3 {
			t.Errorf("%s: %v, %v", name, err, doc.Userspace)
		}
	}
	other := doc
	other.Userspace = []platform.Text{enter, leave, {PCR: 11, Text: "sysinit"}}
	changes := Diff(doc, other)
	if len(changes) != 2 || changes[0].Component != `the system's text "nvpcr-init", PCR 9` || len(changes[0].After) != 0 || changes[1].Component != `boot phase "sysinit", PCR 11` || len(changes[1].Before) != 0 {
		t.Errorf("%+v", changes)
	}
}
