package main

import (
	"fmt"
	"io"

	"foothold/client"
	"foothold/client/term"
	"foothold/protocol/api"
	"foothold/protocol/event"

	"github.com/spf13/cobra"
)

func vmCommand() *cobra.Command {
	return contextFlag(group("vm", "Create, look at, and delete virtual machines",
		`A VM starts empty. It gets a kernel, its disk keys and its way into your network only
after the machine under it has proved which software it runs on, on which host, and
that it is the VM you reserved. Each step is a phase with a deadline:

  reserved → booting → unlocking → connecting → computing

A VM that computes runs its operating system and has passed its audits. It is ready
when, besides, its workload has answered through the tunnel. One that ends unasked, or is
told to restart, goes through all of it again, with its volume.`,
		vmCreate(), vmList(), vmShow(), vmWatch(), vmExplain(), vmAttest(), vmEvidence(), vmLogs(), vmStop(), vmStart(), vmRestart(), vmWorkload(), vmDelete()))
}

func vmList() *cobra.Command {
	return jsonFlag(&cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the VMs",
		Example: "  foothold vm list\n  foothold vm list --json | jq -r '.[] | select(.ready) | .workload_url'",
		Args:    cobra.NoArgs,
		RunE: inSession(func(cmd *cobra.Command, _ []string, s *session) error {
			vms, err := s.VMs(cmd.Context())
			if err != nil {
				return err
			}
			if wantsJSON(cmd) {
				for i := range vms {
					vms[i] = complete(vms[i])
				}
				return printJSON(cmd.OutOrStdout(), orEmpty(vms))
			}
			if len(vms) == 0 {
				s.log.Line("no VMs; make one: foothold vm create web --wait")
				return nil
			}
			var rows [][]string
			for _, vm := range vms {
				rows = append(rows, []string{vm.Name, phaseText(s.out, vm), vm.Size, vm.Template, vm.Host, addrText(vm), ago(vm.Created)})
			}
			s.out.Table([]string{"name", "phase", "size", "template", "host", "tunnel", "age"}, rows)
			return nil
		}),
	})
}

