package measure

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/imalog"
	"foothold/protocol/tcglog"
)

// Logs are the files in which a host's kernel has the logs of what ran before the agent.
type Logs struct {
	Firmware string // of firmware and boot loader, as package tcglog reads it
	Kernel   string // of the files that the kernel measured, as package imalog reads it
}

// SecurityFS is where Linux has them (Documentation/security/tpm/tpm_event_log.rst,
// Documentation/ABI/testing/ima_policy).
func SecurityFS() Logs {
	return Logs{"/sys/kernel/security/tpm0/binary_bios_measurements", "/sys/kernel/security/ima/binary_runtime_measurements"}
}

// Read reads both. They must be read after the quote that they go with: the kernel's list
// grows, and a quote proves a beginning of it.
func (l Logs) Read() (p evidence.Platform, err error) {
	if p.Firmware, err = readWhole(l.Firmware, tcglog.MaxSize); err != nil {
		return evidence.Platform{}, fmt.Errorf("read the firmware's log (is there a TPM, and securityfs mounted?): %w", err)
	}
	if p.Kernel, err = readWhole(l.Kernel, imalog.MaxSize); err != nil {
		return evidence.Platform{}, fmt.Errorf("read the kernel's list (is securityfs mounted, and ima_policy given?): %w", err)
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
	data, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	switch {
	case err != nil:
		return nil, err
	case len(data) == 0:
		return nil, errors.New(path + " is empty")
	case len(data) > limit:
		return nil, fmt.Errorf("%s has more than %d bytes, which no verifier reads", path, limit)
	}
	return data, nil
}
