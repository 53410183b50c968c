package main

import (
	"context"
	"time"

	"foothold/client"
	"foothold/client/term"
	"foothold/protocol/api"

	"github.com/spf13/cobra"
)

// silence is how long a command that waits for a VM shows nothing before it says what it
// waits for. A host that is there confirms within a second or two.
const silence = 3 * time.Second

// timeoutFlag is the --timeout of the commands that wait.
func timeoutFlag(c *cobra.Command, d *time.Duration) {
	c.Flags().DurationVar(d, "timeout", 0, "stop waiting after this `TIME`; what was asked for goes on (default: wait as long as it takes)")
}

// limited is the command's context, which ends after the timeout if there is one.
func limited(cmd *cobra.Command, timeout time.Duration) (context.Context, context.CancelFunc) {
	if timeout <= 0 {
		return cmd.Context(), func() {}
	}
	return context.WithTimeout(cmd.Context(), timeout)
}

// awaited says what keeps a VM while no step of it is shown: its host is away, its next
// start is not due yet, it writes its volume out, others boot in front of it.
type awaited struct {
	s     *session
	steps *term.Steps
	still api.VM    // the last observation that differed
	since time.Time // of it
	told  string
}

func newAwaited(s *session, steps *term.Steps) *awaited { return &awaited{s: s, steps: steps} }

// see takes an observation; once nothing has changed for a while it asks, and tells what
// it has not told yet.
func (a *awaited) see(ctx context.Context, vm api.VM) {
	if vm.Phase != a.still.Phase || vm.Start != a.still.Start || vm.Cleanup != a.still.Cleanup || vm.Wish != a.still.Wish || a.since.IsZero() {
		a.still, a.since = vm, time.Now()
		return
	}
	silent := vm.Phase == client.PhaseReserved || vm.Phase == client.PhaseStopped || vm.Wish != ""
	if !silent || time.Since(a.since) < silence {
		return
	}
	a.since = time.Now() // ask again after as long
	e, err := a.s.Explain(ctx, vm.ID)
	if err != nil || e.Awaited == "" { // the wait itself finds out what is wrong
		return
	}
	text := "waits for " + term.Clean(e.Awaited)
	if !e.Until.IsZero() {
		text += ", until " + when(e.Until)
	}
	if text != a.told {
		a.told = text
		a.steps.Note(text)
	}
}
