// Package nstest runs a test binary as root of a namespace of its own, so that tests
// may make interfaces, rules and mounts without being root and without touching the
// machine.
package nstest

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"
)

const marker = "FOOTHOLD_TEST_NAMESPACE"

// Main replaces m.Run in TestMain: it runs the same test binary again in new user,
// mount and network namespaces, where it is root, and returns its exit code.
func Main(m *testing.M) int {
	if os.Getenv(marker) != "" {
		if err := upLoopback(); err != nil {
			fmt.Fprintln(os.Stderr, "nstest:", err)
			return 1
		}
		return m.Run()
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Env = append(os.Environ(), marker+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	runtime.LockOSThread() // the death signal follows the thread
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "nstest:", err)
		if cmd.ProcessState != nil && cmd.ProcessState.ExitCode() > 0 {
			return cmd.ProcessState.ExitCode()
		}
		return 1
	}
	return 0
}
