//go:build system

package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/client"
	"foothold/lab"
	"foothold/protocol/api"
)

// startLimit is how long one further start may take on a busy machine.
const startLimit = 3 * time.Minute

// TestRestarts takes one VM through one start after the other - by wish, after its QEMU
// and after its host's agent was killed, after a stop - and looks whether its volume's
// data is there each time and nothing of an earlier start serves.
func TestRestarts(t *testing.T) {
	s := newSystem(t)
	s.template(t)
	c := s.client(t)
	s.must(t, "vm", "create", "web", "--workload", filepath.Join(s.bin, "sample-web"), "--wait")
	seen := []api.VM{s.counted(t, c, 1)}
	next := func(what string, do func()) {
		t.Helper()
		do()
		ctx, cancel := context.WithTimeout(t.Context(), startLimit)
		defer cancel()
		start := len(seen) + 1
		began := time.Now()
		if _, err := c.WaitStart(ctx, "web", start, nil); err != nil {
			t.Fatalf("%s: start %d: %v\n%s", what, start, err, s.run(t.Context(), "vm", "explain", "web").stdout)
		}
		t.Logf("%s: ready again after %.1f s", what, time.Since(began).Seconds())
		seen = append(seen, s.counted(t, c, start))
	}
	old := seen[0].TemplateVersion
	next("restart by wish, into a rotated template", func() {
		s.rotate(t)
		s.must(t, "vm", "restart", "web")
	})
	s.rotated(t, c, old)
	next("QEMU killed", func() { s.killMatching(t, victims["QEMU"]) })
	next("host agent killed", func() { s.killMatching(t, victims["host"]) })
	next("stop and start", func() {
		s.must(t, "vm", "stop", "web", "--wait")
		if n := s.machines(t); n != 0 {
			t.Errorf("%d QEMU processes of a stopped VM", n)
		}
		if rules, err := c.Rules(t.Context(), seen[0].ID); err != nil || len(rules) != 0 {
			t.Errorf("rules of a stopped VM: %+v, %v", rules, err)
		}
		s.must(t, "fsck")
		s.must(t, "vm", "start", "web")
	})
	var tunnels []string
	for _, vm := range seen {
		tunnels = append(tunnels, vm.TunnelAddress.String())
	}
	if len(slices.Compact(slices.Sorted(slices.Values(tunnels)))) != len(seen) {
		t.Errorf("two starts had the same tunnel address: %q", tunnels)
	}
	s.must(t, "vm", "delete", "web", "--yes")
	if left := s.volumes(t); len(left) != 0 {
		t.Errorf("volumes are left: %q", left)
	}
	s.must(t, "fsck")
}

// rotate makes the template's next version, in a copy of the folder that other tests use.
func (s *system) rotate(t *testing.T) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "templates")
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(s.build, "templates"))); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	s.must(t, "template", "rotate", "debian", "--cache", filepath.Join(s.build, "cache"), "--dir", dir, "--guest", filepath.Join(s.bin, "foothold-guest"))
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
func (s *system) counted(t *testing.T, c *client.Client, start int) api.VM {
	t.Helper()
	vm, err := c.VM(t.Context(), "web")
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("start %d on this volume", start)
	if r := s.fetch(t, lab.Tenant, vm.WorkloadURL); !strings.Contains(r.stdout, want) {
		t.Errorf("the page of start %d does not say %q:\n%s%s", start, want, r.stdout, r.stderr)
	}
	if vm.Start != start {
		t.Errorf("start %d, want %d", vm.Start, start)
	}
	if n := s.machines(t); n != 1 {
		t.Errorf("%d QEMU processes run, want 1", n)
	}
	s.must(t, "fsck")
	return vm
}
