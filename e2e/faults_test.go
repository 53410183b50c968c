//go:build system

package e2e

import (
	"context"
	"encoding/json"
	"errors"
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

// faults are what is killed and in which phase of a VM's first start. FOOTHOLD_FAULTS=all
// runs every combination.
func faults() [][2]string {
	if os.Getenv("FOOTHOLD_FAULTS") != "all" {
		return [][2]string{{"bootserver", booting}, {"orchestrator", unlocking}, {"gateway", connecting}, {"external", computing}}
	}
	var list [][2]string
	for name := range victims {
		for _, phase := range []string{booting, unlocking, connecting, computing} {
			list = append(list, [2]string{name, phase})
		}
	}
	slices.SortFunc(list, func(a, b [2]string) int { return strings.Compare(a[0]+a[1], b[0]+b[1]) })
	return list
}

// TestFaults kills a daemon, or a VM's QEMU, in one phase of a VM after the other. The VM
// becomes ready, or ends with a reason; after its deletion nothing of it is left; and the
// next VM meets an installation that works.
func TestFaults(t *testing.T) {
	s := newSystem(t)
	s.template(t)
	c := s.client(t)
	for _, f := range faults() {
		t.Run(f[0]+" killed while "+f[1], func(t *testing.T) { s.fault(t, c, f[0], f[1]) })
	}
	t.Run("the next VM", func(t *testing.T) {
		s.must(t, "vm", "create", "next", "--workload", filepath.Join(s.bin, "sample-web"), "--wait")
		s.gone(t, c, "next")
	})
}

func (s *system) fault(t *testing.T, c *client.Client, victim, phase string) {
	s.must(t, "vm", "create", "web", "--workload", filepath.Join(s.bin, "sample-web"), "--restart", "never")
	ctx, cancel := context.WithTimeout(t.Context(), faultLimit)
	defer cancel()
	s.until(ctx, t, c, "web", phase)
	began := time.Now()
	s.killMatching(t, victims[victim])
	vm, err := c.Wait(ctx, "web", nil)
	var ended *client.Ended
	switch {
	case err == nil:
		t.Logf("ready %.1f s after it", time.Since(began).Seconds())
		if r := s.fetch(t, lab.Tenant, vm.WorkloadURL); !strings.Contains(r.stdout, "Hello from web") {
			t.Errorf("ready, but its page is\n%s%s", r.stdout, r.stderr)
		}
	case errors.As(err, &ended):
		t.Logf("%s after %.1f s: %s: %s", vm.Phase, time.Since(began).Seconds(), vm.Reason, vm.Explanation)
		if vm.Reason == "" || vm.Explanation == "" || vm.Reason == "internal-error" {
			t.Errorf("it ended without a good reason: %+v", vm)
		}
	default:
		t.Fatalf("%v\n%s", err, s.run(t.Context(), "vm", "explain", "web").stdout)
	}
	s.gone(t, c, "web")
}

// until waits until the VM is in a phase; a VM without fault comes to each.
func (s *system) until(ctx context.Context, t *testing.T, c *client.Client, name, phase string) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		vm, err := c.VM(ctx, name)
		if err != nil {
			t.Fatal(err)
		}
		if vm.Phase == phase {
			return
		}
		if vm.Reason != "" {
			t.Fatalf("before the fault the VM is %s: %s", vm.Phase, vm.Explanation)
		}
		<-tick.C
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
	left := ""
	for end := time.Now().Add(time.Minute); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		if left = s.leftOf(t, c, vm.ID); left == "" {
			return
		}
	}
	t.Errorf("a minute after its deletion there is still %s", left)
}

func (s *system) leftOf(t *testing.T, c *client.Client, id string) string {
	t.Helper()
	vm, err := c.VM(t.Context(), id)
	if err != nil {
		return "no answer: " + err.Error()
	}
	rules, err := c.Rules(t.Context(), id)
	switch {
	case err != nil:
		return "no answer: " + err.Error()
	case vm.Cleanup != api.CleanupDone:
		return "a clean-up to do"
	case len(rules) > 0:
		return "the rule " + rules[0].Rule
	case s.machines(t) > 0:
		return "a QEMU process"
	}
	if volumes := s.volumes(t); len(volumes) > 0 {
		return "the volume " + volumes[0]
	}
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
// grep's, but the shells that look for it.
func (s *system) signalMatching(t *testing.T, signal, pattern string) {
	t.Helper()
	script := `found=0
for f in /proc/[0-9]*/cmdline; do
	line=$(tr '\0' ' ' 2>/dev/null <$f)
	case "$line" in sh\ *|*\ lab\ *) continue ;; esac
	if printf %s "$line" | grep -q '` + pattern + `'; then p=${f#/proc/}; kill -` + signal + ` ${p%/cmdline} && found=$((found+1)); fi
done
echo $found`
	out := s.must(t, "lab", "exec", "--state", s.state, lab.Host, "--", "sh", "-c", script)
	var n int
	if err := json.Unmarshal([]byte(strings.TrimSpace(out)), &n); err != nil || n == 0 {
		t.Fatalf("SIG%s to %q processes that match %q", signal, out, pattern)
	}
}
