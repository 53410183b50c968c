//go:build system

package e2e

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"foothold/client"
	"foothold/lab"
	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/tenant/orchestrator"
)

// TestRestore puts a copy of the orchestrator's state back, by the command for it, while
// host, DMZ and VMs have gone on. The daemons take the new epoch by themselves and close
// everything; what the copy does not know is destroyed; a VM that computed starts again by
// wish, with its volume, and no VM else.
func TestRestore(t *testing.T) {
	s := newSystem(t)
	s.template(t)
	c := s.client(t)
	ctx, cancel := context.WithTimeout(t.Context(), faultLimit)
	defer cancel()
	s.must(t, "vm", "create", "web", "--workload", filepath.Join(s.bin, "sample-web"), "--restart", "always", "--wait")
	s.must(t, "vm", "create", "way", "--restart", "never")
	s.happens(ctx, t, c, "way", beginnings[booting])

	// 1. The copy, as of one moment. After it way comes up, and another VM begins.
	state := filepath.Join(s.state, "tenant", "orchestrator")
	copied := state + ".copy"
	s.away(t, func() {
		if out, err := exec.Command("cp", "-a", state, copied).CombinedOutput(); err != nil {
			t.Fatalf("copy the state: %v\n%s", err, out)
		}
	})
	way, err := c.Wait(ctx, "way", nil)
	if err != nil {
		t.Fatal(err)
	}
	s.must(t, "vm", "create", "late", "--restart", "never")
	s.happens(ctx, t, c, "late", "vm.started")
	late, err := c.VM(ctx, "late")
	if err != nil {
		t.Fatal(err)
	}
	web, err := c.VM(ctx, "web")
	if err != nil {
		t.Fatal(err)
	}
	if n := s.machines(t); n != 3 || len(s.held(t, web)) != 3 || len(s.held(t, way)) != 3 {
		t.Fatalf("%d QEMU processes, web in %q, way in %q: the checks below would show nothing", n, s.held(t, web), s.held(t, way))
	}

	// 2. The state is lost, and the copy put in its place.
	s.signalMatching(t, "STOP", victims["orchestrator"])
	if err := os.Rename(state, state+".lost"); err != nil {
		t.Fatal(err)
	}
	s.kill(t, "orchestrator")
	var restored orchestrator.Restored
	out := s.must(t, "orchestrator", "restore", "--state", copied, "--yes")
	if err := json.Unmarshal([]byte(out), &restored); err != nil || restored.Stopped != 1 || restored.Aborted != 1 {
		t.Errorf("restored: %s, %v", out, err)
	}
	if err := os.Rename(copied, state); err != nil {
		t.Fatal(err)
	}

	// 3. Nothing of before runs or passes.
	s.within(t, "the new epoch", func(t *testing.T) string { return s.before(t, c, web, way) })
	if vm, err := c.VM(ctx, "web"); err != nil || vm.Phase != client.PhaseStopped || vm.Reason != event.EpochBegun || !vm.NextStart.IsZero() {
		t.Errorf("the VM that computed: %+v, %v", vm, err)
	}
	if vm, err := c.VM(ctx, "way"); err != nil || vm.Phase != client.PhaseAborted || vm.Reason != event.EpochBegun {
		t.Errorf("the VM that was on its way: %+v, %v", vm, err)
	}
	if vm, err := c.VM(ctx, "late"); !client.IsUnknown(err) {
		t.Errorf("the VM of after the copy: %+v, %v", vm, err)
	}
	destroyed := false
	if err := c.Events(ctx, client.EventQuery{}, func(e api.JournalEntry) error {
		destroyed = destroyed || e.Event.Kind == "vm.stranger-destroyed" && e.Event.Detail["id"] == late.ID
		return nil
	}); err != nil || !destroyed {
		t.Errorf("the journal does not say that late was destroyed: %v", err)
	}

	// 4. What computed is started by wish.
	s.must(t, "vm", "start", "web")
	again, err := c.WaitStart(ctx, "web", 2, nil)
	if err != nil {
		t.Fatalf("%v\n%s", err, s.run(t.Context(), "vm", "explain", "web").stdout)
	}
	if r := s.fetch(t, lab.Tenant, again.WorkloadURL); !strings.Contains(r.stdout, "Hello from web") {
		t.Errorf("its page is\n%s%s", r.stdout, r.stderr)
	}
	for _, name := range []string{"web", "way"} {
		s.must(t, "vm", "delete", name, "--yes")
	}
	s.within(t, "the deletions", func(t *testing.T) string {
		if n := s.machines(t); n > 0 {
			return "a QEMU process"
		}
		return s.misfits(t)
	})
}

// before is what there is of the time before the new epoch.
func (s *system) before(t *testing.T, c *client.Client, vms ...api.VM) string {
	t.Helper()
	looked := false
	err := c.Events(t.Context(), client.EventQuery{}, func(e api.JournalEntry) error {
		looked = looked || e.Event.Kind == "epoch.hosts-looked-at"
		return nil
	})
	switch {
	case err != nil:
		return "no answer: " + err.Error()
	case !looked:
		return "a host that was not looked at"
	case s.machines(t) > 0:
		return "a QEMU process"
	case strings.Contains(s.peers(t), "public_key"):
		return "a tunnel"
	}
	for _, vm := range vms {
		if held := s.held(t, vm); len(held) > 0 {
			return "something of " + vm.Name + " in " + held[0]
		}
	}
	return s.misfits(t)
}

// misfits is what fsck finds beside the one volume of the VM that the copy does not know,
// which it names: nobody deletes what may be wanted.
func (s *system) misfits(t *testing.T) string {
	t.Helper()
	r := s.run(t.Context(), "fsck", "--json")
	var f api.Fsck
	if err := json.Unmarshal([]byte(r.stdout), &f); err != nil {
		return "no answer of fsck: " + r.stderr
	}
	if len(f.Findings) != 1 || f.Findings[0].Code != "volume-unexpected" {
		return "something that does not fit, or no word of the volume:\n" + r.stdout
	}
	return ""
}