func vmExplain() *cobra.Command {
	return jsonFlag(&cobra.Command{
		Use: "explain NAME", Short: "Say where a VM stands, what is awaited or went wrong, and what to do",
		Example: "  foothold vm explain web",
		Args:    cobra.ExactArgs(1),
		RunE: inSession(func(cmd *cobra.Command, args []string, s *session) error {
			e, err := s.Explain(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			e.Findings = orEmpty(e.Findings)
			if wantsJSON(cmd) {
				return printJSON(cmd.OutOrStdout(), e)
			}
			explain(s.out, e)
			return nil
		}),
	})
}

// explain prints an explanation for people.
func explain(out *term.Out, e api.Explanation) {
	until := ""
	if !e.Until.IsZero() {
		until = fmt.Sprintf("%s (%s)", when(e.Until), fromNow(e.Until))
	}
	out.Fields(
		term.Field{Name: "VM", Value: out.Paint(term.Strong, term.Clean(e.Name))},
		term.Field{Name: "stands in", Value: e.Phase},
		term.Field{Name: "until", Value: until},
		term.Field{Name: "awaited", Value: term.Clean(e.Awaited)},
		term.Field{Name: "reason", Value: out.Paint(term.Bad, string(e.Reason))},
		term.Field{Name: "what", Value: term.Clean(e.What)},
	)
	showFindings(out, e.Findings)
	out.Fields(term.Field{Name: "next", Value: term.Clean(e.Next)})
}

// showFindings prints all checks that failed, each in a block of its own.
func showFindings(out *term.Out, findings []event.FailedCheck) {
	if len(findings) == 0 {
		return
	}
	out.Line("findings")
	for _, f := range findings {
		out.Line("  %s %s: %s", out.Paint(term.Bad, "✗"), term.Clean(f.Check), term.Clean(f.Component))
		for _, part := range [][2]string{{"expected", f.Expected}, {"seen", f.Seen}, {"do", f.Do}} {
			if part[1] != "" {
				out.Line("      %-9s %s", part[0]+":", term.Clean(part[1]))
			}
		}
	}
}

func vmLogs() *cobra.Command {
	raw := false
	c := &cobra.Command{
		Use: "logs NAME", Short: "Print what a VM wrote to its console",
		Long: `Print what a VM wrote to its console: as its host keeps it, or, of a VM that failed,
what the orchestrator kept of it. The console is output only: nobody can log in there.
Control characters are removed, since a VM
could steer your terminal with them.`,
		Example: "  foothold vm logs web | tail",
		Args:    cobra.ExactArgs(1),
		RunE: inSession(func(cmd *cobra.Command, args []string, s *session) error {
			var w io.Writer = term.Cleaner{W: cmd.OutOrStdout()}
			if raw {
				w = cmd.OutOrStdout()
			}
			return s.Console(cmd.Context(), args[0], w)
		}),
	}
	c.Flags().BoolVar(&raw, "raw", false, "keep control characters")
	return c
}

func vmDelete() *cobra.Command {
	yes := false
	c := jsonFlag(&cobra.Command{
		Use: "delete NAME", Aliases: []string{"rm"}, Short: "End a VM and destroy its volume's key",
		Long: `End a VM: its tunnel and rules go, its tokens and certificate are void, the provider is
asked to destroy it and its absence is checked. Its volume's key is destroyed, so what
the VM stored is gone for good, wherever copies of the volume lie.`,
		Example: "  foothold vm delete web\n  foothold vm delete web --yes",
		Args:    cobra.ExactArgs(1),
		RunE: inSession(func(cmd *cobra.Command, args []string, s *session) error {
			vm, err := s.VM(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if !yes {
				q := fmt.Sprintf("Delete VM %s (%s)? Its volume's key is destroyed: its data is gone for good.", vm.Name, vm.Phase)
				if err := confirm(cmd, q); err != nil {
					return err
				}
			}
			// By id: a VM made under the same name meanwhile is another one.
			if vm, err = s.DeleteVM(cmd.Context(), vm.ID); err != nil {
				return err
			}
			if wantsJSON(cmd) {
				return printJSON(cmd.OutOrStdout(), complete(vm))
			}
			s.log.Line("VM %s is %s, its volume's key destroyed", vm.Name, vm.Phase)
			if vm.Cleanup == api.CleanupPending {
				s.log.Line("its host has not confirmed yet that it is gone; Foothold goes on asking: foothold vm explain %s", vm.ID)
			}
			return nil
		}),
	})
	c.Flags().BoolVarP(&yes, "yes", "y", false, "do not ask")
	return c
}

// complete makes a VM's lists lists, as --json promises.
func complete(vm api.VM) api.VM {
	vm.Findings = orEmpty(vm.Findings)
	vm.Phases, vm.Components = orEmpty(vm.Phases), orEmpty(vm.Components)
	return vm
}

// phaseText is a VM's phase for people.
func phaseText(out *term.Out, vm api.VM) string {
	switch {
	case vm.Ready && vm.Wish == "":
		return out.Paint(term.Good, "ready")
	case vm.Phase == client.PhaseReleased:
		return out.Paint(term.Faint, vm.Phase)
	case vm.Phase == client.PhaseStopped && !vm.NextStart.IsZero():
		return out.Paint(term.Busy, vm.Phase+" ("+string(vm.Reason)+"), starts again")
	case vm.Wish != "":
		return out.Paint(term.Busy, vm.Phase+" (asked to "+vm.Wish+")")
	case vm.Reason != "": // aborted, or computing without its workload
		return out.Paint(term.Bad, vm.Phase+" ("+string(vm.Reason)+")")
	}
	return out.Paint(term.Busy, vm.Phase)
}

func addrText(vm api.VM) string {
	if !vm.TunnelAddress.IsValid() {
		return "-"
	}
	return vm.TunnelAddress.String()
}
