package supervisor

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// Shim says how a process of the lab is confined before it becomes its program: it
// sees only its own folder of the state directory, an empty /tmp, and keeps only the
// capabilities that its work needs. It is a fence against mistakes and against a
// compromised daemon reading its neighbours' keys; the places of a real installation
// are machines of their own.
type Shim struct {
	State string    `json:"state"`          // hidden
	View  string    `json:"view,omitempty"` // but for this folder
	Run   bool      `json:"run,omitempty"`  // sees the lab's /run, where the TPM is
	Caps  []uintptr `json:"caps,omitempty"`
	Argv  []string  `json:"argv"`
}

// command makes the process that confines itself and then becomes the program.
func (s *supervisor) command(p Program) *exec.Cmd {
	spec, _ := json.Marshal(Shim{ // strings and numbers: cannot fail
		State: s.state.Dir, View: p.View, Run: p.Run, Caps: p.Caps, Argv: append([]string{p.Path}, p.Args...),
	})
	cmd := exec.Command("/proc/self/exe", "lab", "confine", string(spec))
	cmd.ExtraFiles = p.Files
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "HOME=/", "TMPDIR=/tmp"}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Unshareflags: syscall.CLONE_NEWNS}
	return cmd
}

// Confine runs in the new process: it never returns but with an error.
func Confine(spec string) error {
	runtime.LockOSThread() // capabilities are the thread's; exec takes this thread's
	var s Shim
	if err := json.Unmarshal([]byte(spec), &s); err != nil {
		return fmt.Errorf("read confinement: %w", err)
	}
	if len(s.Argv) == 0 {
		return fmt.Errorf("read confinement: no program")
	}
	// Opened before its folder may be covered; what runs is this open file.
	program, err := unix.Open(s.Argv[0], unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", s.Argv[0], err)
	}
	if err := hide(s); err != nil {
		return err
	}
	if err := drop(s.Caps); err != nil {
		return err
	}
	unix.Umask(0o077)
	if err := unix.Exec(fmt.Sprintf("/proc/self/fd/%d", program), s.Argv, os.Environ()); err != nil {
		return fmt.Errorf("run %s: %w", s.Argv[0], err)
	}
	return nil
}

// hide covers the state directory with an empty one that holds the view alone, and
// gives the process a /tmp and a /run of its own.
func hide(s Shim) error {
	view := -1
	if s.View != "" {
		var err error
		if view, err = unix.Open(s.View, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
			return fmt.Errorf("open %s: %w", s.View, err)
		}
		defer unix.Close(view)
	}
	covers := []string{s.State}
	if !within("/tmp", s.State) { // else covering /tmp would take the view away
		covers = append(covers, "/tmp")
	}
	if !s.Run {
		covers = append(covers, "/run")
	}
	for _, dir := range covers {
		if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0700,size=256m"); err != nil {
			return fmt.Errorf("cover %s: %w", dir, err)
		}
	}
	if view < 0 {
		return nil
	}
	if err := os.MkdirAll(s.View, 0o700); err != nil {
		return fmt.Errorf("make place of %s: %w", s.View, err)
	}
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", view), s.View, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("show %s: %w", s.View, err)
	}
	return nil
}

func within(dir, path string) bool {
	rel, err := filepath.Rel(dir, path)
	return err == nil && rel != ".." && !(len(rel) > 2 && rel[:3] == "../")
}

// lastCap is the kernel's highest capability that we know of; unknown ones end the loop.
const lastCap = 63

// drop takes every other capability from the bounding set, so that exec loses them,
// and forbids gaining any by a program's file.
func drop(keep []uintptr) error {
	for c := uintptr(0); c <= lastCap; c++ {
		if slices.Contains(keep, c) {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if err == unix.EINVAL {
			break
		}
		if err != nil {
			return fmt.Errorf("drop capability %d: %w", c, err)
		}
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid new privileges: %w", err)
	}
	return nil
}
