// Command foothold is the operator's tool and the tenant's and DMZ's daemons in one
// binary: `foothold vm`, `foothold lab`, `foothold orchestrator`, and so on.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
)

// Exit codes, stable.
const (
	exitOK      = 0
	exitFailure = 1 // the operation was tried and failed
	exitUsage   = 2 // the command line or a file it names is wrong
	exitRefused = 3 // the orchestrator refused
	exitAborted = 4 // the VM that was waited for was aborted
	exitMissing = 5 // the preflight found something missing
)

// commands makes the sub-commands, one file each.
var commands = []func() *cobra.Command{
	versionCommand,
}

// exitError carries an exit code up to main.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	root := &cobra.Command{
		Use:           "foothold",
		Short:         "Run virtual machines on hardware that you do not own, after they proved what they run on",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &exitError{exitUsage, err} })
	for _, c := range commands {
		root.AddCommand(c())
	}
	err := root.ExecuteContext(ctx)
	if err == nil {
		return
	}
	fmt.Fprintln(os.Stderr, "foothold:", err)
	var coded *exitError
	if errors.As(err, &coded) {
		os.Exit(coded.code)
	}
	os.Exit(exitFailure)
}
