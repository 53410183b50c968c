//go:build system

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"foothold/client"
	"foothold/lab"
	"foothold/lab/control"
	"foothold/protocol/api"
)

// faultLimit is the most that a VM may take to be ready or ended after a fault: all
// phases' deadlines, on a busy machine.
const faultLimit = 6 * time.Minute

// victims are what is killed, by what their command lines hold.
var victims = map[string]string{
	"orchestrator": "foothold orchestrator run",
	"bootserver":   "foothold bootserver ",
	"gateway":      "foothold gateway ",
	"store":        "foothold store ",
	"external":     "foothold firewall .*external",
	"internal":     "foothold firewall .*internal",
	"host":         "foothold-host run",
	"QEMU":         "^[^ ]*qemu-system",
	"swtpm":        "^[^ ]*swtpm socket", // the lab takes it as the host's loss of power
}

// releaseAsked is the entry with which a VM's end by wish begins.
const releaseAsked = "vm.release-asked"

// middles are entries of the journal between the beginnings of phases, and who is at work
// for the VM from each of them on.
var middles = map[string][]string{
	"vm.started":           {"orchestrator", "external", "bootserver", "host", "QEMU", "swtpm"}, // firmware and loader run
	"token.spent":          {"orchestrator", "bootserver", "host", "QEMU", "swtpm"},             // T1: the quote follows
	"components.released":  {"orchestrator", "bootserver", "host", "QEMU"},
	"components.delivered": {"orchestrator", "bootserver", "QEMU"}, // kexec and the report follow
	"tunnel.admitted":      {"orchestrator", "gateway", "internal", "store", "QEMU"},
	releaseAsked:           {"orchestrator", "external", "internal", "gateway", "host", "swtpm"},
}

// beginnings are the entries that are made with a phase's beginning.
var beginnings = map[string]string{booting: "vm.create-asked", unlocking: "vm.reported-ready", connecting: "secrets.handed-over", computing: "vm.computing"}

// faults are what is killed, and in which phase of a VM's first start or after which entry.
// FOOTHOLD_FAULTS=all runs every combination.
func faults() [][2]string {
	if os.Getenv("FOOTHOLD_FAULTS") != "all" {
		return [][2]string{{"bootserver", booting}, {"orchestrator", unlocking}, {"gateway", connecting}, {"external", computing}, {"orchestrator", releaseAsked}}
	}
	var list [][2]string
	for name := range victims {
		for _, phase := range []string{booting, unlocking, connecting, computing} {
			list = append(list, [2]string{name, phase})
		}
	}
	for entry, names := range middles {
		for _, name := range names {
			list = append(list, [2]string{name, entry})
		}
	}
	slices.SortFunc(list, func(a, b [2]string) int { return strings.Compare(a[0]+a[1], b[0]+b[1]) })
	return list
}

// TestFaults kills a daemon, a VM's QEMU or the TPM in one act of a VM after the other. The
// VM becomes ready, or ends with a reason and runs and passes no more; its deletion leaves
// nothing of it, nor does one in which the fault falls; and the next VM meets an
// installation that works. At last the lab is taken down.
func TestFaults(t *testing.T) {
	s := newSystem(t)
	s.template(t)
	c := s.client(t)
	for _, f := range faults() {
		t.Run(f[0]+" killed at "+f[1], func(t *testing.T) { s.fault(t, c, f[0], f[1]) })
	}
	t.Run("boot server killed in mid-delivery", func(t *testing.T) { s.goneInMidDelivery(t, c) })
	t.Run("the next VM", func(t *testing.T) {
		s.must(t, "vm", "create", "next", "--workload", filepath.Join(s.bin, "sample-web"), "--wait")
		s.gone(t, c, "next")
	})
	t.Run("the lab's end leaves nothing", s.downLeavesNothing)
}

