package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"syscall"

	"foothold/lab/control"
)

// answer serves the control socket until ctx ends.
func (s *supervisor) answer(ctx context.Context, l *net.UnixListener) {
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				slog.Error("control socket failed", "error", err)
			}
			return
		}
		s.running.Go(func() {
			c := &control.Conn{UnixConn: conn}
			defer c.Close()
			if own, err := c.Own(); err != nil || !own {
				slog.Warn("somebody else calls", "error", err)
				return
			}
			stop := context.AfterFunc(ctx, func() { c.CloseRead() })
			defer stop()
			reply := s.handle(ctx, c)
			if err := c.Send(reply); err != nil {
				slog.Debug("client went away", "error", err)
			}
		})
	}
}

func (s *supervisor) handle(ctx context.Context, c *control.Conn) control.Reply {
	var req control.Request
	files, err := c.Receive(&req)
	if err != nil {
		return control.Reply{Error: fmt.Sprintf("read request: %v", err)}
	}
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	switch req.Op {
	case control.OpStatus:
		return control.Reply{Status: s.status()}
	case control.OpDown:
		s.stop()
		return control.Reply{}
	case control.OpKill:
		d := s.find(req.Name)
		if d == nil {
			return control.Reply{Error: fmt.Sprintf("there is no daemon %q", req.Name)}
		}
		if err := d.signal(syscall.Signal(req.Signal)); err != nil {
			return control.Reply{Error: fmt.Sprintf("signal %s: %v", req.Name, err)}
		}
		return control.Reply{}
	case control.OpExec:
		code, err := s.exec(ctx, c, req, files)
		if err != nil {
			return control.Reply{Error: err.Error(), Code: code}
		}
		return control.Reply{Code: code}
	}
	return control.Reply{Error: fmt.Sprintf("there is no operation %q", req.Op)}
}

func (s *supervisor) status() *control.Status {
	st := &control.Status{
		State: s.state.Dir, Since: s.began, API: s.options.API,
		Context: s.state.Context(), Accel: s.options.Accel,
	}
	for _, d := range s.daemons {
		st.Daemons = append(st.Daemons, d.snapshot())
	}
	return st
}

// Exit codes of exec, as shells have them.
const (
	codeNotFound = 127
	codeSignal   = 128
)

// exec runs a command in a place with the client's open files. The client's end ends
// the command's process group.
func (s *supervisor) exec(ctx context.Context, c *control.Conn, req control.Request, files []*os.File) (int, error) {
	place, ok := s.net.Place(req.Name)
	if !ok {
		return codeNotFound, fmt.Errorf("there is no place %q; `foothold lab status` lists them", req.Name)
	}
	if len(files) != 3 || len(req.Args) == 0 {
		return codeNotFound, errors.New("exec needs a command and three open files")
	}
	path, err := exec.LookPath(req.Args[0])
	if err != nil {
		return codeNotFound, fmt.Errorf("run in %s: %w", req.Name, err)
	}
	cmd := &exec.Cmd{Path: path, Args: req.Args, Env: req.Env, Dir: req.Dir,
		Stdin: files[0], Stdout: files[1], Stderr: files[2],
		SysProcAttr: &syscall.SysProcAttr{Setpgid: true}}
	if err := place.Do(cmd.Start); err != nil {
		return codeNotFound, fmt.Errorf("run in %s: %w", req.Name, err)
	}
	group := -cmd.Process.Pid
	done := make(chan struct{})
	go func() { // until the client goes away or the answer was sent
		for {
			var sig control.Signal
			if _, err := c.Receive(&sig); err != nil {
				select {
				case <-done:
				default:
					if !errors.Is(err, io.EOF) {
						slog.Debug("exec: client went away", "error", err)
					}
					syscall.Kill(group, syscall.SIGKILL)
				}
				return
			}
			syscall.Kill(group, syscall.Signal(sig.Signal))
		}
	}()
	err = cmd.Wait()
	close(done)
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0, nil
	case errors.As(err, &exit):
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
			return codeSignal + int(status.Signal()), nil
		}
		return exit.ExitCode(), nil
	}
	return codeNotFound, fmt.Errorf("run in %s: %w", req.Name, err)
}
