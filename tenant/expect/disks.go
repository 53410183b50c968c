package expect

import (
	"regexp"
	"slices"
	"strings"

	"foothold/protocol/audit"
)

// The VM's disks, as the host attaches them.
const (
	templateDisk = "vda"
	volumeDisk   = "vdb"
)

// diskCipher is how both disks are encrypted (as package luks makes their headers).
const diskCipher = "aes-xts-plain64"

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

// disksClosed: the two disks, nothing opened.
func (j *judge) disksClosed() {
	j.physical()
	for _, d := range j.r.Disks {
		if d.Name != templateDisk && d.Name != volumeDisk && !idleLoop(d) {
			j.find("disk", "%s (%s) is not expected before the disks are opened", d.Name, d.Mapped)
		}
	}
}

// disksOpen: the two disks, a crypt target over each, and the verity target with our
// root hash over the template's.
func (j *judge) disksOpen() {
	j.physical()
	templateCrypt := j.over(templateDisk, "crypt")
	verity := j.over(templateCrypt, "verity")
	volume := j.over(volumeDisk, "crypt")
	expected := []string{templateDisk, volumeDisk, templateCrypt, verity, volume}
	for _, d := range j.r.Disks {
		if !slices.Contains(expected, d.Name) && !idleLoop(d) {
			j.find("disk", "%s (%s: %s) is not expected", d.Name, d.Mapped, d.Table)
		}
	}
	j.crypt("template", templateCrypt, templateDisk)
	j.crypt("volume", volume, volumeDisk)
	j.verity(verity, templateCrypt)
}

// findDevices tells which devices mounts may name; disksOpen judges their tables.
func (j *judge) findDevices() {
	j.root = j.over(j.over(templateDisk, "crypt"), "verity")
	j.volume = j.over(volumeDisk, "crypt")
}

// over is the first mapped device with a target of that type over the named one.
func (j *judge) over(name, target string) string {
	base, ok := j.disk(name)
	if !ok || base.Number == "" {
		return ""
	}
	at := map[string]int{"crypt": 6, "verity": 4}[target]
	for _, d := range j.r.Disks {
		if f := fields(d.Table); len(f) > at && f[2] == target && f[at] == base.Number {
			return d.Name
		}
	}
	return ""
}

// crypt judges "START LENGTH crypt CIPHER KEY IV_OFFSET DEVICE OFFSET [COUNT OPTION...]"
// (kernel documentation, admin-guide/device-mapper/dm-crypt).
func (j *judge) crypt(what, name, base string) {
	d, ok := j.disk(name)
	if !ok {
		j.find("disk", "no crypt target opens the %s's disk %s", what, base)
		return
	}
	f := fields(d.Table)
	if len(f) < 8 || f[0] != "0" || f[3] != diskCipher || f[4] != "-" || f[5] != "0" || f[7] != "0" {
		j.find("disk", "%s opens %s otherwise than expected: %q", name, base, d.Table)
		return
	}
	for _, option := range f[min(9, len(f)):] {
		if !slices.Contains([]string{"sector_size:4096", "allow_discards", "no_read_workqueue", "no_write_workqueue", "same_cpu_crypt", "submit_from_crypt_cpus"}, option) {
			j.find("disk", "%s opens %s with option %q", name, base, option)
		}
	}
	if !slices.Contains(f, "sector_size:4096") {
		j.find("disk", "%s does not use sectors of 4096 bytes", name)
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
