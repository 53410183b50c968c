package orchestrator

import (
	"context"
	"net/http"
	"slices"
	"testing"
	"time"

	"foothold/protocol/agentmsg"
	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/protocol/zone"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// TestStory takes one VM from wish to work and to its end, and looks at rules, phases
// and what is left behind on the way.
func TestStory(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	object := w.putObject([]byte("workload"))
	vm := w.create(api.CreateVM{Name: "web", Workload: &api.Workload{SHA256: object.SHA256, Size: object.Size, Kind: "executable"}})
	id := vm.ID
	g := w.take(id)
	w.waitFlows(id, "external: boot", "boot: boots")

	if why := g.boot(); why != "" {
		t.Fatalf("boot: %s", why)
	}
	g.door()
	if why := g.ready(); why != "" {
		t.Fatalf("ready: %s", why)
	}
	w.waitPhase("web", reservation.Connecting)
	w.waitFlows(id, "external: admission", "external: wireguard")
	if !g.hand.Volume.Format {
		t.Error("the first start does not format the volume")
	}

	if why := g.admit(); why != "" {
		t.Fatalf("admit: %s", why)
	}
	w.waitFlows(id, "external: admission", "external: wireguard", "gateway: peer quarantined=true")
	down, why := g.say()
	if why != "" || !down.Audit || down.Workload != nil {
		t.Fatalf("first message: %s %+v", why, down)
	}
	g.serveWorkload(8080)
	down, why = g.say(g.withAudit)
	if why != "" || down.Workload == nil || down.Workload.SHA256 != object.SHA256 {
		t.Fatalf("second audit: %s %+v", why, down)
	}
	vm = w.wait("web", "ready", func(vm api.VM) bool { return vm.Ready })
	w.waitFlows(id, "external: wireguard", "gateway: peer quarantined=false", "gateway: store",
		"gateway: from-10.80.0.0/24", "internal: from-10.80.0.0/24")
	var names []string
	for _, p := range vm.Phases {
		names = append(names, p.Name)
	}
	if want := []string{"reserved", "booting", "unlocking", "connecting", "computing", "ready"}; !slices.Equal(names, want) {
		t.Errorf("phases: %q", names)
	}
	if len(vm.Components) != 3 || vm.TPMHeld != 0.12 || vm.Creating <= 0 || vm.WorkloadURL != "http://10.84.0.2:8080/" || !vm.Measured {
		t.Errorf("VM: %+v", vm)
	}
	deadline := vm.Deadline
	if _, why := g.say(); why != "" || !w.vm("web").Deadline.After(deadline) {
		t.Errorf("a heartbeat did not renew the lease: %s", why)
	}
	var rules []zone.Live
	w.call("GET", "/v1/vms/web/rules", nil, &rules)
	if len(rules) == 0 {
		t.Error("no live rules are shown")
	}
	w.endStory(g, id)
}

// endStory deletes the VM and looks for what is left.
func (w *world) endStory(g *guest, id string) {
	t := w.t
	var vm api.VM
	if status, p := w.call("DELETE", "/v1/vms/web", nil, &vm); status != http.StatusOK || vm.Phase != "released" || vm.Cleanup != api.CleanupDone {
		t.Fatalf("delete: %d %+v %+v", status, p, vm)
	}
	w.waitFlows(id)
	if w.host.has(id) || w.host.volumes[g.vm.spec.Volume.ID] != 0 {
		t.Error("VM or volume is still at the host")
	}
	if has, _ := w.o.vault.Has(volumeKeyName(g.vm.spec.Volume.ID)); has {
		t.Error("the volume's key is still in the vault")
	}
	if _, why := g.say(); why != event.CertificateRevoked {
		t.Errorf("a message of an ended VM: %s", why)
	}
	if status, p := w.call("GET", "/v1/vms/web", nil, nil); status != http.StatusNotFound || p.Reason != event.UnknownVM {
		t.Errorf("show after delete: %d %+v", status, p)
	}
	if status, _ := w.call("GET", "/v1/vms/"+id, nil, nil); status != http.StatusOK {
		t.Errorf("show by id after delete: %d", status)
	}
	for _, kind := range []string{"vm.reserved", "token.spent", "quote.accepted", "components.delivered", "vm.probed", "audit.passed", "certificate.issued",
		"secrets.released", "tunnel.admitted", "vm.computing", "vm.ready", "vm.released", "vm.erased"} {
		if !slices.Contains(w.events(id), kind) {
			t.Errorf("the journal lacks %s", kind)
		}
	}
	check(t, w.o.ledger.Read(context.Background(), (*ledger.Tx).VerifyJournal))
}

// TestRefusals makes one thing wrong in each act. The VM must end aborted with the
// right reason, gone from the host, without any rule.
func TestRefusals(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config) { c.Limits.VMs = 20; c.Network.Last = c.Network.Last.Next().Next() })
	w.template("debian")
	stranger := w.stranger()
	to := func(acts ...func(*guest) event.Reason) func(*guest) event.Reason {
		return func(g *guest) (why event.Reason) {
			for i, act := range acts {
				if why = act(g); why != "" && i < len(acts)-1 {
					t.Fatalf("act %d: %s", i, why)
				}
			}
			return why
		}
	}
	boot, ready := (*guest).boot, (*guest).ready
	knock := func(g *guest) event.Reason { g.door(); return g.ready() }
	connected := func(g *guest) event.Reason { w.waitPhase(g.id, reservation.Connecting); return "" }
	admit := (*guest).admit
	cases := []struct {
		name  string
		tweak func(*tweaks)
		acts  func(*guest) event.Reason
		said  event.Reason // what the daemon is told
		want  event.Reason // why the VM ended
	}{
		{"T1 from another address", func(x *tweaks) { x.source = stranger.addr }, boot, event.TokenWrongAddress, event.TokenWrongAddress},
		{"another VM's key in the verdict", func(x *tweaks) { x.key = make([]byte, 32) }, boot, event.QuoteRefused, event.QuoteRefused},
		{"another tunnel measured", func(x *tweaks) { x.otherTunnel = true }, boot, event.QuoteRefused, event.QuoteRefused},
		{"other components delivered", func(x *tweaks) { x.delivered = stranger.components }, boot, event.DigestMismatch, event.DigestMismatch},
		{"report signed by another key", func(x *tweaks) { x.signer = stranger.key }, to(boot, ready), event.ReportRefused, event.ReportRefused},
		{"door open to any key", func(x *tweaks) { x.openDoor = true }, to(boot, knock), "", event.ProbeAccepted},
		{"another host key", func(x *tweaks) { x.hostKey = stranger.key }, to(boot, knock), "", event.HostKeyMismatch},
		{"a process too many", func(x *tweaks) { x.process = "/bin/evil" }, to(boot, knock), "", event.AuditFailed},
		{"disk refused", func(x *tweaks) { x.handover = "disk-refused" }, to(boot, knock), "", event.DiskRefused},
		{"handover refused", func(x *tweaks) { x.handover = "handover-failed" }, to(boot, knock), "", event.HandoverFailed},
		{"wrong password", func(x *tweaks) { x.password = "wrong" }, to(boot, knock, connected, admit), event.CredentialsWrong, event.CredentialsWrong},
		{"foreign certificate", func(x *tweaks) { x.cert = certificateOf(t) }, to(boot, knock, connected, admit), event.CertificateInvalid, event.CertificateInvalid},
		{"a process too many in the OS", func(x *tweaks) { x.osProcess = "/bin/evil" }, to(boot, knock, connected, admit, func(g *guest) event.Reason {
			if _, why := g.say(); why != "" {
				return why
			}
			_, why := g.say(g.withAudit)
			return why
		}), event.AuditFailed, event.AuditFailed},
		{"audit withheld", nil, to(boot, knock, connected, admit, func(g *guest) event.Reason {
			if _, why := g.say(); why != "" {
				return why
			}
			_, why := g.say()
			return why
		}), event.AuditFailed, event.AuditFailed},
		{"VM stops by itself", nil, func(g *guest) event.Reason { w.host.stop(g.id, event.LoaderFailed); return "" }, "", event.LoaderFailed},
		// The last one: the host stays as it is.
		{"host runs other software", func(x *tweaks) { x.rogue = true }, boot, event.QuoteRefused, event.QuoteRefused},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			vm := w.create(api.CreateVM{Name: "web"})
			g := w.take(vm.ID)
			if c.tweak != nil {
				c.tweak(&g.tweak)
			}
			var got api.VM
			w.refusedOnce(c.name, "vm.aborted", c.want, func() {
				if said := c.acts(g); said != c.said {
					t.Errorf("the daemon was told %q, want %q", said, c.said)
				}
				got = w.waitPhase(vm.ID, reservation.Aborted)
			})
			if got.Reason != c.want || got.Explanation == "" {
				t.Errorf("ended with %q (%s), want %q", got.Reason, got.Explanation, c.want)
			}
			var e api.Explanation
			w.call("GET", "/v1/vms/"+vm.ID+"/explain", nil, &e)
			if e.Reason != c.want || e.What == "" || e.Next == "" {
				t.Errorf("explanation: %+v", e)
			}
			w.waitGone(vm.ID)
			w.waitFlows(vm.ID)
			if status, _ := w.call("DELETE", "/v1/vms/web", nil, nil); status != http.StatusOK {
				t.Errorf("delete: %d", status)
			}
		})
	}
}

