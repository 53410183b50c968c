package orchestrator

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/internal/luks"
	"foothold/internal/secret"
	"foothold/protocol/agentmsg"
	"foothold/protocol/api"
	"foothold/protocol/bootmsg"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// ask makes an operator's call on a VM.
func (w *world) ask(what, name string) (vm api.VM) {
	w.t.Helper()
	if status, p := w.call("POST", "/v1/vms/"+name+"/"+what, nil, &vm); status != http.StatusOK {
		w.t.Fatalf("%s %s: %d %+v", what, name, status, p)
	}
	return vm
}

// passphrases of both disks, which the handover's reader would wipe.
func (g *guest) passphrases() (template, volume secret.Bytes) {
	return secret.New(bytes.Clone(g.hand.Template.Passphrase.Reveal())), secret.New(bytes.Clone(g.hand.Volume.Passphrase.Reveal()))
}

// TestRestartByWish: the VM is told through its tunnel, and its next start has nothing of
// the last but its volume.
func TestRestartByWish(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	old := w.computing("web")
	if vm := w.ask("restart", "web"); vm.Wish != "restart" || vm.Phase != string(reservation.Computing) {
		t.Errorf("asked: %+v", vm)
	}
	if down, why := old.say(); why != "" || !down.Stop {
		t.Fatalf("the VM is told %+v, %s", down, why)
	}
	w.host.stop(old.id, event.GuestPoweredOff)
	g := w.takeStart(old.id, 2)
	if g.vm.t1.Digest() == old.vm.t1.Digest() || g.vm.spec.Volume != old.vm.spec.Volume || g.vm.spec.Network != old.vm.spec.Network {
		t.Errorf("the next start's settings: %+v", g.vm.spec)
	}
	g.tunnel = g.tunnel.Next()
	g.pass()
	if _, why := g.open(old.vm.t1); why != event.TokenSpent {
		t.Errorf("the old T1: %q", why)
	}
	if g.hand.Volume.Format || !old.hand.Volume.Format {
		t.Error("the volume is formatted again, or was not at first")
	}
	if bytes.Equal(g.hand.Volume.Header, old.hand.Volume.Header) || bytes.Equal(g.unique.AuthorizedKey, old.unique.AuthorizedKey) || g.serial() == old.serial() ||
		g.hand.T3.Digest() == old.hand.T3.Digest() || g.unique.T2.Digest() == old.unique.T2.Digest() || g.hand.User == old.hand.User {
		t.Error("the next start has something of the last")
	}
	_, oldPass := old.passphrases()
	_, newPass := g.passphrases()
	if _, err := luks.Unlock(g.hand.Volume.Header, oldPass); err == nil {
		t.Error("the old passphrase opens the new header")
	}
	oldKey, err := luks.Unlock(old.hand.Volume.Header, oldPass)
	check(t, err)
	newKey, err := luks.Unlock(g.hand.Volume.Header, newPass)
	if check(t, err); !oldKey.Equal(newKey) {
		t.Error("the volume has another key: its data is lost")
	}
	if _, why := old.say(); why != event.CertificateInvalid {
		t.Errorf("the old start still speaks: %q", why)
	}
	check(t, w.o.ledger.Read(t.Context(), func(tx *ledger.Tx) error {
		if err := tx.CheckCertificate(old.serial(), nil, old.id, 1); event.ReasonOf(err) != event.CertificateRevoked {
			t.Errorf("the old certificate: %v", err)
		}
		return nil
	}))
	if vm := w.vm("web"); vm.Start != 2 || vm.Restarts != 0 || vm.Wish != "" || vm.Reason != "" {
		t.Errorf("afterwards: %+v", vm)
	}
	kinds := w.events("web")
	for _, want := range []string{"vm.restart-asked", "vm.stopped", "vm.gone", "vm.create-asked"} {
		if !slices.Contains(kinds, want) {
			t.Errorf("the journal lacks %s: %q", want, kinds)
		}
	}
}

