package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"foothold/client"
	"foothold/client/term"
	"foothold/protocol/api"

	"github.com/spf13/cobra"
)

func eventsCommand() *cobra.Command {
	var q client.EventQuery
	c := contextFlag(&cobra.Command{
		Use:   "events",
		Short: "Print the journal",
		Long: `Print the journal: what was asked, decided, delivered and refused, hash-chained, oldest
first. With --json every entry is one JSON object on a line of its own.`,
		Example: `  foothold events --vm web
  foothold events --follow
  foothold events --json | jq -r 'select(.event.reason) | .event.kind + " " + .event.reason'`,
		Args: cobra.NoArgs,
		RunE: inSession(func(cmd *cobra.Command, _ []string, s *session) error {
			asJSON := wantsJSON(cmd)
			return s.Events(cmd.Context(), q, func(e api.JournalEntry) error {
				if !asJSON {
					s.out.Line("%s", eventText(s.out, e))
					return nil
				}
				return json.NewEncoder(cmd.OutOrStdout()).Encode(e)
			})
		}),
	})
	c.Flags().StringVar(&q.VM, "vm", "", "only of this VM (`NAME` or id)")
	c.Flags().Int64Var(&q.After, "after", 0, "only entries after this sequence `NUMBER`")
	c.Flags().IntVar(&q.Limit, "limit", 0, "at most this `NUMBER` of entries, at most 10000 (default: all)")
	c.Flags().BoolVarP(&q.Follow, "follow", "f", false, "stay and print new entries as they come")
	return jsonFlag(c)
}

// eventText is one entry on one line.
func eventText(out *term.Out, e api.JournalEntry) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s  %-22s %-20s", out.Paint(term.Faint, e.Event.Time.Local().Format("15:04:05.000")),
		quoted(e.Event.Source), quoted(e.Event.Kind))
	if e.VM != "" {
		fmt.Fprintf(&b, " vm=%s", quoted(e.VM))
	}
	if e.Event.Reason != "" {
		fmt.Fprintf(&b, " %s", out.Paint(term.Bad, quoted(string(e.Event.Reason))))
	}
	for _, k := range slices.Sorted(maps.Keys(e.Event.Detail)) {
		fmt.Fprintf(&b, " %s=%s", quoted(k), quoted(e.Event.Detail[k]))
	}
	return b.String()
}

// quoted makes a text from outside safe to print: it stays on its line, and what has
// blanks is in quotes, so that it cannot pass for more than one text.
func quoted(v string) string {
	v = term.Clean(v)
	if strings.ContainsAny(v, " \t\n\"") {
		return fmt.Sprintf("%q", v)
	}
	return v
}
