// Package facts gathers what an audit reports of the live machine (package audit):
// from /proc, /sys, netlink and the device-mapper, without running a program. It
// judges nothing and leaves nothing out: what it cannot read fails the audit.
package facts

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"foothold/protocol/audit"

	"golang.org/x/sys/unix"
)

// Gatherer remembers digests of files that have not changed since it last read them.
type Gatherer struct{ digests digests }

// Scope says where files are listed from: directories, each shown under a name of its own.
type Scope struct {
	Dir string // on this machine
	As  string // in the report: "/" shows Dir/x as /x
}

// Initramfs is the scope of the first audit: the whole memory file system.
func Initramfs() []Scope { return []Scope{{"/", "/"}, {"/run", "/run"}} }

// Gather makes a report.
func (g *Gatherer) Gather(stage string, nonce []byte, scopes []Scope) (audit.Report, error) {
	r := audit.Report{Stage: stage, Nonce: nonce}
	for _, step := range []struct {
		name string
		do   func(*audit.Report) error
	}{
		{"kernel", kernel},
		{"files", func(r *audit.Report) (err error) { r.Files, err = g.files(scopes); return }},
		{"processes", g.processes},
		{"modules", modules},
		{"listeners", listeners},
		{"mounts", mounts},
		{"users", users},
		{"disks", disks},
		{"network", network},
		{"swaps", swaps},
	} {
		if err := step.do(&r); err != nil {
			return r, fmt.Errorf("gather %s: %w", step.name, err)
		}
	}
	return r, nil
}

// Warm reads files ahead, so that the audit finds their digests known.
func (g *Gatherer) Warm(scopes []Scope) { _, _ = g.files(scopes) }

func kernel(r *audit.Report) error {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return err
	}
	r.Kernel, r.Hostname = text(u.Release[:]), text(u.Nodename[:])
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	r.Cmdline = strings.TrimSuffix(string(cmdline), "\n")
	tainted, err := os.ReadFile("/proc/sys/kernel/tainted")
	if err != nil {
		return err
	}
	r.Tainted, err = strconv.ParseUint(strings.TrimSpace(string(tainted)), 10, 64)
	return err
}

func text(b []byte) string {
	s, _, _ := bytes.Cut(b, []byte{0})
	return string(s)
}

func modules(r *audit.Report) error {
	err := lines("/proc/modules", func(line string) error {
		r.Modules = append(r.Modules, strings.Fields(line)[0])
		return nil
	})
	slices.Sort(r.Modules)
	if os.IsNotExist(err) { // a kernel without loadable modules
		return nil
	}
	return err
}

func swaps(r *audit.Report) error {
	err := lines("/proc/swaps", func(line string) error {
		if f := strings.Fields(line); len(f) > 0 && f[0] != "Filename" {
			r.Swaps = append(r.Swaps, f[0])
		}
		return nil
	})
	if os.IsNotExist(err) { // a kernel without swap
		return nil
	}
	return err
}

// mounts reads mountinfo (proc(5)): fields 4 root, 5 mount point, 6 options, then
// optional fields up to "-", type, source, super options.
func mounts(r *audit.Report) error {
	err := lines("/proc/self/mountinfo", func(line string) error {
		before, after, ok := strings.Cut(line, " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if !ok || len(f) < 6 || len(g) < 2 {
			return fmt.Errorf("line %q is malformed", line)
		}
		m := audit.Mount{Source: unescape(g[1]), Target: unescape(f[4]), Type: g[0], Options: f[5]}
		if len(g) > 2 {
			m.Options += "," + unescape(g[2])
		}
		r.Mounts = append(r.Mounts, m)
		return nil
	})
	slices.SortFunc(r.Mounts, func(a, b audit.Mount) int {
		return strings.Compare(a.Target+"\x00"+a.Type+"\x00"+a.Source, b.Target+"\x00"+b.Type+"\x00"+b.Source)
	})
	return err
}

// unescape undoes the kernel's octal escapes of blanks, tabs, newlines and backslashes.
func unescape(s string) string {
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if v, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				out.WriteByte(byte(v))
				i += 3
				continue
			}
		}
		out.WriteByte(s[i])
	}
	return out.String()
}

// users reads the accounts. An account is locked when its shadow field can match no
// password; one without a shadow line is locked unless the password file says otherwise.
func users(r *audit.Report) error {
	locked := map[string]bool{}
	impossible := func(field string) bool { return strings.HasPrefix(field, "!") || strings.HasPrefix(field, "*") }
	err := lines("/etc/shadow", func(line string) error {
		f := strings.Split(line, ":")
		if len(f) > 1 {
			locked[f[0]] = impossible(f[1])
		}
		return nil
	})
	if err != nil && !os.IsNotExist(err) {
		return err
	}
	err = lines("/etc/passwd", func(line string) error {
		f := strings.Split(line, ":")
		if len(f) != 7 {
			return fmt.Errorf("line %q is malformed", line)
		}
		uid, err := strconv.Atoi(f[2])
		if err != nil {
			return err
		}
		u := audit.User{Name: f[0], UID: uid, Shell: f[6], Locked: impossible(f[1])}
		if f[1] == "x" {
			u.Locked = locked[f[0]]
		}
		r.Users = append(r.Users, u)
		return nil
	})
	if os.IsNotExist(err) { // the initramfs has no accounts
		return nil
	}
	return err
}

// lines calls f for each line of a file that is not empty.
func lines(path string, f func(string) error) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	scan := bufio.NewScanner(bytes.NewReader(data))
	scan.Buffer(nil, 1<<20)
	for scan.Scan() {
		if scan.Text() == "" {
			continue
		}
		if err := f(scan.Text()); err != nil {
			return fmt.Errorf("%s: %w", filepath.Base(path), err)
		}
	}
	return scan.Err()
}
