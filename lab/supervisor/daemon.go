package supervisor

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"foothold/lab/control"
	"foothold/lab/wiring"
)

const (
	stopGrace  = 6 * time.Second // daemons promise to end within 5 s of SIGTERM
	firstPause = 250 * time.Millisecond
	longPause  = 10 * time.Second
	steady     = 30 * time.Second // a daemon that ran this long starts over with the first pause
)

// Program is a daemon to run.
type Program struct {
	Name  string
	Place string
	Path  string
	Args  []string // without the program's name
	// Files become the process's open files 3, 4, ...
	Files []*os.File
	// View is the folder of the state directory that the process sees; the rest of
	// the state directory is hidden from it.
	View string
	// Run lets it see the lab's /run.
	Run bool
	// Caps are the capabilities that stay in its bounding set.
	Caps []uintptr
	// Quiet programs print no "serving" line: they count as serving once started.
	Quiet bool
}

// daemon runs a program until stopped, again after each crash.
type daemon struct {
	program Program
	place   wiring.Namespace
	launch  func(Program) *exec.Cmd
	log     *logFile

	serving chan struct{} // closed when it served for the first time
	ended   chan error    // receives the exit of a process that never served

	mu     sync.Mutex
	status control.Daemon // guarded by mu
	cmd    *exec.Cmd      // guarded by mu
}

// await waits until the daemon served for the first time. Its error holds the end of
// the daemon's log.
func (d *daemon) await(ctx context.Context) error {
	limit := time.NewTimer(startTimeout)
	defer limit.Stop()
	why := ""
	select {
	case <-d.serving:
		return nil
	case err := <-d.ended:
		why = fmt.Sprint(err)
	case <-limit.C:
		why = "it does not serve after " + startTimeout.String()
	case <-ctx.Done():
		return ctx.Err()
	}
	return fmt.Errorf("start %s: %s\n%s\n(log: %s)", d.program.Name, why, d.log.tail(8), d.log.path)
}

// run is the daemon's life: start, wait, pause, start again, until ctx ends.
func (d *daemon) run(ctx context.Context) {
	pause := firstPause
	for ctx.Err() == nil {
		began := time.Now()
		err := d.once(ctx)
		if ctx.Err() != nil {
			break
		}
		d.crashed(err)
		select {
		case d.ended <- err:
		default:
		}
		if time.Since(began) > steady {
			pause = firstPause
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, longPause)
	}
	d.set(func(s *control.Daemon) { s.State, s.PID = control.Stopped, 0 })
}

func (d *daemon) crashed(err error) {
	text := "ended without an error"
	if err != nil {
		text = err.Error()
	}
	slog.Warn("daemon ended", "daemon", d.program.Name, "error", text)
	d.set(func(s *control.Daemon) {
		s.State, s.PID, s.LastExit = control.Waiting, 0, text
		s.Restarts++
	})
}

// once runs one process to its end.
func (d *daemon) once(ctx context.Context) error {
	cmd := d.launch(d.program)
	out, in, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("make log pipe: %w", err)
	}
	defer out.Close()
	cmd.Stdout, cmd.Stderr = in, in
	err = d.place.Do(cmd.Start)
	in.Close()
	if err != nil {
		return fmt.Errorf("start %s: %w", d.program.Name, err)
	}
	state := control.Starting
	if d.program.Quiet {
		state = control.Serving
	}
	d.mu.Lock()
	d.cmd = cmd
	d.mu.Unlock()
	d.set(func(s *control.Daemon) { s.State, s.PID, s.Since = state, cmd.Process.Pid, time.Now() })
	if d.program.Quiet {
		d.served()
	}
	copied := make(chan struct{})
	go func() {
		defer close(copied)
		d.copyLog(out)
	}()
	stop := context.AfterFunc(ctx, func() { d.terminate(cmd) })
	defer stop()
	err = cmd.Wait()
	select {
	case <-copied:
	case <-time.After(time.Second): // a grandchild still holds the pipe
	}
	return err
}

// terminate ends a process, hard when it does not listen.
func (d *daemon) terminate(cmd *exec.Cmd) {
	cmd.Process.Signal(syscall.SIGTERM)
	time.AfterFunc(stopGrace, func() { cmd.Process.Kill() })
}

// signal sends the running process a signal.
func (d *daemon) signal(sig syscall.Signal) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cmd == nil || d.status.PID == 0 {
		return errors.New("it does not run")
	}
	return d.cmd.Process.Signal(sig)
}

// copyLog writes the process's output to its log and looks for the line that says
// that it serves.
func (d *daemon) copyLog(r io.Reader) {
	lines := bufio.NewReaderSize(r, 64<<10)
	for {
		line, err := lines.ReadSlice('\n')
		if len(line) > 0 {
			d.log.Write(line)
			if saysServing(line) {
				d.set(func(s *control.Daemon) { s.State = control.Serving })
				d.served()
			}
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return
		}
	}
}

func saysServing(line []byte) bool {
	if !bytes.Contains(line, []byte(`"serving"`)) {
		return false
	}
	var record struct {
		Msg string `json:"msg"`
	}
	return json.Unmarshal(line, &record) == nil && record.Msg == "serving"
}

func (d *daemon) served() {
	select {
	case <-d.serving:
	default:
		close(d.serving)
	}
}

func (d *daemon) set(f func(*control.Daemon)) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f(&d.status)
}

func (d *daemon) snapshot() control.Daemon {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.status
}
