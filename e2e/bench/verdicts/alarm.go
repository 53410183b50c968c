package verdicts

import (
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// alarm wakes a goroutine at a time, some 50 µs late. time.Sleep does not do: where a
// process has nothing else to do, Go's timers wait in epoll_wait, which counts whole
// milliseconds. An alarm comes as a packet from the network does, through a file.
type alarm struct {
	fd   int // of file, which stays in non-blocking mode
	file *os.File
}

func newAlarm() (*alarm, error) {
	fd, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make a timer: %w", err)
	}
	return &alarm{fd, os.NewFile(uintptr(fd), "timer")}, nil
}

// wait returns at once if the time is over.
func (a *alarm) wait(until time.Time) error {
	left := time.Until(until)
	if left <= 0 {
		return nil
	}
	if err := unix.TimerfdSettime(a.fd, 0, &unix.ItimerSpec{Value: unix.NsecToTimespec(left.Nanoseconds())}, nil); err != nil {
		return fmt.Errorf("set a timer: %w", err)
	}
	var expired [8]byte
	_, err := a.file.Read(expired[:])
	return err
}

func (a *alarm) close() { a.file.Close() }
