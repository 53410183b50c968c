package orchestrator

import (
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
	"foothold/tenant/verify"
)

// closing is a configuration under which a refused quote closes.
func closing(c *Config) {
	roomy(c)
	c.QuoteRefused = quoteClose
	c.Limits.Lease = time.Minute
}

// refused has the host changed and a computing VM's quote refused, by an operator's wish.
func (w *world) refused(name string) {
	w.t.Helper()
	w.host.measureRogue()
	if status, p := w.call("POST", "/v1/vms/"+name+"/attest", nil, nil); status != http.StatusForbidden || p.Reason != event.QuoteRefused {
		w.t.Fatalf("attest of a changed host: %d %+v", status, p)
	}
}

// isClosed waits until a VM is closed, and checks all that this means: no rule, no token, no
// certificate, its instance kept, what was refused shown, and no start planned.
func (w *world) isClosed(g *guest) api.VM {
	w.t.Helper()
	vm := w.wait(g.id, "closed", func(vm api.VM) bool {
		return vm.Phase == string(reservation.Stopped) && vm.Reason == event.QuoteRefused
	})
	w.waitFlows(g.id)
	complete(w.t, vm.Findings)
	if !vm.NextStart.IsZero() || vm.Start != g.vm.spec.Start || vm.Cleanup != "" || !strings.Contains(vm.Explanation, "closed") {
		w.t.Errorf("it starts at %v, is at start %d, clean-up %q, %q", vm.NextStart, vm.Start, vm.Cleanup, vm.Explanation)
	}
	var e api.Explanation
	if w.call("GET", "/v1/vms/"+g.id+"/explain", nil, &e); !strings.Contains(e.Next, "vm stop web") || !strings.Contains(e.What, "closed") || len(e.Findings) == 0 {
		w.t.Errorf("explained: %+v", e)
	}
	var s ledger.Survey
	check(w.t, w.o.ledger.Read(w.t.Context(), func(t *ledger.Tx) (err error) { s, err = t.Survey(); return err }))
	if len(s.Tokens) != 0 || len(s.Certificates) != 0 {
		w.t.Errorf("open are %d tokens, valid %d certificates", len(s.Tokens), len(s.Certificates))
	}
	if _, why := g.say(); why == "" {
		w.t.Error("its heartbeat is heard")
	}
	check(w.t, w.o.cleanUp(w.t.Context(), g.id)) // as the sweep does again and again
	if !w.host.has(g.id) {
		w.t.Error("its instance is not kept")
	}
	return vm
}

// TestRefusedQuoteCloses: a VM whose host's later quote is refused loses its network, tokens
// and certificate at once and is kept, also over a restart of the orchestrator, whatever was
// planned; what an operator then asks for is done.
func TestRefusedQuoteCloses(t *testing.T) {
	t.Parallel()
	for name, ask := range map[string]func(*world, *guest){
		"then stopped": func(w *world, g *guest) {
			w.ask("stop", "web")
			w.waitGone(g.id)
			w.restart() // the refusal is not acted on again
			if vm := w.vm("web"); vm.Phase != string(reservation.Stopped) || vm.Reason != event.StopAsked || vm.Start != 1 {
				t.Errorf("stopped: %+v", vm)
			}
		},
		"then started": func(w *world, g *guest) {
			w.ask("start", "web")
			w.waitGone(g.id)
			vm := w.wait("web", "refused a host", func(vm api.VM) bool { return vm.Reason == event.NoHost }) // it is barred
			if vm.Phase != string(reservation.Stopped) || vm.Start != 1 {
				t.Errorf("started: %+v", vm)
			}
			w.call("POST", "/v1/hosts/host-1/readmit", nil, nil)
			w.ask("start", "web")
			w.wait("web", "started again", func(vm api.VM) bool { return vm.Start == 2 && vm.Phase == string(reservation.Booting) })
		},
		"then restarted": func(w *world, g *guest) {
			w.call("POST", "/v1/hosts/host-1/readmit", nil, nil)
			w.ask("restart", "web")
			w.wait("web", "started again", func(vm api.VM) bool { return vm.Start == 2 })
		},
		"then deleted": func(w *world, g *guest) {
			if status, p := w.call("DELETE", "/v1/vms/web", nil, nil); status != http.StatusOK {
				t.Errorf("delete: %d %+v", status, p)
			}
			w.waitGone(g.id)
			w.waitPhase(g.id, reservation.Released)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, closing)
			w.template("debian")
			g := w.take(w.create(api.CreateVM{Name: "web", Restart: string(reservation.Always)}).ID)
			g.pass()
			w.refused("web")
			w.isClosed(g)
			if n := w.count("web", "vm.quote-refused"); n != 1 {
				t.Errorf("%d alerts", n)
			}
			f := w.fsck()
			if !f.Clean || !slices.ContainsFunc(f.Notes, func(n api.Finding) bool { return n.Code == "vm-closed" }) {
				t.Errorf("fsck: %+v", f)
			}
			if list, _ := w.audited("web"); list[len(list)-1].Derived {
				t.Error("the refusal has no evidence")
			}
			w.restart()
			w.isClosed(g)
			if n := w.count("web", "vm.stopped"); n != 1 {
				t.Errorf("closed %d times", n)
			}
			ask(w, g)
		})
	}
}

