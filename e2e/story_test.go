//go:build system

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"foothold/client"
	"foothold/lab"
	"foothold/protocol/api"
)

// TestStory takes one VM from wish to work and to its end in a lab of its own, while
// probers in every place try, over and over, to get packets past the firewalls.
func TestStory(t *testing.T) {
	s := newSystem(t)
	s.template(t)
	c := s.client(t)
	w := newPassage(t, s, c)

	w.round(t, "before any VM")
	vm := s.create(t, w)
	t.Run("a VM computes and says how it came there", func(t *testing.T) { complete(t, vm) })
	t.Run("the workload answers through the tunnel", func(t *testing.T) { s.workload(t, vm) })
	t.Run("people are told", func(t *testing.T) { s.told(t) })
	t.Run("its evidence leads to the same verdicts", s.evidence)
	t.Run("the host measures what the reference values say", func(t *testing.T) { s.measures(t) })
	t.Run("everything fits while it computes", func(t *testing.T) { s.fits(t, 1) })
	for range 3 {
		w.round(t, "computing")
	}
	t.Run("the end leaves nothing of the VM", func(t *testing.T) { s.end(t, c, vm) })
	t.Run("everything fits after its end", func(t *testing.T) { s.fits(t, 0) })
	w.round(t, "after its end")
	t.Run("only the table's traffic passes", func(t *testing.T) { w.judge(t) })
}

// create runs `vm create --wait --json` and probes until it returns.
func (s *system) create(t *testing.T, w *passage) api.VM {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), commandLimit)
	defer stop()
	cmd := s.command(ctx, "vm", "create", "web", "--workload", filepath.Join(s.bin, "sample-web"), "--wait", "--json")
	var out, progress bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &progress
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	for running := true; running; {
		select {
		case err := <-ended:
			if err != nil {
				explain := s.run(t.Context(), "vm", "explain", "web")
				logs := s.run(t.Context(), "vm", "logs", "web")
				t.Fatalf("vm create: %v\n%s%s\n%s\nconsole:\n%s", err, out.String(), progress.String(), explain.stdout, logs.stdout)
			}
			running = false
		default:
			w.round(t, "")
		}
	}
	t.Logf("progress:\n%s", progress.String())
	var vm api.VM
	if err := json.Unmarshal(out.Bytes(), &vm); err != nil {
		t.Fatalf("standard output is not one JSON object: %v\n%s", err, out.String())
	}
	return vm
}

// complete checks what `vm create --json` promises.
func complete(t *testing.T, vm api.VM) {
	if vm.Name != "web" || vm.ID == "" || vm.Phase != computing || !vm.Ready || !vm.Measured {
		t.Errorf("VM %+v", vm)
	}
	var names []string
	for i, p := range vm.Phases {
		names = append(names, p.Name)
		t.Logf("%-12s %6.2f s", p.Name, p.Seconds)
		if p.Name != computing && (p.End.IsZero() || p.Seconds <= 0 || p.End.Sub(p.Start).Seconds()-p.Seconds > 0.01) {
			t.Errorf("phase %+v has no end or another length", p)
		}
		if i > 0 && p.Start.Before(vm.Phases[i-1].Start) {
			t.Errorf("phase %s begins before %s", p.Name, vm.Phases[i-1].Name)
		}
	}
	for _, want := range []string{"reserved", booting, unlocking, connecting, computing} {
		if !slices.Contains(names, want) {
			t.Errorf("phase %s is missing in %q", want, names)
		}
	}
	var delivered []string
	for _, c := range vm.Components {
		delivered = append(delivered, c.Name)
		if c.SHA256.IsZero() || c.Size <= 0 {
			t.Errorf("component %+v", c)
		}
	}
	slices.Sort(delivered)
	if !slices.Equal(delivered, []string{"initramfs", "kernel", "unique"}) {
		t.Errorf("components %q", delivered)
	}
}

