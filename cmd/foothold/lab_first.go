package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"foothold/client"
	"foothold/lab"
	"foothold/protocol/api"
)

// firstTemplate and firstVM are what `make lab` makes.
const (
	firstTemplate = "debian"
	firstVM       = "first"
)

// labFirst is the end of `make lab`: it runs the commands that a new user would type
// next, and shows them.
func labFirst(open openLab) *cobra.Command {
	var workload string
	cmd := &cobra.Command{
		Use:   "first",
		Short: "Build the first template, create the first VM, fetch a page from it",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			state, err := open()
			if err != nil {
				return err
			}
			w := &walk{state: state, out: cmd.ErrOrStderr()}
			return w.all(cmd.Context(), workload)
		},
	}
	cmd.Flags().StringVar(&workload, "workload", "", "executable `FILE` for the VM to run")
	return cmd
}

// walk runs this program's own commands, as a user would.
type walk struct {
	state lab.State
	out   io.Writer
}

func (w *walk) all(ctx context.Context, workload string) error {
	began := time.Now()
	if err := os.Setenv(client.Variable, w.state.Context()); err != nil {
		return fmt.Errorf("name the lab's context: %w", err)
	}
	found, err := client.Find(w.state.Context())
	if err != nil {
		return err
	}
	c, err := client.Dial(found)
	if err != nil {
		return err
	}
	vm, err := c.VM(ctx, firstVM)
	if err != nil && !client.IsUnknown(err) {
		return err
	}
	for _, args := range towardsReady(vm, workload) {
		if err := w.run(ctx, args...); err != nil {
			return err
		}
	}
	if vm, err = c.VM(ctx, firstVM); err != nil {
		return err
	}
	if vm.WorkloadURL != "" {
		if err := w.run(ctx, "lab", "fetch", vm.WorkloadURL, "--state", w.state.Dir); err != nil {
			return err
		}
	}
	fmt.Fprintf(w.out, "\nDone after %.0f s. What to try next:\n", time.Since(began).Seconds())
	w.next(workload)
	return nil
}

// towardsReady lists the commands that make the first VM ready, from what there is of
// it; the zero VM is none. The template is built before each creation, which takes
// seconds if it is up to date: an agent of an older build might not understand the lab's
// daemons. A VM that ended goes first, because a template that a VM has is not renewed.
func towardsReady(vm api.VM, workload string) [][]string {
	build, create := []string{"template", "build", firstTemplate}, createArgs(firstVM, workload, "--template", firstTemplate)
	switch {
	case vm.Ready:
		return nil
	case vm.Name == "":
		return [][]string{build, create}
	case vm.Phase == client.PhaseStopped:
		return [][]string{{"vm", "start", firstVM, "--wait"}}
	case vm.Reason != "" || vm.Phase == client.PhaseReleased:
		return [][]string{{"vm", "delete", firstVM, "--yes"}, build, create}
	}
	return [][]string{{"vm", "watch", firstVM}}
}

// next says what a new user can try.
func (w *walk) next(workload string) {
	for _, line := range []string{
		"export " + client.Variable + "=" + w.state.Context(),
		"bin/foothold vm show " + firstVM + "        # phases, components, the rules that are live for it",
		"bin/foothold vm explain " + firstVM,
		"bin/foothold " + strings.Join(createArgs("web", workload), " "),
		"bin/foothold events",
		"bin/foothold lab exec external --state " + w.state.Dir + " -- nft list ruleset",
		"bin/foothold vm delete " + firstVM,
		"make down",
	} {
		fmt.Fprintln(w.out, "  "+line)
	}
}

// createArgs is the command that makes a VM, with a workload or without.
func createArgs(name, workload string, more ...string) []string {
	args := append([]string{"vm", "create", name, "--wait"}, more...)
	if workload != "" {
		args = append(args, "--workload", workload)
	}
	return args
}

// run shows a command of this program and runs it.
func (w *walk) run(ctx context.Context, args ...string) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find own program: %w", err)
	}
	fmt.Fprintf(w.out, "\n$ foothold %s\n", strings.Join(args, " "))
	cmd := exec.CommandContext(ctx, self, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	err = cmd.Run()
	if exit, ok := err.(*exec.ExitError); ok {
		return &exitError{code: max(exit.ExitCode(), exitFailure)} // it has said why
	}
	return err
}
