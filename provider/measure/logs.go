package measure

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/imalog"
	"foothold/protocol/systemdlog"
	"foothold/protocol/tcglog"

	"golang.org/x/sys/unix"
)

// Logs are the files in which a host's kernel has the logs of what ran before the agent.
type Logs struct {
	Firmware string // of firmware and boot loader, as package tcglog reads it
	Kernel   string // of the files that the kernel measured, as package imalog reads it
	// Userspace is of what the host's system measured once the kernel ran, as package
	// systemdlog reads it; empty where it keeps no log.
	Userspace string
}

// SystemdLog is where systemd keeps its log (from version 254).
const SystemdLog = "/run/log/systemd/tpm2-measure.log"

// SecurityFS is where Linux has them (Documentation/security/tpm/tpm_event_log.rst,
// Documentation/ABI/testing/ima_policy).
func SecurityFS() Logs {
	return Logs{Firmware: "/sys/kernel/security/tpm0/binary_bios_measurements", Kernel: "/sys/kernel/security/ima/binary_runtime_measurements"}
}

// Here are the logs of this very machine: systemd's where it keeps one.
func Here() Logs {
	l := SecurityFS()
	if _, err := os.Stat(SystemdLog); !errors.Is(err, os.ErrNotExist) {
		l.Userspace = SystemdLog
	}
	return l
}

// Read reads all. They must be read after the quote that they go with: the kernel's list and
// the system's log grow, and a quote proves a beginning of each.
func (l Logs) Read() (p evidence.Platform, err error) {
	if p.Firmware, err = readWhole(l.Firmware, tcglog.MaxSize); err != nil {
		return evidence.Platform{}, fmt.Errorf("read the firmware's log (is there a TPM, and securityfs mounted?): %w", err)
	}
	if p.Kernel, err = readWhole(l.Kernel, imalog.MaxSize); err != nil {
		return evidence.Platform{}, fmt.Errorf("read the kernel's list (is securityfs mounted, and ima_policy given?): %w", err)
	}
	if l.Userspace != "" {
		if p.Userspace, err = readLocked(l.Userspace, systemdlog.MaxSize); err != nil {
			return evidence.Platform{}, fmt.Errorf("read the system's log (may this user read it?): %w", err)
		}
	}
	return p, nil
}

// Measured reports whether the kernel's list has a file of that digest by now. A kernel
// measures a file when it is opened, so it is asked after that.
func (l Logs) Measured(sum digest.SHA256) (bool, error) {
	data, err := readWhole(l.Kernel, imalog.MaxSize)
	if err != nil {
		return false, fmt.Errorf("read the kernel's list: %w", err)
	}
	list, err := imalog.Parse(data)
	if err != nil {
		return false, err
	}
	for _, e := range list.Entries {
		if !e.Violation && e.Algorithm == "sha256" && bytes.Equal(e.Digest, sum[:]) {
			return true, nil
		}
	}
	return false, nil
}

// readWhole reads a file that says nothing of its size: all of it, or an error.
func readWhole(path string, limit int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return readAll(f, limit)
}

func readAll(f *os.File, limit int) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	switch {
	case err != nil:
		return nil, err
	case len(data) == 0:
		return nil, errors.New(f.Name() + " is empty")
	case len(data) > limit:
		return nil, fmt.Errorf("%s has more than %d bytes, which no verifier reads", f.Name(), limit)
	}
	return data, nil
}

// A system's log is locked for as long as one measurement takes (systemd,
// src/shared/tpm2-util.c), some milliseconds; lockWait bounds waiting for that.
const (
	lockWait  = 5 * time.Second
	lockRetry = 10 * time.Millisecond
)

// readLocked is readWhole of a file whose writer locks it from before it extends a register
// until the record is written: what was extended before the lock was had is in the file.
func readLocked(path string, limit int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() // and unlocks
	for late := time.Now().Add(lockWait); ; time.Sleep(lockRetry) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB)
		if err == nil {
			return readAll(f, limit)
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if time.Now().After(late) {
			return nil, fmt.Errorf("%s is locked for more than %v: which process measures?", path, lockWait)
		}
	}
}
