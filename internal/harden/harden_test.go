package harden_test

import (
	"bufio"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"foothold/internal/harden"
	"foothold/internal/harden/hardentest"
)

// nobody is an ordinary user of every system.
const nobody = 65534

// buildProbe builds a command where any user may run it.
func buildProbe(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "harden-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	program := filepath.Join(dir, "probe")
	cmd := exec.Command("go", "build", "-o", program, "./testdata/probe")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the probe: %v\n%s", err, out)
	}
	return program
}

// start runs the probe until the test ends, and returns when it is ready.
func start(t *testing.T, attr *syscall.SysProcAttr, args ...string) int {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	cmd.SysProcAttr, cmd.Dir, cmd.Stderr = attr, "/", os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Wait()
	})
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "ready\n" {
		t.Fatalf("the probe says %q, %v", line, err)
	}
	return cmd.Process.Pid
}

// TestProcess hardens a process of each kind of user.
func TestProcess(t *testing.T) {
	program := buildProbe(t)
	root := os.Geteuid() == 0
	ordinary := &syscall.SysProcAttr{}
	if root {
		ordinary.Credential = &syscall.Credential{Uid: nobody, Gid: nobody}
	}
	namespace := &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	for _, c := range []struct {
		name string
		attr *syscall.SysProcAttr
		all  bool
		skip bool
	}{
		{"an ordinary user", ordinary, false, false},
		{"root", &syscall.SysProcAttr{}, true, !root},
		{"root of a namespace", namespace, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.skip {
				t.Skip("needs root; root of a namespace stands for it")
			}
			hardentest.Check(t, hardentest.Process{PID: start(t, c.attr, program), Keep: []uintptr{unix.CAP_NET_ADMIN}, All: c.all})
			// One with capabilities is closed to those without anyway.
			if plain := start(t, c.attr, program, "plain"); c.attr == ordinary && !hardentest.Readable(t, plain, "environ") {
				t.Error("the environment of a process that is not hardened is closed too: the checks show nothing")
			}
		})
	}
}

// A binary with cgo could change one thread and leave the others: it is refused.
func TestProcessRefusesCgo(t *testing.T) {
	program := filepath.Join(t.TempDir(), "probe")
	cmd := exec.Command("go", "build", "-race", "-o", program, "./testdata/probe") // the race detector needs cgo
	cmd.Env = append(os.Environ(), "CGO_ENABLED=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build with cgo, which the race detector needs too: apt-get install gcc libc6-dev: %s", out)
	}
	out, err := exec.Command(program).Output()
	if err == nil || !strings.Contains(string(out), "CGO_ENABLED=0") {
		t.Errorf("it says %q, %v", out, err)
	}
}

// A program that a thread without capabilities starts has none either.
func TestThreadDropsCapabilities(t *testing.T) {
	said := make(chan string)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := harden.ThreadDropsCapabilities(); err != nil {
			said <- err.Error()
			return
		}
		unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) // as the daemon that starts it has
		out, err := exec.Command("grep", "CapEff", "/proc/self/status").CombinedOutput()
		if err != nil {
			out = append(out, err.Error()...)
		}
		said <- string(out)
	}()
	if out := <-said; strings.Join(strings.Fields(out), " ") != "CapEff: 0000000000000000" {
		t.Errorf("it has %q", out)
	}
}
