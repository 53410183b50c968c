package main

import (
	"fmt"

	"foothold/client/term"
	"foothold/protocol/api"

	"github.com/spf13/cobra"
)

func fsckCommand() *cobra.Command {
	return jsonFlag(contextFlag(&cobra.Command{
		Use:   "fsck",
		Short: "Hold database, vault, hosts, kernel rules and tunnels against each other",
		Long: `Hold against each other what the orchestrator's database says, the keys in its vault, the
VMs, volumes and templates that each host lists, and the rules and tunnels that firewalls,
boot server and gateway have read back from their kernels. What does not fit is named
with what was expected, what is there, and what to do; then the exit code is 1. It changes
nothing.

What is under way - a VM that boots, a clean-up, a rule that was just asked for - is listed
as in motion, and does not fit only when its time has passed. docs/fsck.md lists the codes.`,
		Example: `  foothold fsck
  foothold fsck --json`,
		Args: cobra.NoArgs,
		RunE: inSession(func(cmd *cobra.Command, _ []string, s *session) error {
			f, err := s.Fsck(cmd.Context())
			if err != nil {
				return err
			}
			f.Findings, f.Motion, f.Notes = orEmpty(f.Findings), orEmpty(f.Motion), orEmpty(f.Notes)
			if wantsJSON(cmd) {
				err = printJSON(cmd.OutOrStdout(), f)
			} else {
				showFsck(s.out, f)
			}
			if err == nil && !f.Clean {
				err = fmt.Errorf("%s not fit", plural(len(f.Findings), "thing does", "things do"))
			}
			return err
		}),
	}))
}

// showFsck writes findings first, each in a block of its own, then what is no misfit.
func showFsck(out *term.Out, f api.Fsck) {
	for _, x := range f.Findings {
		out.Line("%s %s: %s", out.Paint(term.Bad, "✗"), out.Paint(term.Bad, term.Clean(x.Code)), term.Clean(x.Thing))
		out.Line("    expected: %s", term.Clean(x.Expected))
		out.Line("    found:    %s", term.Clean(x.Found))
		if !x.Until.IsZero() {
			out.Line("    until:    %s", when(x.Until))
		}
		out.Line("    next:     %s", term.Clean(x.Next))
	}
	for _, x := range f.Motion {
		until := ""
		if !x.Until.IsZero() {
			until = ", until " + when(x.Until)
		}
		out.Line("%s in motion, %s: %s: %s%s", out.Paint(term.Busy, "~"), term.Clean(x.Code), term.Clean(x.Thing), term.Clean(x.Found), until)
	}
	for _, x := range f.Notes {
		out.Line("%s %s: %s: %s", out.Paint(term.Faint, "-"), term.Clean(x.Code), term.Clean(x.Thing), term.Clean(x.Found))
	}
	if f.Clean {
		out.Line("%s everything fits: %s", out.Paint(term.Good, "✓"), lookedText(f.Looked))
	}
}

// lookedText says what was compared.
func lookedText(l api.Looked) string {
	return fmt.Sprintf("%s, %s, %s with %s, %s and %s, %s, %s", plural(l.VMs, "VM", "VMs"), plural(l.Keys, "key", "keys"), plural(l.Hosts, "host", "hosts"),
		plural(l.Instances, "instance", "instances"), plural(l.Volumes, "volume", "volumes"), plural(l.Templates, "template", "templates"),
		plural(l.Rules, "live rule", "live rules"), plural(int(l.Entries), "journal entry", "journal entries"))
}

func plural(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
