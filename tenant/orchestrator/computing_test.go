package orchestrator

import (
	"testing"
	"time"

	"foothold/protocol/agentmsg"
	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/tenant/reservation"
)

// TestHostChangesAfterBoot: a host that starts other software after the VM's boot was
// attested gets neither disk keys nor a tunnel for it.
func TestHostChangesAfterBoot(t *testing.T) {
	for name, act := range map[string]func(*testing.T, *world, *guest){
		"before unlock": func(_ *testing.T, w *world, g *guest) {
			w.host.measureRogue()
			g.door()
			g.ready()
		},
		"before connect": func(t *testing.T, w *world, g *guest) {
			g.door()
			if why := g.ready(); why != "" {
				t.Fatalf("ready: %s", why)
			}
			w.waitPhase(g.id, reservation.Connecting)
			w.host.measureRogue()
			if why := g.admit(); why != event.QuoteRefused {
				t.Errorf("the gateway was told %q, want %q", why, event.QuoteRefused)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.template("debian")
			g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
			if why := g.boot(); why != "" {
				t.Fatalf("boot: %s", why)
			}
			act(t, w, g)
			if vm := w.waitPhase(g.id, reservation.Aborted); vm.Reason != event.QuoteRefused {
				t.Errorf("ended with %q (%s), want %q", vm.Reason, vm.Explanation, event.QuoteRefused)
			}
			if name == "before unlock" && len(g.hand.Certificate) != 0 {
				t.Error("the VM was handed secrets")
			}
			w.waitGone(g.id)
			w.waitFlows(g.id)
		})
	}
}

// TestHostChangesWhileComputing: the host is quoted again and again; the first quote
// that shows other software ends the VM, its tunnel and its rules.
func TestHostChangesWhileComputing(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	w.watchEvery = 300 * time.Millisecond
	w.restart()
	g := w.computing("web")
	accepted := func() (n int) {
		for _, kind := range w.events(g.id) {
			if kind == "quote.accepted" {
				n++
			}
		}
		return n
	}
	w.wait("web", "quoted while computing", func(api.VM) bool { return accepted() > 3 }) // boot, unlock, connect
	w.host.measureRogue()
	if vm := w.waitPhase(g.id, reservation.Aborted); vm.Reason != event.QuoteRefused {
		t.Errorf("ended with %q (%s), want %q", vm.Reason, vm.Explanation, event.QuoteRefused)
	}
	w.waitGone(g.id)
	w.waitFlows(g.id)
}

// TestWorkloadThatEnds: a VM whose workload ends after its first answer goes on, is no
// longer ready, and says why; whatever its end looks like to the VM, and whatever becomes of
// the orchestrator meanwhile.
func TestWorkloadThatEnds(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	object := w.putObject([]byte("workload"))
	g := w.take(w.create(api.CreateVM{Name: "web", Workload: &api.Workload{SHA256: object.SHA256, Size: object.Size, Kind: "executable"}}).ID)
	g.serveWorkload(8080)
	g.pass()
	w.wait("web", "ready", func(vm api.VM) bool { return vm.Ready })
	for _, state := range []string{"failed", "exited", "running", "exited"} {
		if _, why := g.say(func(u *agentmsg.Up) {
			u.Workload = &agentmsg.Status{SHA256: object.SHA256, State: state, Detail: "exit code 1"}
		}); why != "" {
			t.Fatalf("%s: the VM was told %s", state, why)
		}
	}
	w.workloadLimit = probePause
	w.restart()
	check(t, pause(t.Context(), 4*probePause))
	if vm := w.vm("web"); vm.Phase != "computing" || vm.Ready || vm.Reason != event.WorkloadFailed || vm.Explanation == "" {
		t.Errorf("VM %+v", vm)
	}
	var e api.Explanation
	w.call("GET", "/v1/vms/web/explain", nil, &e)
	if e.Reason != event.WorkloadFailed || e.What != event.Explain(event.WorkloadFailed).Cause || e.Next == "" {
		t.Errorf("explanation %+v", e)
	}
}

// TestWorkloadThatAnswersAsItIsHeard: a message says that the workload ended, and between its
// arrival and its effect the workload has answered: that ends no VM.
func TestWorkloadThatAnswersAsItIsHeard(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	object := w.putObject([]byte("workload"))
	g := w.take(w.create(api.CreateVM{Name: "web", Workload: &api.Workload{SHA256: object.SHA256, Size: object.Size, Kind: "executable"}}).ID)
	g.pass()
	r, before, err := w.o.row(t.Context(), g.id)
	check(t, err)
	if !before.Ready.IsZero() {
		t.Fatal("the workload has answered already: the rest would show nothing")
	}
	check(t, w.o.ready(t.Context(), r))
	m := accepted{r: r, s: before, up: agentmsg.Up{Workload: &agentmsg.Status{SHA256: object.SHA256, State: workloadExited}}}
	if err := w.o.hearWorkload(t.Context(), m); err != nil {
		t.Errorf("it answered, and ends its VM: %v", err)
	}
	if _, s, err := w.o.row(t.Context(), g.id); err != nil || !s.Answered || !s.Ready.IsZero() {
		t.Errorf("%+v, %v", s, err)
	}
}
