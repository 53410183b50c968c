package harden_test

import (
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"foothold/internal/harden"
)

// killed is what outcome says of a process that the filter ended.
const killed = "killed"

// outcome runs the probe as the root of namespaces of its own, who may do most, and returns what
// it prints, or that the filter killed it.
func outcome(t *testing.T, program string, args ...string) string {
	t.Helper()
	cmd := exec.Command(program, args...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	out, err := cmd.Output()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	if s := cmd.ProcessState.Sys().(syscall.WaitStatus); s.Signaled() && s.Signal() == unix.SIGSYS {
		return killed
	}
	return strings.TrimSpace(string(out))
}

func mustFilter(t *testing.T) {
	t.Helper()
	if !harden.FiltersCalls() {
		t.Fatal("this kernel refuses no system calls: use one with CONFIG_SECCOMP_FILTER, as every distribution's is")
	}
}

// TestRefusedCalls makes each call that is refused, in a hardened process and in one that is
// not: there it may fail, but otherwise.
func TestRefusedCalls(t *testing.T) {
	mustFilter(t)
	program := buildProbe(t)
	for _, c := range []struct {
		name     string
		call     uintptr
		argument string
		want     string
	}{
		{"ptrace", unix.SYS_PTRACE, "0", killed},
		{"process_vm_readv", unix.SYS_PROCESS_VM_READV, "0", killed},
		{"process_vm_writev", unix.SYS_PROCESS_VM_WRITEV, "0", killed},
		{"pidfd_getfd", unix.SYS_PIDFD_GETFD, "0", killed},
		{"kexec_load", unix.SYS_KEXEC_LOAD, "0", killed},
		{"kexec_file_load", unix.SYS_KEXEC_FILE_LOAD, "0", killed},
		{"init_module", unix.SYS_INIT_MODULE, "0", killed},
		{"finit_module", unix.SYS_FINIT_MODULE, "0", killed},
		{"delete_module", unix.SYS_DELETE_MODULE, "0", killed},
		{"bpf", unix.SYS_BPF, "0", killed},
		{"reboot", unix.SYS_REBOOT, "0", killed},
		{"swapon", unix.SYS_SWAPON, "0", killed},
		{"swapoff", unix.SYS_SWAPOFF, "0", killed},
		{"acct", unix.SYS_ACCT, "0", killed},
		{"open_by_handle_at", unix.SYS_OPEN_BY_HANDLE_AT, "0", killed},
		{"pivot_root", unix.SYS_PIVOT_ROOT, "0", killed},
		{"settimeofday", unix.SYS_SETTIMEOFDAY, "0", killed},
		{"clock_settime", unix.SYS_CLOCK_SETTIME, "0", killed},
		{"mount", unix.SYS_MOUNT, "0", "EPERM"},
		{"umount2", unix.SYS_UMOUNT2, "0", "EPERM"},
		{"chroot", unix.SYS_CHROOT, "0", "EPERM"},
		{"unshare", unix.SYS_UNSHARE, "0", "EPERM"},
		{"setns", unix.SYS_SETNS, "0", "EPERM"},
		{"fsopen", unix.SYS_FSOPEN, "0", "EPERM"},
		{"fsconfig", unix.SYS_FSCONFIG, "0", "EPERM"},
		{"fsmount", unix.SYS_FSMOUNT, "0", "EPERM"},
		{"fspick", unix.SYS_FSPICK, "0", "EPERM"},
		{"move_mount", unix.SYS_MOVE_MOUNT, "0", "EPERM"},
		{"open_tree", unix.SYS_OPEN_TREE, "0", "EPERM"},
		{"mount_setattr", unix.SYS_MOUNT_SETATTR, "0", "EPERM"},
		{"personality", unix.SYS_PERSONALITY, "0xffffffff", "EPERM"},                    // asks which it is
		{"clone into a user namespace", unix.SYS_CLONE, "0x10010000", "EPERM"},          // with CLONE_THREAD, which no kernel takes together
		{"clone into a network namespace", unix.SYS_CLONE, "0x40010000", "EPERM"},       // likewise
		{"clone into a process namespace", unix.SYS_CLONE, "0x20010000", "EPERM"},       // likewise
		{"clone into a file system's namespace", unix.SYS_CLONE, "0x00030000", "EPERM"}, // likewise
		{"clone3", unix.SYS_CLONE3, "0", "ENOSYS"},
		{"io_uring_setup", unix.SYS_IO_URING_SETUP, "0", "ENOSYS"},
		{"io_uring_enter", unix.SYS_IO_URING_ENTER, "0", "ENOSYS"},
		{"io_uring_register", unix.SYS_IO_URING_REGISTER, "0", "ENOSYS"},
		{"userfaultfd", unix.SYS_USERFAULTFD, "0", "ENOSYS"},
		{"perf_event_open", unix.SYS_PERF_EVENT_OPEN, "0", "ENOSYS"},
		{"add_key", unix.SYS_ADD_KEY, "0", "ENOSYS"},
		{"request_key", unix.SYS_REQUEST_KEY, "0", "ENOSYS"},
		{"keyctl", unix.SYS_KEYCTL, "0", "ENOSYS"},
		{"a call newer than the list", unix.SYS_LANDLOCK_RESTRICT_SELF + 2, "0", "ENOSYS"}, // process_mrelease
	} {
		t.Run(c.name, func(t *testing.T) {
			try := []string{"try", hex(c.call), c.argument}
			got := outcome(t, program, append([]string{"hardened"}, try...)...)
			if got != c.want {
				t.Errorf("it ends with %q, want %q", got, c.want)
			}
			switch plain := outcome(t, program, append([]string{"plain"}, try...)...); {
			case plain != c.want:
			case plain == "ENOSYS":
				t.Logf("this kernel has no such call")
			default:
				t.Errorf("in a process that is not hardened it ends with %q too: this shows nothing", plain)
			}
		})
	}
}

// What is not refused goes to the kernel: up to the newest call that the list knows.
func TestOtherCallsPass(t *testing.T) {
	program := buildProbe(t)
	for _, call := range []uintptr{unix.SYS_GETPID, unix.SYS_OPENAT, unix.SYS_CLOSE_RANGE, unix.SYS_LANDLOCK_RESTRICT_SELF} {
		plain, hardened := outcome(t, program, "plain", "try", hex(call), "0"), outcome(t, program, "hardened", "try", hex(call), "0")
		if hardened != plain {
			t.Errorf("call %d ends with %q, without the filter with %q", call, hardened, plain)
		}
	}
}

// The list is of this architecture's numbers: others must not lead past it.
func TestCallsOfAnotherArchitectureKill(t *testing.T) {
	mustFilter(t)
	if runtime.GOARCH != "amd64" {
		t.Skip("only amd64 has 32-bit numbers beside its own")
	}
	program := buildProbe(t)
	if got := outcome(t, program, "plain", "try32"); got != "called" {
		t.Logf("this kernel runs no 32-bit calls: %q", got)
		return
	}
	if got := outcome(t, program, "hardened", "try32"); got != killed {
		t.Errorf("it ends with %q", got)
	}
}

// TestNoPrograms starts a program from each kind of daemon, and looks at the filter from within it.
func TestNoPrograms(t *testing.T) {
	mustFilter(t)
	program := buildProbe(t)
	if got := outcome(t, program, "hardened", "run", "grep", "Seccomp:", "/proc/self/status"); strings.Join(strings.Fields(got), " ") != "Seccomp: 2" {
		t.Errorf("a program of a daemon that starts some has %q", got)
	}
	for _, call := range []uintptr{unix.SYS_EXECVE, unix.SYS_EXECVEAT} {
		if got := outcome(t, program, "hardened", "try", hex(call), "0"); got == killed {
			t.Errorf("call %d of a daemon that starts programs kills it", call)
		}
		if got := outcome(t, program, "alone", "try", hex(call), "0"); got != killed {
			t.Errorf("call %d of a daemon that starts none ends with %q", call, got)
		}
	}
}

func hex(n uintptr) string { return "0x" + strconv.FormatUint(uint64(n), 16) }
