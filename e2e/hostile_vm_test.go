//go:build system

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/client"
	"foothold/lab"
	"foothold/lab/control"
	"foothold/lab/ground"
	"foothold/protocol/api"
	"foothold/protocol/event"
)

// This file has VMs that are taken over while they compute, by someone who is root in them,
// and hosts that run something else than was agreed. A template of ender's lets the first in.

// arrivalLimit is how long what must arrive may be under way from inside a VM.
const arrivalLimit = 15 * time.Second

// hostileLimit is how long a VM may take to be ready or ended: its start, and an audit or a
// lease of a minute, on a busy machine beside others.
const hostileLimit = 6 * time.Minute

// TestHostileVMs takes three VMs over while they compute. Of all that is sent from one's
// place on the network, the table's own flows alone arrive. Each is ended: one
// for what runs in it, one for what was changed in it and hidden from the audit, one for
// being silent. Afterwards it is the host that is not right, and a new VM is refused.
func TestHostileVMs(t *testing.T) {
	s := newSystem(t)
	// Three VMs start at once, and no phase's deadline is the matter here.
	s.limits(t, map[string]time.Duration{"booting": hostileLimit, "unlocking": hostileLimit, "connecting": hostileLimit})
	probe := buildProbe(t)
	s.endingTemplate(t, probe, s.module(t))
	c := s.client(t)
	ctx, cancel := context.WithTimeout(t.Context(), hostileLimit)
	defer cancel()
	ender := buildEnder(t)
	names := []string{"changed", "silent", "crowded"}
	for _, name := range names {
		s.must(t, "vm", "create", name, "--template", ending, "--workload", ender, "--restart", "never")
	}
	p := startProbers(t, s, probe)
	vms := map[string]api.VM{}
	for _, name := range names {
		vm, err := c.Wait(ctx, name, nil)
		if err != nil {
			t.Fatalf("%s: %v\n%s", name, err, s.run(t.Context(), "vm", "explain", name).stdout)
		}
		if held := s.held(t, vm); len(held) != 3 {
			t.Fatalf("while %s computes, rules or a peer are in %q alone: the check of its end would show nothing", name, held)
		}
		s.takeOver(t, vm)
		if name == "crowded" {
			t.Run("only the table's traffic leaves it", func(t *testing.T) { s.fromInside(t, p, vm, vms["silent"]) })
			t.Run("services do not know it", func(t *testing.T) { s.strange(t, vm) })
		}
		vms[name] = vm
		s.as(t, vm, map[string]string{"crowded": crowd, "changed": change, "silent": silence}[name], "")
		if name == "changed" { // without a process of its own
			if r := s.fetch(t, lab.Tenant, intruderURL(vm, "leave", nil)); r.code != 0 {
				t.Errorf("the intruder is to leave: %s", r.stderr)
			}
		}
	}
	ended := func(name, phase string, why event.Reason) api.VM {
		t.Helper()
		_, err := c.WaitStart(ctx, name, 2, nil)
		var end *client.Ended
		if !errors.As(err, &end) || end.VM.Phase != phase || end.VM.Reason != why {
			t.Fatalf("%s is to end, %s for %s: %v\n%s", name, phase, why, err, s.run(t.Context(), "vm", "explain", name).stdout)
		}
		s.closed(ctx, t, vms[name])
		return end.VM
	}
	t.Run("what runs in it ends it", func(t *testing.T) {
		found(t, ended("crowded", client.PhaseAborted, event.AuditFailed), map[string]string{
			"process": "perl", "listener": "4444", "module": "dummy", "interface": "dummy0"})
	})
	t.Run("what the bridge dropped of it is journalled", func(t *testing.T) { s.dropped(t, vms["crowded"]) })
	t.Run("what is changed in it ends it", func(t *testing.T) {
		vm := ended("changed", client.PhaseAborted, event.AuditFailed)
		found(t, vm, map[string]string{"user": "mallory", "file": "/etc/ping", "mount": "/proc/modules", "interface": "dummy0"})
		if slices.ContainsFunc(vm.Findings, func(f event.FailedCheck) bool { return f.Check == "process" || f.Check == "module" }) {
			t.Error("its process or module was found: what is hidden is not")
		}
	})
	t.Run("its silence ends it", func(t *testing.T) { ended("silent", client.PhaseStopped, event.HeartbeatMissed) })
	for _, name := range names {
		s.must(t, "vm", "delete", name, "--yes")
	}
	install := s.release(t)
	t.Run("an altered loader and firmware end it", func(t *testing.T) {
		install(map[string]func([]byte) []byte{ground.LoaderInitramfs: padded, ground.BIOS: inFilling})
		s.refused(ctx, t, c, "altered", `file "`+ground.LoaderInitramfs+`"`, `file "`+ground.BIOS+`"`, "PCR 16 holds", "loader initramfs is", "firmware is")
	})
	t.Run("a host agent that alters its settings ends it", func(t *testing.T) {
		agent := otherAgent(t)
		install(map[string]func([]byte) []byte{ground.Agent: func([]byte) []byte { return agent }})
		s.refused(ctx, t, c, "misled", `file "`+ground.Agent+`"`, "neither the host's log nor its claims lead to them")
	})
	t.Run("what was agreed is accepted again", func(t *testing.T) {
		install(nil)
		s.asAgreed(t)
	})
	t.Run("a gateway that is another server ends it", func(t *testing.T) { s.falseGateway(ctx, t, c) })
	s.must(t, "fsck")
}

