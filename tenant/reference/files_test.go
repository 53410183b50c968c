package reference

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/imalog/imalogtest"
	"foothold/protocol/platform"
	"foothold/protocol/tcglog"
	"foothold/tenant/verify"
)

// writeProgram is a program of EFI's with these sections "name=data", each padded to 16 bytes.
func writeProgram(sections ...string) []byte {
	const pe, optional, directories, table = 0x40, 0x40 + 24, 112, 0x40 + 24 + 112 + 6*8
	headers := table + len(sections)*40
	out := make([]byte, headers)
	copy(out, "MZ")
	binary.LittleEndian.PutUint32(out[0x3c:], pe)
	copy(out[pe:], "PE\x00\x00")
	binary.LittleEndian.PutUint16(out[pe+6:], uint16(len(sections)))
	binary.LittleEndian.PutUint16(out[pe+20:], table-optional)
	binary.LittleEndian.PutUint16(out[optional:], 0x20b)
	binary.LittleEndian.PutUint32(out[optional+60:], uint32(headers))
	binary.LittleEndian.PutUint32(out[optional+directories-4:], 6)
	for i, s := range sections {
		name, data, _ := strings.Cut(s, "=")
		header := out[table+i*40:]
		copy(header[:8], name)
		size := (len(data) + 15) / 16 * 16
		binary.LittleEndian.PutUint32(header[8:], uint32(len(data)))
		binary.LittleEndian.PutUint32(header[16:], uint32(size))
		binary.LittleEndian.PutUint32(header[20:], uint32(len(out)))
		out = append(out, data...)
		out = append(out, make([]byte, size-len(data))...)
	}
	return out
}

// Where a program of writeProgram has its checksum and the entry of its certificates.
const checksumAt, certificatesAt = 0x40 + 24 + 64, 0x40 + 24 + 112 + 4*8

// sign puts a signature behind a program, as signing tools do.
func sign(p []byte, signature string) []byte {
	out := bytes.Clone(p)
	binary.LittleEndian.PutUint32(out[certificatesAt:], uint32(len(p)))
	binary.LittleEndian.PutUint32(out[certificatesAt+4:], uint32(len(signature)))
	binary.LittleEndian.PutUint32(out[checksumAt:], 0x1234)
	return append(out, signature...)
}

func TestAuthenticode(t *testing.T) {
	p := writeProgram(".text=code", ".data=more data than sixteen bytes")
	sum, err := programSum(p)
	if err != nil {
		t.Fatal(err)
	}
	parts := slices.Concat(p[:checksumAt], p[checksumAt+4:certificatesAt], p[certificatesAt+8:])
	if want := digest.SHA256(sha256.Sum256(parts)); sum != want {
		t.Errorf("%s, want %s", sum, want)
	}
	if signed, err := programSum(sign(p, "a signature of some kind")); err != nil || signed != sum {
		t.Errorf("signed: %s, %v, want %s", signed, err, sum)
	}
	if longer, err := programSum(append(bytes.Clone(p), "appendix"...)); err != nil || longer == sum {
		t.Errorf("what stands behind the sections is not measured: %v", err)
	}
	for i := range p {
		other := bytes.Clone(p)
		other[i] ^= 1
		changed, err := programSum(other)
		covered := (i < checksumAt || i >= checksumAt+4) && (i < certificatesAt || i >= certificatesAt+8)
		if err == nil && covered == (changed == sum) {
			t.Errorf("byte %d: covered %v, %s", i, covered, changed)
		}
	}
	for n := range len(p) {
		if cut, err := programSum(p[:n]); err == nil {
			t.Errorf("cut to %d bytes: %s", n, cut)
		}
	}
	over := bytes.Clone(p)
	binary.LittleEndian.PutUint32(over[0x40+24+112+6*8+20:], uint32(len(p)-16)) // the first section lies upon the second
	if sum, err := programSum(over); err == nil {
		t.Errorf("sections that share bytes: %s", sum)
	}
	// A gap before the last section, as a stub of odd length leaves it: firmware takes as many
	// bytes from where it would have come to.
	const second = 0x40 + 24 + 112 + 6*8 + 40 // header of the second section
	at := int(binary.LittleEndian.Uint32(p[second+20:]))
	gap := slices.Concat(p[:at], make([]byte, 8), p[at:])
	binary.LittleEndian.PutUint32(gap[second+20:], uint32(at+8))
	parts = slices.Concat(gap[:checksumAt], gap[checksumAt+4:certificatesAt], gap[certificatesAt+8:at], gap[at+8:], gap[len(gap)-8:])
	if sum, err := programSum(gap); err != nil || sum != digest.SHA256(sha256.Sum256(parts)) {
		t.Errorf("with a gap: %s, %v", sum, err)
	}
}

