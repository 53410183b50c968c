package lab

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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
	return s, nil
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
