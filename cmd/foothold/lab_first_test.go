package main

import (
	"strings"
	"testing"

	"foothold/client"
	"foothold/protocol/api"
	"foothold/protocol/event"
)

// TestMakeLabAgain: `make lab` goes on from whatever an earlier one left.
func TestMakeLabAgain(t *testing.T) {
	for name, c := range map[string]struct {
		vm   api.VM
		want string
	}{
		"none":                 {api.VM{}, "template build debian; vm create first --wait --template debian --workload w"},
		"under way":            {api.VM{Name: firstVM, Phase: "booting"}, "vm watch first"},
		"stopped":              {api.VM{Name: firstVM, Phase: client.PhaseStopped, Reason: event.StopAsked}, "vm start first --wait"},
		"ready":                {api.VM{Name: firstVM, Phase: "computing", Ready: true}, ""},
		"failed":               {api.VM{Name: firstVM, Phase: client.PhaseAborted, Reason: event.QuoteRefused}, "vm delete first --yes; template build debian; vm create first --wait --template debian --workload w"},
		"workload ended":       {api.VM{Name: firstVM, Phase: "computing", Reason: event.WorkloadFailed}, "vm delete first --yes; template build debian; vm create first --wait --template debian --workload w"},
		"released, still held": {api.VM{Name: firstVM, Phase: client.PhaseReleased, Reason: event.Released}, "vm delete first --yes; template build debian; vm create first --wait --template debian --workload w"},
	} {
		var got []string
		for _, args := range towardsReady(c.vm, "w") {
			got = append(got, strings.Join(args, " "))
		}
		if text := strings.Join(got, "; "); text != c.want {
			t.Errorf("%s: %q, want %q", name, text, c.want)
		}
	}
}
