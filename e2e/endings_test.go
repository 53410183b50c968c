//go:build system

package e2e

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"foothold/client"
	"foothold/internal/durable"
	"foothold/lab"
	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/tenant/reservation"
)

// ending is a template like the default one whose VMs end from inside as their workload
// wishes.
const ending = "ending"

// buildEnder makes the workload of such a VM.
func buildEnder(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "ender")
	cmd := exec.Command("go", "build", "-trimpath", "-o", program, "foothold/e2e/ender")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the workload: %v\n%s", err, out)
	}
	return program
}

// endingTemplate makes and registers that template, as an organisation makes one that
// holds files of its own: from a Debian tree with ender/root added. It is built and
// audited like any other. The files of more go to /usr/lib/ender as well. The folder that
// it returns holds its cache and its templates.
func (s *system) endingTemplate(t *testing.T, more ...string) string {
	t.Helper()
	kept := filepath.Join(s.build, "cache")
	if trees, _ := filepath.Glob(filepath.Join(kept, "bootstrap", "*", "root.tar")); len(trees) == 0 {
		s.template(t) // bootstraps
	}
	dir := t.TempDir()
	cache := filepath.Join(dir, "cache")
	if err := os.CopyFS(filepath.Join(cache, "bootstrap"), os.DirFS(filepath.Join(kept, "bootstrap"))); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(kept, "kernel"), filepath.Join(cache, "kernel")); err != nil {
		t.Fatal(err)
	}
	trees, err := filepath.Glob(filepath.Join(cache, "bootstrap", "*", "root.tar"))
	if err != nil || len(trees) == 0 {
		t.Fatalf("no Debian tree in %s: %v", kept, err)
	}
	root := filepath.Join(dir, "root")
	if err := os.CopyFS(root, os.DirFS("ender/root")); err != nil {
		t.Fatal(err)
	}
	for _, file := range more {
		copyFile(t, file, filepath.Join(root, "usr/lib/ender", filepath.Base(file)))
	}
	for _, tree := range trees {
		add := exec.Command("tar", "--append", "--file="+tree, "--owner=0", "--group=0", "--numeric-owner", "--mode=go-w", "--mtime=@1700000000",
			"--directory="+root, "./usr/lib/ender", "./usr/lib/systemd/system/foothold-workload.service.d")
		if out, err := add.CombinedOutput(); err != nil {
			t.Fatalf("add to the Debian tree: %v\n%s", err, out)
		}
		sum, err := durable.Digest(tree)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(filepath.Dir(tree), "digest"), []byte(sum.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	began := time.Now()
	s.must(t, "template", "build", ending, "--cache", cache, "--dir", filepath.Join(dir, "templates"), "--guest", filepath.Join(s.bin, "foothold-guest"))
	t.Logf("template %s registered after %.1f s", ending, time.Since(began).Seconds())
	return dir
}

// copyFile copies a file with its mode.
func copyFile(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, data, info.Mode().Perm()); err != nil {
		t.Fatal(err)
	}
}

// endInside has a VM end itself.
func (s *system) endInside(t *testing.T, vm api.VM, how string) {
	t.Helper()
	if r := s.fetch(t, lab.Tenant, strings.TrimSuffix(vm.WorkloadURL, "/")+"/end/"+how); r.code != 0 || strings.TrimSpace(r.stdout) != how {
		t.Fatalf("%s is to end itself by %s: exit code %d\n%s%s", vm.Name, how, r.code, r.stdout, r.stderr)
	}
}

// createOthers creates a VM that always starts again, but by wish, and one that never does.
func (s *system) createOthers(t *testing.T, ender string) {
	t.Helper()
	for name, policy := range map[string]reservation.Restart{"again": reservation.Always, "once": reservation.Never} {
		s.must(t, "vm", "create", name, "--template", ending, "--workload", ender, "--restart", string(policy))
	}
}

// otherPolicies shows what follows an end from inside in those two.
func (s *system) otherPolicies(t *testing.T, c *client.Client) {
	ctx, cancel := context.WithTimeout(t.Context(), 2*startLimit)
	defer cancel()
	for _, name := range []string{"again", "once"} {
		if _, err := c.Wait(ctx, name, nil); err != nil {
			t.Fatalf("%s: %v\n%s", name, err, s.run(t.Context(), "vm", "explain", name).stdout)
		}
	}
	s.endInside(t, s.counted(t, c, "again", 1), "poweroff")
	s.endInside(t, s.counted(t, c, "once", 1), "crash")
	if vm := s.staysStopped(t, c, "once", event.GuestCrashed); vm.Start != 1 {
		t.Errorf("it crashed and was started again: %+v", vm)
	}
	if logs := s.must(t, "vm", "logs", "once"); !strings.Contains(logs, "Kernel panic") {
		t.Errorf("the kernel's last words are not kept:\n%s", logs)
	}
	if _, err := c.WaitStart(ctx, "again", 2, nil); err != nil {
		t.Fatalf("powered off, to start again: %v\n%s", err, s.run(t.Context(), "vm", "explain", "again").stdout)
	}
	s.counted(t, c, "again", 2)
	s.must(t, "vm", "stop", "again", "--wait")
	s.still(t, c, "again")
	s.staysStopped(t, c, "again", event.StopAsked)
	for _, name := range []string{"again", "once"} {
		s.must(t, "vm", "delete", name, "--yes")
	}
}

