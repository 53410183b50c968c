// Package command runs the machine's own tools (apt, cryptsetup, mkfs.erofs, ...).
//
// It finds those of the system folders, which an ordinary user's PATH lacks on
// Debian, gives them a fixed locale, ends them with the context, and puts the end
// of what they complained of into the error. Secrets go in by standard input or an
// open file, never by an argument.
package command

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// complaint bounds how much of a tool's output an error quotes, in bytes.
const complaint = 600

// grace is how long a tool may take to clean up after its context ended.
const grace = 10 * time.Second

// ErrMissing is returned for a tool that is not installed.
var ErrMissing = errors.New("program is not installed")

// Find returns the tool's path.
func Find(name string) (string, error) {
	if path, err := exec.LookPath(name); err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("%s: %w", name, ErrMissing)
}

// New prepares a tool. The context's end sends it SIGTERM, and SIGKILL when that
// does not help.
func New(ctx context.Context, name string, args ...string) (*exec.Cmd, error) {
	path, err := Find(name)
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = grace
	return cmd, nil
}

// Run runs a tool that says nothing worth keeping.
func Run(ctx context.Context, name string, args ...string) error {
	_, err := Output(ctx, name, args...)
	return err
}

// Output runs a tool and returns its standard output.
func Output(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd, err := New(ctx, name, args...)
	if err != nil {
		return nil, err
	}
	return Wait(cmd)
}

// Wait runs a prepared tool and returns its standard output, unless cmd has a
// place for it already.
func Wait(cmd *exec.Cmd) ([]byte, error) {
	var out, complaints bytes.Buffer
	if cmd.Stdout == nil {
		cmd.Stdout = &out
	}
	if cmd.Stderr == nil {
		cmd.Stderr = &complaints
	}
	if err := cmd.Run(); err != nil {
		text := strings.TrimSpace(complaints.String())
		if text == "" {
			text = strings.TrimSpace(out.String())
		}
		if len(text) > complaint {
			text = "..." + text[len(text)-complaint:]
		}
		return nil, fmt.Errorf("%s: %w: %s", filepath.Base(cmd.Path), err, text)
	}
	return out.Bytes(), nil
}