// TestRestartByPolicy: what follows when a VM ends and nobody asked it to.
func TestRestartByPolicy(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	for _, c := range []struct {
		policy reservation.Restart
		why    event.Reason
		again  bool
	}{
		{reservation.Always, event.GuestPoweredOff, true},
		{reservation.OnFailure, event.GuestReset, true},
		{reservation.OnFailure, event.GuestCrashed, true},
		{reservation.OnFailure, event.VMStopped, true},
		{reservation.OnFailure, event.GuestPoweredOff, false},
		{reservation.Never, event.VMStopped, false},
		{reservation.Never, event.GuestReset, false},
		{reservation.Never, event.GuestCrashed, false},
	} {
		g := w.take(w.create(api.CreateVM{Name: "web", Restart: string(c.policy)}).ID)
		g.pass()
		w.host.stop(g.id, c.why)
		if c.again {
			w.takeStart(g.id, 2)
			if vm := w.vm("web"); vm.Restarts != 1 {
				t.Errorf("%s after %s: %d restarts", c.policy, c.why, vm.Restarts)
			}
		} else {
			vm := w.waitPhase("web", reservation.Stopped)
			if vm.Reason != c.why || !vm.NextStart.IsZero() {
				t.Errorf("%s after %s: %+v", c.policy, c.why, vm)
			}
			w.waitFlows(g.id)
			w.waitGone(g.id)
		}
		if status, p := w.call("DELETE", "/v1/vms/web", nil, nil); status != http.StatusOK {
			t.Fatalf("delete: %d %+v", status, p)
		}
		if has, _ := w.o.vault.Has(volumeKeyName(g.vm.spec.Volume.ID)); has {
			t.Error("the volume's key outlives the VM")
		}
	}
	if status, p := w.call("POST", "/v1/vms", []byte(`{"name":"x","restart":"sometimes"}`), nil); p.Reason != event.BadRequest {
		t.Errorf("an unknown policy: %d %+v", status, p)
	}
}

// TestRestartsBackOff: a VM that does not come to compute again is tried less and less.
func TestRestartsBackOff(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
	g.pass()
	for start := 2; start <= 3; start++ {
		ended := time.Now()
		w.host.stop(g.id, event.VMStopped)
		vm := w.wait("web", "stopped or further", func(vm api.VM) bool { return vm.Start == start || vm.Phase == string(reservation.Stopped) })
		if want := reservation.Backoff(start - 2); vm.Phase == string(reservation.Stopped) && vm.NextStart.Sub(ended) < want {
			t.Errorf("start %d is due after %v, want %v or more", start, vm.NextStart.Sub(ended), want)
		}
		w.takeStart(g.id, start)
		if vm := w.vm("web"); vm.Restarts != start-1 {
			t.Errorf("start %d: %d restarts in a row", start, vm.Restarts)
		}
	}
}

// TestNeverTwoInstances: no start begins before the host has confirmed that the last
// instance is gone.
func TestNeverTwoInstances(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	g := w.computing("web")
	w.host.mu.Lock()
	w.host.undead = true
	w.host.mu.Unlock()
	w.ask("restart", "web")
	if down, why := g.say(); why != "" || !down.Stop {
		t.Fatalf("the VM is told %+v, %s", down, why)
	}
	w.host.stop(g.id, event.GuestPoweredOff)
	w.waitPhase("web", reservation.Stopped)
	check(t, pause(t.Context(), 3*sweepEvery)) // the start is due all the while
	if vm := w.ask("start", "web"); vm.Phase != string(reservation.Stopped) || vm.Cleanup != api.CleanupPending {
		t.Errorf("with the old instance there: %+v", vm)
	}
	if e := w.explained("web"); e.Awaited != "the host to confirm that its last instance is gone" {
		t.Errorf("awaited: %q", e.Awaited)
	}
	w.host.mu.Lock()
	w.host.undead = false
	w.host.mu.Unlock()
	w.ask("start", "web") // asks the host again at once
	w.takeStart(g.id, 2)
}

func (w *world) explained(name string) (e api.Explanation) {
	w.t.Helper()
	if status, p := w.call("GET", "/v1/vms/"+name+"/explain", nil, &e); status != http.StatusOK {
		w.t.Fatalf("explain: %d %+v", status, p)
	}
	return e
}

