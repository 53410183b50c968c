package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"foothold/client"
	"foothold/internal/durable"
	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/protocol/vmspec"
	"foothold/tenant/verify"

	"github.com/spf13/cobra"
)

// chainFile is the list of all verdicts of a start beside their bundles.
const chainFile = "chain.json"

func vmAttest() *cobra.Command {
	return jsonFlag(&cobra.Command{
		Use: "attest NAME", Short: "Have the host of a computing VM quoted now",
		Long: `Have the host of a computing VM quoted now, beside the quotes that are asked for all the
time. All checks that fail are shown at once; then the VM has been closed or ended, as
quote_refused of the orchestrator's configuration says. A host that does not answer is named as such, and borne for limits.attest_within of the orchestrator's
configuration.`,
		Example: "  foothold vm attest web",
		Args:    cobra.ExactArgs(1),
		RunE: inSession(func(cmd *cobra.Command, args []string, s *session) error {
			v, err := s.Attest(cmd.Context(), args[0])
			var refusal *client.Refusal
			switch {
			case errors.As(err, &refusal) && len(refusal.Findings) > 0 && wantsJSON(cmd):
				return errors.Join(printJSON(cmd.OutOrStdout(), attested{Findings: refusal.Findings}), err)
			case errors.As(err, &refusal) && len(refusal.Findings) > 0:
				showFindings(s.out, refusal.Findings)
				refusal.Findings = nil // they have been said
				return err
			case err != nil:
				return err
			case wantsJSON(cmd):
				return printJSON(cmd.OutOrStdout(), attested{v, []event.FailedCheck{}})
			}
			s.out.Line("host %s proved again what it runs: verdict %s at %s", v.Host, v.Digest, when(v.At))
			return nil
		}),
	})
}

// attested is what `vm attest --json` prints.
type attested struct {
	api.Verdict
	Findings []event.FailedCheck `json:"findings"`
}

func vmEvidence() *cobra.Command {
	start, out := 0, ""
	c := jsonFlag(&cobra.Command{
		Use: "evidence NAME", Short: "List or export the evidence of every decision about a VM",
		Long: `List the verdicts on one start of a VM, accepted and refused, and with --out export the
evidence of each as a file, for ` + "`foothold verify`" + ` to derive the verdict again without the
orchestrator. A bundle holds the quote, the host's logs, the signed inventory and reference
values that counted, and all that the quote was held against; no key that it is verified by,
and no secret. A start that was refused before there was a quote to judge leaves one too,
with what had come. Of a VM that computes for long the newest evidence is kept; of the rest,
` + chainFile + ` has the links of the chain.`,
		Example: `  foothold vm evidence web
  foothold vm evidence web --out evidence`,
		Args: cobra.ExactArgs(1),
		RunE: inSession(func(cmd *cobra.Command, args []string, s *session) error {
			if start < 0 {
				return usage("--start %d: want the number of a start", start)
			}
			e, err := s.Evidence(cmd.Context(), args[0], start)
			if err != nil {
				return err
			}
			e.Verdicts = orEmpty(e.Verdicts)
			if out != "" {
				if err := export(cmd, s, e, out); err != nil {
					return err
				}
			}
			if wantsJSON(cmd) {
				return printJSON(cmd.OutOrStdout(), e)
			}
			if len(e.Verdicts) == 0 {
				s.log.Line("no quote of start %d of VM %s was judged yet", e.Start, e.Name)
				return nil
			}
			var rows [][]string
			for _, v := range e.Verdicts {
				kept := "kept"
				if !v.Kept {
					kept = "link alone"
				}
				verdict := map[bool]string{true: "accepted", false: "refused"}[v.Accepted]
				if v.Unjudged {
					verdict = "refused, not judged"
				}
				rows = append(rows, []string{v.Role, when(v.At), v.Host, verdict, kept, v.Digest.String()})
			}
			s.out.Table([]string{"quote", "judged", "host", "verdict", "evidence", "digest"}, rows)
			return nil
		}),
	})
	c.Flags().IntVar(&start, "start", 0, "`NUMBER` of the start (default: the latest)")
	c.Flags().StringVar(&out, "out", "", "`FOLDER` to write one file for each bundle into, and "+chainFile)
	return c
}

// export writes bundles as they are: the orchestrator's word is held against nothing here.
func export(cmd *cobra.Command, s *session, e api.Evidence, dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return usage("%w", err)
	}
	chain := verify.Chain{Format: verify.ChainFormat, Links: []verify.Link{}}
	written := 0
	for i, v := range e.Verdicts {
		chain.Links = append(chain.Links, verify.Link{Role: v.Role, Reservation: e.ID, Start: e.Start, Host: v.Host, At: v.At, Accepted: v.Accepted,
			Previous: v.Previous, Record: v.Record, Unjudged: v.Unjudged})
		if !v.Kept {
			continue
		}
		if !vmspec.ValidName(v.Role) {
			return fmt.Errorf("verdict %d is of a role that cannot be a file's name", i+1)
		}
		data, err := s.Bundle(cmd.Context(), e.ID, v.Digest)
		if err != nil {
			return err
		}
		if err := durable.WriteFile(filepath.Join(dir, fmt.Sprintf("%05d-%s-%s.json", i+1, v.Role, v.Digest.Short())), data, 0o644); err != nil {
			return err
		}
		written++
	}
	data, err := json.Marshal(chain)
	if err != nil {
		return fmt.Errorf("encode chain: %w", err)
	}
	if err := durable.WriteFile(filepath.Join(dir, chainFile), append(data, '\n'), 0o644); err != nil {
		return err
	}
	s.log.Line("wrote %s and the chain of %s to %s; audit them by: foothold verify %s, with the keys that you pin", plural(written, "bundle", "bundles"),
		plural(len(e.Verdicts), "verdict", "verdicts"), dir, dir)
	return nil
}