// TestRefusedQuoteClosesWhateverIsAsked: an operator's wish, and a second hearing of the same,
// change nothing about a VM that is being closed.
func TestRefusedQuoteClosesWhateverIsAsked(t *testing.T) {
	t.Parallel()
	w := newWorld(t, closing)
	w.template("debian")
	g := w.computing("web")
	w.ask("restart", "web") // it has a minute to write its volume out
	r, _, err := w.o.row(t.Context(), g.id)
	check(t, err)
	if r.Phase != reservation.Computing || r.Wish != ledger.WishRestart {
		t.Fatalf("%+v", r)
	}
	w.host.measureRogue()
	_, err = w.o.attestAgain(t.Context(), g.id, evidence.RoleWatch)
	for range 3 {
		w.o.abort(t.Context(), g.id, 1, err)
	}
	w.isClosed(g)
}

// TestRefusedBeforeSecrets: whatever quote_refused says, a VM that has got nothing yet, or has
// never computed, is ended.
func TestRefusedBeforeSecrets(t *testing.T) {
	t.Parallel()
	w := newWorld(t, closing)
	w.template("debian")
	g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
	g.tweak.rogue = true
	if why := g.boot(); why != event.QuoteRefused {
		t.Fatalf("boot: %q", why)
	}
	w.waitPhase("web", reservation.Aborted)
	w.waitGone(g.id)

	w = newWorld(t, closing)
	w.template("debian")
	g = w.take(w.create(api.CreateVM{Name: "web"}).ID)
	g.upTo(3)
	w.host.measureRogue()
	if why := g.admit(); why != event.QuoteRefused {
		t.Fatalf("admission: %q", why)
	}
	w.waitPhase("web", reservation.Aborted)
	w.waitGone(g.id)
}

// TestCrashBeforeClosing: where the orchestrator dies between a refusal and the closing, its
// next start closes the VM; one that has stopped meanwhile, and was to start again, stays
// stopped.
func TestCrashBeforeClosing(t *testing.T) {
	t.Parallel()
	for _, phase := range []reservation.Phase{reservation.Computing, reservation.Stopped} {
		t.Run(string(phase), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, closing)
			w.template("debian")
			g := w.computing("web")
			w.refusalAlone(g)
			if phase == reservation.Stopped {
				w.host.stop(g.id, event.GuestPoweredOff)
				w.waitPhase("web", phase)
				check(t, w.o.ledger.Write(t.Context(), func(t *ledger.Tx) error {
					return t.SetDue(g.id, 1, event.Refusal{Reason: event.VMStopped}, t.Now.Add(time.Hour), 1)
				}))
			}
			w.restart()
			if phase == reservation.Computing {
				w.isClosed(g)
				return
			}
			vm := w.vm("web")
			if vm.Phase != string(phase) || vm.Reason != event.QuoteRefused || !vm.NextStart.IsZero() {
				t.Errorf("after the crash: %+v", vm)
			}
			complete(t, vm.Findings)
		})
	}
}

// refusalAlone stores the refusal of a VM's quote, as a crash right behind it leaves it.
func (w *world) refusalAlone(g *guest) {
	t := w.t
	t.Helper()
	r, s, err := w.o.row(t.Context(), g.id)
	check(t, err)
	w.host.measureRogue()
	x := verify.StaticExpectation{Role: evidence.RoleWatch, Reservation: g.id, Start: 1, Host: r.Host, Previous: s.Verdict}
	check(t, w.o.ledger.Write(t.Context(), func(t *ledger.Tx) (err error) { x.Nonce, err = t.NewNonce(g.id, 1, x.Role); return err }))
	h, err := w.o.host(r.Host)
	check(t, err)
	q, err := h.Quote(t.Context(), evidence.StaticBinding(x.Role, g.id, s.Verdict, x.Nonce))
	check(t, err)
	_, v := w.o.basis().verifier.Static(x, verify.StaticEvidence{Quote: q.Quote, Platform: q.Platform})
	if v.Good() {
		t.Fatal("the quote is good")
	}
	check(t, w.o.ledger.Write(t.Context(), func(t *ledger.Tx) error { return t.AddBundle(v.Parts) }))
}

// TestClosingOnAFullDisk: a closing that finds no room is owed, and done when there is some.
func TestClosingOnAFullDisk(t *testing.T) {
	t.Parallel()
	w := newWorld(t, closing)
	w.template("debian")
	disk := w.ontoDisk()
	g := w.computing("web")
	w.fillUp(disk)
	refused := event.Refuse(event.QuoteRefused, "test")
	refused.Findings = []event.FailedCheck{{Check: "log", Component: "c", Expected: "e", Seen: "s", Do: "d"}}
	w.o.abort(t.Context(), g.id, 1, refused)
	if w.o.owesEnd(g.id, 1) == nil {
		t.Fatal("the disk is not full")
	}
	disk.Free(t)
	w.isClosed(g)
}

// TestQuoteRefusedPolicy: no configuration lets a refused VM run on.
func TestQuoteRefusedPolicy(t *testing.T) {
	w := newWorld(t)
	w.template("debian") // it serves
	for policy, good := range map[string]bool{"close": true, "terminate": true, "alert": false, "": false, "Close": false} {
		conf := w.conf
		conf.QuoteRefused = policy
		if err := conf.Validate(); (err == nil) != good || err != nil && !strings.Contains(err.Error(), "quote_refused") {
			t.Errorf("%q: %v", policy, err)
		}
	}
}
