// Package hardentest looks at a running process from outside: whether package harden
// holds in it.
package hardentest

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"foothold/internal/harden"
)

// Process is what is expected of one.
type Process struct {
	PID int
	// Keep are the capabilities that it may have.
	Keep []uintptr
	// All says that it was started with every capability: then it has the kept ones, and
	// its bounding set no other.
	All bool
	// Alone says that it starts no program, and has the filter that forbids it.
	Alone bool
}

// Check reports everything that is not as it must be.
func Check(t *testing.T, p Process) {
	t.Helper()
	var keep uint64
	for _, c := range p.Keep {
		keep |= 1 << c
	}
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", p.PID))
	if err != nil || len(threads) == 0 {
		t.Fatalf("process %d has no threads: %v", p.PID, err)
	}
	for _, file := range threads {
		s := status(t, file)
		if s["NoNewPrivs"] != "1" {
			t.Errorf("%s: it may gain privileges", file)
		}
		filters := 1
		if p.Alone {
			filters = 2
		}
		// Whatever confines this test as well confines what it starts.
		have, err := strconv.Atoi(s["Seccomp_filters"])
		outer, _ := strconv.Atoi(status(t, "/proc/self/status")["Seccomp_filters"])
		if s["Seccomp"] != "2" || err != nil || have != outer+filters {
			t.Errorf("%s: Seccomp is %q with %q filters, want 2 with %d; the kernel needs CONFIG_SECCOMP_FILTER", file, s["Seccomp"], s["Seccomp_filters"], outer+filters)
		}
		for _, set := range []string{"CapInh", "CapPrm", "CapEff", "CapAmb", "CapBnd"} {
			have, err := strconv.ParseUint(s[set], 16, 64)
			may, must := keep, uint64(0)
			switch {
			case set == "CapInh" || set == "CapAmb":
				may = 0
			case set == "CapBnd" && !p.All:
				may = ^uint64(0) // see harden.Process
			case p.All:
				must = keep
			}
			if err != nil || have&^may != 0 || must&^have != 0 {
				t.Errorf("%s: %s is %q, may be %x, must be %x", file, set, s[set], may, must)
			}
		}
	}
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", p.PID))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(limits)) {
		if rest, ok := strings.CutPrefix(line, "Max core file size"); ok && strings.Join(strings.Fields(rest), " ") != "0 0 bytes" {
			t.Errorf("process %d may leave a core file: %s", p.PID, line)
		}
	}
	if ours(p.PID) {
		return
	}
	for _, name := range []string{"mem", "environ", "maps"} {
		if Readable(t, p.PID, name) {
			t.Errorf("another process of its user opens /proc/%d/%s", p.PID, name)
		}
	}
}

// ours reports whether the process is in a user namespace that we made: then we have
// every right in it, as its root has.
func ours(pid int) bool {
	theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/user", pid))
	if err != nil {
		return false
	}
	own, err := os.Readlink("/proc/self/ns/user")
	return err == nil && own != theirs
}

// Readable reports whether a process of the same user, without capabilities, opens that
// file of /proc/PID.
func Readable(t *testing.T, pid int, name string) bool {
	t.Helper()
	s := status(t, fmt.Sprintf("/proc/%d/status", pid))
	uid, gid := first(t, s["Uid"]), first(t, s["Gid"])
	opened := make(chan bool)
	failed := make(chan error, 1)
	go func() {
		defer close(opened)
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if os.Geteuid() == 0 { // the user is this thread's alone: raw calls
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, gid, gid, gid); errno != 0 {
				failed <- errno
				return
			}
			if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uid, uid, uid); errno != 0 {
				failed <- errno
				return
			}
		}
		if err := harden.ThreadDropsCapabilities(); err != nil {
			failed <- err
			return
		}
		fd, err := unix.Open(fmt.Sprintf("/proc/%d/%s", pid, name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			unix.Close(fd)
		}
		opened <- err == nil
	}()
	ok := <-opened
	select {
	case err := <-failed:
		t.Fatalf("become user %d: %v", uid, err)
	default:
	}
	return ok
}

func first(t *testing.T, ids string) uintptr {
	t.Helper()
	fields := strings.Fields(ids)
	if len(fields) == 0 {
		t.Fatal("status names no user")
	}
	id, err := strconv.ParseUint(fields[0], 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	return uintptr(id)
}

// status reads a status file of proc(5).
func status(t *testing.T, file string) map[string]string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	s := map[string]string{}
	for line := range strings.Lines(string(data)) {
		key, value, _ := strings.Cut(line, ":")
		s[key] = strings.TrimSpace(value)
	}
	return s
}
