package expect

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"foothold/protocol/audit"
)

// The VM's disks, as the host attaches them, and the guest's own RAM disk below an
// authenticated volume, which holds the superblock of its tags alone.
const (
	templateDisk = "vda"
	volumeDisk   = "vdb"
	memoryDisk   = "ram0"
	memoryNumber = "1:0" // no other driver has it (kernel documentation, admin-guide/devices)
	memorySize   = 4096  // bytes
)

// How disks are encrypted (as package luks makes their headers, and package devmapper
// opens them), and the tags beside the sectors of an authenticated volume.
const (
	diskCipher          = "aes-xts-plain64"
	authenticatedCipher = "capi:authenc(hmac(sha256),xts(aes))-plain64"
	tagBytes            = "32"
)

var loopForm = regexp.MustCompile(`^loop[0-9]+$`)

// physical judges vda and vdb, which must be there at both stages.
func (j *judge) physical() {
	for _, want := range []struct {
		name     string
		size     int64
		readOnly bool
	}{{templateDisk, j.i.TemplateSize, true}, {volumeDisk, j.i.VolumeSize, false}} {
		d, ok := j.disk(want.name)
		switch {
		case !ok:
			j.find("disk", "%s is missing", want.name)
		case d.Size != want.size:
			j.find("disk", "%s has %d bytes, want %d", want.name, d.Size, want.size)
		case d.ReadOnly != want.readOnly:
			j.find("disk", "%s: read-only is %v, want %v", want.name, d.ReadOnly, want.readOnly)
		case d.Mapped != "" || d.Table != "":
			j.find("disk", "%s is a mapped device", want.name)
		}
	}
}

// memory judges the RAM disk, which is there at both stages, and returns the names that it
// adds to what is expected: none where no volume needs it.
func (j *judge) memory() []string {
	if !j.t.AuthenticatedVolume {
		return nil
	}
	d, ok := j.disk(memoryDisk)
	switch {
	case !ok:
		j.find("disk", "%s is missing", memoryDisk)
	case d.Number != memoryNumber || d.Size != memorySize || d.ReadOnly || d.Mapped != "" || d.Table != "":
		j.find("disk", "%s is not a RAM disk of %d bytes: %+v", memoryDisk, memorySize, d)
	}
	return []string{memoryDisk}
}

// disksClosed: the two disks, nothing opened.
func (j *judge) disksClosed() {
	j.physical()
	expected := append(j.memory(), templateDisk, volumeDisk)
	for _, d := range j.r.Disks {
		if !slices.Contains(expected, d.Name) && !idleLoop(d) {
			j.find("disk", "%s (%s) is not expected before the disks are opened", d.Name, d.Mapped)
		}
	}
}

// disksOpen: the two disks, a crypt target over each, the verity target with our root
// hash over the template's, and below an authenticated volume's the integrity target over the
// disk whose first block lies in memory.
func (j *judge) disksOpen() {
	j.physical()
	templateCrypt := j.over(templateDisk, "crypt")
	verity := j.over(templateCrypt, "verity")
	volume, base := j.volumeOver()
	expected := append(j.memory(), templateDisk, volumeDisk, templateCrypt, verity, base, volume)
	if j.t.AuthenticatedVolume {
		expected = append(expected, j.assembled())
	}
	for _, d := range j.r.Disks {
		if !slices.Contains(expected, d.Name) && !idleLoop(d) {
			j.find("disk", "%s (%s: %s) is not expected", d.Name, d.Mapped, d.Table)
		}
	}
	j.crypt("template", templateCrypt, templateDisk, false)
	if j.t.AuthenticatedVolume {
		j.integrity(base)
	}
	j.crypt("volume", volume, base, j.t.AuthenticatedVolume)
	j.verity(verity, templateCrypt)
}

// volumeOver is the opened volume, and the device that its crypt target opens.
func (j *judge) volumeOver() (volume, base string) {
	base = volumeDisk
	if j.t.AuthenticatedVolume {
		base = j.over(j.assembled(), "integrity")
	}
	return j.over(base, "crypt"), base
}

// assembled is the volume's disk with its first block in memory: exactly two targets, so that
// the kernel reads nothing of that block from the disk. Empty if there is no such device.
func (j *judge) assembled() string {
	disk, ok := j.disk(volumeDisk)
	if !ok || disk.Number == "" {
		return ""
	}
	const first = memorySize / 512
	want := fmt.Sprintf("0 %d linear %s 0\n%d %d linear %s %d", first, memoryNumber, first, disk.Size/512-first, disk.Number, first)
	for _, d := range j.r.Disks {
		if d.Table == want && d.Size == disk.Size && !d.ReadOnly {
			return d.Name
		}
	}
	return ""
}

// findDevices tells which devices mounts may name; disksOpen judges their tables.
func (j *judge) findDevices() {
	j.root = j.over(j.over(templateDisk, "crypt"), "verity")
	j.volume, _ = j.volumeOver()
}

// over is the first mapped device with a target of that type over the named one.
func (j *judge) over(name, target string) string {
	base, ok := j.disk(name)
	if !ok || base.Number == "" {
		return ""
	}
	at := map[string]int{"crypt": 6, "verity": 4, "integrity": 3}[target]
	for _, d := range j.r.Disks {
		if f := fields(d.Table); len(f) > at && f[2] == target && f[at] == base.Number {
			return d.Name
		}
	}
	return ""
}

