package reference

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"foothold/protocol/digest"
	"foothold/protocol/imalog"
	"foothold/protocol/platform"
	"foothold/protocol/tcglog"
)

// Release is a platform release as its maker ships it: files, from which is computed what a
// host measures that boots them.
type Release struct {
	Loaders [][]byte // programs of EFI's that the firmware starts before UKI, in their order: a boot menu
	UKI     []byte   // unified kernel image, with systemd-stub
	Cmdline string   // the kernel's command line where the boot menu passes one; else the image's counts
	Files   []platform.File
}

// Add completes a manifest with what a host measures that boots the release. What only
// firmware knows - its own code and configuration, secure boot's state, how it leaves the boot
// services - is taken from the firmware's log of a known-good host of the same kind, which may
// have booted another release: registers 0 to 3 and 5 to 7, and of register 4 what is no
// program. Of such a host's kernel nothing is taken.
func (r Release) Add(doc *platform.Manifest, firmware []byte) error {
	if len(r.Files) == 0 {
		return errors.New("the release has no files")
	}
	seen, err := events(firmware)
	if err != nil {
		return err
	}
	boot, err := onlyFirmware(seen)
	if err != nil {
		return err
	}
	booted, err := r.boot()
	if err != nil {
		return err
	}
	addBoot(doc, append(boot, booted...))
	addFiles(doc, r.Files)
	return nil
}

// program is the type of an event that is about a program which firmware runs.
const program = tcglog.Type(0x80000003)

// onlyFirmware are the events that do not depend on what a host boots.
func onlyFirmware(all []platform.Event) (list []platform.Event, err error) {
	const programs = 4 // register
	ran := false
	for _, e := range all {
		switch {
		case e.PCR > 7:
			continue
		case e.PCR == programs && tcglog.Type(e.Type) == program:
			ran = true
			continue
		case e.PCR == programs && ran:
			return nil, fmt.Errorf("the firmware's log has %s, PCR %d, after a program that it ran: the host tried to boot more than once; take the log of one that did not", e.Component, programs)
		}
		list = append(list, e)
	}
	return list, nil
}

// boot are the events of what is booted: programs, then what systemd-stub and the
// kernel's EFI stub measure.
func (r Release) boot() (list []platform.Event, err error) {
	add := func(register int, t tcglog.Type, component string, sums ...digest.SHA256) {
		list = append(list, platform.Event{PCR: register, Component: component, SHA256: sums, Type: uint32(t)})
	}
	for i, data := range r.Loaders {
		sum, err := programSum(data)
		if err != nil {
			return nil, fmt.Errorf("boot loader %d: %w", i+1, err)
		}
		add(4, program, fmt.Sprintf("boot loader %d", i+1), sum)
	}
	uki, err := parseUKI(r.UKI)
	if err != nil {
		return nil, fmt.Errorf("unified kernel image: %w", err)
	}
	add(4, program, "unified kernel image", uki.sum)
	add(4, program, "kernel", uki.kernel)
	line := r.Cmdline
	if line == "" {
		line = uki.cmdline
	} else {
		// The boot menu measures it with its final zero, as it is documented without.
		wide := tcglog.UTF16(line)
		add(12, tcglog.IPL, "kernel command line from outside the image", digest.Of(wide), digest.Of(wide[:len(wide)-2]))
	}
	add(9, tcglog.EventTag, "kernel command line", digest.Of(tcglog.UTF16(line)))
	add(9, tcglog.EventTag, "initramfs", digest.Of(uki.initramfs))
	for _, s := range uki.measured {
		add(11, tcglog.IPL, s.name+", its name", digest.Of([]byte(s.name+"\x00")))
		add(11, tcglog.IPL, s.name, digest.Of(s.data))
	}
	return list, nil
}

func programSum(data []byte) (digest.SHA256, error) {
	p, err := parseImage(data)
	if err != nil {
		return digest.SHA256{}, err
	}
	return p.authenticode(), nil
}

// uki is a unified kernel image (UAPI group's specification) as it is measured.
type uki struct {
	sum, kernel digest.SHA256 // of the image and of the kernel in it, as programs
	cmdline     string
	initramfs   []byte
	measured    []section // into register 11, in their order
}

