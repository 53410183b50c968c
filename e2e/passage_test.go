//go:build system

package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"sort"
	"strings"
	"testing"
	"time"

	"foothold/client"
	"foothold/lab"
	"foothold/protocol/api"
)

// transition is how long after a phase's begin the last one's rules may still be on
// their way out: a document has to be signed, sent, and made so.
const transition = 1500 * time.Millisecond

// Guesses of a VM's addresses before they are known: the first of each pool.
var (
	firstAddress = netip.MustParseAddr("10.82.0.10")
	firstTunnel  = netip.MustParseAddr("10.84.0.2")
)

const firstMAC = "02:fb:00:00:00:10"

// passage tries everything against the firewalls, round after round, and keeps what passed.
type passage struct {
	client  *client.Client
	probers *probers
	macs    addresses

	rounds map[string]int             // by phase, of those that lay wholly in it
	passed map[string]map[string]bool // phase → allowed attempts that arrived
	wrong  map[string]int             // attempts that arrived and must not, with the phase
	known  api.VM                     // as far as it is known
}

func newPassage(t *testing.T, s *system, c *client.Client) *passage {
	w := &passage{client: c, probers: startProbers(t, s, buildProbe(t)), rounds: map[string]int{}, passed: map[string]map[string]bool{}, wrong: map[string]int{}}
	w.macs = addresses{w.probers.byPlace[lab.Neighbour].interfaces["vpc0"], w.probers.byPlace[lab.Gateway].interfaces["dmz0"]}
	w.known = api.VM{Address: firstAddress, TunnelAddress: firstTunnel, MAC: firstMAC}
	return w
}

// look is what phases may be on now: the current one, and, just after its begin, the one before.
func (w *passage) look(t *testing.T) (phases []string, vm api.VM) {
	t.Helper()
	list, err := w.client.VMs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, vm := range list {
		if vm.Name != "web" {
			continue
		}
		if vm.Address.IsValid() {
			w.known.Address, w.known.MAC = vm.Address, vm.MAC
		}
		if vm.TunnelAddress.IsValid() {
			w.known.TunnelAddress = vm.TunnelAddress
		}
		phases = []string{vm.Phase}
		for i, p := range vm.Phases {
			if p.Name == vm.Phase && i > 0 && time.Since(p.Start) < transition {
				phases = append(phases, vm.Phases[i-1].Name)
			}
		}
		return phases, vm
	}
	return []string{"none"}, api.VM{}
}

// round sends everything once and judges what arrived by the phases before and after.
func (w *passage) round(t *testing.T, what string) {
	t.Helper()
	before, _ := w.look(t)
	list := attempts(w.known, w.macs)
	arrived := w.probers.fire(t, w.known, list)
	after, _ := w.look(t)
	phases := slices.Compact(slices.Sorted(slices.Values(append(before, after...))))
	whole := len(phases) == 1
	if whole {
		w.rounds[phases[0]]++
	}
	for _, a := range arrived {
		if !a.allowed(phases) {
			w.wrong[fmt.Sprintf("%s, in phase %s", a, strings.Join(phases, " to "))]++
			continue
		}
		for _, phase := range phases {
			if a.allowed([]string{phase}) {
				if w.passed[phase] == nil {
					w.passed[phase] = map[string]bool{}
				}
				w.passed[phase][a.String()] = true
			}
		}
	}
	if what != "" {
		t.Logf("round %d, %s: %d attempts, %d arrived, phase %s", w.probers.round, what, len(list), len(arrived), strings.Join(phases, " to "))
	}
}

// judge reports every attempt that arrived and must not, and every row of the table
// whose packet never arrived.
func (w *passage) judge(t *testing.T) {
	var lines []string
	for what, n := range w.wrong {
		lines = append(lines, fmt.Sprintf("passed %d times: %s", n, what))
	}
	sort.Strings(lines)
	for _, l := range lines {
		t.Error(l)
	}
	for _, phase := range []string{"none", booting, unlocking, connecting, computing} {
		t.Logf("%-11s %d whole rounds; arrived: %s", phase, w.rounds[phase], strings.Join(keys(w.passed[phase]), "; "))
		if w.rounds[phase] == 0 && phase != unlocking && phase != connecting {
			t.Errorf("no round lay wholly in phase %s", phase)
		}
	}
	list := attempts(w.known, w.macs)
	for _, r := range table {
		for _, phase := range r.phases {
			if r.must && !w.arrived(r, phase, list) {
				t.Errorf("never arrived: %s → %s %s %d in phase %s", r.from, r.to, r.proto, r.port, phase)
			}
		}
	}
}

// arrived reports whether the rule's packet passed in the phase.
func (w *passage) arrived(r rule, phase string, list []attempt) bool {
	for _, a := range list {
		if a.never || !r.matches(a) {
			continue
		}
		for p, passed := range w.passed {
			if (p == phase || phase == always) && passed[a.String()] {
				return true
			}
		}
	}
	return false
}

func keys(m map[string]bool) []string {
	var list []string
	for k := range m {
		list = append(list, k)
	}
	sort.Strings(list)
	return list
}
