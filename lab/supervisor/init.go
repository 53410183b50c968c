package supervisor

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
)

// Open files of the first process, and of the supervisor after it.
const (
	lockFD   = 3 // the state directory's lock, held as long as the lab lives
	reportFD = 4 // progress, to `lab up`
	apiFD    = 5 // the operator API's listening socket
)

// Init is the first process of the lab's PID namespace. It mounts what the lab needs,
// starts the supervisor, and collects orphans. When the supervisor ends it ends too,
// and the kernel with it everything else in the namespace.
func Init(args []string) error {
	if os.Getpid() != 1 {
		return errors.New("this runs only as the first process of a lab: use `foothold lab up`")
	}
	for _, fd := range []int{lockFD, reportFD, apiFD} {
		unix.CloseOnExec(fd)
	}
	if err := mounts(); err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", append([]string{"lab", "supervise"}, args...)...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	for _, fd := range []int{lockFD, reportFD, apiFD} {
		cmd.ExtraFiles = append(cmd.ExtraFiles, os.NewFile(uintptr(fd), "inherited"))
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGCHLD)
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start supervisor: %w", err)
	}
	unix.Close(reportFD) // its end must show when the supervisor closes it
	unix.Close(apiFD)
	for sig := range signals {
		switch sig {
		case syscall.SIGTERM, syscall.SIGINT:
			cmd.Process.Signal(syscall.SIGTERM)
		}
		if code, done := reap(cmd.Process.Pid); done {
			if code != 0 {
				return fmt.Errorf("supervisor ended with code %d", code)
			}
			return nil
		}
	}
	return nil
}

// reap collects ended children. It reports the end of the one with the number pid.
func reap(pid int) (code int, done bool) {
	for {
		var status unix.WaitStatus
		ended, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil || ended <= 0 {
			return 0, false
		}
		if ended == pid {
			if status.Signaled() {
				return 128 + int(status.Signal()), true
			}
			return status.ExitStatus(), true
		}
	}
}

// mounts gives the lab a /proc of its PID namespace and an empty /run, both unseen
// from outside.
func mounts() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mount /proc (a container that masks parts of /proc forbids it): %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755,size=64m"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	return nil
}
