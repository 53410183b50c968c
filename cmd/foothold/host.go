package main

import (
	"foothold/client/term"

	"github.com/spf13/cobra"
)

func hostCommand() *cobra.Command {
	return contextFlag(group("host", "Look at the provider's hosts",
		`Hosts come from the provider's signed inventory, checked on your side. A host's standing
is good while its last quote was accepted and its keys are validated.`, hostList(), hostReadmit()))
}

func hostReadmit() *cobra.Command {
	return jsonFlag(&cobra.Command{
		Use: "readmit NAME", Short: "Let a host get VMs again after its quote was refused",
		Long: `Let a host get VMs again after a quote that it made by itself - before unlocking, before
connecting, while computing - was refused. Do so once you know why: foothold events has the
findings. Nothing is released to a VM there without a new quote that is accepted.`,
		Example: "  foothold host readmit alpha",
		Args:    cobra.ExactArgs(1),
		RunE: inSession(func(cmd *cobra.Command, args []string, s *session) error {
			h, err := s.ReadmitHost(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if wantsJSON(cmd) {
				return printJSON(cmd.OutOrStdout(), h)
			}
			s.log.Line("host %s: %s", term.Clean(h.Name), term.Clean(h.Standing))
			return nil
		}),
	})
}

func hostList() *cobra.Command {
	return jsonFlag(&cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List the inventoried hosts and their standing",
		Example: "  foothold host list",
		Args:    cobra.NoArgs,
		RunE: inSession(func(cmd *cobra.Command, _ []string, s *session) error {
			hosts, err := s.Hosts(cmd.Context())
			if err != nil {
				return err
			}
			if wantsJSON(cmd) {
				return printJSON(cmd.OutOrStdout(), orEmpty(hosts))
			}
			var rows [][]string
			for _, h := range hosts {
				tone := term.Good
				if h.Standing != "good" {
					tone = term.Bad
				}
				rows = append(rows, []string{h.Name, s.out.Paint(tone, term.Clean(h.Standing)), term.Clean(h.Location),
					term.Clean(h.Asset), term.Clean(h.Software), itoa(h.VMs), when(h.Quoted)})
			}
			s.out.Table([]string{"host", "standing", "location", "asset", "software", "vms", "last quote"}, rows)
			return nil
		}),
	})
}