// Whatever the bytes are: no panic, and one digest for what firmware runs alike.
func FuzzProgram(f *testing.F) {
	p := writeProgram(".text=code", ".data=more data than sixteen bytes")
	f.Add(p)
	f.Add(sign(p, "signature"))
	f.Add(ukiOf())
	f.Fuzz(func(t *testing.T, data []byte) {
		_, _ = parseUKI(data)
		p, err := parseImage(data)
		if err != nil {
			return
		}
		sum := p.authenticode()
		other := bytes.Clone(data)
		other[p.checksum] ^= 1
		if again, err := programSum(other); err != nil || again != sum {
			t.Fatalf("another checksum: %s, %v, before %s", again, err, sum)
		}
		if other = bytes.Clone(data); p.headers > p.checksum+4 {
			other[p.headers-1] ^= 1
		}
		if again, err := programSum(other); err == nil && again == sum && p.headers > p.checksum+4 && (p.certificate == 0 || p.headers > p.certificate+8) {
			t.Fatal("a changed header has the same digest")
		}
	})
}

const stubOf252 = ".sdmagic=#### LoaderInfo: systemd-stub 252.39-1~deb12u1 ####\x00"

// ukiOf is a unified kernel image; sections may replace its parts, or come in addition.
func ukiOf(sections ...string) []byte {
	parts := []string{".text=stub", ".sbat=sbat", stubOf252, ".osrel=ID=x", ".cmdline=quiet", ".linux=" + string(writeProgram(".text=kernel")), ".initrd=initramfs"}
	for _, s := range sections {
		name, _, _ := strings.Cut(s, "=")
		at := slices.IndexFunc(parts, func(p string) bool { return strings.HasPrefix(p, name+"=") })
		switch {
		case at >= 0 && s == name:
			parts = slices.Delete(parts, at, at+1)
		case at >= 0:
			parts[at] = s
		default:
			parts = append(parts, s)
		}
	}
	return writeProgram(parts...)
}

// event is one of a firmware's log, without data.
type event struct {
	register int
	typ      tcglog.Type
	sum      digest.SHA256
}

func of(register int, typ tcglog.Type, data string) event {
	return event{register, typ, digest.Of([]byte(data))}
}

func writeLog(events ...event) []byte {
	spec := append([]byte("Spec ID Event03\x00"), 0, 0, 0, 0, 0, 2, 0, 2, 1, 0, 0, 0, 0x0b, 0, 32, 0, 0)
	log := append(word(0, uint32(tcglog.NoAction)), make([]byte, 20)...)
	log = append(append(log, word(uint32(len(spec)))...), spec...)
	for _, e := range events {
		log = append(append(log, word(uint32(e.register), uint32(e.typ), 1)...), 0x0b, 0)
		log = append(append(log, e.sum[:]...), word(0)...)
	}
	return log
}

// firmwareOf are the events of a machine's firmware until it runs a program.
func firmwareOf() (list []event) {
	list = append(list, of(0, tcglog.CRTMVersion, "firmware"), of(7, tcglog.VariableConfig, "secure boot"), of(4, 0x80000007, "Calling"))
	for i := range 8 {
		list = append(list, of(i, tcglog.Separator, "\x00\x00\x00\x00"))
	}
	return list
}