// TestStopAndStart: a VM may be stopped in any phase and started again; its volume is
// formatted by order only as long as nothing was handed over.
func TestStopAndStart(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	g := w.take(w.create(api.CreateVM{Name: "web", Restart: string(reservation.Always)}).ID)
	if vm := w.ask("stop", "web"); vm.Phase != string(reservation.Stopped) || vm.Reason != event.StopAsked || !vm.NextStart.IsZero() {
		t.Fatalf("stopped while booting: %+v", vm)
	}
	w.waitGone(g.id)
	if e := w.explained("web"); e.Next != "foothold vm start web" {
		t.Errorf("next: %q", e.Next)
	}
	if why := g.boot(); why != event.TokenExpired {
		t.Errorf("T1 of the stopped start: %q", why)
	}
	w.ask("start", "web")
	g = w.takeStart(g.id, 2)
	w.ask("start", "web") // changes nothing
	g.pass()
	if !g.hand.Volume.Format {
		t.Error("the volume that was never handed over is not formatted")
	}
	w.ask("stop", "web")
	w.host.stop(g.id, event.VMStopped) // it crashes instead of stopping
	if vm := w.waitPhase("web", reservation.Stopped); vm.Reason != event.StopAsked || !vm.NextStart.IsZero() {
		t.Errorf("a VM that was to stop, and crashed: %+v", vm)
	}
	w.restart() // a stopped VM outlives the orchestrator
	w.ask("restart", "web")
	g = w.takeStart(g.id, 3)
	g.tunnel = g.tunnel.Next()
	g.pass()
	if status, p := w.call("POST", "/v1/vms/none/stop", nil, nil); status != http.StatusNotFound {
		t.Errorf("stop of no VM: %d %+v", status, p)
	}
	w.call("DELETE", "/v1/vms/web", nil, nil)
	if status, p := w.call("POST", "/v1/vms/"+g.id+"/start", nil, nil); status != http.StatusConflict || p.Reason != event.WrongPhase {
		t.Errorf("start of a deleted VM: %d %+v", status, p)
	}
}

// TestAFurtherStartIsHeldToTheSame: what is not as it must be ends the VM in its second
// start as in its first, whatever its policy.
func TestAFurtherStartIsHeldToTheSame(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	g := w.take(w.create(api.CreateVM{Name: "web", Restart: string(reservation.Always)}).ID)
	g.pass()
	w.host.stop(g.id, event.VMStopped)
	g = w.takeStart(g.id, 2)
	g.tweak.process = "/bin/evil"
	g.boot()
	g.door()
	g.ready()
	if vm := w.waitPhase("web", reservation.Aborted); vm.Reason != event.AuditFailed {
		t.Errorf("ended with %q", vm.Reason)
	}
	w.waitGone(g.id)
	if has, err := w.o.vault.Has(volumeKeyName(g.vm.spec.Volume.ID)); err != nil || !has {
		t.Errorf("its volume's key is gone without a wish: %v", err)
	}
}

// TestStartThatCannotBegin: a host that refuses the next start is asked again later, and
// a volume without its key is not started at all.
func TestStartThatCannotBegin(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
	g.pass()
	w.host.failing("POST /v1/vms", 1)
	w.host.stop(g.id, event.VMStopped)
	w.takeStart(g.id, 3) // start 2 had begun when the host refused it
	check(t, w.o.vault.Destroy(volumeKeyName(g.vm.spec.Volume.ID)))
	w.host.stop(g.id, event.VMStopped)
	vm := w.wait("web", "put off", func(vm api.VM) bool {
		return vm.Phase == string(reservation.Stopped) && vm.Reason == event.InternalError
	})
	if vm.Start != 3 {
		t.Errorf("start %d began without the volume's key", vm.Start)
	}
	if r, _, err := w.o.row(context.Background(), g.id); err != nil || !r.Formatted {
		t.Errorf("%+v, %v", r, err)
	}
}