// staysStopped waits until a VM is stopped and gone from its host, and says for which
// cause, without a start to come.
func (s *system) staysStopped(t *testing.T, c *client.Client, name string, cause event.Reason) api.VM {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), startLimit)
	defer cancel()
	vm, err := c.WaitStopped(ctx, name, nil)
	if err != nil {
		t.Fatalf("%s is to stop: %v", name, err)
	}
	if vm.Reason != cause || !vm.NextStart.IsZero() {
		t.Errorf("%s stopped: %+v; want %s and no start to come", name, vm, cause)
	}
	if out, want := s.must(t, "vm", "explain", name), event.Explain(cause).Cause; !strings.Contains(out, want) {
		t.Errorf("vm explain %s does not say %q:\n%s", name, want, out)
	}
	return vm
}

// still checks that no VM runs, and that nothing passes of a stopped one.
func (s *system) still(t *testing.T, c *client.Client, name string) {
	t.Helper()
	if n := s.machines(t); n != 0 {
		t.Errorf("%d QEMU processes of a stopped VM", n)
	}
	if rules, err := c.Rules(t.Context(), name); err != nil || len(rules) != 0 {
		t.Errorf("rules of a stopped VM: %+v, %v", rules, err)
	}
	s.must(t, "fsck")
}

// acts is what the journal has of each start that came to compute, in this order.
var acts = []string{"vm.create-asked", "vm.started", "token.spent", "quote.accepted", "components.released", "components.delivered",
	"vm.reported-ready", "token.spent", "certificate.issued", "secrets.released", "token.spent", "tunnel.admitted", "vm.computing"}

// anew checks in a VM's journal that its starts ended for these causes, that each start went
// through all acts with nothing of another one's, and that the pauses between them grew.
func anew(t *testing.T, journal []api.JournalEntry, causes []event.Reason) {
	t.Helper()
	var starts [][]api.JournalEntry
	var ends []api.JournalEntry
	part := []api.JournalEntry{}
	for _, e := range journal {
		if part = append(part, e); e.Event.Kind == "vm.stopped" {
			starts, ends, part = append(starts, part), append(ends, e), nil
		}
	}
	starts = append(starts, part)
	if len(ends) != len(causes) {
		t.Fatalf("%d starts ended, want %d", len(ends), len(causes))
	}
	used := map[string]int{}
	for i, start := range starts {
		left := acts
		for _, e := range start {
			if len(left) > 0 && e.Event.Kind == left[0] {
				left = left[1:]
			}
			for _, what := range []string{"settings", "serial", "template-header", "volume-header"} {
				if value, ok := e.Event.Detail[what]; ok {
					if was := used[what+value]; was != 0 && was != i+1 {
						t.Errorf("start %d has the %s of start %d", i+1, what, was)
					}
					used[what+value] = i + 1
				}
			}
		}
		if len(left) > 0 {
			t.Errorf("start %d came without, or not in order: %q", i+1, left)
		}
	}
	if len(used) != 4*len(starts) {
		t.Errorf("%d settings, certificates and headers of %d starts", len(used), len(starts))
	}
	restarts := 0
	for i, e := range ends {
		if e.Event.Reason != causes[i] {
			t.Errorf("start %d ended by %s, want %s: %v", i+1, e.Event.Reason, causes[i], e.Event.Detail)
		}
		switch e.Event.Reason {
		case event.RestartAsked, event.StopAsked, event.QuoteRefused: // what follows is started by wish
			restarts = 0
			continue
		case event.GuestPoweredOff:
			continue
		}
		begun := slices.IndexFunc(starts[i+1], func(e api.JournalEntry) bool { return e.Event.Kind == "vm.create-asked" })
		if begun < 0 {
			t.Errorf("start %d has no beginning", i+2)
			continue
		}
		if pause, want := starts[i+1][begun].Event.Time.Sub(e.Event.Time), reservation.Backoff(restarts); pause < want {
			t.Errorf("start %d began %v after the end of the one before, want %v or more", i+2, pause, want)
		}
		restarts++
	}
}

// machines are the QEMU processes that were seen of one VM.
type machines struct {
	pids  map[int]bool
	most  int // at a time
	looks int
}

var macArgument = regexp.MustCompile(`mac=([0-9a-f:]{17})`)

// countMachines looks for the lab's QEMU processes all the time until it is asked what it
// saw, by MAC address. It takes them for the lab's by their PID namespace.
func (s *system) countMachines(t *testing.T) func() map[string]*machines {
	t.Helper()
	home := s.namespace(t)
	seen := map[string]*machines{}
	stop := make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			look(home, seen)
			select {
			case <-stop:
				return
			case <-tick.C:
			}
		}
	})
	end := sync.OnceFunc(func() { close(stop); watch.Wait() })
	t.Cleanup(end)
	return func() map[string]*machines {
		end()
		return seen
	}
}

// look adds the processes that run now.
func look(home string, seen map[string]*machines) {
	now := map[string]int{}
	for _, pid := range processes() {
		line, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline")) // empty of one that has ended
		mac := macArgument.FindSubmatch(line)
		if !bytes.HasPrefix(line, []byte("qemu-system-x86_64\x00")) || mac == nil {
			continue
		}
		if ns, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "ns/pid")); err == nil && ns != home {
			continue // of another lab; one that cannot be told counts
		}
		vm := string(mac[1])
		if seen[vm] == nil {
			seen[vm] = &machines{pids: map[int]bool{}}
		}
		seen[vm].pids[pid] = true
		now[vm]++
	}
	for vm, m := range seen {
		m.looks++
		m.most = max(m.most, now[vm])
	}
}

// namespace is the lab's PID namespace.
func (s *system) namespace(t *testing.T) string {
	t.Helper()
	own, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range processes() {
		line, _ := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
		ns, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(pid), "ns/pid"))
		if err == nil && ns != own && bytes.Contains(line, []byte(s.state)) {
			return ns
		}
	}
	t.Fatal("no process of the lab has a PID namespace of its own")
	return ""
}

func processes() (pids []int) {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids
}