func (s *system) fault(t *testing.T, c *client.Client, victim, when string) {
	s.must(t, "vm", "create", "web", "--workload", filepath.Join(s.bin, "sample-web"), "--restart", "never")
	ctx, cancel := context.WithTimeout(t.Context(), faultLimit)
	defer cancel()
	if when == releaseAsked {
		s.faultAtEnd(ctx, t, c, victim)
		return
	}
	if entry, phase := beginnings[when]; phase {
		when = entry
	}
	s.happens(ctx, t, c, "web", when)
	began := time.Now()
	s.kill(t, victim)
	vm, err := c.Wait(ctx, "web", nil)
	var ended *client.Ended
	switch {
	case err == nil:
		t.Logf("ready %.1f s after it", time.Since(began).Seconds())
		if r := s.fetch(t, lab.Tenant, vm.WorkloadURL); !strings.Contains(r.stdout, "Hello from web") {
			t.Errorf("ready, but its page is\n%s%s", r.stdout, r.stderr)
		}
		s.within(t, "it is ready", s.misfit)
	case errors.As(err, &ended):
		t.Logf("%s after %.1f s: %s: %s", vm.Phase, time.Since(began).Seconds(), vm.Reason, vm.Explanation)
		if vm.Reason == "" || vm.Explanation == "" || vm.Reason == "internal-error" {
			t.Errorf("it ended without a good reason: %+v", vm)
		}
		s.within(t, "its end", func(t *testing.T) string { return s.runningOf(t, c, vm.ID) })
	default:
		t.Fatalf("%v\n%s", err, s.run(t.Context(), "vm", "explain", "web").stdout)
	}
	s.gone(t, c, "web")
}

// faultAtEnd kills while a VM that computes is being deleted.
func (s *system) faultAtEnd(ctx context.Context, t *testing.T, c *client.Client, victim string) {
	vm, err := c.Wait(ctx, "web", nil)
	if err != nil {
		t.Fatal(err)
	}
	asked, deleted := errors.New("its end was asked for"), make(chan error, 1)
	err = c.Events(ctx, client.EventQuery{VM: vm.ID, Follow: true}, func(e api.JournalEntry) error {
		switch e.Event.Kind {
		case "vm.computing":
			go func() {
				_, err := c.DeleteVM(ctx, vm.ID)
				deleted <- err
			}()
		case releaseAsked:
			return asked
		}
		return nil
	})
	if !errors.Is(err, asked) {
		t.Fatal(err)
	}
	s.kill(t, victim)
	t.Logf("the deletion itself: %v", <-deleted)
	// Nobody asks again: what was stored is carried through.
	s.within(t, "its deletion", func(t *testing.T) string { return s.leftOf(t, c, vm.ID) })
}

// kill ends a daemon, a VM's QEMU or the TPM, at once: a daemon in a moment, by the lab's
// own means.
func (s *system) kill(t *testing.T, victim string) {
	t.Helper()
	if victim == "QEMU" || victim == "swtpm" {
		s.killMatching(t, victims[victim])
		return
	}
	request := control.Request{Op: control.OpKill, Name: victim, Signal: int(syscall.SIGKILL)}
	if _, err := control.Call(t.Context(), lab.State{Dir: s.state}.Run(), request); err != nil {
		t.Fatal(err)
	}
}

// gone deletes a VM and waits until nothing of it is left: not at its host, not on a disk,
// not in a kernel's rules.
func (s *system) gone(t *testing.T, c *client.Client, name string) {
	t.Helper()
	vm, err := c.DeleteVM(t.Context(), name)
	if err != nil {
		t.Fatalf("delete: %v", err)
	}
	s.within(t, "its deletion", func(t *testing.T) string { return s.leftOf(t, c, vm.ID) })
}

// within waits a minute at most until nothing is left that should not be.
func (s *system) within(t *testing.T, when string, left func(*testing.T) string) {
	t.Helper()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(time.Minute); ; <-tick.C {
		what := left(t)
		if what == "" {
			return
		}
		if time.Now().After(end) {
			t.Errorf("a minute after %s there is still %s", when, what)
			return
		}
	}
}