// TestSecondPresentations: none of them harms a VM that has moved on.
func TestSecondPresentations(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	vm := w.create(api.CreateVM{Name: "web"})
	g := w.take(vm.ID)
	if why := g.boot(); why != "" {
		t.Fatal(why)
	}
	g.door()
	if why := g.ready(); why != "" {
		t.Fatal(why)
	}
	w.waitPhase("web", reservation.Connecting)
	if _, why := g.open(g.vm.t1); why != event.TokenSpent {
		t.Errorf("T1 again: %s", why)
	}
	if why := g.ready(); why != event.TokenSpent {
		t.Errorf("T2 again: %s", why)
	}
	if why := g.admit(); why != "" {
		t.Fatal(why)
	}
	if why := g.admit(); why != event.TokenSpent {
		t.Errorf("T3 again: %s", why)
	}
	if got := w.vm("web"); got.Phase != string(reservation.Connecting) {
		t.Errorf("the VM is %s: %s", got.Phase, got.Explanation)
	}
	g.say()
	if _, why := g.say(g.withAudit); why != "" {
		t.Fatal(why)
	}
	w.wait("web", "ready", func(vm api.VM) bool { return vm.Ready })
}

// TestAgentMessages: the same message again is answered again; any other that does not
// answer the last one is refused and ends nothing.
func TestAgentMessages(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	g := w.computing("web")
	before := w.vm("web").Deadline
	for name, change := range map[string]func(*agentmsg.Up){
		"old nonce":     func(u *agentmsg.Up) { u.Nonce = make([]byte, 32) },
		"old number":    func(u *agentmsg.Up) { u.Seq = 1 },
		"another VM":    func(u *agentmsg.Up) { u.Reservation = "00000000-0000-4000-8000-000000000000" },
		"another start": func(u *agentmsg.Up) { u.Start = 2 },
	} {
		if _, why := g.say(change); why != event.ReportRefused {
			t.Errorf("%s: %q", name, why)
		}
	}
	if got := w.vm("web"); got.Phase != "computing" || !got.Deadline.Equal(before) {
		t.Errorf("a refused message changed the VM: %s %v", got.Phase, got.Deadline)
	}
	g.tunnel = g.tunnel.Next()
	if _, why := g.say(); why != event.AdmissionRefused {
		t.Errorf("from another tunnel address: %q", why)
	}
}

