//go:build system

package e2e

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/client"
	"foothold/lab"
	"foothold/protocol/api"
	"foothold/protocol/event"
)

// startLimit is how long one further start may take on a busy machine.
const startLimit = 3 * time.Minute

// TestRestarts takes one VM through one start after the other - by wish, after its QEMU
// and after its host's agent was killed, after its host booted anew, after it was closed because
// its host had changed, after a reboot, a crash and a poweroff from inside - and looks whether its volume's data is there each time and
// nothing of an earlier start serves. Two more show the other restart policies.
func TestRestarts(t *testing.T) {
	s := newSystem(t)
	dir := s.endingTemplate(t)
	c := s.client(t)
	machines := s.countMachines(t)
	ender := buildEnder(t)
	if r := s.run(t.Context(), "vm", "create", "web", "--template", ending, "--workload", ender, "--wait"); r.code != 0 {
		t.Fatalf("vm create: exit code %d\n%s\nconsole:\n%s", r.code, r.stderr, s.run(t.Context(), "vm", "logs", "web").stdout)
	}
	seen := []api.VM{s.counted(t, c, "web", 1)}
	var causes []event.Reason
	next := func(what string, cause event.Reason, do func()) {
		t.Helper()
		do()
		ctx, cancel := context.WithTimeout(t.Context(), startLimit)
		defer cancel()
		start := len(seen) + 1
		began := time.Now()
		if _, err := c.WaitStart(ctx, "web", start, nil); err != nil {
			t.Fatalf("%s: start %d: %v\n%s\n%s", what, start, err, s.run(t.Context(), "vm", "explain", "web").stdout, s.run(t.Context(), "vm", "logs", "web").stdout)
		}
		t.Logf("%s: ready again after %.1f s", what, time.Since(began).Seconds())
		seen, causes = append(seen, s.counted(t, c, "web", start)), append(causes, cause)
	}
	inside := func(how string) { s.endInside(t, seen[len(seen)-1], how) }
	old := seen[0].TemplateVersion
	next("restart by wish, into a rotated template", event.RestartAsked, func() {
		s.rotate(t, dir)
		s.must(t, "vm", "restart", "web")
	})
	s.rotated(t, c, old)
	next("QEMU killed", event.VMStopped, func() { s.killMatching(t, victims["QEMU"]) })
	next("host agent killed", event.VMStopped, func() { s.killMatching(t, victims["host"]) })
	next("host rebooted", event.VMStopped, func() { s.killMatching(t, victims["swtpm"]) })
	next("host changed, and as agreed again", event.QuoteRefused, func() { s.hostChanges(t, c, seen[len(seen)-1]) })
	s.createOthers(t, ender) // they start beside it
	next("reboot from inside", event.GuestReset, func() { inside("reboot") })
	next("crash of its kernel", event.GuestCrashed, func() { inside("crash") })
	next("powered off from inside, and started", event.GuestPoweredOff, func() {
		inside("poweroff")
		s.staysStopped(t, c, "web", event.GuestPoweredOff)
		t.Run("the other policies", func(t *testing.T) { s.otherPolicies(t, c) })
		s.still(t, c, "web")
		if vm := s.staysStopped(t, c, "web", event.GuestPoweredOff); vm.Start != len(seen) {
			t.Errorf("a start began unasked: %+v", vm)
		}
		s.must(t, "vm", "start", "web")
	})
	var tunnels []string
	for _, vm := range seen {
		tunnels = append(tunnels, vm.TunnelAddress.String())
	}
	if len(slices.Compact(slices.Sorted(slices.Values(tunnels)))) != len(seen) {
		t.Errorf("two starts had the same tunnel address: %q", tunnels)
	}
	anew(t, s.journal(t, c), causes)
	s.must(t, "vm", "delete", "web", "--yes")
	if left := s.volumes(t); len(left) != 0 {
		t.Errorf("volumes are left: %q", left)
	}
	s.must(t, "fsck")
	for mac, m := range machines() {
		t.Logf("%s: %d QEMU processes, at most %d at a time in %d looks", mac, len(m.pids), m.most, m.looks)
		if m.most != 1 {
			t.Errorf("%d QEMU processes at a time ran one VM", m.most)
		}
		if mac == seen[0].MAC && len(m.pids) != len(seen) {
			t.Errorf("%d QEMU processes in all for %d starts", len(m.pids), len(seen))
		}
	}
}

// rotate makes the template's next version.
func (s *system) rotate(t *testing.T, dir string) {
	t.Helper()
	began := time.Now()
	s.must(t, "template", "rotate", ending, "--cache", filepath.Join(dir, "cache"), "--dir", filepath.Join(dir, "templates"), "--guest", filepath.Join(s.bin, "foothold-guest"))
	t.Logf("rotated after %.1f s", time.Since(began).Seconds())
}

// rotated waits until the version that the VM had before is gone from ledger and hosts,
// which takes as long as the sweep's pause.
func (s *system) rotated(t *testing.T, c *client.Client, old int) {
	t.Helper()
	vm, err := c.VM(t.Context(), "web")
	if err != nil || vm.TemplateVersion != old+1 || vm.NextVersion != 0 {
		t.Errorf("after the rotation the VM is of version %d, next %d, %v; it was of %d", vm.TemplateVersion, vm.NextVersion, err, old)
	}
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(time.Minute); ; <-tick.C {
		list, err := c.Templates(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		list = slices.DeleteFunc(list, func(t api.Template) bool { return t.Name != ending })
		if len(list) == 1 && list[0].Version == old+1 && list[0].State == api.TemplateCurrent {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("a minute after the last start of the old version: %+v", list)
		}
	}
	s.must(t, "fsck")
}

// counted fetches the page, which says how many starts the volume has seen.
func (s *system) counted(t *testing.T, c *client.Client, name string, start int) api.VM {
	t.Helper()
	vm, err := c.VM(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("start %d on this volume", start)
	r := s.fetch(t, lab.Tenant, vm.WorkloadURL)
	if !strings.Contains(r.stdout, want) {
		t.Errorf("the page of start %d does not say %q:\n%s%s", start, want, r.stdout, r.stderr)
	}
	if !strings.Contains(r.stdout, "kexec disabled: 1\n") {
		t.Errorf("the VM may reboot past its host:\n%s", r.stdout)
	}
	if vm.Start != start {
		t.Errorf("start %d, want %d", vm.Start, start)
	}
	s.must(t, "fsck")
	return vm
}