func (s *system) leftOf(t *testing.T, c *client.Client, id string) string {
	t.Helper()
	if left := s.runningOf(t, c, id); left != "" {
		return left
	}
	if volumes := s.volumes(t); len(volumes) > 0 {
		return "the volume " + volumes[0]
	}
	if vm, err := c.VM(t.Context(), id); err != nil || vm.Cleanup != api.CleanupDone {
		return "no word that it is gone"
	}
	return ""
}

// runningOf is what there still is, but its volume, of a VM that has ended.
func (s *system) runningOf(t *testing.T, c *client.Client, id string) string {
	t.Helper()
	vm, err := c.VM(t.Context(), id)
	if err != nil {
		return "no answer: " + err.Error()
	}
	rules, err := c.Rules(t.Context(), id)
	switch {
	case err != nil:
		return "no answer: " + err.Error()
	case vm.Cleanup == api.CleanupPending:
		return "a clean-up to do"
	case len(rules) > 0:
		return "the rule " + rules[0].Rule
	case s.machines(t) > 0:
		return "a QEMU process"
	}
	return s.misfit(t)
}

// misfit is what fsck finds.
func (s *system) misfit(t *testing.T) string {
	t.Helper()
	if r := s.run(t.Context(), "fsck"); r.code != 0 {
		return "something that does not fit:\n" + r.stdout + r.stderr
	}
	return ""
}

// killMatching ends, at once, every process of the lab whose command line matches.
func (s *system) killMatching(t *testing.T, pattern string) {
	t.Helper()
	s.signalMatching(t, "KILL", pattern)
}

// signalMatching signals every process of the lab whose command line matches a pattern of
// grep's, but the shells that look for it. It waits until there is one: a VM's QEMU starts
// a moment after the VM is asked for.
func (s *system) signalMatching(t *testing.T, signal, pattern string) {
	t.Helper()
	script := `found=0
for f in /proc/[0-9]*/cmdline; do
	line=$(tr '\0' ' ' 2>/dev/null <$f)
	case "$line" in sh\ *|*\ lab\ *) continue ;; esac
	if printf %s "$line" | grep -q '` + pattern + `'; then p=${f#/proc/}; kill -` + signal + ` ${p%/cmdline} && found=$((found+1)); fi
done
echo $found`
	for end := time.Now().Add(arrivalLimit); ; {
		out := s.must(t, "lab", "exec", "--state", s.state, lab.Host, "--", "sh", "-c", script)
		var n int
		if err := json.Unmarshal([]byte(strings.TrimSpace(out)), &n); err == nil && n > 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("SIG%s to %q processes that match %q", signal, out, pattern)
		}
	}
}

// downLeavesNothing takes the lab down and looks for what refers to its folder.
func (s *system) downLeavesNothing(t *testing.T) {
	if len(traces(t, s.state)) == 0 {
		t.Fatal("a running lab leaves no trace: the check below would show nothing")
	}
	s.must(t, "lab", "down", "--state", s.state)
	if left := traces(t, s.state); len(left) != 0 {
		t.Errorf("left of the lab: %q", left)
	}
	if out, err := exec.Command("ip", "-brief", "link").Output(); err == nil && strings.Contains(string(out), "cloud0") {
		t.Errorf("the lab's network is left:\n%s", out)
	}
}

// traces are the processes and mounts that refer to a folder, but our own.
func traces(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, e := range entries {
		if e.Name()[0] < '0' || e.Name()[0] > '9' {
			continue
		}
		for _, file := range []string{"cmdline", "mountinfo"} {
			if data, err := os.ReadFile(filepath.Join("/proc", e.Name(), file)); err == nil && bytes.Contains(data, []byte(dir)) {
				found = append(found, e.Name()+"/"+file)
			}
		}
	}
	return found
}
