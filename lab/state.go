package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// State is the directory of one lab. Two labs with two directories share nothing.
//
//	context.yaml   how the command line reaches this lab's orchestrator
//	logs/          one file a daemon
//	run/           lock, control socket; emptied by the end of the lab
//	tenant/        the tenant's data centre: orchestrator, off-line keys, operator's certificate
//	dmz/NAME/      one folder a daemon
//	provider/      host agent, release, TPM, the provider's authority
type State struct{ Dir string }

// Open makes the directory where it is missing and returns it with an absolute path.
// One that others own or may write to is refused: they could put their folders, and so
// their keys, in the place of the lab's. What is in it is the user's alone.
func Open(dir string) (State, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return State{}, fmt.Errorf("find state directory: %w", err)
	}
	s := State{abs}
	for _, d := range []string{"", "run", "logs", "tenant", "dmz", "provider"} {
		if err := os.MkdirAll(s.path(d), 0o700); err != nil {
			return State{}, fmt.Errorf("make state directory: %w", err)
		}
		if err := s.own(d); err != nil {
			return State{}, fmt.Errorf("state directory: %w", err)
		}
	}
	return s, nil
}

// ErrNone is returned for a directory that holds no lab.
var ErrNone = errors.New("there is no lab")

// Existing returns the state of a lab that was made before.
func Existing(dir string) (State, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return State{}, fmt.Errorf("find state directory: %w", err)
	}
	s := State{abs}
	if _, err := os.Stat(s.Run()); errors.Is(err, fs.ErrNotExist) {
		return State{}, fmt.Errorf("%w in %s: `foothold lab up --state %[2]s` makes one", ErrNone, abs)
	} else if err != nil {
		return State{}, fmt.Errorf("find state directory: %w", err)
	}
	return s, errors.Join(s.own(""), s.own("run"))
}

// own checks whose a folder is, and closes the lab's own ones to others.
func (s State) own(dir string) error {
	path := s.path(dir)
	stat := unix.Lstat
	if dir == "" { // it may be a link of the user's
		stat = unix.Stat
	}
	var st unix.Stat_t
	if err := stat(path, &st); err != nil {
		return &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	switch {
	case dir != "" && st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("%s is no folder", path)
	case int(st.Uid) != os.Geteuid():
		return fmt.Errorf("%s belongs to user %d, not to you", path, st.Uid)
	case dir == "" && st.Mode&0o002 != 0:
		return fmt.Errorf("everybody may write to %s: chmod o-w it, or name another with --state", path)
	case dir != "" && st.Mode&0o077 != 0:
		return os.Chmod(path, 0o700)
	}
	return nil
}

func (s State) path(parts ...string) string {
	return filepath.Join(append([]string{s.Dir}, parts...)...)
}

// Run holds what lives only as long as the lab runs.
func (s State) Run(parts ...string) string { return s.path(append([]string{"run"}, parts...)...) }

// Tenant is the folder of the tenant's data centre.
func (s State) Tenant(parts ...string) string { return s.path(append([]string{"tenant"}, parts...)...) }

// DMZ is the folder of one daemon of the DMZ.
func (s State) DMZ(parts ...string) string { return s.path(append([]string{"dmz"}, parts...)...) }

// Provider is the provider's folder.
func (s State) Provider(parts ...string) string {
	return s.path(append([]string{"provider"}, parts...)...)
}

// Log is the file that a daemon's standard error goes to.
func (s State) Log(name string) string { return s.path("logs", name+".log") }

// Context is the context file of the command line.
func (s State) Context() string { return s.path("context.yaml") }