// TestAnotherWorkload: a computing VM gets another workload without another start. Until
// it runs the new one the old one is no surplus; one that nobody asked for always is.
func TestAnotherWorkload(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	one, two := w.putObject([]byte("workload one")), w.putObject([]byte("workload two"))
	work := func(c bootmsg.Component, port int) *api.Workload {
		return &api.Workload{SHA256: c.SHA256, Size: c.Size, Kind: "executable", Port: port}
	}
	g := w.take(w.create(api.CreateVM{Name: "web", Workload: work(one, 8080)}).ID)
	g.pass()
	runs := func(c bootmsg.Component, state string) func(*agentmsg.Up) {
		return func(up *agentmsg.Up) { up.Workload = &agentmsg.Status{SHA256: c.SHA256, State: state} }
	}
	g.serveWorkload(8080)
	if _, why := g.say(runs(one, "running")); why != "" {
		t.Fatal(why)
	}
	w.wait("web", "ready", func(vm api.VM) bool { return vm.Ready })

	set := func(name string, body *api.Workload) (api.VM, int, api.Problem) {
		var vm api.VM
		status, p := w.call("PUT", "/v1/vms/"+name+"/workload", must[[]byte](t)(json.Marshal(body)), &vm)
		return vm, status, p
	}
	if _, status, p := set("web", &api.Workload{SHA256: digest.Of([]byte("none")), Size: 4, Kind: "executable"}); p.Reason != event.UnknownWorkload {
		t.Errorf("one that is not in the store: %d %+v", status, p)
	}
	if _, status, p := set("web", &api.Workload{SHA256: two.SHA256, Size: two.Size, Kind: "script"}); p.Reason != event.BadRequest {
		t.Errorf("one of no kind: %d %+v", status, p)
	}
	vm, status, p := set("web", work(two, 9090))
	if status != http.StatusOK || vm.Ready || vm.Start != 1 || vm.Phase != string(reservation.Computing) || !strings.HasSuffix(vm.WorkloadURL, ":9090/") {
		t.Fatalf("changed: %d %+v %+v", status, p, vm)
	}
	w.waitFlows(g.id, "external: wireguard", "gateway: peer quarantined=false", "gateway: store", "gateway: from-10.80.0.0/24", "internal: from-10.80.0.0/24")
	down, why := g.say(runs(one, "running")) // it has not been told yet
	if why != "" || down.Workload == nil || down.Workload.SHA256 != two.SHA256 || down.Workload.Port != 9090 {
		t.Fatalf("the VM is told %+v, %s", down.Workload, why)
	}
	g.serveWorkload(9090)
	check(t, pause(t.Context(), 4*probePause))
	if w.vm("web").Ready {
		t.Error("it is ready while it may still run the old one")
	}
	if _, why := g.say(runs(two, "running")); why != "" {
		t.Fatal(why)
	}
	w.wait("web", "ready again", func(vm api.VM) bool { return vm.Ready })

	// Two changes before the VM hears of the second: it may be at any of the three.
	four, five := w.putObject([]byte("workload four")), w.putObject([]byte("workload five"))
	set("web", work(four, 9090))
	if _, why := g.say(runs(four, "fetching")); why != "" {
		t.Fatal(why)
	}
	set("web", work(five, 9090))
	for _, c := range []bootmsg.Component{two, four} {
		if _, why := g.say(runs(c, "running")); why != "" {
			t.Errorf("a workload that is being replaced: %s", why)
		}
	}
	if w.vm("web").Ready {
		t.Error("ready by a workload that was replaced")
	}
	if _, why := g.say(runs(five, "running")); why != "" {
		t.Fatal(why)
	}
	w.wait("web", "ready with the last", func(vm api.VM) bool { return vm.Ready })

	// A replacement that fails ends nothing: the VM and its data are wanted.
	three := w.putObject([]byte("workload three"))
	if _, status, p := set("web", work(three, 9090)); status != http.StatusOK {
		t.Fatalf("changed again: %d %+v", status, p)
	}
	if _, why := g.say(runs(three, "failed")); why != "" {
		t.Errorf("a failed replacement: %s", why)
	}
	if vm := w.vm("web"); vm.Phase != string(reservation.Computing) || vm.Reason != event.WorkloadFailed || vm.Ready {
		t.Errorf("with a failed replacement: %+v", vm)
	}
	if _, why := g.say(runs(one, "running")); why != event.ReportRefused { // long replaced
		t.Errorf("a workload that nobody asked for: %q", why)
	}
	w.waitPhase("web", reservation.Aborted)
	if _, status, p := set("web", work(one, 8080)); p.Reason != event.WrongPhase {
		t.Errorf("of an ended VM: %d %+v", status, p)
	}
}

