package measure

import (
	"errors"
	"fmt"
	"io"
	"os"

	"foothold/protocol/evidence"
	"foothold/protocol/imalog"
	"foothold/protocol/tcglog"
)

// Where securityfs has the logs of what ran before the agent (Linux,
// Documentation/ABI/testing/ima_policy and .../security/tpm/tpm_event_log.rst).
const (
	firmwareLog = "/sys/kernel/security/tpm0/binary_bios_measurements"
	kernelList  = "/sys/kernel/security/ima/binary_runtime_measurements"
)

// Logs reads the logs of firmware and kernel. They must be read after the quote that they
// go with: the kernel's list grows, and a quote proves a beginning of it.
func Logs() (evidence.Platform, error) { return logs(firmwareLog, kernelList) }

func logs(firmware, kernel string) (p evidence.Platform, err error) {
	if p.Firmware, err = readWhole(firmware, tcglog.MaxSize); err != nil {
		return evidence.Platform{}, fmt.Errorf("read the firmware's log (is there a TPM, and securityfs mounted?): %w", err)
	}
	if p.Kernel, err = readWhole(kernel, imalog.MaxSize); err != nil {
		return evidence.Platform{}, fmt.Errorf("read the kernel's list (is securityfs mounted, and ima_policy given?): %w", err)
	}
	return p, nil
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
