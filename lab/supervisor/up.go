package supervisor

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"foothold/internal/durable"
	"foothold/lab"
	"foothold/lab/control"
)

const (
	lockFile   = "lock"
	recordFile = "supervisor.json"
	// lockWait covers the moment between the end of a killed lab's first process and
	// that of its last.
	lockWait = 10 * time.Second
	downWait = 30 * time.Second
)

// ErrUp is returned when the lab runs already.
var ErrUp = errors.New("the lab is up already")

// record says which process outside is the lab's first.
type record struct {
	PID    int    `json:"pid"`
	BootID string `json:"boot_id"` // a number of another boot means nothing
	Start  string `json:"start"`   // start time of the process, clock ticks since boot
}

// Up starts a supervisor and waits until all its daemons serve. The caller holds the
// lab's lock and has made the ground.
func Up(ctx context.Context, lock *os.File, api *net.TCPListener, o Options, progress func(Step)) error {
	state := lab.State{Dir: o.State}
	apiSocket, err := api.File()
	if err != nil {
		return fmt.Errorf("hand in the API's socket: %w", err)
	}
	defer apiSocket.Close()
	read, write, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("make progress pipe: %w", err)
	}
	defer read.Close()
	defer write.Close()
	log, err := os.OpenFile(state.Log("supervisor"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	defer log.Close()
	options, err := json.Marshal(o)
	if err != nil {
		return fmt.Errorf("encode options: %w", err)
	}
	cmd := exec.Command("/proc/self/exe", "lab", "init", string(options))
	cmd.Args[0] = "foothold"
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{lock, write, apiSocket}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true,
		Cloneflags: syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWNET |
			syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC | syscall.CLONE_NEWUTS,
		// The user is root inside and nobody else exists there: no range of
		// subordinate ids is needed, and every file stays the user's own.
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}},
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start the lab's namespaces (`foothold lab preflight` says what is missing): %w", err)
	}
	write.Close()
	exited := make(chan struct{})
	go func() { cmd.Wait(); close(exited) }()
	abandon := func() {
		cmd.Process.Kill()
		<-exited
	}
	if err := remember(state, cmd.Process.Pid); err != nil {
		abandon()
		return err
	}
	stop := context.AfterFunc(ctx, abandon)
	defer stop()
	if err := follow(read, progress); err != nil {
		abandon()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("%w\nlog of the supervisor: %s", err, state.Log("supervisor"))
	}
	return nil
}

// follow passes progress on until the lab is ready.
func follow(r *os.File, progress func(Step)) error {
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		var s Step
		if err := json.Unmarshal(lines.Bytes(), &s); err != nil {
			return fmt.Errorf("read progress: %w", err)
		}
		switch {
		case s.Error != "":
			return errors.New(s.Error)
		case s.Ready:
			return nil
		}
		progress(s)
	}
	return errors.New("the supervisor ended before the lab was ready")
}

// Lock takes the lab's lock. A lab that is up holds it; ErrUp says so. The lock ends
// with the last process that holds it open, so none is ever stale.
func Lock(ctx context.Context, state lab.State) (*os.File, error) {
	f, err := os.OpenFile(state.Run(lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
		}
		if c, err := control.Dial(state.Run()); err == nil {
			c.Close()
			f.Close()
			return nil, ErrUp
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("another `foothold lab` command holds %s; `foothold lab down --state %s` ends it", f.Name(), state.Dir)
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// Down ends the lab: by asking, and by killing its first process when it does not
// answer. It returns once nothing of it is left.
func Down(ctx context.Context, state lab.State) error {
	asked, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_, err := control.Call(asked, state.Run(), control.Request{Op: control.OpDown})
	if err != nil && !errors.Is(err, control.ErrDown) {
		kill(state)
	}
	if errors.Is(err, control.ErrDown) { // perhaps it is starting, or hangs
		kill(state)
	}
	if err := awaitLock(ctx, state, downWait); err != nil {
		kill(state)
		if err := awaitLock(ctx, state, lockWait); err != nil {
			return err
		}
	}
	for _, name := range []string{control.SocketFile, recordFile} {
		if err := os.Remove(state.Run(name)); err != nil && !os.IsNotExist(err) {
			return fmt.Errorf("tidy up: %w", err)
		}
	}
	return nil
}

// awaitLock waits until no process of the lab holds the lock.
func awaitLock(ctx context.Context, state lab.State, limit time.Duration) error {
	f, err := os.OpenFile(state.Run(lockFile), os.O_RDWR, 0)
	if os.IsNotExist(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open lock: %w", err)
	}
	defer f.Close()
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the lab in %s does not end", state.Dir)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Running says whether the recorded first process lives, and its number.
func Running(state lab.State) (int, bool) {
	data, err := os.ReadFile(state.Run(recordFile))
	if err != nil {
		return 0, false
	}
	var r record
	if json.Unmarshal(data, &r) != nil || r.PID <= 1 || r.BootID != bootID() || r.Start == "" || r.Start != startTime(r.PID) {
		return 0, false
	}
	return r.PID, true
}

// kill ends the recorded process, if it still is the one that was recorded.
func kill(state lab.State) {
	if pid, ok := Running(state); ok {
		syscall.Kill(pid, syscall.SIGKILL)
	}
}

func remember(state lab.State, pid int) error {
	data, err := json.Marshal(record{PID: pid, BootID: bootID(), Start: startTime(pid)})
	if err != nil {
		return fmt.Errorf("record the lab's process: %w", err)
	}
	return durable.WriteFile(state.Run(recordFile), data, 0o600)
}

func bootID() string {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}

// startTime is field 22 of /proc/PID/stat (proc(5)).
func startTime(pid int) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	text := string(data)
	fields := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
	if len(fields) < 20 {
		return ""
	}
	return fields[19]
}