func mustSum(t *testing.T, p []byte) digest.SHA256 {
	t.Helper()
	sum, err := programSum(p)
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// A manifest made of files takes what a host measures that boots them, though no host has
// before; one that boots or runs anything else differs.
func TestReleaseOfFiles(t *testing.T) {
	root := t.TempDir()
	for name, content := range map[string]string{"bin/agent": "agent", "lib/tun.ko": "tun", "share/doc/readme": "doc"} {
		if err := os.MkdirAll(filepath.Join(root, filepath.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("agent", filepath.Join(root, "bin/other")); err != nil {
		t.Fatal(err)
	}
	files, err := Files(root, "/usr", []string{"/usr/share/doc/"})
	if err != nil {
		t.Fatal(err)
	}
	want := []platform.File{{Name: "/usr/bin/agent", SHA256: digest.Of([]byte("agent"))}, {Name: "/usr/lib/tun.ko", SHA256: digest.Of([]byte("tun"))}}
	if !slices.Equal(files, want) {
		t.Errorf("%v, want %v", files, want)
	}
	if _, err := Files(root, "/usr", []string{"/usr"}); err == nil {
		t.Error("a release without files: accepted")
	}
	if _, err := Files(filepath.Join(root, "none"), "/", nil); err == nil {
		t.Error("a folder that is not there: accepted")
	}

	// The firmware is a host's that booted something else, by a boot menu.
	other := append(firmwareOf(), of(4, program, "another menu"), of(12, tcglog.IPL, "another line"), of(4, program, "another"), of(9, tcglog.EventTag, "another"),
		of(11, tcglog.IPL, "another"), of(5, 0x80000007, "Exit Boot Services"))
	menu := writeProgram(".text=menu")
	name := func(s string) event { return of(11, tcglog.IPL, s+"\x00") }
	wide := func(s string) string { return string(tcglog.UTF16(s)) }
	for _, c := range []struct {
		name    string
		release Release
		booted  []event
	}{
		{"an image", Release{UKI: ukiOf()}, []event{
			{4, program, mustSum(t, ukiOf())}, name(".linux"), {11, tcglog.IPL, digest.Of(writeProgram(".text=kernel"))}, name(".osrel"), of(11, tcglog.IPL, "ID=x"),
			name(".cmdline"), of(11, tcglog.IPL, "quiet"), name(".initrd"), of(11, tcglog.IPL, "initramfs"), {4, program, mustSum(t, writeProgram(".text=kernel"))},
			of(9, tcglog.EventTag, wide("quiet")), of(9, tcglog.EventTag, "initramfs")}},
		{"an image of a later stub, with a boot menu and its line", Release{Loaders: [][]byte{menu}, Cmdline: "quiet debug", UKI: ukiOf(".sdmagic=#### LoaderInfo: systemd-stub 254.1 ####", ".uname=6.1", ".splash=picture")}, []event{
			{4, program, mustSum(t, menu)}, of(12, tcglog.IPL, wide("quiet debug")), {4, program, mustSum(t, ukiOf(".sdmagic=#### LoaderInfo: systemd-stub 254.1 ####", ".uname=6.1", ".splash=picture"))},
			name(".linux"), {11, tcglog.IPL, digest.Of(writeProgram(".text=kernel"))}, name(".osrel"), of(11, tcglog.IPL, "ID=x"), name(".cmdline"), of(11, tcglog.IPL, "quiet"),
			name(".initrd"), of(11, tcglog.IPL, "initramfs"), name(".splash"), of(11, tcglog.IPL, "picture"), name(".uname"), of(11, tcglog.IPL, "6.1"), name(".sbat"), of(11, tcglog.IPL, "sbat"),
			{4, program, mustSum(t, writeProgram(".text=kernel"))}, of(9, tcglog.EventTag, wide("quiet debug")), of(9, tcglog.EventTag, "initramfs")}},
	} {
		doc := platform.Manifest{Name: "2026-12", Profile: platform.Production, ValidFrom: time.Now(), ValidUntil: time.Now().Add(time.Hour)}
		doc.Firmware.BIOS, doc.Firmware.LoaderKernel, doc.Firmware.LoaderInitramfs = digest.Of([]byte("b")), digest.Of([]byte("k")), digest.Of([]byte("i"))
		c.release.Files = files
		if err := c.release.Add(&doc, writeLog(other...)); err != nil {
			t.Fatalf("%s: %v", c.name, err)
		}
		compare := func(files []string, booted ...event) string {
			firmware := writeLog(slices.Concat(firmwareOf(), booted, []event{of(5, 0x80000007, "Exit Boot Services")})...)
			findings, err := verify.CompareLogs(doc, evidence.Platform{Firmware: firmware, Kernel: imalogtest.List(t, firmware, files...)})
			if err != nil {
				t.Fatal(err)
			}
			text := ""
			for _, f := range findings {
				text += f.Detail + "\n"
			}
			return text
		}
		if text := compare([]string{"/usr/bin/agent=agent", "/usr/lib/tun.ko=tun"}, c.booted...); text != "" {
			t.Errorf("%s: %s", c.name, text)
		}
		if text := compare([]string{"/usr/bin/agent=another"}, c.booted...); !strings.Contains(text, `file "/usr/bin/agent"`) {
			t.Errorf("%s, another agent: %s", c.name, text)
		}
		for i, e := range c.booted {
			changed := slices.Clone(c.booted)
			changed[i].sum = digest.Of([]byte("changed"))
			if text := compare([]string{"/usr/bin/agent=agent"}, changed...); !strings.Contains(text, e.sum.String()) {
				t.Errorf("%s, event %d changed: %q", c.name, i+1, text)
			}
		}
	}
}

func TestReleaseOfFilesIsRefused(t *testing.T) {
	files := []platform.File{{Name: "/bin/agent", SHA256: digest.Of([]byte("agent"))}}
	firmware := writeLog(firmwareOf()...)
	again := append(firmwareOf(), of(4, program, "first try"), of(4, 0x80000007, "Returning"), of(4, program, "second try"))
	for name, c := range map[string]struct {
		release  Release
		firmware []byte
		says     string
	}{
		"no files":                         {Release{UKI: ukiOf()}, firmware, "no files"},
		"no image":                         {Release{Files: files}, firmware, "not a program"},
		"a kernel alone":                   {Release{UKI: writeProgram(".text=kernel"), Files: files}, firmware, "no version of systemd-stub"},
		"a boot loader that is no program": {Release{UKI: ukiOf(), Loaders: [][]byte{[]byte("menu")}, Files: files}, firmware, "boot loader 1"},
		"a stub that is too new":           {Release{UKI: ukiOf(".sdmagic=#### LoaderInfo: systemd-stub 257 ####"), Files: files}, firmware, "version 257"},
		"a signed policy":                  {Release{UKI: ukiOf(".pcrsig={}"), Files: files}, firmware, ".pcrsig"},
		"no initramfs":                     {Release{UKI: ukiOf(".initrd"), Files: files}, firmware, "no section .initrd"},
		"no command line":                  {Release{UKI: ukiOf(".cmdline"), Files: files}, firmware, "no section .cmdline"},
		"a command line that is altered":   {Release{UKI: ukiOf(".cmdline=quiet\n"), Files: files}, firmware, "would alter"},
		"a kernel that is none":            {Release{UKI: ukiOf(".linux=kernel"), Files: files}, firmware, "kernel"},
		"two kernels":                      {Release{UKI: writeProgram(".linux=a", ".linux=b"), Files: files}, firmware, "two sections"},
		"no firmware":                      {Release{UKI: ukiOf(), Files: files}, nil, "firmware log"},
		"a firmware that tried twice":      {Release{UKI: ukiOf(), Files: files}, writeLog(again...), "more than once"},
	} {
		var doc platform.Manifest
		if err := c.release.Add(&doc, c.firmware); err == nil || !strings.Contains(err.Error(), c.says) || len(doc.Boot)+len(doc.Files) > 0 {
			t.Errorf("%s: does not say %q: %v", name, c.says, err)
		}
	}
}
