package main

import (
	"context"
	"time"

	"foothold/client"
	"foothold/protocol/api"

	"github.com/spf13/cobra"
)

func vmStop() *cobra.Command {
	wait, timeout := false, time.Duration(0)
	c := jsonFlag(&cobra.Command{
		Use: "stop NAME", Short: "Stop a VM and keep its volume",
		Long: `Stop a VM and keep its volume. One that computes is told through its tunnel and writes
its volume out first; if it has not ended within a minute, its host ends it. Tokens,
certificate, tunnel and rules go with it. Nothing starts it again but ` + "`foothold vm start`" + `.`,
		Example: "  foothold vm stop web --wait",
		Args:    cobra.ExactArgs(1),
		RunE: inSession(func(cmd *cobra.Command, args []string, s *session) error {
			ctx, stop := limited(cmd, timeout)
			defer stop()
			vm, err := s.StopVM(ctx, args[0])
			if err == nil && wait {
				vm, err = s.followStop(ctx, vm.ID)
			}
			if err != nil {
				return failed(cmd, vm, err)
			}
			if wantsJSON(cmd) {
				return printJSON(cmd.OutOrStdout(), complete(vm))
			}
			if vm.Wish != "" {
				s.log.Line("VM %s was asked to stop; follow it: foothold vm explain %s", vm.Name, vm.Name)
				return nil
			}
			s.log.Line("VM %s is %s, its volume kept; start it again: foothold vm start %s", vm.Name, vm.Phase, vm.Name)
			return nil
		}),
	})
	c.Flags().BoolVar(&wait, "wait", false, "wait until its host has confirmed that it is gone, saying what keeps it")
	timeoutFlag(c, &timeout)
	return c
}

func vmStart() *cobra.Command {
	return startCommand("start NAME", "Start a stopped VM again",
		`Start a stopped VM again, on its host and with its volume: the whole boot story with new
tokens, new keys, new disk headers and a new quote.`,
		"  foothold vm start web --wait", (*session).start)
}

func vmRestart() *cobra.Command {
	return startCommand("restart NAME", "Stop a VM and start it again",
		`Stop a VM as `+"`foothold vm stop`"+` does, then start it again: the whole boot story with new
tokens, new keys, new disk headers and a new quote. The next start begins only when the
VM's host has confirmed that the last instance is gone.`,
		"  foothold vm restart web --wait", (*session).restart)
}

// start and restart return what they asked for and the number of the start to come.
func (s *session) start(ctx context.Context, name string) (api.VM, int, error) {
	before, err := s.VM(ctx, name)
	if err != nil {
		return before, 0, err
	}
	vm, err := s.StartVM(ctx, before.ID)
	if before.Phase != client.PhaseStopped && before.Wish == "" { // it runs, or is on its way
		return vm, before.Start, err
	}
	return vm, before.Start + 1, err
}

func (s *session) restart(ctx context.Context, name string) (api.VM, int, error) {
	before, err := s.VM(ctx, name)
	if err != nil {
		return before, 0, err
	}
	vm, err := s.RestartVM(ctx, before.ID)
	return vm, before.Start + 1, err
}

// followStop waits until a VM is stopped and its host has confirmed that, and says what
// keeps it.
func (s *session) followStop(ctx context.Context, id string) (api.VM, error) {
	steps := s.log.Steps()
	defer steps.Close()
	a := newAwaited(s, steps)
	return s.WaitStopped(ctx, id, func(vm api.VM) { a.see(ctx, vm) })
}

func startCommand(use, short, long, example string, ask func(*session, context.Context, string) (api.VM, int, error)) *cobra.Command {
	wait, timeout := false, time.Duration(0)
	c := jsonFlag(&cobra.Command{
		Use: use, Short: short, Long: long, Example: example, Args: cobra.ExactArgs(1),
		RunE: inSession(func(cmd *cobra.Command, args []string, s *session) error {
			ctx, stop := limited(cmd, timeout)
			defer stop()
			vm, start, err := ask(s, ctx, args[0])
			if err == nil && wait {
				vm, err = s.followStart(ctx, vm.ID, start)
			}
			if err != nil {
				return failed(cmd, vm, err)
			}
			switch {
			case wantsJSON(cmd):
				return printJSON(cmd.OutOrStdout(), complete(vm))
			case wait:
				s.log.Line("%s", readyText(vm))
			default:
				s.log.Line("VM %s: start %d was asked for; follow it: foothold vm watch %s", vm.Name, start, vm.Name)
			}
			return nil
		}),
	})
	c.Flags().BoolVar(&wait, "wait", false, "wait until the VM is ready, showing each phase and what keeps it")
	timeoutFlag(c, &timeout)
	return c
}
