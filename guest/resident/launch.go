package resident

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// Name is the resident agent's argv[0]: it tells package main which part to play.
const Name = "foothold-agent"

// Dir holds what the agent keeps below /run; others may pass through it.
const Dir = "/run/foothold"

// NotifySocket is where the OS's service manager says that it has started
// (sd_notify(3), READY=1).
const NotifySocket = Dir + "/notify"

// Open files of the resident agent at its start.
const (
	fdState = 3 + iota
	fdProgram
	fdNotify
)

// Launch is a resident agent that is ready to be started.
type Launch struct{ state, program, notify *os.File }

// Prepare copies this program into a sealed memory file, since its own file goes with
// the initramfs, and the state into another.
func Prepare(s *State) (*Launch, error) {
	l := &Launch{}
	var err error
	if l.program, err = sealedSelf(); err != nil {
		return nil, fmt.Errorf("prepare the resident agent: %w", err)
	}
	data, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("prepare the resident agent: %w", err)
	}
	defer clear(data)
	defer s.wipe()
	if l.state, err = memoryFile("state", 0); err != nil {
		return nil, fmt.Errorf("prepare the resident agent: %w", err)
	}
	if _, err := l.state.Write(data); err != nil {
		return nil, fmt.Errorf("prepare the resident agent: %w", err)
	}
	if l.notify, err = notifySocket(NotifySocket); err != nil {
		return nil, fmt.Errorf("prepare the resident agent: %w", err)
	}
	return l, nil
}

// Start runs it. Its path is resolved in the child, after the files are in place.
func (l *Launch) Start() error {
	cmd := &exec.Cmd{
		Path: fmt.Sprintf("/proc/self/fd/%d", fdProgram), Args: []string{Name}, Dir: "/",
		Env:    []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"},
		Stdout: os.Stdout, Stderr: os.Stderr, ExtraFiles: []*os.File{l.state, l.program, l.notify},
		SysProcAttr: &syscall.SysProcAttr{Setsid: true},
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the resident agent: %w", err)
	}
	return nil
}

func sealedSelf() (*os.File, error) {
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return nil, err
	}
	defer self.Close()
	f, err := memoryFile(Name, unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, err
	}
	if _, err := io.Copy(f, self); err != nil {
		return nil, err
	}
	seals := unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, seals); err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	// A file that is open for writing cannot be executed (execve(2), ETXTBSY).
	return os.Open(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
}

func memoryFile(name string, flags int) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|flags)
	if err != nil {
		return nil, fmt.Errorf("make memory file: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

func notifySocket(path string) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, err
	}
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	return conn.File()
}

// inherited takes the files that Start passed.
func inherited() (state, notify *os.File, err error) {
	for _, fd := range []int{fdState, fdProgram, fdNotify} {
		unix.CloseOnExec(fd)
	}
	state = os.NewFile(fdState, "state")
	os.NewFile(fdProgram, "program").Close()
	notify = os.NewFile(fdNotify, "notify")
	if _, err := state.Stat(); err != nil {
		return nil, nil, errors.New("no state was handed over")
	}
	return state, notify, nil
}
