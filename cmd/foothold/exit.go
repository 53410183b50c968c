package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"foothold/client"

	"github.com/spf13/cobra"
)

// Exit codes, stable. `foothold help exit-codes` and docs/operations.md explain them.
const (
	exitOK          = 0
	exitFailure     = 1   // the operation was tried and failed, fsck found what does not fit, or evidence is not as recorded
	exitUsage       = 2   // the command line or a file it names is wrong
	exitRefused     = 3   // the orchestrator refused, or evidence rightly records a refusal
	exitAborted     = 4   // the VM that was waited for was stopped, aborted or released, or its workload ended
	exitMissing     = 5   // the preflight found something missing
	exitUnreachable = 6   // no answer from the orchestrator
	exitTimeout     = 7   // still under way when --timeout passed
	exitInterrupted = 130 // ended by SIGINT or SIGTERM
)

const exitHelp = `Every command ends with one of these codes. They are stable.

  0    done
  1    the operation was tried and failed, fsck found what does not fit, or verify found
       evidence that is not as recorded
  2    the command line, the context or a file that it names is wrong; nothing was done
  3    the orchestrator refused; the message carries a stable reason. Of verify: the
       evidence is as recorded, and records a refusal
  4    the VM that was waited for was stopped, aborted or released, or its workload ended
  5    the preflight found something missing; it prints the line that mends it
  6    the orchestrator does not answer, or the two certificates do not trust each other;
       nothing is known of the request
  7    --timeout passed while the VM was still on its way; it goes on without you
  130  interrupted; a VM that was being waited for goes on

foothold lab exec ends as the command does that it ran: with its code, with 128 and the
number of the signal that ended it, or with 127 if there is no such place or command.

Reasons are listed in docs/errors.md.
`

// exitCodes is a help topic, not a command: it has no Run.
func exitCodes() *cobra.Command {
	return &cobra.Command{Use: "exit-codes", Short: "What the exit codes mean", Long: exitHelp}
}

// exitError carries an exit code up to main. Without err there is nothing more to
// say: a command run by `lab exec` has said it.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string {
	if e.err == nil {
		return fmt.Sprintf("exit code %d", e.code)
	}
	return e.err.Error()
}

func (e *exitError) Unwrap() error { return e.err }

// usage is an error of the command line.
func usage(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...)}
}

// exitCode is the code that an error ends the process with.
func exitCode(err error) int {
	var coded *exitError
	var refusal *client.Refusal
	var ended *client.Ended
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &coded):
		return coded.code
	case errors.As(err, &refusal):
		return exitRefused
	case errors.As(err, &ended):
		return exitAborted
	case errors.Is(err, client.ErrUnreachable), errors.Is(err, client.ErrUntrusted):
		return exitUnreachable
	case errors.Is(err, context.DeadlineExceeded):
		return exitTimeout
	case errors.Is(err, context.Canceled):
		return exitInterrupted
	}
	return exitFailure
}

// tell writes an error to w.
func tell(w io.Writer, err error) {
	var coded *exitError
	if errors.As(err, &coded) && coded.err == nil {
		return
	}
	if errors.Is(err, context.Canceled) {
		err = errors.New("interrupted")
	}
	if errors.Is(err, context.DeadlineExceeded) && exitCode(err) == exitTimeout {
		err = errors.New("--timeout passed; what was asked for goes on: foothold vm explain NAME says what it waits for")
	}
	fmt.Fprintln(w, "foothold:", err)
}

// group is a command that only holds others.
func group(use, short, long string, subs ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{
		Use: use, Short: short, Long: long, SuggestionsMinimumDistance: 2,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return nil
			}
			text := fmt.Sprintf("%s has no command %q", cmd.CommandPath(), args[0])
			if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
				text += fmt.Sprintf("; did you mean %q?", near[0])
			}
			return usage("%s; see `%s --help`", text, cmd.CommandPath())
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	c.AddCommand(subs...)
	return c
}

// strictArgs makes every argument error of the tree one of usage, a required flag that
// is missing included.
func strictArgs(c *cobra.Command) {
	if check := c.Args; check != nil {
		c.Args = func(cmd *cobra.Command, args []string) error {
			err := check(cmd, args)
			if err == nil {
				err = cmd.ValidateRequiredFlags()
			}
			var coded *exitError
			if err == nil || errors.As(err, &coded) {
				return err
			}
			return usage("%w; usage: %s", err, cmd.UseLine())
		}
	}
	for _, sub := range c.Commands() {
		strictArgs(sub)
	}
}
