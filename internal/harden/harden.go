// Package harden takes from a daemon's process what its work does not need, before it
// reads its first secret:
//
//   - its memory is nobody else's: no process of the same user may trace it or read its
//     /proc files, no core file is written;
//   - it gains no privilege, by whatever program it starts;
//   - it keeps the named capabilities and no other, and hands none on to what it starts;
//   - system calls that no daemon needs are refused to it and to what it starts, and end it
//     where only an attacker would make them;
//   - what it writes is its own, unless a call says otherwise.
//
// All of it holds for every thread and for good. Package fence bounds the files as well.
//
// What it does not do: root of the machine, and whoever owns the user namespace that the
// process was started in, reads everything. The binary must be built without cgo (`make build` is),
// which alone lets a Go program change all its threads at once; another one refuses to run.
package harden

import (
	"errors"
	"fmt"
	"slices"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// lastCapability is the highest that a kernel may know; the first unknown one ends the loop.
const lastCapability = 63

// Process hardens this process, which keeps the named capabilities (unix.CAP_NET_ADMIN)
// as far as it has them. Call it first, in main.
func Process(keep ...uintptr) error {
	for _, step := range []struct {
		what string
		do   func([]uintptr) error
	}{
		{"close its memory", closeMemory},
		{"forbid new privileges", forbidPrivileges},
		{"drop capabilities", dropCapabilities},
		{"refuse system calls", refuseCalls},
	} {
		if err := step.do(keep); err != nil {
			return fmt.Errorf("harden this process: %s: %w", step.what, err)
		}
	}
	return nil
}

// closeMemory sets what belongs to the process as a whole.
func closeMemory([]uintptr) error {
	unix.Umask(0o077)
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return err
	}
	return unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
}

func forbidPrivileges([]uintptr) error {
	return prctl(unix.PR_SET_NO_NEW_PRIVS, 1)
}

// dropCapabilities empties the bounding set too, where the process may: an ordinary
// user's process, or one that was confined before, may not. It needs not either, since
// without new privileges a program that it starts never gets more than it has itself.
func dropCapabilities(keep []uintptr) error {
	if err := prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL); err != nil {
		return err
	}
	for c := uintptr(0); c <= lastCapability; c++ {
		if slices.Contains(keep, c) {
			continue
		}
		err := prctl(unix.PR_CAPBSET_DROP, c)
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EPERM) {
			break
		}
		if err != nil {
			return err
		}
	}
	have, err := permitted()
	if err != nil {
		return err
	}
	var set [2]unix.CapUserData
	for _, c := range keep {
		bit := uint32(1) << (c % 32)
		set[c/32].Permitted |= have[c/32].Permitted & bit
		set[c/32].Effective = set[c/32].Permitted
	}
	return capset(&set)
}

// ThreadDropsCapabilities takes every capability from the calling thread alone, so that
// a program which it starts has none. The caller has locked the thread and never gives
// it back.
func ThreadDropsCapabilities() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		return fmt.Errorf("drop this thread's capabilities: %w", err)
	}
	return nil
}

func permitted() (set [2]unix.CapUserData, err error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	err = unix.Capget(&header, &set[0])
	return set, err
}

// capset sets the capabilities of every thread. The inheritable set is empty.
func capset(set *[2]unix.CapUserData) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	_, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(set)), 0)
	return failure(errno)
}

// prctl sets an attribute of every thread.
func prctl(option, value uintptr) error {
	_, _, errno := syscall.AllThreadsSyscall6(unix.SYS_PRCTL, option, value, 0, 0, 0, 0)
	return failure(errno)
}

func failure(errno syscall.Errno) error {
	switch errno {
	case 0:
		return nil
	case syscall.ENOTSUP:
		return errors.New("this binary was built with cgo; build it with CGO_ENABLED=0")
	}
	return errno
}