// TestNobodyGetsPastAJudgement: a VM whose audit is judged while it resets, or is killed,
// and even has begun its next start, is ended for good all the same.
func TestNobodyGetsPastAJudgement(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	for _, next := range []bool{false, true} {
		policy := reservation.Never
		if next {
			policy = reservation.Always
		}
		g := w.take(w.create(api.CreateVM{Name: "web", Restart: string(policy)}).ID)
		g.pass()
		w.host.stop(g.id, event.GuestReset)
		if next {
			w.takeStart(g.id, 2)
		} else {
			w.waitPhase("web", reservation.Stopped)
		}
		w.o.abort(t.Context(), g.id, 1, event.Refuse(event.HeartbeatMissed, "late news of an outage"))
		if vm := w.vm("web"); vm.Phase == string(reservation.Aborted) {
			t.Errorf("an outage of an old start ended the VM: %+v", vm)
		}
		w.o.abort(t.Context(), g.id, 1, event.Refuse(event.AuditFailed, "one process too many"))
		if vm := w.vm("web"); vm.Phase != string(reservation.Aborted) || vm.Reason != event.AuditFailed || !strings.Contains(vm.Explanation, "start 1") {
			t.Errorf("next start begun %v: %+v", next, vm)
		}
		w.waitGone(g.id)
		w.call("DELETE", "/v1/vms/web", nil, nil)
	}
}

// TestWishesThatCross: the last thing that an operator asked for is what happens.
func TestWishesThatCross(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	g := w.computing("web")
	w.ask("stop", "web")
	if vm := w.ask("start", "web"); vm.Wish != "restart" {
		t.Errorf("started while it stops: %+v", vm)
	}
	w.host.stop(g.id, event.GuestPoweredOff)
	w.takeStart(g.id, 2)
	w.ask("stop", "web")
	w.ask("start", "web")
	for end := time.Now().Add(20 * time.Second); ; pause(t.Context(), 10*time.Millisecond) { // the third may begin at once
		if now, there := w.host.get(g.id); !there || now.spec.Start > 2 {
			break
		}
		if time.Now().After(end) {
			t.Fatal("the second start is still at the host")
		}
	}
	w.ask("stop", "web") // takes the start that is due off, or ends the one that has begun
	vm := w.wait("web", "stopped", func(vm api.VM) bool { return vm.Phase == string(reservation.Stopped) })
	check(t, pause(t.Context(), 3*sweepEvery))
	if now := w.vm("web"); now.Phase != string(reservation.Stopped) || now.Start != vm.Start || !now.NextStart.IsZero() {
		t.Errorf("a start that was taken off began: %+v", now)
	}
}

// TestCrashBetweenRefusalAndEnd: the refusal of a quote is stored before the end that it
// brings. Where the orchestrator dies in between, its next start ends the VM at once, one
// that has stopped meanwhile too.
func TestCrashBetweenRefusalAndEnd(t *testing.T) {
	t.Parallel()
	for _, phase := range []reservation.Phase{reservation.Computing, reservation.Stopped} {
		t.Run(string(phase), func(t *testing.T) {
			w := newWorld(t)
			w.template("debian")
			w.watchEvery = time.Hour
			w.restart()
			g := w.computing("web")
			w.host.measureRogue()
			if _, err := w.o.attestAgain(t.Context(), g.id, evidence.RoleWatch); event.ReasonOf(err) != event.QuoteRefused {
				t.Fatalf("the quote: %v", err)
			}
			if phase == reservation.Stopped {
				w.host.stop(g.id, event.GuestPoweredOff)
			}
			w.waitPhase("web", phase)
			w.restart()
			vm := w.vm("web")
			if vm.Phase != string(reservation.Aborted) || vm.Reason != event.QuoteRefused || len(vm.Findings) == 0 {
				t.Errorf("after the crash: %+v", vm)
			}
			w.waitFlows(g.id)
			w.waitGone(g.id)
		})
	}
}
