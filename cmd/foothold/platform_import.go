package main

import (
	"fmt"
	"time"

	"foothold/client/term"
	"foothold/protocol/api"
	"foothold/protocol/digest"

	"github.com/spf13/cobra"
)

func manifestImport() *cobra.Command {
	var sum string
	c := jsonFlag(&cobra.Command{
		Use:   "import FILE [--sha256 DIGEST]",
		Short: "Take signed reference values into use",
		Long: `Take signed reference values into use, beside those that count. They count from their own
beginning to their own end; a release may have several, say while hosts are being updated.
What counted before still does until it ends or you withdraw it.`,
		Example: `  foothold platform manifest import platform.json
  foothold platform manifest list`,
		Args: cobra.ExactArgs(1),
		RunE: inSession(func(cmd *cobra.Command, args []string, s *session) error {
			doc, err := documentFile(args[0], sum)
			if err != nil {
				return err
			}
			p, err := s.ImportPlatform(cmd.Context(), doc)
			if err != nil {
				return err
			}
			return showPlatform(cmd, s, p)
		}),
	})
	c.Flags().StringVar(&sum, "sha256", "", "`DIGEST` that was told you, as foothold platform manifest show prints it")
	return c
}

func showPlatform(cmd *cobra.Command, s *session, p api.Platform) error {
	if wantsJSON(cmd) {
		return printJSON(cmd.OutOrStdout(), p)
	}
	showAlerts(s.log, p.Alerts)
	s.out.Fields(
		term.Field{Name: "release", Value: term.Clean(p.Release)},
		term.Field{Name: "sha256", Value: p.SHA256.String()},
		term.Field{Name: "from", Value: p.ValidFrom.UTC().Format(time.RFC3339)},
		term.Field{Name: "until", Value: p.ValidUntil.UTC().Format(time.RFC3339)},
		term.Field{Name: "state", Value: platformState(s.out, p)},
	)
	return nil
}

// platformState says whether reference values count, and if not, why.
func platformState(out *term.Out, p api.Platform) string {
	switch {
	case !p.Withdrawn.IsZero():
		return out.Paint(term.Bad, fmt.Sprintf("withdrawn %s by %s: %s", when(p.Withdrawn), term.Clean(p.WithdrawnBy), term.Clean(p.Why)))
	case p.Counts:
		return out.Paint(term.Good, "counts")
	case p.ValidFrom.After(time.Now()):
		return "counts from " + when(p.ValidFrom)
	}
	return "ended"
}

func manifestList() *cobra.Command {
	return jsonFlag(&cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the imported reference values, those that count and the others",
		Example: "  foothold platform manifest list",
		Args:    cobra.NoArgs,
		RunE: inSession(func(cmd *cobra.Command, _ []string, s *session) error {
			list, err := s.Platforms(cmd.Context())
			if err != nil {
				return err
			}
			if wantsJSON(cmd) {
				return printJSON(cmd.OutOrStdout(), orEmpty(list))
			}
			var rows [][]string
			for _, p := range list {
				rows = append(rows, []string{term.Clean(p.Release), p.SHA256.String(), when(p.ValidFrom), when(p.ValidUntil), itoa(p.VMs), platformState(s.out, p)})
			}
			s.out.Table([]string{"release", "sha256", "from", "until", "vms", "state"}, rows)
			return nil
		}),
	})
}

func manifestWithdraw() *cobra.Command {
	var why string
	var yes bool
	c := jsonFlag(&cobra.Command{
		Use:   "withdraw SHA256 --why TEXT",
		Short: "Make reference values count no more",
		Long: `Make reference values count no more, from the orchestrator's next decision on: no host gets
a VM by them. VMs that run and whose last quote was judged by them are told of; within a
minute each one's host is quoted again, and one that satisfies no other reference values of
its release loses its VMs, as host_lost in the orchestrator's configuration says.

Withdrawn values do not come back; sign others if you have to.`,
		Example: `  foothold platform manifest list
  foothold platform manifest withdraw 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08 --why "QEMU of 2026-10 has a hole" --yes`,
		Args: cobra.ExactArgs(1),
		RunE: inSession(func(cmd *cobra.Command, args []string, s *session) error {
			sum, err := digest.Parse(args[0])
			if err != nil {
				return usage("%w; see foothold platform manifest list", err)
			}
			if why == "" {
				return usage("want --why TEXT: it stays in the journal")
			}
			if !yes {
				if err := confirm(cmd, fmt.Sprintf("Withdraw reference values %s?", sum.Short())); err != nil {
					return err
				}
			}
			p, err := s.WithdrawPlatform(cmd.Context(), sum, why)
			if err != nil {
				return err
			}
			return showPlatform(cmd, s, p)
		}),
	})
	c.Flags().StringVar(&why, "why", "", "`TEXT` for the journal")
	c.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return c
}
