package harden

import (
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What happens to a refused system call.
const (
	pass = unix.SECCOMP_RET_ALLOW
	// kill ends the whole process: nothing of ours makes the call, in no error path either,
	// so whoever does has taken the process over.
	kill = unix.SECCOMP_RET_KILL_PROCESS
	// forbid says that the caller may not.
	forbid = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)
	// unknown says that this kernel has no such call: libraries then take another way.
	unknown = unix.SECCOMP_RET_ERRNO | uint32(unix.ENOSYS)
)

// newest is the newest system call that a daemon may make. Numbers are the same on every
// architecture from 424 on, so whatever a later kernel adds is unknown to a daemon.
const newest = unix.SYS_LANDLOCK_RESTRICT_SELF

// refused are the system calls that no daemon makes, nor cryptsetup and QEMU, which inherit
// this. All others that need a privilege are refused by the kernel for want of it.
var refused = []struct {
	action uint32
	calls  []uint32
}{
	{kill, []uint32{ // other processes' memory, the kernel's code, the whole machine
		unix.SYS_PTRACE, unix.SYS_PROCESS_VM_READV, unix.SYS_PROCESS_VM_WRITEV, unix.SYS_PIDFD_GETFD,
		unix.SYS_KEXEC_LOAD, unix.SYS_KEXEC_FILE_LOAD, unix.SYS_INIT_MODULE, unix.SYS_FINIT_MODULE, unix.SYS_DELETE_MODULE,
		unix.SYS_BPF, unix.SYS_REBOOT, unix.SYS_SWAPON, unix.SYS_SWAPOFF, unix.SYS_ACCT, unix.SYS_OPEN_BY_HANDLE_AT,
		unix.SYS_PIVOT_ROOT, unix.SYS_SETTIMEOFDAY, unix.SYS_CLOCK_SETTIME,
	}},
	{forbid, []uint32{ // other views of the file system and of the machine
		unix.SYS_MOUNT, unix.SYS_UMOUNT2, unix.SYS_CHROOT, unix.SYS_UNSHARE, unix.SYS_SETNS,
		unix.SYS_FSOPEN, unix.SYS_FSCONFIG, unix.SYS_FSMOUNT, unix.SYS_FSPICK, unix.SYS_MOVE_MOUNT, unix.SYS_OPEN_TREE, unix.SYS_MOUNT_SETATTR,
		unix.SYS_PERSONALITY,
	}},
	{unknown, []uint32{ // much of the kernel for little use; QEMU and cryptsetup try some and do without
		unix.SYS_IO_URING_SETUP, unix.SYS_IO_URING_ENTER, unix.SYS_IO_URING_REGISTER, unix.SYS_USERFAULTFD, unix.SYS_PERF_EVENT_OPEN,
		unix.SYS_ADD_KEY, unix.SYS_REQUEST_KEY, unix.SYS_KEYCTL,
		unix.SYS_CLONE3, // its flags lie in memory, where a filter does not see them; clone does the same
	}},
}

// programs are the system calls that start another program.
var programs = []uint32{unix.SYS_EXECVE, unix.SYS_EXECVEAT}

// namespaces are clone's flags that make a new namespace.
const namespaces = unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC |
	unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET

// refuseCalls sets the filter on every thread. A kernel without seccomp refuses nothing:
// see [FiltersCalls].
func refuseCalls([]uintptr) error {
	f, err := newFilter()
	if err != nil {
		return err
	}
	f.add(unix.BPF_JMP|unix.BPF_JGT|unix.BPF_K, 0, 1, newest) // x32's numbers, too, are above
	f.add(unix.BPF_RET|unix.BPF_K, 0, 0, unknown)
	for _, r := range refused {
		for _, call := range r.calls {
			f.on(call, r.action)
		}
	}
	f.add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, 0, 3, unix.SYS_CLONE)
	f.add(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, 0, 0, firstArgument)
	f.add(unix.BPF_JMP|unix.BPF_JSET|unix.BPF_K, 0, 1, namespaces)
	f.add(unix.BPF_RET|unix.BPF_K, 0, 0, forbid)
	return f.install()
}

// NoPrograms kills this process when it starts another program. For daemons that start
// none; call it after [Process], on which it builds.
func NoPrograms() error {
	f, err := newFilter()
	if err != nil {
		return fmt.Errorf("forbid programs: %w", err)
	}
	for _, call := range programs {
		f.on(call, kill)
	}
	if err := f.install(); err != nil {
		return fmt.Errorf("forbid programs: %w", err)
	}
	return nil
}

// FiltersCalls reports whether the kernel has seccomp filters, and so whether [Process]
// and [NoPrograms] refuse any call.
func FiltersCalls() bool {
	action := uint32(kill)
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_GET_ACTION_AVAIL, 0, uintptr(unsafe.Pointer(&action)))
	return errno == 0
}

// LogCalls logs whether the kernel refuses any call.
func LogCalls() {
	if FiltersCalls() {
		slog.Info("system calls refused", "by", "seccomp")
		return
	}
	slog.Warn("system calls not refused: this kernel has no seccomp filters")
}

// filter is a classic BPF program over struct seccomp_data, see seccomp(2). After its
// beginning the number of the call is in the accumulator.
type filter []unix.SockFilter

// Offsets in struct seccomp_data. The first argument's is that of its lower half: both
// architectures are little-endian.
const (
	number        = 0
	architecture  = 4
	firstArgument = 16
)

// newFilter begins a filter. A call by another architecture's numbers, as a 64-bit
// process may make by int 0x80, would be none of those listed: it is killed for.
func newFilter() (filter, error) {
	arch, ok := map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64}[runtime.GOARCH]
	if !ok {
		return nil, fmt.Errorf("the system calls of %s are not listed here; daemons run on amd64 and arm64", runtime.GOARCH)
	}
	var f filter
	f.add(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, 0, 0, architecture)
	f.add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, 1, 0, arch)
	f.add(unix.BPF_RET|unix.BPF_K, 0, 0, kill)
	f.add(unix.BPF_LD|unix.BPF_W|unix.BPF_ABS, 0, 0, number)
	return f, nil
}

// add appends an instruction that goes on yes or no instructions later.
func (f *filter) add(code uint16, yes, no uint8, k uint32) {
	*f = append(*f, unix.SockFilter{Code: code, Jt: yes, Jf: no, K: k})
}

func (f *filter) on(call, action uint32) {
	f.add(unix.BPF_JMP|unix.BPF_JEQ|unix.BPF_K, 0, 1, call)
	f.add(unix.BPF_RET|unix.BPF_K, 0, 0, action)
}

// install ends the filter, which lets pass what it does not refuse, and sets it on all threads.
func (f filter) install() error {
	if !FiltersCalls() {
		return nil
	}
	f.add(unix.BPF_RET|unix.BPF_K, 0, 0, pass)
	program := unix.SockFprog{Len: uint16(len(f)), Filter: &f[0]}
	thread, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&program)))
	switch {
	case errno != 0:
		return errno
	case thread != 0:
		return errors.New("a thread has a filter of its own")
	}
	return nil
}
