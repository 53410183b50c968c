package main

import (
	"fmt"
	"strconv"

	"foothold/client/term"

	"github.com/spf13/cobra"
)

func statusCommand() *cobra.Command {
	return jsonFlag(contextFlag(&cobra.Command{
		Use:   "status",
		Short: "Show the installation at a glance",
		Long: `Show the installation at a glance: for each zone of the DMZ, the revision that the
orchestrator wants and the one that the daemon has read back from its kernel. Below it,
how often what was refused, and what failed, since the installation was made: the reasons
are those of "foothold events".`,
		Example: "  foothold status",
		Args:    cobra.NoArgs,
		RunE: inSession(func(cmd *cobra.Command, _ []string, s *session) error {
			st, err := s.Status(cmd.Context())
			if err != nil {
				return err
			}
			st.Zones, st.Refusals = orEmpty(st.Zones), orEmpty(st.Refusals)
			if wantsJSON(cmd) {
				return printJSON(cmd.OutOrStdout(), st)
			}
			s.out.Fields(
				term.Field{Name: "context", Value: fmt.Sprintf("%s (%s)", s.context.Name, s.context.File)},
				term.Field{Name: "server", Value: s.context.Server},
				term.Field{Name: "version", Value: term.Clean(st.Version)},
				term.Field{Name: "profile", Value: term.Clean(st.Profile)},
				term.Field{Name: "epoch", Value: strconv.FormatInt(st.Epoch, 10)},
				term.Field{Name: "VMs", Value: itoa(st.VMs)},
			)
			var rows [][]string
			for _, z := range st.Zones {
				state := s.out.Paint(term.Good, "live")
				switch {
				case z.Error != "":
					state = s.out.Paint(term.Bad, term.Clean(z.Error))
				case z.Seen.IsZero():
					state = s.out.Paint(term.Bad, "never heard of")
				case z.Live != z.Wanted:
					state = s.out.Paint(term.Busy, "behind")
				}
				rows = append(rows, []string{z.Zone, state, strconv.FormatInt(z.Wanted, 10), strconv.FormatInt(z.Live, 10), when(z.Seen)})
			}
			s.out.Line("")
			s.out.Table([]string{"zone", "state", "wanted", "live", "last report"}, rows)
			if len(st.Refusals) == 0 {
				return nil
			}
			rows = nil
			for _, r := range st.Refusals {
				rows = append(rows, []string{term.Clean(r.Source), term.Clean(r.Kind), term.Clean(string(r.Reason)), strconv.FormatInt(r.Count, 10)})
			}
			s.out.Line("")
			s.out.Table([]string{"told by", "what", "reason", "times"}, rows)
			return nil
		}),
	}))
}

func itoa(n int) string { return strconv.Itoa(n) }