// falseGateway answers VMs with the store's certificate, of the right authority. The VM, which
// has its disks open by then, tells nobody its credentials; why it ended comes from its host.
func (s *system) falseGateway(ctx context.Context, t *testing.T, c *client.Client) {
	place := func(server, kind string) string { return filepath.Join(s.state, "dmz", server, server+kind) }
	var own [2][]byte
	put := func(kind string, data []byte) {
		if err := os.WriteFile(place("gateway", kind), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	kinds := []string{".crt", ".key"}
	for i, kind := range kinds {
		stores, err := os.ReadFile(place("store", kind))
		if err != nil {
			t.Fatal(err)
		}
		if own[i], err = os.ReadFile(place("gateway", kind)); err != nil {
			t.Fatal(err)
		}
		put(kind, stores)
	}
	s.killMatching(t, victims["gateway"])
	defer s.killMatching(t, victims["gateway"])
	defer func() {
		for i, kind := range kinds {
			put(kind, own[i])
		}
	}()
	s.must(t, "vm", "create", "lured", "--restart", "never")
	vm, err := c.Wait(ctx, "lured", nil)
	var ended *client.Ended
	if !errors.As(err, &ended) || vm.Phase != client.PhaseAborted || vm.Reason != event.ServerUntrusted {
		t.Fatalf("it is %s for %q: %v\n%s%s", vm.Phase, vm.Reason, err, s.run(t.Context(), "vm", "explain", "lured").stdout, s.run(t.Context(), "vm", "logs", "lured").stdout)
	}
	if out := s.must(t, "vm", "explain", "lured"); !strings.Contains(out, "the VM's agent gave up") {
		t.Errorf("vm explain does not say who gave up:\n%s", out)
	}
	handed := false
	err = c.Events(ctx, client.EventQuery{VM: "lured"}, func(e api.JournalEntry) error {
		handed = handed || e.Event.Kind == "secrets.handed-over"
		return nil
	})
	if err != nil || !handed {
		t.Errorf("it was not unlocked, so it did not come to the gateway (%v)", err)
	}
	s.gone(t, c, "lured")
}

// What root does in the VMs.
const (
	load = `perl -e 'open M, "<", "/usr/lib/ender/dummy.ko" or die $!; syscall(313, fileno(M), my $none = "", 0) and die $!' # finit_module
grep -q '^dummy ' /proc/modules
`
	crowd = load + `perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalPort => 4444, Listen => 1) or die $!; print "listens\n"; close STDOUT; sleep' >/run/says 2>&1 </dev/null &
until grep listens /run/says; do sleep 0.1; done
`
	// The audit is to read the list of modules as it was before.
	change = `cp /proc/modules /run/modules
` + load + `mount --bind /run/modules /proc/modules
echo 'mallory:x:0:0::/root:/bin/sh' >>/etc/passwd
cp /usr/bin/dash /etc/ping && chmod 4755 /etc/ping
`
	silence = `for p in /proc/[0-9]*; do
	if grep -qz '^foothold-agent' $p/cmdline; then kill -STOP ${p#/proc/} && echo stopped; fi
done 2>&1 | grep stopped
`
)

// module is a kernel module that no template expects, of the kernel that VMs run.
func (s *system) module(t *testing.T) string {
	t.Helper()
	const pattern = "cache/kernel/*/lib/modules/*/kernel/drivers/net/dummy.ko"
	list, err := filepath.Glob(filepath.Join(s.build, pattern))
	if err != nil || len(list) != 1 {
		t.Fatalf("%d files %s, %v; want one kernel's", len(list), pattern, err)
	}
	return list[0]
}

// takeOver has the VM's workload end, and an intruder run as root in its place.
func (s *system) takeOver(t *testing.T, vm api.VM) {
	t.Helper()
	s.endInside(t, vm, "intruder")
	for end := time.Now().Add(arrivalLimit); ; {
		r := s.fetch(t, lab.Tenant, intruderURL(vm, "run", url.Values{"do": {"id -u"}}))
		if strings.TrimSpace(r.stdout) == "0" {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("nobody is root in %s: exit code %d\n%s%s", vm.Name, r.code, r.stdout, r.stderr)
		}
	}
}

func intruderURL(vm api.VM, path string, query url.Values) string {
	return strings.TrimSuffix(vm.WorkloadURL, "/") + "/" + path + "?" + query.Encode()
}

// as runs a script as root in the VM.
func (s *system) as(t *testing.T, vm api.VM, script, in string) string {
	t.Helper()
	r := s.fetch(t, lab.Tenant, intruderURL(vm, "run", url.Values{"do": {script}, "in": {in}}))
	if r.code != 0 {
		t.Fatalf("root in %s: %s\nexit code %d: %s%s", vm.Name, script, r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// fromInside sends, from the VM's own place on the network and through its tunnel, what it
// may and may not, under its own and others' addresses.
func (s *system) fromInside(t *testing.T, p *probers, vm, other api.VM) {
	macs := addresses{p.byPlace[lab.Neighbour].interfaces["vpc0"], p.byPlace[lab.Gateway].interfaces["dmz0"]}
	iface := strings.TrimSpace(s.as(t, vm, "basename $(dirname $(grep -l '"+vm.MAC+"' /sys/class/net/*/address))", ""))
	list := insideAttempts(iface, vm, other)
	arrived := map[string]bool{}
	for _, a := range p.fireInside(t, other, macs, list, func(in string) string { return s.as(t, vm, "/usr/lib/ender/probe", in) }) {
		arrived[a.String()] = true
		if !a.allowed([]string{computing}) {
			t.Errorf("it passed: %s", a)
		}
	}
	t.Logf("%d attempts, arrived: %s", len(list), strings.Join(keys(arrived), "; "))
	for _, a := range list {
		if a.allowed([]string{computing}) && !arrived[a.String()] {
			t.Errorf("never arrived: %s", a)
		}
	}
}

// dropped waits for the journal's entry of frames that went no further than the bridge, as
// others' and to the neighbour.
func (s *system) dropped(t *testing.T, vm api.VM) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); ; time.Sleep(time.Second) {
		out := s.must(t, "events", "--vm", vm.Name, "--json")
		for lines := bufio.NewScanner(strings.NewReader(out)); lines.Scan(); {
			var e api.JournalEntry
			if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
				t.Fatalf("%v\n%s", err, lines.Text())
			}
			d := e.Event.Detail
			if e.Event.Kind == "bridge.dropped" && e.Event.Reason == event.TrafficRefused && d["other-source"] != "0" && d["neighbour"] != "0" {
				t.Logf("%v", d)
				return
			}
		}
		if time.Now().After(end) {
			t.Fatalf("nobody tells of it:\n%s", out)
		}
	}
}

// insideAttempts are what root sends from a computing VM; other is a second one.
func insideAttempts(iface string, vm, other api.VM) []attempt {
	var list []attempt
	all := func(a attempt, receivers ...string) {
		for _, to := range receivers {
			for _, p := range ports[to] {
				b := a
				b.to, b.proto, b.dport, b.sport = to, p.proto, p.port, sourcePort
				list = append(list, b)
			}
		}
	}
	at := func(mac string, src netip.Addr) *forged { return &forged{iface: iface, mac: mac, src: src} }
	firewalled := []string{"bootserver", "gateway", "store", "tenant", "intranet", "host"}
	all(attempt{from: "vm", how: "as itself", forged: at(vm.MAC, vm.Address)}, firewalled...)
	never := attempt{from: "vm", never: true}
	for _, lie := range []struct {
		how string
		as  *forged
	}{
		{"as another VM's address", at(vm.MAC, other.Address)},
		{"as another VM's MAC", at(other.MAC, vm.Address)},
		{"as another VM", at(other.MAC, other.Address)},
		{"as a stranger's MAC", at(strangerMAC, vm.Address)},
		{"as its own tunnel address", at(vm.MAC, vm.TunnelAddress)},
		{"as the tenant", at(vm.MAC, lab.Address(lab.Tenant, lab.TenantLAN))},
		{"as the boot server", at(vm.MAC, lab.Address(lab.BootServer, lab.DMZLAN))},
	} {
		never.how, never.forged = lie.how, lie.as
		all(never, firewalled...)
	}
	never.how, never.forged = "on the segment", at(vm.MAC, vm.Address)
	all(never, "neighbour", "vm")
	never.how, never.forged = "on the segment, as the gateway", at(vm.MAC, lab.Address(lab.Gateway, lab.DMZLAN))
	all(never, "neighbour", "vm")

	tunnelled := []string{"tenant", "intranet", "host", "bootserver"}
	all(attempt{from: "tunnel", how: "through its tunnel", forged: &forged{src: vm.TunnelAddress}}, tunnelled...)
	never.from, never.how, never.forged = "tunnel", "through its tunnel, as another's address", &forged{src: vm.TunnelAddress.Next()}
	all(never, tunnelled...)
	// Its own filter lets no ICMP into the tunnel: that would show nothing of what is behind it.
	return slices.DeleteFunc(list, func(a attempt) bool { return a.from == "tunnel" && a.proto == "icmp" })
}

// fireInside has the VM send all attempts, waits for those that must arrive, and returns
// which arrived at their receiver, of which one that is a VM is other.
func (p *probers) fireInside(t *testing.T, other api.VM, macs addresses, list []attempt, send func(string) string) []attempt {
	t.Helper()
	p.round++
	next := map[string]string{"neighbour": macs.neighbour, "vm": other.MAC}
	var probes []probe
	want := 0
	for i, a := range list {
		pr := probe{ID: i, Proto: a.proto, Sport: a.sport, Dport: a.dport, Src: a.forged.src, Dst: receiver(a.to, other)}
		if a.forged.iface != "" {
			pr.Interface, pr.SrcMAC, pr.DstMAC = a.forged.iface, a.forged.mac, p.byPlace[lab.External].interfaces[lab.CloudInterface]
			if mac := next[a.to]; mac != "" {
				pr.DstMAC = mac
			}
		}
		probes = append(probes, pr)
		if a.allowed([]string{computing}) {
			want++
		}
	}
	command, err := json.Marshal(map[string]any{"round": p.round, "probes": probes})
	if err != nil {
		t.Fatal(err)
	}
	said := send(string(command))
	sent := false
	for lines := bufio.NewScanner(strings.NewReader(said)); lines.Scan(); {
		var m probeMessage
		if json.Unmarshal(lines.Bytes(), &m) == nil && m.Sent == p.round {
			sent = len(m.Failed) == 0
		}
	}
	if !sent {
		t.Fatalf("the VM did not send everything:\n%s", said)
	}
	for end := time.Now().Add(arrivalLimit); p.permitted(list) < want && time.Now().Before(end); {
		time.Sleep(20 * time.Millisecond)
	}
	time.Sleep(settle)
	return p.collect(list)
}

// permitted counts what has arrived so far of what the table lets pass while computing.
func (p *probers) permitted(list []attempt) int {
	p.mu.Lock()
	defer p.mu.Unlock()
	seen := map[int]bool{}
	for _, a := range p.arrivals {
		if a.Round == p.round && a.Probe < len(list) && list[a.Probe].allowed([]string{computing}) && arrivesAt(list[a.Probe].to, a) {
			seen[a.Probe] = true
		}
	}
	return len(seen)
}

// strange calls the services that the VM's tunnel leads to, with a certificate of its own making.
func (s *system) strange(t *testing.T, vm api.VM) {
	for name, at := range map[string]netip.AddrPort{
		"the agents' relay": netip.AddrPortFrom(lab.TunnelGateway, 8443), "the store": netip.AddrPortFrom(lab.Address(lab.Store, lab.DMZLAN), 8443),
	} {
		r := s.fetch(t, lab.Tenant, intruderURL(vm, "call", url.Values{"to": {at.String()}}))
		if r.code != 0 || !strings.Contains(r.stdout, "sent away") || !strings.Contains(r.stdout, "tls:") {
			t.Errorf("%s: exit code %d\n%s%s", name, r.code, r.stdout, r.stderr)
		}
	}
}

// closed waits until nothing of a VM that has ended is in a kernel, which its end does not
// wait for, and calls its intruder.
func (s *system) closed(ctx context.Context, t *testing.T, vm api.VM) {
	t.Helper()
	for held := s.held(t, vm); len(held) != 0; held = s.held(t, vm) {
		if ctx.Err() != nil {
			t.Fatalf("%s has ended, and is still in %q", vm.Name, held)
		}
	}
	if r := s.tryFetch(t, intruderURL(vm, "run", url.Values{"do": {"true"}})); r.code == 0 {
		t.Errorf("%s has ended, and its intruder still answers", vm.Name)
	}
}

// found checks that a VM's audit found these things, each by its name.
func found(t *testing.T, vm api.VM, want map[string]string) {
	t.Helper()
	for check, what := range want {
		if !slices.ContainsFunc(vm.Findings, func(f event.FailedCheck) bool { return f.Check == check && strings.Contains(f.Seen, what) }) {
			t.Errorf("no finding of %s %q", check, what)
		}
	}
	for _, f := range vm.Findings {
		t.Logf("%s", f)
	}
}

// release keeps the host's installed release, and returns what installs it with changes, by
// file, and boots the host anew.
func (s *system) release(t *testing.T) func(changes map[string]func([]byte) []byte) {
	dir := ground.ReleaseDir(lab.State{Dir: s.state})
	good := map[string][]byte{}
	for _, name := range ground.PlatformFiles() {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		good[name] = data
	}
	return func(changes map[string]func([]byte) []byte) {
		t.Helper()
		for name, data := range good {
			if change := changes[name]; change != nil {
				data = change(bytes.Clone(data))
				if bytes.Equal(data, good[name]) {
					t.Fatalf("%s is not changed", name)
				}
			}
			if err := os.WriteFile(filepath.Join(dir, name), data, 0o700); err != nil {
				t.Fatal(err)
			}
		}
		s.bootHost(t)
	}
}

// bootHost boots the host anew, which measures what is installed, and waits until it serves.
func (s *system) bootHost(t *testing.T) {
	t.Helper()
	former := s.agent(t).PID
	s.killMatching(t, victims["swtpm"])
	for end := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		d := s.agent(t)
		if d.State == control.Serving && d.PID != former {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("the host does not serve: %+v", d)
		}
	}
}

// agent is the host's agent, as the lab sees it.
func (s *system) agent(t *testing.T) control.Daemon {
	t.Helper()
	var st control.Status
	if err := json.Unmarshal([]byte(s.must(t, "lab", "status", "--json", "--state", s.state)), &st); err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(st.Daemons, func(d control.Daemon) bool { return d.Name == "host" })
	if i < 0 {
		t.Fatalf("the lab has no host: %+v", st)
	}
	return st.Daemons[i]
}

// padded is an initramfs whose kernel sees no difference.
func padded(image []byte) []byte { return append(image, make([]byte, 512)...) }

// inFilling changes a byte of a firmware's image that nothing reads: it boots as before.
func inFilling(image []byte) []byte {
	filling := make([]byte, 1<<10)
	if i := bytes.Index(image, filling); i >= 0 {
		image[i+len(filling)/2] = 1
	}
	return image
}

// otherAgent builds a host agent that runs VMs with other settings than it was asked for and
// says of them that they are those.
func otherAgent(t *testing.T) []byte {
	t.Helper()
	dir := t.TempDir()
	file, err := filepath.Abs("../provider/host/vm.go")
	if err != nil {
		t.Fatal(err)
	}
	source, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	text := string(source) + "\nfunc altered(s vmspec.Spec) vmspec.Spec { s.Network.MTU -= 20; return s }\n"
	for old, other := range map[string]string{
		"tenant: tenant, spec: spec,":                 "tenant: tenant, spec: altered(spec),",
		"if back.Digest() != v.describe().Settings {": "if back.Digest() != v.spec.Digest() {",
	} {
		if strings.Count(text, old) != 1 {
			t.Fatalf("%s does not have one %q", file, old)
		}
		text = strings.Replace(text, old, other, 1)
	}
	changed, overlay, program := filepath.Join(dir, "vm.go"), filepath.Join(dir, "overlay.json"), filepath.Join(dir, "agent")
	if err := os.WriteFile(changed, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(map[string]map[string]string{"Replace": {file: changed}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(overlay, data, 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-overlay", overlay, "-o", program, "foothold/cmd/foothold-host")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build another agent: %v\n%s", err, out)
	}
	agent, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	return agent
}

// refused creates a VM that is ended for its quote, whose findings name and say these, and
// that got nothing.
func (s *system) refused(ctx context.Context, t *testing.T, c *client.Client, name string, says ...string) {
	t.Helper()
	s.must(t, "vm", "create", name, "--restart", "never")
	vm, err := c.Wait(ctx, name, nil)
	var ended *client.Ended
	if !errors.As(err, &ended) || vm.Phase != client.PhaseAborted || vm.Reason != event.QuoteRefused {
		t.Fatalf("it is %s for %q: %v\n%s", vm.Phase, vm.Reason, err, s.run(t.Context(), "vm", "explain", name).stdout)
	}
	for _, f := range vm.Findings {
		t.Logf("%s: %s", f.Component, f)
	}
	for _, want := range says {
		if !slices.ContainsFunc(vm.Findings, func(f event.FailedCheck) bool { return strings.Contains(f.Component+" "+f.Detail, want) }) {
			t.Errorf("no finding names or says %s", want)
		}
	}
	err = c.Events(ctx, client.EventQuery{VM: name}, func(e api.JournalEntry) error {
		if slices.Contains([]string{"quote.accepted", "components.released", "components.delivered"}, e.Event.Kind) {
			t.Errorf("the journal has %s", e.Event.Kind)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	s.gone(t, c, name)
}
