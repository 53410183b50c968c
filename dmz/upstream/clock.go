package upstream

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Boottime is the time since the machine started, sleep included (CLOCK_BOOTTIME).
// All durations of zone documents run on it: nobody can set it back.
func Boottime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return time.Duration(1<<63 - 1) // cannot happen on Linux; then everything has expired
	}
	return time.Duration(ts.Nano())
}

// bootID is the kernel's file of that name.
const bootID = "/proc/sys/kernel/random/boot_id"

// BootID names this start of the machine, so that a persisted time is not compared
// with the clock of another.
func BootID() (string, error) {
	data, err := os.ReadFile(bootID)
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}
