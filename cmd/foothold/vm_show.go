package main

import (
	"fmt"
	"time"

	"foothold/client"
	"foothold/client/term"
	"foothold/protocol/api"
	"foothold/protocol/zone"

	"github.com/spf13/cobra"
)

// shown is what `vm show --json` prints: the VM and its live rules.
type shown struct {
	api.VM
	Rules []zone.Live `json:"rules"`
}

func vmShow() *cobra.Command {
	return jsonFlag(&cobra.Command{
		Use: "show NAME", Short: "Show a VM: phases, delivered components, live rules",
		Long: `Show a VM. The rules are those that firewalls and gateway read back from their kernels,
not what they were told to do.`,
		Example: "  foothold vm show web\n  foothold vm show web --json | jq .components",
		Args:    cobra.ExactArgs(1),
		RunE: inSession(func(cmd *cobra.Command, args []string, s *session) error {
			vm, err := s.VM(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			rules, err := s.Rules(cmd.Context(), vm.ID)
			if err != nil {
				return err
			}
			if wantsJSON(cmd) {
				return printJSON(cmd.OutOrStdout(), shown{complete(vm), orEmpty(rules)})
			}
			showVM(s.out, vm)
			showRules(s.out, rules)
			return nil
		}),
	})
}

func showVM(out *term.Out, vm api.VM) {
	measured := "yes: runs on a host that proved its software"
	if !vm.Measured {
		measured = out.Paint(term.Bad, "no: the provider can read this VM")
	}
	address := ""
	if vm.Address.IsValid() {
		address = fmt.Sprintf("%s  %s", vm.Address, vm.MAC)
	}
	deadline := ""
	if !vm.Deadline.IsZero() {
		deadline = fmt.Sprintf("%s (%s)", when(vm.Deadline), fromNow(vm.Deadline))
	}
	tunnel := ""
	if vm.TunnelAddress.IsValid() {
		tunnel = vm.TunnelAddress.String()
	}
	tpm := ""
	if vm.TPMHeld > 0 {
		tpm = fmt.Sprintf("%.0f ms", vm.TPMHeld*1000)
	}
	out.Fields(
		term.Field{Name: "name", Value: out.Paint(term.Strong, vm.Name)},
		term.Field{Name: "id", Value: vm.ID},
		term.Field{Name: "phase", Value: phaseText(out, vm)},
		term.Field{Name: "explanation", Value: term.Clean(vm.Explanation)},
		term.Field{Name: "until", Value: deadline},
		term.Field{Name: "start", Value: startText(vm)},
		term.Field{Name: "template", Value: templateOf(vm)},
		term.Field{Name: "size", Value: vm.Size},
		term.Field{Name: "host", Value: vm.Host},
		term.Field{Name: "measured", Value: measured},
		term.Field{Name: "address", Value: address},
		term.Field{Name: "tunnel", Value: tunnel},
		term.Field{Name: "workload", Value: vm.WorkloadURL},
		term.Field{Name: "TPM held", Value: tpm},
		term.Field{Name: "attested", Value: attestedText(vm)},
	)
	showFindings(out, vm.Findings)
	if len(vm.Phases) > 0 {
		out.Line("")
		var rows [][]string
		for _, p := range vm.Phases {
			took := fmt.Sprintf("%.1f s", p.Seconds)
			if p.End.IsZero() {
				took = "since " + ago(p.Start)
			}
			rows = append(rows, []string{p.Name, when(p.Start), took})
		}
		out.Table([]string{"phase", "began", "took"}, rows)
	}
	if len(vm.Components) > 0 {
		out.Line("")
		var rows [][]string
		for _, c := range vm.Components {
			rows = append(rows, []string{c.Name, bytesText(c.Size), c.SHA256.String()})
		}
		out.Table([]string{"component", "size", "sha256"}, rows)
	}
}

// attestedText is when the host last proved what it runs, and the verdict on it.
func attestedText(vm api.VM) string {
	if vm.Verdict.IsZero() {
		return ""
	}
	return fmt.Sprintf("%s, verdict %s", when(vm.Attested), vm.Verdict)
}

// startText is the number of the start, and what the policy makes of its end.
func startText(vm api.VM) string {
	text := fmt.Sprintf("%d, restart policy %s", vm.Start, vm.Restart)
	if vm.Restarts > 0 {
		text += fmt.Sprintf(", %d in a row", vm.Restarts)
	}
	if !vm.NextStart.IsZero() {
		text += fmt.Sprintf(", next %s", fromNow(vm.NextStart))
	}
	return text
}

func showRules(out *term.Out, rules []zone.Live) {
	out.Line("")
	if len(rules) == 0 {
		out.Line("no rule lets anything pass to or from this VM")
		return
	}
	var rows [][]string
	for _, r := range rules {
		left := "-"
		if r.Remaining > 0 {
			left = r.Remaining.Round(time.Second).String()
		}
		rows = append(rows, []string{term.Clean(r.Rule), left, fmt.Sprint(r.Packets)})
	}
	out.Table([]string{"live rule", "left", "packets"}, rows)
}

func vmWatch() *cobra.Command {
	return jsonFlag(&cobra.Command{
		Use: "watch NAME", Short: "Follow a VM until it is ready or ended",
		Long: `Follow a VM's phases until it is ready or ended. With --json, every change is one JSON
object on a line of its own.`,
		Example: "  foothold vm watch web",
		Args:    cobra.ExactArgs(1),
		RunE: inSession(func(cmd *cobra.Command, args []string, s *session) error {
			if wantsJSON(cmd) {
				return watchJSON(cmd, s, args[0])
			}
			vm, err := s.follow(cmd.Context(), args[0])
			if err != nil {
				return err
			}
			s.log.Line("%s", readyText(vm))
			return nil
		}),
	})
}

// fromNow says how far a deadline is.
func fromNow(t time.Time) string {
	d := time.Until(t).Round(time.Second)
	if d < 0 {
		return (-d).String() + " ago"
	}
	return "in " + d.String()
}

// readyText is the last line of a wait.
func readyText(vm api.VM) string {
	text := fmt.Sprintf("VM %s is ready after %.1f s", vm.Name, total(vm))
	if vm.WorkloadURL != "" {
		text += "; its workload answers at " + vm.WorkloadURL + " from the tenant's network"
	}
	return text
}

// total is the time from the reservation to the end of the last phase that ended, in seconds.
func total(vm api.VM) float64 {
	var end time.Time
	for _, p := range vm.Phases {
		for _, t := range []time.Time{p.End, p.Start} {
			if t.After(end) {
				end = t
			}
		}
	}
	if len(vm.Phases) == 0 {
		return 0
	}
	return end.Sub(vm.Phases[0].Start).Seconds()
}

// phaseSteps shows a VM's phases as steps.
type phaseSteps struct {
	steps *term.Steps
	start int             // number of the start that is shown
	begun map[string]bool // of that start
	ended map[string]bool
}

func newPhaseSteps(out *term.Out) *phaseSteps {
	return &phaseSteps{steps: out.Steps(), begun: map[string]bool{}, ended: map[string]bool{}}
}

// see brings the display up to an observation.
func (d *phaseSteps) see(vm api.VM) {
	if vm.Start != d.start {
		d.start, d.begun, d.ended = vm.Start, map[string]bool{}, map[string]bool{}
	}
	failed := vm.Phase == client.PhaseAborted
	for i, p := range vm.Phases {
		if d.ended[p.Name] || p.Name == client.PhaseAborted || p.Name == client.PhaseReleased {
			continue
		}
		took := time.Duration(p.Seconds * float64(time.Second))
		switch {
		case failed && lastStep(vm.Phases[i:]):
			d.steps.Fail(p.Name, took)
			d.ended[p.Name] = true
		case !p.End.IsZero():
			d.steps.End(p.Name, took)
			d.ended[p.Name] = true
		case !d.begun[p.Name]:
			d.steps.Begin(p.Name, p.Start)
			d.begun[p.Name] = true
		}
	}
}

// lastStep reports whether no phase but a terminal one follows the first.
func lastStep(rest []api.Phase) bool {
	for _, p := range rest[1:] {
		if p.Name != client.PhaseAborted && p.Name != client.PhaseReleased {
			return false
		}
	}
	return true
}

// templateOf names the version that a VM's latest start is of, and a newer one that waits.
func templateOf(vm api.VM) string {
	text := vm.Template
	if vm.TemplateVersion > 0 {
		text += fmt.Sprintf(", version %d", vm.TemplateVersion)
	}
	if vm.NextVersion > 0 {
		text += fmt.Sprintf("; version %d from its next start", vm.NextVersion)
	}
	return text
}