// computing takes a VM without workload to computing.
// computing makes a VM that computes, and that stays stopped when it ends.
func (w *world) computing(name string) *guest {
	w.t.Helper()
	g := w.take(w.create(api.CreateVM{Name: name, Restart: string(reservation.Never)}).ID)
	g.pass()
	return g
}

func (g *guest) pass() {
	t := g.w.t
	t.Helper()
	if why := g.boot(); why != "" {
		t.Fatalf("boot: %s", why)
	}
	g.door()
	if why := g.ready(); why != "" {
		t.Fatalf("ready: %s", why)
	}
	g.w.waitPhase(g.id, reservation.Connecting)
	if why := g.admit(); why != "" {
		t.Fatalf("admit: %s", why)
	}
	if _, why := g.say(); why != "" {
		t.Fatalf("first message: %s", why)
	}
	if _, why := g.say(g.withAudit); why != "" {
		t.Fatalf("audit: %s", why)
	}
	g.w.waitPhase(g.id, reservation.Computing)
}

// TestDeadlines: each phase ends by its own limit, with what was awaited.
func TestDeadlines(t *testing.T) {
	const short = 2 * time.Second
	for _, c := range []struct {
		name  string
		limit func(*Limits)
		upTo  func(*world) (id string)
		ends  reservation.Phase
		why   event.Reason
	}{
		{"silent", func(l *Limits) { l.Booting = short }, func(w *world) string {
			return w.create(api.CreateVM{Name: "silent"}).ID
		}, reservation.Aborted, event.DeadlinePassed},
		{"lost", func(l *Limits) { l.Connecting = short }, func(w *world) string {
			g := w.take(w.create(api.CreateVM{Name: "lost"}).ID)
			g.boot()
			g.door()
			g.ready()
			return g.id
		}, reservation.Aborted, event.DeadlinePassed},
		{"mute", func(l *Limits) { l.Lease = 2 * short }, func(w *world) string {
			return w.computing("mute").id
		}, reservation.Stopped, event.HeartbeatMissed},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, func(conf *Config) { c.limit(&conf.Limits) })
			w.template("debian")
			id := c.upTo(w)
			if got := w.waitPhase(id, c.ends); got.Reason != c.why {
				t.Errorf("ended with %q: %s", got.Reason, got.Explanation)
			}
			if c.ends == reservation.Aborted {
				w.waitGone(id)
				w.waitFlows(id)
			}
		})
	}
}

// TestRestart: a restarted orchestrator keeps a computing VM, ends one whose T1 may be
// lost, and still refuses what was spent.
func TestRestart(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	g := w.computing("web")
	booting := w.take(w.create(api.CreateVM{Name: "late", Restart: string(reservation.Never)}).ID)
	w.mu.Lock()
	w.docs = map[string]zone.Document{}
	w.mu.Unlock()
	w.restart()
	if got := w.vm("web"); got.Phase != "computing" {
		t.Fatalf("after a restart: %s %s", got.Phase, got.Explanation)
	}
	if _, why := g.say(); why != "" {
		t.Errorf("heartbeat after a restart: %s", why)
	}
	w.waitFlows(g.id, "external: wireguard", "gateway: peer quarantined=false", "gateway: store")
	if _, why := g.open(g.vm.t1); why != event.TokenSpent {
		t.Errorf("T1 after a restart: %s", why)
	}
	booting.tunnel = booting.tunnel.Next()
	booting.pass()
	w.host.stop(booting.id, "")
	if got := w.waitPhase("late", reservation.Stopped); got.Reason != event.VMStopped {
		t.Errorf("the host's view is not watched after a restart: %s", got.Reason)
	}
}
