//go:build system

package e2e

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/client"
	"foothold/lab"
	"foothold/protocol/api"
	"foothold/protocol/event"
)

// Times of an outage. A zone document is renewed when half its lease is over, and then
// says what is left of the VM's own, of which a quarter may be spent: so an outage of about a
// quarter of the lease is borne.
const (
	outageLease = time.Minute
	shortOutage = 10 * time.Second
	// closingSlack is what a busy machine may add to the end of a lease until a probe tells it.
	closingSlack = 5 * time.Second
	fetchLimit   = 3 * time.Second
)

// TestOrchestratorAway stops the orchestrator's process as it stands, which to everyone
// else is an orchestrator that does not answer. For ten seconds nothing that was admitted
// notices. Past the lease the DMZ has closed everything by itself and admitted nobody.
// When the orchestrator goes on, each VM's fate is decided.
func TestOrchestratorAway(t *testing.T) {
	s := newSystem(t)
	s.limits(t, map[string]time.Duration{"lease": outageLease})
	s.template(t)
	c := s.client(t)
	s.must(t, "vm", "create", "web", "--workload", filepath.Join(s.bin, "sample-web"), "--restart", "always", "--wait")
	web, err := c.VM(t.Context(), "web")
	if err != nil {
		t.Fatal(err)
	}
	if held := s.held(t, web); len(held) != 3 {
		t.Fatalf("while it computes, rules or a peer are in %q alone: the check below would show nothing", held)
	}

	// 1. Ten seconds.
	s.away(t, func() {
		for end := time.Now().Add(shortOutage); time.Now().Before(end); {
			if r := s.tryFetch(t, web.WorkloadURL); r.code != 0 {
				t.Errorf("%.1f s before the end of a short outage: %s", time.Until(end).Seconds(), r.stderr)
			}
		}
	})
	vm := s.heardAgain(t, c, web)
	if vm.Start != 1 || vm.Phase != computing || vm.TunnelAddress != web.TunnelAddress || !vm.Ready {
		t.Errorf("after a short outage: %+v", vm)
	}
	if n := s.count(t, c, "token.spent"); n != 3 {
		t.Errorf("%d tokens were spent, want the three of its start", n)
	}

	// 2. Past the lease, with another VM on its way to its admission.
	s.must(t, "vm", "create", "late", "--restart", "never")
	ctx, cancel := context.WithTimeout(t.Context(), faultLimit)
	defer cancel()
	s.happens(ctx, t, c, "late", beginnings[connecting])
	s.away(t, func() { s.closes(t, web) })

	// 3. The orchestrator goes on.
	if again, err := c.WaitStart(ctx, "web", 2, nil); err != nil || !again.Ready {
		t.Errorf("web is not back: %v: %+v", err, again)
	}
	if !slices.ContainsFunc(s.journal(t, c), func(e api.JournalEntry) bool {
		return e.Event.Kind == "vm.stopped" && e.Event.Reason == event.HeartbeatMissed
	}) {
		t.Error("the journal does not say that web was stopped for a missed heartbeat")
	}
	late, err := c.Wait(ctx, "late", nil)
	var ended *client.Ended
	switch {
	case errors.As(err, &ended):
		t.Logf("late is %s: %s: %s", late.Phase, late.Reason, late.Explanation)
		if late.Reason == "" || late.Reason == "internal-error" || late.Explanation == "" {
			t.Errorf("late ended without a good reason: %+v", late)
		}
	case err != nil || late.Phase != computing:
		t.Errorf("late's fate is not decided: %v: %+v", err, late)
	}
	if _, err := c.DeleteVM(t.Context(), "late"); err != nil {
		t.Errorf("delete: %v", err)
	}
	s.gone(t, c, "web")
}

// limits sets limits of the orchestrator, which it reads at its next start.
func (s *system) limits(t *testing.T, set map[string]time.Duration) {
	t.Helper()
	file := filepath.Join(s.state, "tenant", "orchestrator.yaml")
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for name, d := range set {
		line := regexp.MustCompile(`(?m)^  ` + name + `: .*$`)
		if len(line.FindAll(data, -1)) != 1 {
			t.Fatalf("%s has not one %s", file, name)
		}
		data = line.ReplaceAll(data, []byte("  "+name+": "+d.String()))
	}
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	s.killMatching(t, victims["orchestrator"])
}

// away does something while the orchestrator does not answer.
func (s *system) away(t *testing.T, do func()) {
	t.Helper()
	s.signalMatching(t, "STOP", victims["orchestrator"])
	defer s.signalMatching(t, "CONT", victims["orchestrator"])
	do()
}