// workload fetches the sample's pages from the tenant's network and from elsewhere.
func (s *system) workload(t *testing.T, vm api.VM) {
	if r := s.fetch(t, lab.Tenant, vm.WorkloadURL); r.code != 0 || !strings.Contains(r.stdout, "Hello from web") {
		t.Errorf("from the tenant: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	intranet := s.fetch(t, lab.Tenant, "http://"+lab.Address(lab.Intranet, lab.TenantLAN).String()+"/")
	if intranet.code != 0 || len(intranet.stdout) < 20 {
		t.Fatalf("the intranet's own page: exit code %d %q", intranet.code, intranet.stdout)
	}
	if r := s.fetch(t, lab.Tenant, strings.TrimSuffix(vm.WorkloadURL, "/")+"/intranet"); r.code != 0 || !strings.Contains(r.stdout, strings.TrimSpace(intranet.stdout)) {
		t.Errorf("the intranet as the VM sees it: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	if r := s.fetch(t, lab.Neighbour, "http://"+vm.Address.String()+":8080/"); r.code == 0 {
		t.Error("the neighbour reaches the workload on the cloud network")
	}
}

// told checks what people see of a computing VM.
func (s *system) told(t *testing.T) {
	for _, c := range []struct {
		args []string
		want []string
	}{
		{[]string{"vm", "list"}, []string{"web", "ready"}},
		{[]string{"vm", "show", "web"}, []string{"10.81.0.20", "51820", "kernel", "initramfs"}},
		{[]string{"vm", "explain", "web"}, []string{"computing"}},
		{[]string{"vm", "logs", "web"}, []string{"foothold-loader", "foothold-guest"}},
		{[]string{"events", "--vm", "web"}, []string{"component.delivered"}},
		{[]string{"events"}, []string{"firewall.dropped"}}, // what the probers tried
		{[]string{"host", "list"}, []string{"good"}},
		{[]string{"status"}, []string{"external", "internal", "gateway", "live", strings.Fields(s.must(t, "version"))[1]}},
		{[]string{"template", "list"}, []string{"debian"}},
	} {
		out := s.must(t, c.args...)
		for _, want := range c.want {
			if !strings.Contains(out, want) {
				t.Errorf("foothold %s does not say %q:\n%s", strings.Join(c.args, " "), want, out)
			}
		}
	}
}

// fits holds database, vault, host, kernels and tunnels against each other.
func (s *system) fits(t *testing.T, vms int) {
	r := s.run(t.Context(), "fsck", "--json")
	var f api.Fsck
	if err := json.Unmarshal([]byte(r.stdout), &f); err != nil {
		t.Fatalf("standard output is not one JSON object: %v\n%s%s", err, r.stdout, r.stderr)
	}
	if r.code != 0 || !f.Clean || f.Looked.VMs != vms || f.Looked.Instances != vms || f.Looked.Volumes != vms || f.Looked.Hosts != 1 || f.Looked.Rules == 0 {
		t.Errorf("exit code %d, looked at %+v, findings %+v", r.code, f.Looked, f.Findings)
	}
	t.Logf("in motion: %+v", f.Motion)
}

// end deletes the VM and looks for what could be left of it: rules, QEMU, volume.
func (s *system) end(t *testing.T, c *client.Client, vm api.VM) {
	volumes := s.volumes(t)
	if len(volumes) == 0 {
		t.Error("the provider holds no volume while the VM computes: the check below would show nothing")
	}
	if n := s.machines(t); n != 1 {
		t.Errorf("%d QEMU processes run, want 1", n)
	}
	s.must(t, "vm", "delete", "web", "--yes")
	if left := s.volumes(t); len(left) != 0 {
		t.Errorf("volumes are left: %q", left)
	}
	if n := s.machines(t); n != 0 {
		t.Errorf("%d QEMU processes are left", n)
	}
	deadline := time.Now().Add(10 * time.Second)
	for {
		rules, err := c.Rules(t.Context(), vm.ID)
		if err == nil && len(rules) == 0 || client.IsUnknown(err) {
			break
		}
		if time.Now().After(deadline) {
			t.Errorf("rules are left: %+v, %v", rules, err)
			break
		}
		time.Sleep(200 * time.Millisecond)
	}
	if r := s.fetch(t, lab.Tenant, vm.WorkloadURL); r.code == 0 {
		t.Error("the workload still answers")
	}
	if r := s.run(t.Context(), "vm", "delete", "web", "--yes"); r.code != 3 && r.code != 0 {
		t.Errorf("deleting it again: exit code %d\n%s", r.code, r.stderr)
	}
}

// volumes lists the provider's files of VMs' volumes.
func (s *system) volumes(t *testing.T) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(filepath.Join(s.state, "provider"), func(path string, e os.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() && strings.Contains(path, "volume") {
			found = append(found, path)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// machines counts the QEMU processes of this lab, which alone the lab's places see. The
// pattern does not match its own command line.
func (s *system) machines(t *testing.T) int {
	t.Helper()
	out := s.must(t, "lab", "exec", "--state", s.state, lab.Host, "--", "sh", "-c", "grep -al '^qemu-syste[m]' /proc/[0-9]*/cmdline 2>/dev/null | wc -l")
	n, err := strconv.Atoi(strings.TrimSpace(out))
	if err != nil {
		t.Fatalf("count QEMU processes: %v", err)
	}
	return n
}