// Sections that systemd-stub measures, in its order (systemd, src/fundamental/uki.c).
// Version 254 added two.
var (
	measuredSections = []string{".linux", ".osrel", ".cmdline", ".initrd", ".splash", ".dtb", ".uname", ".sbat", ".pcrpkey"}
	measuredFrom254  = []string{".uname", ".sbat"}
)

// Sections that make the stub hand over another initramfs than the image's, or choose among
// several parts: what is measured then does not follow from the image in a way that holds from
// version to version.
var unpredicted = []string{".pcrsig", ".pcrpkey", ".ucode", ".profile", ".dtbauto", ".hwids", ".efifw"}

// Versions of systemd-stub whose measurements are known to be these. Later ones pass on
// parts of their own beside the image's initramfs.
const oldestStub, newestStub = 252, 254

var stubVersion = regexp.MustCompile(`LoaderInfo: systemd-stub ([0-9]+)`)

func parseUKI(data []byte) (u uki, err error) {
	p, err := parseImage(data)
	if err != nil {
		return u, err
	}
	u.sum = p.authenticode()
	parts := map[string][]byte{}
	for _, name := range slices.Concat([]string{".sdmagic"}, measuredSections, unpredicted) {
		if parts[name], err = p.find(name); err != nil {
			return u, err
		}
	}
	found := stubVersion.FindSubmatch(parts[".sdmagic"])
	if found == nil {
		return u, errors.New("it names no version of systemd-stub")
	}
	version, err := strconv.Atoi(string(found[1]))
	if err != nil || version < oldestStub || version > newestStub {
		return u, fmt.Errorf("its systemd-stub is of version %s, and what %d to %d measure is known; make reference values of a host that has booted it", found[1], oldestStub, newestStub)
	}
	for _, name := range unpredicted {
		if parts[name] != nil {
			return u, fmt.Errorf("it has a section %s, with which systemd-stub hands over an initramfs of its own making; make reference values of a host that has booted it", name)
		}
	}
	for _, name := range []string{".linux", ".cmdline", ".initrd"} {
		if len(parts[name]) == 0 {
			return u, fmt.Errorf("it has no section %s", name)
		}
	}
	if u.cmdline = string(parts[".cmdline"]); strings.TrimSpace(u.cmdline) != u.cmdline || bytes.ContainsFunc(parts[".cmdline"], func(r rune) bool { return r < ' ' || r > '~' }) {
		return u, errors.New("its command line has characters that systemd-stub would alter: spaces at an end, or others than ASCII's printable ones")
	}
	if u.kernel, err = programSum(parts[".linux"]); err != nil {
		return u, fmt.Errorf("kernel: %w", err)
	}
	u.initramfs = parts[".initrd"]
	for _, name := range measuredSections {
		if parts[name] != nil && (version >= 254 || !slices.Contains(measuredFrom254, name)) {
			u.measured = append(u.measured, section{name: name, data: parts[name]})
		}
	}
	return u, nil
}

// Files lists what a host may run and read of a folder that has the release's root, which is
// mounted at mount there: every regular file below it, but those below the skipped paths, which
// are the host's. Symbolic links are not followed: a kernel measures what they lead to by its
// own path.
func Files(root, mount string, skip []string) (list []platform.File, err error) {
	err = filepath.WalkDir(root, func(file string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		below, err := filepath.Rel(root, file)
		if err != nil {
			return err
		}
		name := path.Join(mount, filepath.ToSlash(below))
		if slices.ContainsFunc(skip, func(s string) bool { return name == path.Clean(s) }) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if !d.Type().IsRegular() {
			return nil
		}
		if len(list) == imalog.MaxEntries {
			return fmt.Errorf("it has more than %d files: leave out those that no host runs or reads", imalog.MaxEntries)
		}
		sum, err := fileSum(file)
		list = append(list, platform.File{Name: name, SHA256: sum})
		return err
	})
	if err == nil && len(list) == 0 {
		err = errors.New("it has no files")
	}
	if err != nil {
		return nil, fmt.Errorf("list %s: %w", root, err)
	}
	return list, nil
}

func fileSum(file string) (sum digest.SHA256, err error) {
	f, err := os.Open(file)
	if err != nil {
		return sum, err
	}
	defer f.Close()
	h := sha256.New()
	_, err = io.Copy(h, f)
	return digest.SHA256(h.Sum(nil)), err
}
