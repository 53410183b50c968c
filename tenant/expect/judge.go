package expect

import (
	"crypto/subtle"
	"fmt"
	"path"
	"slices"
	"strings"

	"foothold/protocol/audit"
)

// maxFindings bounds what one audit can write into the journal.
const maxFindings = 64

// judge collects the findings of one audit.
type judge struct {
	t     Template
	stage Stage
	i     Instance
	r     audit.Report
	os    bool

	root, volume string // names under which the verity device and the volume may be mounted: set by disksOpen
	found        []Finding
}

func (j *judge) find(check, format string, args ...any) {
	if len(j.found) < maxFindings {
		j.found = append(j.found, Finding{check, fmt.Sprintf(format, args...)})
	}
}

// common holds at both stages.
func (j *judge) common(stage string) {
	r := j.r
	if r.Stage != stage {
		j.find("stage", "the report is of stage %q, want %q", r.Stage, stage)
	}
	if len(j.i.Nonce) == 0 || subtle.ConstantTimeCompare(r.Nonce, j.i.Nonce) != 1 {
		j.find("nonce", "the report does not answer this audit")
	}
	if r.Kernel != j.t.Kernel {
		j.find("kernel", "%q runs, want %q", r.Kernel, j.t.Kernel)
	}
	if r.Cmdline != j.i.Cmdline {
		j.find("command line", "the kernel was started with %q, the manifest says %q", r.Cmdline, j.i.Cmdline)
	}
	if extra := r.Tainted &^ j.t.Taint; extra != 0 {
		j.find("kernel", "it is tainted: bits %#x", extra)
	}
	if r.Hostname != j.i.Name {
		j.find("host name", "%q, want %q", r.Hostname, j.i.Name)
	}
	for _, s := range r.Swaps {
		j.find("swap", "%q is in use, want none", s)
	}
	for _, m := range r.Modules {
		if !slices.Contains(j.t.Modules, m) {
			j.find("module", "%q is loaded", m)
		}
	}
	if j.os {
		j.findDevices()
	}
	j.processes()
	j.mounts()
	j.users()
	j.files()
}

func (j *judge) processes() {
	agents := 0
	for _, p := range j.r.Processes {
		switch {
		case p.SHA256.IsZero():
			j.find("process", "%d runs %q, whose content is not reported", p.PID, p.Exe)
		case p.SHA256 == j.t.Agent:
			agents++
		case slices.Contains(j.stage.Programs, Program{p.Exe, p.SHA256}):
		case j.isWorkload(p):
			if p.UID == 0 {
				j.find("process", "%d, the workload %q, runs as root", p.PID, p.Exe)
			}
		default:
			j.find("process", "%d runs %q (sha256 %s), which is not expected", p.PID, p.Exe, p.SHA256.Short())
		}
	}
	if agents == 0 {
		j.find("process", "the agent does not run")
	}
}

func (j *judge) isWorkload(p audit.Process) bool {
	return j.os && slices.ContainsFunc(j.workloads(), func(w *Workload) bool {
		return p.SHA256 == w.SHA256 || w.SHA256.IsZero() && strings.HasPrefix(p.Exe, WorkloadDir+"/")
	})
}

// workloads are what may run beside the OS: the workload, and those that it replaces.
func (j *judge) workloads() []*Workload {
	if j.i.Workload == nil {
		return nil
	}
	return append([]*Workload{j.i.Workload}, j.i.Former...)
}

func (j *judge) mounts() {
	for _, m := range j.r.Mounts {
		if j.os && m.Target == "/" {
			if m.Type != "erofs" || j.root == "" || !j.device(SourceRoot, m.Source) || !hasOption(m.Options, "ro") {
				j.find("mount", "/ is %s of %q (%s), want the template's verity device, read-only", m.Type, m.Source, m.Options)
			}
			continue
		}
		if !slices.ContainsFunc(j.stage.Mounts, func(want Mount) bool { return j.mountIs(m, want) }) {
			j.find("mount", "%s of %q at %q (%s) is not expected", m.Type, m.Source, m.Target, m.Options)
		}
	}
	if j.os && !slices.ContainsFunc(j.r.Mounts, func(m audit.Mount) bool { return m.Target == "/" }) {
		j.find("mount", "nothing is reported to be mounted at /")
	}
}

func (j *judge) mountIs(m audit.Mount, want Mount) bool {
	if m.Type != want.Type || !matches(want.Target, m.Target) {
		return false
	}
	for _, o := range want.Options {
		if !hasOption(m.Options, o) {
			return false
		}
	}
	switch want.Source {
	case SourceRoot, SourceVolume:
		return j.device(want.Source, m.Source)
	case "*":
		return !strings.HasPrefix(m.Source, "/")
	}
	return matches(want.Source, m.Source)
}

// device reports whether source names this start's device.
func (j *judge) device(which, source string) bool {
	name := j.root
	if which == SourceVolume {
		name = j.volume
	}
	for _, d := range j.r.Disks {
		if name != "" && d.Name == name {
			return source == "/dev/"+d.Name || d.Mapped != "" && source == "/dev/mapper/"+d.Mapped
		}
	}
	return false
}

// users compares exactly, and every account must be locked.
func (j *judge) users() {
	var got []User
	for _, u := range j.r.Users {
		user := User{u.Name, u.UID, u.Shell}
		got = append(got, user)
		if !slices.Contains(j.stage.Users, user) {
			j.find("user", "%q (uid %d, shell %q) is not expected", u.Name, u.UID, u.Shell)
		} else if !u.Locked {
			j.find("user", "%q is not locked", u.Name)
		}
	}
	for _, want := range j.stage.Users {
		if !slices.Contains(got, want) {
			j.find("user", "%q (uid %d) is missing", want.Name, want.UID)
		}
	}
}

func (j *judge) files() {
	if len(j.r.Files) == 0 && len(j.stage.Files) > 0 {
		j.find("file", "the report lists none")
	}
	for _, f := range j.r.Files {
		if !slices.ContainsFunc(j.stage.Files, func(want File) bool { return fileIs(f, want) }) {
			j.find("file", "%q (mode %#o, sha256 %s) is not expected", f.Path, f.Mode&0o7777, f.SHA256.Short())
		}
	}
}

func fileIs(f audit.File, want File) bool {
	const typeBits, regular, setID, anyExec = 0o170000, 0o100000, 0o6000, 0o111
	if !matches(want.Path, f.Path) || f.Mode&setID != 0 {
		return false
	}
	if want.SHA256.IsZero() {
		return f.Mode&typeBits == regular && f.Mode&anyExec == 0
	}
	return f.SHA256 == want.SHA256
}

func hasOption(options, want string) bool {
	return slices.Contains(strings.Split(options, ","), want)
}

// matches compares a pattern that Validate has accepted.
func matches(pattern, name string) bool {
	ok, err := path.Match(pattern, name)
	return ok && err == nil
}