func (s *system) tryFetch(t *testing.T, url string) result {
	ctx, cancel := context.WithTimeout(t.Context(), fetchLimit)
	defer cancel()
	return s.run(ctx, "lab", "fetch", "--state", s.state, "--from", lab.Intranet, url)
}

// closes waits until the VM's page does not answer any more, which must be so at the end
// of the lease, and looks for what the DMZ still holds of it or holds anew.
func (s *system) closes(t *testing.T, vm api.VM) {
	t.Helper()
	began := time.Now()
	last := began
	for time.Since(began) < outageLease+closingSlack {
		asked := time.Now() // when it came cannot be told from how long this test was kept waiting
		if s.tryFetch(t, vm.WorkloadURL).code == 0 {
			last = asked
		}
	}
	t.Logf("the last page was asked for %.1f s after the orchestrator's last word", last.Sub(began).Seconds())
	if d := last.Sub(began); d > outageLease {
		t.Errorf("pages were asked for, and came, for %v, longer than the lease of %v", d, outageLease)
	} else if d < shortOutage {
		t.Errorf("the last page was asked for after %v already", d)
	}
	if held := s.held(t, vm); len(held) != 0 {
		t.Errorf("past the lease there are still rules or a peer in %q", held)
	}
	if data := s.peers(t); strings.Contains(data, "public_key") {
		t.Errorf("the gateway has a peer past the lease")
	}
}

// held lists where the DMZ's kernels or the gateway's memory of admissions name the VM.
func (s *system) held(t *testing.T, vm api.VM) (places []string) {
	t.Helper()
	for place, address := range map[string]netip.Addr{lab.External: vm.Address, lab.Internal: vm.TunnelAddress, lab.Gateway: vm.TunnelAddress} {
		rules := s.must(t, "lab", "exec", "--state", s.state, place, "--", "nft", "list", "table", "inet", "foothold")
		named := strings.Contains(rules, address.String()+" ") || strings.Contains(rules, address.String()+"/")
		if place == lab.Gateway {
			named = named || strings.Contains(s.peers(t), vm.ID)
		}
		if named {
			places = append(places, place)
		}
	}
	return places
}

func (s *system) peers(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(s.state, "dmz", "gateway", "state", "peers.json"))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// heardAgain waits for the VM's next heartbeat, which renews its lease.
func (s *system) heardAgain(t *testing.T, c *client.Client, before api.VM) api.VM {
	t.Helper()
	for end := time.Now().Add(outageLease); ; time.Sleep(200 * time.Millisecond) {
		vm, err := c.VM(t.Context(), before.Name)
		if err != nil {
			t.Fatal(err)
		}
		if time.Until(vm.Deadline) > outageLease*9/10 || vm.Phase != computing || time.Now().After(end) {
			return vm
		}
	}
}

// journal is what the orchestrator entered of web.
func (s *system) journal(t *testing.T, c *client.Client) (list []api.JournalEntry) {
	t.Helper()
	err := c.Events(t.Context(), client.EventQuery{VM: "web"}, func(e api.JournalEntry) error {
		list = append(list, e)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func (s *system) count(t *testing.T, c *client.Client, kind string) (n int) {
	t.Helper()
	for _, e := range s.journal(t, c) {
		if e.Event.Kind == kind {
			n++
		}
	}
	return n
}

// goneInMidDelivery kills the boot server while a VM fetches what it boots: its start ends
// with the loader's word, as far as that came out, and nothing is left of it. That the next
// VM comes up at the boot server that follows is the caller's to show.
func (s *system) goneInMidDelivery(t *testing.T, c *client.Client) {
	s.must(t, "vm", "create", "web")
	ctx, cancel := context.WithTimeout(t.Context(), faultLimit)
	defer cancel()
	s.says(ctx, t, c, "web", "admitted; both signatures verify")
	s.killMatching(t, victims["bootserver"])
	vm, err := c.Wait(ctx, "web", nil)
	var ended *client.Ended
	if !errors.As(err, &ended) || vm.Reason != event.BootServerFailed {
		t.Errorf("it ended with %q (%s): %v", vm.Reason, vm.Explanation, err)
	}
	for _, e := range s.journal(t, c) {
		if e.Event.Kind == "components.delivered" {
			t.Error("everything was delivered before the kill: that shows nothing")
		}
	}
	s.gone(t, c, "web")
}

// says waits until a VM's console has a line.
func (s *system) says(ctx context.Context, t *testing.T, c *client.Client, name, line string) {
	t.Helper()
	for {
		var console strings.Builder
		if err := c.Console(ctx, name, &console); err == nil && strings.Contains(console.String(), line) {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("the console of %s does not say %q", name, line)
		case <-time.After(20 * time.Millisecond):
		}
	}
}
