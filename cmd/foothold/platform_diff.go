package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"

	"foothold/client/term"
	"foothold/internal/strictjson"
	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/platform"
	"foothold/tenant/verify"

	"github.com/spf13/cobra"
)

func platformDiff() *cobra.Command {
	return jsonFlag(&cobra.Command{
		Use:   "diff HOST",
		Short: "Say in component names how a host differs from the reference values in force",
		Long: `Ask a host what it measures and say, component by component, how that differs from the
reference values in force and from the policy for the host. A quote of its TPM proves the
answer; no VM is concerned by it. A host that gives none is judged by what a VM's last quote
there proved. The exit code is 1 if anything differs, so that a script can tell.`,
		Example: `  foothold platform diff alpha`,
		Args:    cobra.ExactArgs(1),
		RunE: inSession(func(cmd *cobra.Command, args []string, s *session) error {
			j, err := s.HostPlatform(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			if wantsJSON(cmd) {
				err = printJSON(cmd.OutOrStdout(), j)
			} else {
				showJudged(s.out, j)
			}
			return errors.Join(err, differs(j))
		}),
	})
}

func platformEvidence() *cobra.Command {
	var out string
	c := &cobra.Command{
		Use:   "evidence HOST",
		Short: "Fetch what a host says that it measured, to make reference values of",
		Long: `Fetch a host's logs as its agent gives them now: an evidence file for 'foothold platform
manifest create' and 'try'. Take it from a host that you have examined: here it is the host's
word, which no quote proves. It has what the agent reads at its start, unlike the logs that
'foothold-host quote' takes before.`,
		Example: `  foothold platform evidence alpha --out alpha.json
  foothold platform manifest create --name 2026-12 --evidence alpha.json ...`,
		Args: cobra.ExactArgs(1),
		RunE: inSession(func(cmd *cobra.Command, args []string, s *session) error {
			logs, err := s.HostEvidence(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			return writeDocument(cmd.OutOrStdout(), out, logs)
		}),
	}
	c.Flags().StringVar(&out, "out", "", "`FILE` for the logs (default: standard output)")
	return c
}

func manifestTry() *cobra.Command {
	var host string
	var files []string
	c := jsonFlag(&cobra.Command{
		Use:   "try FILE",
		Short: "Say which hosts reference values would refuse, before they count",
		Long: `Hold reference values, signed or not, against every host, and say which they would refuse
and why: by what the host answers now, and by what the last quote of each of its VMs proved.
Each host is judged as if the inventory named this release for it, whenever the values begin
to count. Nothing is refused, released or changed by it.

With --evidence no orchestrator is asked: the logs in the files are compared, as what their
hosts say of themselves, without the policy for single hosts.

The exit code is 1 if anything would be refused or could not be judged.`,
		Example: `  foothold platform manifest try 2026-12.json
  foothold platform manifest try 2026-12.json --host alpha
  foothold platform manifest try 2026-12.json --evidence alpha.json --evidence beta.json`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			doc, _, err := readManifest(args[0])
			if err != nil {
				return err
			}
			var list []api.Judged
			switch {
			case len(files) > 0 && host != "":
				return usage("want --host, which asks the orchestrator, or --evidence, which asks nobody")
			case len(files) > 0:
				list, err = tryFiles(doc, files)
			default:
				list, err = tryHosts(cmd, doc, host)
			}
			if err != nil {
				return err
			}
			if wantsJSON(cmd) {
				err = printJSON(cmd.OutOrStdout(), orEmpty(list))
			} else {
				showTrial(term.New(cmd.OutOrStdout()), doc, list)
			}
			return errors.Join(err, refusals(list))
		},
	})
	c.Flags().StringVar(&host, "host", "", "this `HOST` alone")
	c.Flags().StringArrayVar(&files, "evidence", nil, "`FILE` of a host's logs, in place of the orchestrator; may be repeated")
	return c
}

func tryHosts(cmd *cobra.Command, doc platform.Manifest, host string) ([]api.Judged, error) {
	s, err := open(cmd)
	if err != nil {
		return nil, err
	}
	payload, err := json.Marshal(doc)
	if err != nil {
		return nil, err
	}
	return s.TryPlatform(cmd.Context(), payload, host)
}

// tryFiles compares logs in files.
func tryFiles(doc platform.Manifest, files []string) ([]api.Judged, error) {
	var list []api.Judged
	for _, file := range files {
		data, err := readDocument(file)
		if err != nil {
			return nil, err
		}
		var logs evidence.Platform
		if err := strictjson.Unmarshal(data, &logs); err != nil {
			return nil, fmt.Errorf("evidence %s: %w", file, err)
		}
		findings, err := verify.CompareLogs(doc, logs)
		if err != nil {
			return nil, err
		}
		j := api.Judged{Host: file, By: doc.Name, Evidence: "file", Accepted: len(findings) == 0, Findings: append([]event.FailedCheck{}, findings...)}
		list = append(list, j)
	}
	return list, nil
}

// source says for people what was judged.
func source(j api.Judged) string {
	switch j.Evidence {
	case api.EvidenceAsked:
		return "asked at " + when(j.At)
	case api.EvidenceStored:
		return fmt.Sprintf("%s quote of VM %s at %s", term.Clean(j.Role), term.Clean(j.VM), when(j.At))
	}
	return "its logs, proved by nothing"
}

func showJudged(out *term.Out, j api.Judged) {
	out.Line("host %s, release %s, %s", term.Clean(j.Host), term.Clean(j.Release), source(j))
	if j.Problem != "" {
		out.Line("it gave no answer now: %s", term.Clean(j.Problem))
	}
	switch {
	case j.Accepted:
		out.Line("no component differs")
	case len(j.Findings) == 0:
		out.Line("there is nothing to judge it by")
	}
	showFindings(out, j.Findings)
}

// showTrial is a table, and then each list of findings once, with whom it is about.
func showTrial(out *term.Out, doc platform.Manifest, list []api.Judged) {
	var rows [][]string
	var texts []string
	about := map[string][]string{}
	found := map[string][]event.FailedCheck{}
	for _, j := range list {
		verdict, tone := "accepted", term.Good
		switch {
		case j.Problem != "":
			verdict, tone = "not judged: "+term.Clean(j.Problem), term.Bad
		case !j.Accepted:
			verdict, tone = plural(len(j.Findings), "finding", "findings"), term.Bad
			text := fmt.Sprint(j.Findings)
			if about[text] == nil {
				texts = append(texts, text)
			}
			about[text], found[text] = append(about[text], term.Clean(j.Host)+", "+source(j)), j.Findings
		}
		rows = append(rows, []string{term.Clean(j.Host), term.Clean(j.Release), source(j), out.Paint(tone, verdict)})
	}
	out.Table([]string{"host", "release now", "evidence", "by " + term.Clean(doc.Name)}, rows)
	for _, text := range texts {
		out.Line("%s:", strings.Join(about[text], "; "))
		showFindings(out, found[text])
	}
}

// differs is the end of a diff that found something.
func differs(j api.Judged) error {
	switch {
	case j.Problem != "":
		return fmt.Errorf("host %s gave no answer", j.Host)
	case !j.Accepted:
		return errors.New(plural(len(j.Findings), "finding", "findings"))
	}
	return nil
}

// refusals is the end of a trial that found something.
func refusals(list []api.Judged) error {
	n := 0
	for _, j := range list {
		if !j.Accepted {
			n++
		}
	}
	switch {
	case len(list) == 0:
		return errors.New("there is no host to judge")
	case n > 0:
		return fmt.Errorf("%d of %d would be refused, or could not be judged", n, len(list))
	}
	return nil
}