// crypt judges "START LENGTH crypt CIPHER KEY IV_OFFSET DEVICE OFFSET [COUNT OPTION...]"
// (kernel documentation, admin-guide/device-mapper/dm-crypt).
func (j *judge) crypt(what, name, base string, authenticated bool) {
	d, ok := j.disk(name)
	if !ok {
		j.find("disk", "no crypt target opens the %s's disk %s", what, base)
		return
	}
	cipher, needs := diskCipher, []string{"sector_size:4096"}
	if authenticated {
		cipher, needs = authenticatedCipher, append(needs, "integrity:"+tagBytes+":aead")
	}
	under, _ := j.disk(base)
	if d.Size != under.Size || d.ReadOnly != under.ReadOnly {
		j.find("disk", "%s opens %s with %d of %d bytes, read-only %v", name, base, d.Size, under.Size, d.ReadOnly)
	}
	f := fields(d.Table)
	if len(f) < 8 || f[0] != "0" || !spans(f, d.Size) || f[3] != cipher || f[4] != "-" || f[5] != "0" || f[7] != "0" {
		j.find("disk", "%s opens %s otherwise than expected: %q", name, base, d.Table)
		return
	}
	if authenticated {
		j.options(name, f[8:], needs)
		return
	}
	j.options(name, f[8:], needs, "allow_discards", "no_read_workqueue", "no_write_workqueue", "same_cpu_crypt", "submit_from_crypt_cpus")
}

// spans reports whether a target covers a device of that size.
func spans(f []string, size int64) bool { return f[1] == strconv.FormatInt(size/512, 10) }

// integrity judges "START LENGTH integrity DEVICE START TAG_SIZE MODE COUNT OPTION..."
// (admin-guide/device-mapper/dm-integrity): with a journal, the tags made above.
func (j *judge) integrity(name string) {
	d, ok := j.disk(name)
	if !ok {
		j.find("disk", "no integrity target keeps tags on the volume's disk with its first block in memory")
		return
	}
	// Tags, journal and rounding take less than a thirty-second of any volume we make, and
	// no more than this of a small one.
	if least := j.i.VolumeSize - max(j.i.VolumeSize/32, 16<<20); d.Size < least || d.Size >= j.i.VolumeSize {
		j.find("disk", "%s has %d bytes, want %d or more below %d", name, d.Size, least, j.i.VolumeSize)
	}
	f := fields(d.Table)
	if len(f) < 8 || f[0] != "0" || !spans(f, d.Size) || f[4] != "0" || f[5] != tagBytes || f[6] != "J" {
		j.find("disk", "%s keeps tags otherwise than expected: %q", name, d.Table)
		return
	}
	// How the kernel buffers and when it commits does not matter.
	j.options(name, f[7:], []string{"block_size:4096", "fix_padding", "journal_sectors:16896", "interleave_sectors:32768"}, "buffer_sectors:N", "journal_watermark:N", "commit_time:N")
}

var number = regexp.MustCompile(`:[0-9]+$`)

// options judges a target's options behind their count, which is absent where there are
// none: the needed must be there, besides them only the free ones, where :N stands for
// any number.
func (j *judge) options(name string, counted, needed []string, free ...string) {
	options := []string{}
	if len(counted) > 0 {
		options = counted[1:]
		if counted[0] != strconv.Itoa(len(options)) {
			j.find("disk", "%s is opened with %s options, and shows %d", name, counted[0], len(options))
		}
	}
	for _, option := range options {
		if !slices.Contains(needed, option) && !slices.Contains(free, number.ReplaceAllString(option, ":N")) {
			j.find("disk", "%s is opened with option %q", name, option)
		}
	}
	for _, option := range needed {
		if !slices.Contains(options, option) {
			j.find("disk", "%s is opened without option %q", name, option)
		}
	}
}

// verity judges "START LENGTH verity 1 DEVICE HASH_DEVICE BLOCK HASH_BLOCK BLOCKS
// HASH_START ALGORITHM ROOT SALT [COUNT OPTION...]" (admin-guide/device-mapper/verity).
func (j *judge) verity(name, base string) {
	d, ok := j.disk(name)
	if !ok {
		j.find("disk", "no verity target checks the template's disk")
		return
	}
	f := fields(d.Table)
	under, _ := j.disk(base)
	switch {
	case len(f) < 13 || f[0] != "0" || f[3] != "1" || f[5] != under.Number || f[10] != "sha256":
		j.find("disk", "%s checks the template otherwise than expected: %q", name, d.Table)
	case j.i.RootHash.IsZero() || f[11] != j.i.RootHash.String():
		j.find("disk", "%s has root hash %s, want the template's %s", name, f[11], j.i.RootHash)
	case !d.ReadOnly:
		j.find("disk", "%s can be written", name)
	}
	for _, option := range f[min(14, len(f)):] {
		if option != "restart_on_corruption" && option != "panic_on_corruption" {
			j.find("disk", "%s checks with option %q", name, option)
		}
	}
}

func (j *judge) disk(name string) (audit.Disk, bool) {
	if name == "" {
		return audit.Disk{}, false
	}
	i := slices.IndexFunc(j.r.Disks, func(d audit.Disk) bool { return d.Name == name })
	if i < 0 {
		return audit.Disk{}, false
	}
	return j.r.Disks[i], true
}

// idleLoop: the kernel may show loop devices that nothing backs.
func idleLoop(d audit.Disk) bool { return loopForm.MatchString(d.Name) && d.Size == 0 && d.Table == "" }

// fields splits a table of exactly one target.
func fields(table string) []string {
	if strings.Contains(strings.TrimSpace(table), "\n") {
		return nil
	}
	return strings.Fields(table)
}
