package orchestrator

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"foothold/protocol/agentmsg"
	"foothold/protocol/api"
	"foothold/protocol/audit"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/signed"
	"foothold/protocol/token"
	"foothold/protocol/upstream"
	"foothold/protocol/vmcert"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
	"foothold/tenant/unlock"
)

// roomy is a world for many VMs, one after the other or side by side.
func roomy(c *Config) {
	c.Limits.VMs = 60
	c.Network.Last = netip.MustParseAddr("10.82.0.90")
	c.Limits.Booting, c.Limits.Connecting, c.Limits.Unlocking = 5*time.Minute, 5*time.Minute, 5*time.Minute
	c.Limits.Lease = 5 * time.Minute // few send heartbeats
}

// counted is how often the orchestrator has counted a reason under a kind of entry.
func (w *world) counted(kind string, r event.Reason) int64 {
	w.t.Helper()
	var s api.Status
	if status, p := w.call("GET", "/v1/status", nil, &s); status != http.StatusOK {
		w.t.Fatalf("status: %d %+v", status, p)
	}
	for _, c := range s.Refusals {
		if c.Source == "orchestrator" && c.Kind == kind && c.Reason == r {
			return c.Count
		}
	}
	return 0
}

// journal lists the newest entries of a kind.
func (w *world) journal(kind string) (list []event.Event) {
	w.t.Helper()
	var all []api.JournalEntry
	w.call("GET", "/v1/events?limit=10000", nil, &all)
	for _, e := range all {
		if e.Event.Kind == kind {
			list = append(list, e.Event)
		}
	}
	return list
}

// refusedOnce runs f and wants exactly one more entry of the kind with the reason, in the
// journal and in the count.
func (w *world) refusedOnce(what, kind string, r event.Reason, f func()) {
	w.t.Helper()
	before := w.counted(kind, r)
	f()
	if now := w.counted(kind, r); now != before+1 {
		w.t.Errorf("%s: counted %d times as %s %s, want once", what, now-before, kind, r)
	}
	list := w.journal(kind)
	if len(list) == 0 || list[len(list)-1].Reason != r || list[len(list)-1].Source != "orchestrator" {
		w.t.Errorf("%s: the journal's last %s is %+v, want reason %s", what, kind, list, r)
	}
}

// TestRefusedWishesLeaveNothing: what an operator is refused is named to him with a next
// step, enters the journal under its reason, and leaves no row, key or VM.
func TestRefusedWishesLeaveNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config) {
		c.Limits.Booting = 5 * time.Minute // the one that is held boots all the while
		c.Limits.VMs, c.Limits.MemoryMiB = 3, 4096
		c.Network.Last = c.Network.First.Next()
	})
	w.template("debian")
	held := w.create(api.CreateVM{Name: "held"})
	w.take(held.ID)
	leftovers := func() string {
		var vms []api.VM
		w.call("GET", "/v1/vms", nil, &vms)
		w.host.mu.Lock()
		defer w.host.mu.Unlock()
		return fmt.Sprintf("%d rows, %d VMs, %d volumes, %d reserved", len(vms), len(w.host.vms), len(w.host.volumes), len(w.journal("vm.reserved")))
	}
	big := strings.Repeat("a", 2<<20)
	none := digest.Of([]byte("nobody put it there")).String()
	for _, c := range []struct {
		name, body string
		want       event.Reason
		says       string
	}{
		{"unknown template", `{"name":"a","template":"other"}`, event.UnknownTemplate, "template other"},
		{"unknown size", `{"name":"a","size":"huge"}`, event.UnknownSize, "size"},
		{"name taken", `{"name":"held"}`, event.NameTaken, "held"},
		{"quota of memory", `{"name":"a","size":"large"}`, event.QuotaExceeded, "MiB"},
		{"unknown workload", `{"name":"a","workload":{"sha256":"` + none + `","size":1,"kind":"executable"}}`, event.UnknownWorkload, none[:8]},
		{"malformed", `{"name":`, event.BadRequest, "ends early"},
		{"oversized", `{"name":"` + big + `"}`, event.BadRequest, "limit"},
		{"duplicate key", `{"name":"a","name":"b"}`, event.BadRequest, "duplicate key"},
		{"trailing data", `{"name":"a"}{}`, event.BadRequest, "trailing"},
		{"unknown field", `{"name":"a","colour":"red"}`, event.BadRequest, "colour"},
		{"name that is none", `{"name":"A b"}`, event.BadRequest, "name"},
	} {
		before := leftovers()
		w.refusedOnce(c.name, requestRefused, c.want, func() {
			status, p := w.call("POST", "/v1/vms", []byte(c.body), nil)
			if status < 400 || p.Reason != c.want || p.Next == "" || !strings.Contains(p.Detail, c.says) {
				t.Errorf("%s: %d %+v, want %s and a detail that names %q", c.name, status, p, c.want, c.says)
			}
		})
		last := w.journal(requestRefused)
		if e := last[len(last)-1]; e.Detail["by"] != "operator/alice" || e.Detail["call"] != "create-vm" || e.Detail["detail"] == "" {
			t.Errorf("%s: the journal says %+v", c.name, e.Detail)
		}
		if after := leftovers(); after != before {
			t.Errorf("%s: before: %s; after: %s", c.name, before, after)
		}
	}
	w.create(api.CreateVM{Name: "second"})
	w.refusedOnce("pool empty", requestRefused, event.PoolEmpty, func() {
		if status, p := w.call("POST", "/v1/vms", []byte(`{"name":"third"}`), nil); status != http.StatusConflict || p.Reason != event.PoolEmpty || p.Next == "" {
			t.Errorf("pool empty: %d %+v", status, p)
		}
	})
	w.refusedOnce("unknown VM", requestRefused, event.UnknownVM, func() {
		if status, p := w.call("DELETE", "/v1/vms/nobody", nil, nil); status != http.StatusNotFound || !strings.Contains(p.Detail, "VM nobody") {
			t.Errorf("unknown VM: %d %+v", status, p)
		}
	})
	w.refusedOnce("image of another digest", requestRefused, event.DigestMismatch, func() {
		reg, image := w.registration("other")
		if status, p := w.call("POST", "/v1/templates", must[[]byte](t)(json.Marshal(reg)), nil); status != http.StatusCreated {
			t.Fatalf("register: %d %+v", status, p)
		}
		image[7] ^= 1
		w.call("PUT", "/v1/templates/other/image", image, nil)
	})
}

// TestRefusedCallsAreJournalled: what a daemon sends and is refused before anything
// changed enters the journal under its own reason and the daemon's name.
func TestRefusedCallsAreJournalled(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	open := func(body string) func() {
		return func() {
			if why := w.postBytes(t.Context(), "bootserver", upstream.PathBootOpen, []byte(body), nil); why != event.BadRequest {
				t.Errorf("%.40s: %q", body, why)
			}
		}
	}
	text := token.New(token.T1).Reveal()
	altered := text[:len(text)-1] + map[bool]string{true: "b", false: "a"}[text[len(text)-1] == 'a']
	for name, body := range map[string]string{
		"malformed":       `{"token":`,
		"unknown field":   `{"nonsense":1}`,
		"duplicate key":   `{"token":"","token":""}`,
		"trailing data":   `{} {}`,
		"malformed token": `{"token":"` + altered + `"}`,
		"oversized":       `{"token":"` + strings.Repeat("x", upstream.MaxMessage) + `"}`,
	} {
		w.refusedOnce(name, callRefused, event.BadRequest, open(body))
	}
	for _, e := range w.journal(callRefused) {
		if e.Detail["by"] != "bootserver/bootserver" || !strings.Contains(e.Detail["call"], upstream.PathBootOpen) || strings.Contains(fmt.Sprint(e.Detail), altered) {
			t.Errorf("the journal says %+v", e.Detail)
		}
	}
	w.refusedOnce("call of another role", callRefused, event.NotPermitted, func() {
		w.postBytes(t.Context(), "gateway", upstream.PathBootOpen, []byte(`{}`), nil)
	})
	// A daemon that does nothing else fills no journal.
	w.o.journalled.take("bootserver/bootserver", journalBurst, time.Now().Add(time.Minute))
	before := w.counted(callRefused, event.BadRequest)
	open(`{`)()
	if now := w.counted(callRefused, event.BadRequest); now != before {
		t.Error("a flood of refused calls goes on entering the journal")
	}
}

// upTo plays a good VM until it holds the token; own is the token then.
func (g *guest) upTo(kind token.Kind) {
	t := g.w.t
	t.Helper()
	if kind == token.T1 {
		return
	}
	if why := g.boot(); why != "" {
		t.Fatalf("boot: %s", why)
	}
	if kind == token.T2 {
		return
	}
	g.door()
	if why := g.ready(); why != "" {
		t.Fatalf("ready: %s", why)
	}
	g.w.waitPhase(g.id, reservation.Connecting)
}

func (g *guest) own(kind token.Kind) token.Token {
	return map[token.Kind]token.Token{token.T1: g.vm.t1, token.T2: g.unique.T2, token.T3: g.hand.T3}[kind]
}

// present presents a token where its kind belongs, with all else as the guest has it.
func (g *guest) present(kind token.Kind, tok token.Token) event.Reason {
	var why event.Reason
	switch kind {
	case token.T1:
		_, why = g.open(tok)
	case token.T2:
		g.unique.T2 = tok
		why = g.ready()
	case token.T3:
		g.hand.T3 = tok
		why = g.admit()
	}
	return why
}

// next moves a VM on without its token, as only a fault could.
func (g *guest) next(kind token.Kind) {
	from, to := reservation.Booting, reservation.Unlocking
	if kind == token.T3 {
		from, to = reservation.Connecting, reservation.Computing
	}
	check(g.w.t, g.w.o.ledger.Write(g.w.t.Context(), func(t *ledger.Tx) error {
		return t.Move(g.id, 1, from, to, t.Now.Add(time.Minute))
	}))
}

// TestEveryTokenInEveryWrongWay presents T1, T2 and T3 in each wrong way. Each is refused
// and counted under its own reason; a VM whose token was burnt is ended and gone, any
// other goes on.
func TestEveryTokenInEveryWrongWay(t *testing.T) {
	t.Parallel()
	w := newWorld(t, roomy)
	w.template("debian")
	stranger := netip.MustParseAddr("10.82.0.99")
	type use struct {
		name string
		// of a VM g, and of another o that has come as far; it returns what was said
		do    func(kind token.Kind, g, o *guest) event.Reason
		want  event.Reason
		ends  []token.Kind // kinds with which g ends
		other bool         // o, and not g, holds on to its token
	}
	all := []token.Kind{token.T1, token.T2, token.T3}
	for _, c := range []use{
		{"wrong", func(k token.Kind, g, _ *guest) event.Reason { return g.present(k, token.New(k)) }, event.TokenUnknown, []token.Kind{token.T1}, false},
		{"of another kind", func(k token.Kind, g, _ *guest) event.Reason {
			other := map[token.Kind]token.Kind{token.T1: token.T2, token.T2: token.T3, token.T3: token.T1}[k]
			if k == token.T2 { // is refused by its form: nothing of it reaches the ledger
				w.refusedOnce("T3 for T2", callRefused, event.BadRequest, func() { g.present(k, token.New(other)) })
				return g.present(k, token.New(k))
			}
			return g.present(k, token.New(other))
		}, event.TokenUnknown, []token.Kind{token.T1}, false},
		{"spent", func(k token.Kind, g, _ *guest) event.Reason {
			own := g.own(k)
			if why := g.present(k, own); why != "" {
				t.Fatalf("its first use: %s", why)
			}
			return g.present(k, own)
		}, event.TokenSpent, []token.Kind{token.T1}, false}, // still booting there: the VM or who replays
		{"expired", func(k token.Kind, g, _ *guest) event.Reason {
			w.o.abort(t.Context(), g.id, 0, event.Refuse(event.TokenExpired, "test"))
			return g.present(k, g.own(k))
		}, event.TokenExpired, all, false},
		{"foreign", func(k token.Kind, g, o *guest) event.Reason {
			t2, t3 := o.unique.T2, o.hand.T3
			defer func() { o.unique.T2, o.hand.T3 = t2, t3 }()
			return o.present(k, g.own(k))
		}, event.TokenWrongAddress, all, true},
		{"in the wrong phase", func(k token.Kind, g, _ *guest) event.Reason { g.next(k); return g.present(k, g.own(k)) }, event.TokenWrongPhase, all, false},
		{"from the wrong address", func(k token.Kind, g, _ *guest) event.Reason {
			g.tweak.source = stranger
			return g.present(k, g.own(k))
		}, event.TokenWrongAddress, all, false},
	} {
		for i, kind := range all {
			t.Run(fmt.Sprintf("T%d %s", i+1, c.name), func(t *testing.T) {
				g := w.take(w.create(api.CreateVM{Name: "one"}).ID)
				o := w.take(w.create(api.CreateVM{Name: "two"}).ID)
				o.tunnel = o.tunnel.Next()
				g.upTo(kind)
				o.upTo(kind)
				var said event.Reason
				w.refusedOnce(c.name, "token.rejected", c.want, func() { said = c.do(kind, g, o) })
				if said != c.want {
					t.Errorf("the daemon was told %q, want %q", said, c.want)
				}
				if slices.Contains(c.ends, kind) {
					if got := w.waitPhase(g.id, reservation.Aborted); got.Reason != c.want || got.Explanation == "" {
						t.Errorf("the VM ended with %q (%s), want %q", got.Reason, got.Explanation, c.want)
					}
					w.waitGone(g.id)
					w.waitFlows(g.id)
				} else if phase := w.vm(g.id).Phase; reservation.Phase(phase).Terminal() {
					t.Errorf("the VM is %s", phase)
				}
				// The other VM is none the worse, unless what was presented for it was no T1 of its own.
				if c.other && kind == token.T1 {
					if got := w.waitPhase(o.id, reservation.Aborted); got.Reason != c.want {
						t.Errorf("the VM that presented a T1 which is not its own ended with %q", got.Reason)
					}
				} else if why := o.present(kind, o.own(kind)); why != "" {
					t.Errorf("the other VM's own token: %s", why)
				}
				for _, name := range []string{"one", "two"} {
					if status, p := w.call("DELETE", "/v1/vms/"+name, nil, nil); status != http.StatusOK {
						t.Errorf("delete %s: %d %+v", name, status, p)
					}
				}
			})
		}
	}
}

// TestAHundredRacingPresentations: of a hundred uses of one token at once, by whoever,
// one wins. T1's replay ends the VM that still boots there; T2's and T3's end nothing.
func TestAHundredRacingPresentations(t *testing.T) {
	t.Parallel()
	w := newWorld(t, roomy)
	w.template("debian")
	for i, kind := range []token.Kind{token.T1, token.T2, token.T3} {
		t.Run(fmt.Sprintf("T%d", i+1), func(t *testing.T) {
			g := w.take(w.create(api.CreateVM{Name: fmt.Sprintf("t%d", i+1)}).ID)
			g.tunnel = netip.AddrFrom4([4]byte{10, 84, 1, byte(10 + i)})
			g.upTo(kind)
			if kind == token.T2 { // the one that wins begins to unlock
				g.door()
			}
			before := w.counted("token.rejected", event.TokenSpent)
			var mu sync.Mutex
			said := map[event.Reason]int{}
			var all sync.WaitGroup
			each := slices.Repeat([]guest{*g}, 100) // the conversation behind the door changes g
			for _, one := range each {
				all.Go(func() {
					why := one.present(kind, one.own(kind))
					mu.Lock()
					defer mu.Unlock()
					said[why]++
				})
			}
			all.Wait()
			if said[""] != 1 || said[event.TokenSpent] != 99 {
				t.Errorf("said: %v", said)
			}
			if n := w.counted("token.rejected", event.TokenSpent) - before; n != 99 {
				t.Errorf("%d are counted, want 99", n)
			}
			if kind == token.T1 {
				if got := w.waitPhase(g.id, reservation.Aborted); got.Reason != event.TokenSpent {
					t.Errorf("ended with %q", got.Reason)
				}
			} else if vm := w.vm(g.id); reservation.Phase(vm.Phase).Terminal() {
				t.Errorf("the VM is %s: %s", vm.Phase, vm.Explanation)
			}
		})
	}
}

// TestOnlyTheIssuedCertificateAdmits: another VM's, one of the right authority that was
// never issued - with a WireGuard key of somebody's choice -, and one that was revoked
// since, admit nobody.
func TestOnlyTheIssuedCertificateAdmits(t *testing.T) {
	t.Parallel()
	w := newWorld(t, roomy)
	w.template("debian")
	other := w.take(w.create(api.CreateVM{Name: "other"}).ID)
	other.upTo(token.T3)
	for name, bend := range map[string]func(g *guest) []byte{
		"another VM's": func(*guest) []byte { return other.hand.Certificate },
		"WireGuard key of somebody's choice": func(g *guest) []byte {
			der, _, err := w.ca.IssueVM(vmcert.Info{Reservation: g.id, Start: 1, Address: g.address(), WireGuardKey: bytes.Repeat([]byte{9}, 32)}, g.request(), time.Hour)
			check(t, err)
			return der
		},
		"another start's": func(g *guest) []byte {
			der, _, err := w.ca.IssueVM(vmcert.Info{Reservation: g.id, Start: 2, Address: g.address(), WireGuardKey: bytes.Repeat([]byte{7}, 32)}, g.request(), time.Hour)
			check(t, err)
			return der
		},
		"altered": func(g *guest) []byte { der := bytes.Clone(g.hand.Certificate); der[len(der)-1] ^= 1; return der },
	} {
		t.Run(name, func(t *testing.T) {
			g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
			g.upTo(token.T3)
			g.tweak.cert = bend(g)
			w.refusedOnce(name, "token.rejected", event.CertificateInvalid, func() {
				if why := g.admit(); why != event.CertificateInvalid {
					t.Errorf("said: %q", why)
				}
			})
			if got := w.waitPhase(g.id, reservation.Aborted); got.Reason != event.CertificateInvalid {
				t.Errorf("ended with %q", got.Reason)
			}
			w.waitGone(g.id)
			w.waitFlows(g.id)
			w.call("DELETE", "/v1/vms/web", nil, nil)
		})
	}
	r, _, err := w.o.row(t.Context(), other.id)
	check(t, err)
	must[bool](t)(w.o.fail(t.Context(), other.id, 0, fate{Refusal: *event.Refuse(event.VMStopped, "test")}))
	check(t, w.o.ledger.Read(t.Context(), func(tx *ledger.Tx) error {
		if _, _, err := w.o.checkCertificate(tx, r, other.hand.Certificate, r.Address); event.ReasonOf(err) != event.CertificateRevoked {
			t.Errorf("revoked since it was issued: %v", err)
		}
		return nil
	}))
}

// TestEndDuringAdmission: T3 is spent and the host is being quoted when the VM ends.
func TestEndDuringAdmission(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
	g.upTo(token.T3)
	w.host.tpmMu.Lock() // the quote waits
	said := make(chan event.Reason, 1)
	go func() { said <- g.admit() }()
	w.wait("web", "T3 spent", func(api.VM) bool {
		return slices.ContainsFunc(w.journal("token.spent"), func(e event.Event) bool { return e.Detail["token"] == token.T3.String() })
	})
	w.o.abort(t.Context(), g.id, 0, event.Refuse(event.DeadlinePassed, "test"))
	w.host.tpmMu.Unlock()
	if why := <-said; why == "" {
		t.Error("admitted")
	}
	w.waitGone(g.id)
	w.waitFlows(g.id)
	if slices.Contains(w.events(g.id), "tunnel.admitted") {
		t.Error("the journal has an admission")
	}
}

// TestForgedByTheBootServer: a boot server that has been taken over knows T1, T2 and all
// that it relays, and no VM's key.
func TestForgedByTheBootServer(t *testing.T) {
	t.Parallel()
	w := newWorld(t, roomy)
	w.template("debian")
	mine := w.stranger().key
	for name, c := range map[string]struct {
		kind  token.Kind
		forge func(g *guest) event.Reason
		entry string
		want  event.Reason
		ends  bool
	}{
		"T2 in a report of its own": {token.T2, func(g *guest) event.Reason { g.tweak.signer = mine; return g.ready() }, "token.rejected", event.ReportRefused, true},
		"T2 before anything was delivered": {token.T2, func(g *guest) event.Reason {
			check(t, w.o.ledger.Write(t.Context(), func(tx *ledger.Tx) error {
				return tx.ChangeStart(g.id, 1, func(s *ledger.Start) { s.Delivered = time.Time{} })
			}))
			return g.ready()
		}, "token.rejected", event.ReportRefused, true},
		"verdict without T1": {token.T1, func(g *guest) event.Reason {
			return g.attest(upstream.OpenResponse{Reservation: g.id, Nonce: make([]byte, 32)})
		}, callRefused, event.TokenWrongPhase, false},
		"verdict for another address": {token.T1, func(g *guest) event.Reason {
			opened, _ := g.open(g.vm.t1)
			g.tweak.source = netip.MustParseAddr("10.82.0.99")
			return g.attest(opened)
		}, callRefused, event.TokenWrongAddress, false},
		"verdict on nobody": {token.T1, func(g *guest) event.Reason {
			return g.attest(upstream.OpenResponse{Reservation: "00000000-0000-4000-8000-000000000000", Nonce: make([]byte, 32)})
		}, callRefused, event.UnknownVM, false},
		"second verdict": {token.T1, func(g *guest) event.Reason {
			opened, _ := g.open(g.vm.t1)
			if why := g.attest(opened); why != "" {
				t.Fatal(why)
			}
			return g.attest(opened)
		}, "vm.aborted", event.QuoteRefused, true},
	} {
		t.Run(name, func(t *testing.T) {
			g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
			g.upTo(c.kind)
			w.refusedOnce(name, c.entry, c.want, func() {
				if why := c.forge(g); why != c.want {
					t.Errorf("said: %q, want %q", why, c.want)
				}
			})
			if c.ends {
				got := w.waitPhase(g.id, reservation.Aborted)
				if name == "second verdict" && !strings.Contains(got.Explanation, "judged before") { // its nonce is used up, too
					t.Errorf("ended with %q", got.Explanation)
				}
				w.waitGone(g.id)
				w.waitFlows(g.id)
			} else if vm := w.vm(g.id); vm.Phase != string(reservation.Booting) {
				t.Errorf("the VM is %s: %s", vm.Phase, vm.Explanation)
			}
			w.call("DELETE", "/v1/vms/web", nil, nil)
		})
	}
}

// TestForgedByTheGateway: a gateway that has been taken over relays for a VM, and can
// neither speak for it, nor have it admitted elsewhere, nor keep it alive.
func TestForgedByTheGateway(t *testing.T) {
	t.Parallel()
	w := newWorld(t, roomy)
	w.template("debian")
	mine := w.stranger().key
	g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
	g.upTo(token.T3)
	if why := g.admit(); why != "" {
		t.Fatal(why)
	}
	if _, why := g.say(); why != "" {
		t.Fatal(why)
	}
	forged := func(what string, want event.Reason, bend func(*agentmsg.Up) signed.Envelope) {
		t.Helper()
		up := agentmsg.Up{Reservation: g.id, Start: 1, Seq: g.seq + 1, Nonce: g.nonce}
		g.withAudit(&up)
		w.refusedOnce(what, callRefused, want, func() {
			if _, why := g.relay(bend(&up)); why != want {
				t.Errorf("%s: said %q, want %q", what, why, want)
			}
		})
		if vm := w.vm("web"); vm.Phase != string(reservation.Connecting) {
			t.Errorf("%s: the VM is %s", what, vm.Phase)
		}
	}
	seal := func(key ed25519.PrivateKey, label string, up *agentmsg.Up) signed.Envelope {
		return signed.Seal(key, label, must[[]byte](t)(json.Marshal(up)))
	}
	forged("audit under its own key", event.ReportRefused, func(up *agentmsg.Up) signed.Envelope { return seal(mine, signed.AgentUp, up) })
	forged("audit signed for another purpose", event.ReportRefused, func(up *agentmsg.Up) signed.Envelope { return seal(g.key, signed.Report, up) })
	forged("altered audit", event.ReportRefused, func(up *agentmsg.Up) signed.Envelope {
		e := seal(g.key, signed.AgentUp, up)
		e.Payload[len(e.Payload)/2] ^= 1
		return e
	})
	other := w.take(w.create(api.CreateVM{Name: "other"}).ID)
	other.upTo(token.T3)
	taken := g.tunnel
	for name, address := range map[string]string{
		"another VM's address": taken.String(), "the gateway's own": "10.84.0.1", "the network's": "10.84.0.0", "outside the pool": "10.80.0.10", "none": "",
	} {
		victim := w.take(w.create(api.CreateVM{Name: "victim"}).ID)
		victim.upTo(token.T3)
		victim.tunnel, _ = netip.ParseAddr(address)
		w.refusedOnce(name, "vm.aborted", event.AdmissionRefused, func() {
			if why := victim.admit(); why != event.AdmissionRefused {
				t.Errorf("admitted at %s: %q", name, why)
			}
			if got := w.waitPhase(victim.id, reservation.Aborted); got.Reason != event.AdmissionRefused {
				t.Errorf("%s: ended with %q", name, got.Reason)
			}
		})
		w.waitGone(victim.id)
		w.waitFlows(victim.id)
		w.call("DELETE", "/v1/vms/victim", nil, nil)
	}
	// Without T3 it admits nobody, whose certificate and password it may have.
	other.tunnel = other.tunnel.Next()
	own := other.hand.T3
	w.refusedOnce("admission without T3", "token.rejected", event.TokenUnknown, func() {
		if why := other.present(token.T3, token.New(token.T3)); why != event.TokenUnknown {
			t.Errorf("said: %q", why)
		}
	})
	if slices.Contains(w.events(other.id), "tunnel.admitted") {
		t.Error("admitted without T3")
	}
	if why := other.present(token.T3, own); why != "" {
		t.Errorf("the VM's own T3 afterwards: %s", why)
	}
	if _, why := g.say(g.withAudit); why != "" {
		t.Errorf("the VM's own audit afterwards: %s", why)
	}
}

// request is a certificate request for the guest's TLS key.
func (g *guest) request() []byte {
	return must[[]byte](g.w.t)(x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, g.tlsKey))
}

// TestRefusedCertificatesAreJournalled: a caller whose certificate does not get it
// through the handshake has no name; where it called from, and why not, is kept.
func TestRefusedCertificatesAreJournalled(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	before := w.counted(tlsRefused, event.NotPermitted)
	if resp, err := w.daemons["gateway"].Get(w.api + "/v1/vms"); err == nil {
		resp.Body.Close()
		t.Error("a daemon reached the operators' API")
	}
	if resp, err := w.operator.Get(w.dmz + upstream.PathZone); err == nil {
		resp.Body.Close()
		t.Error("an operator reached the daemons' API")
	}
	for end := time.Now().Add(15 * time.Second); w.counted(tlsRefused, event.NotPermitted) < before+2; pause(t.Context(), 50*time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("the journal has %+v", w.journal(tlsRefused))
		}
	}
	var listeners []string
	for _, e := range w.journal(tlsRefused) {
		listeners = append(listeners, e.Detail["listener"])
		if e.Detail["from"] != "127.0.0.1" || e.Detail["why"] == "" || e.Detail["count"] == "0" {
			t.Errorf("the journal says %+v", e.Detail)
		}
	}
	for _, l := range []string{"operators", "dmz"} {
		if !slices.Contains(listeners, l) {
			t.Errorf("nothing of the listener for %s: %q", l, listeners)
		}
	}
}

// TestOneThingTooManyEndsTheVM: at the first audit it is handed no secret, at the second
// and at each later one its tunnel and rules go. Package expect shows what else is found.
func TestOneThingTooManyEndsTheVM(t *testing.T) {
	t.Parallel()
	w := newWorld(t, roomy)
	w.template("debian")
	evil := digest.Of([]byte("evil"))
	for name, c := range map[string]struct {
		add   func(*audit.Report)
		check string
	}{
		"process": {func(r *audit.Report) {
			r.Processes = append(r.Processes, audit.Process{PID: 66, Exe: "/bin/evil", SHA256: evil})
		}, "process"},
		"listener": {func(r *audit.Report) {
			r.Listeners = append(r.Listeners, audit.Listener{Proto: "tcp", Address: "0.0.0.0", Port: 4444, Exe: "/init"})
		}, "listener"},
		"module": {func(r *audit.Report) { r.Modules = append(r.Modules, "rootkit") }, "module"},
		"user":   {func(r *audit.Report) { r.Users = append(r.Users, audit.User{Name: "eve", Shell: "/bin/sh"}) }, "user"},
		"file": {func(r *audit.Report) {
			r.Files = append(r.Files, audit.File{Path: "/etc/ld.so.preload", Mode: 0o100644, SHA256: evil})
		}, "file"},
	} {
		ended := func(t *testing.T, g *guest) {
			t.Helper()
			got := w.waitPhase(g.id, reservation.Aborted)
			var e api.Explanation
			w.call("GET", "/v1/vms/"+g.id+"/explain", nil, &e)
			if got.Reason != event.AuditFailed || len(e.Findings) != 1 || e.Findings[0].Check != c.check || e.Findings[0].Do == "" {
				t.Errorf("ended with %q and %q, want one finding of a %s", got.Reason, e.Findings, c.check)
			}
			w.waitGone(g.id)
			w.waitFlows(g.id)
			w.call("DELETE", "/v1/vms/web", nil, nil)
		}
		t.Run(name+" at the first audit", func(t *testing.T) {
			g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
			g.tweak.first = c.add
			w.refusedOnce(name, "vm.aborted", event.AuditFailed, func() {
				g.boot()
				g.door()
				g.ready()
				w.waitPhase(g.id, reservation.Aborted)
			})
			if g.hand.User != "" || slices.Contains(w.events(g.id), "certificate.issued") {
				t.Error("it was handed secrets")
			}
			ended(t, g)
		})
		t.Run(name+" at the second", func(t *testing.T) {
			g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
			g.upTo(token.T3)
			if why := g.admit(); why != "" {
				t.Fatal(why)
			}
			g.say()
			w.refusedOnce(name, "vm.aborted", event.AuditFailed, func() {
				if _, why := g.say(func(up *agentmsg.Up) { g.withAudit(up); c.add(up.Audit) }); why != event.AuditFailed {
					t.Errorf("said: %q", why)
				}
			})
			if slices.Contains(w.events(g.id), "vm.computing") {
				t.Error("it computed")
			}
			ended(t, g)
		})
	}
}

// TestTheHostsReasonIsKept: what a host ended a VM for is why it ended, if a host can know
// it; anything else says no more than that it ended.
func TestTheHostsReasonIsKept(t *testing.T) {
	t.Parallel()
	w := newWorld(t, roomy)
	w.template("debian")
	for said, want := range map[event.Reason]event.Reason{
		event.ChannelMisuse: event.ChannelMisuse, event.TPMCommandRefused: event.TPMCommandRefused, event.TPMBusy: event.TPMBusy,
		event.LoaderFailed: event.LoaderFailed, event.BootServerFailed: event.BootServerFailed, event.ServerUntrusted: event.ServerUntrusted,
		event.SignatureInvalid: event.SignatureInvalid, event.DigestMismatch: event.DigestMismatch, event.DeadlinePassed: event.DeadlinePassed,
		event.QuoteRefused: event.QuoteRefused, event.Released: event.VMStopped, event.AuditFailed: event.VMStopped, "": event.VMStopped, "made-up": event.VMStopped,
	} {
		g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
		w.refusedOnce(string(said), "vm.aborted", want, func() {
			w.host.stop(g.id, said)
			w.waitPhase(g.id, reservation.Aborted)
		})
		list := w.journal("vm.aborted")
		if detail := list[len(list)-1].Detail["detail"]; said == want && !strings.Contains(detail, `"what the host saw"`) {
			t.Errorf("%s: the journal says %q", said, detail)
		}
		w.waitGone(g.id)
		w.waitFlows(g.id)
		w.call("DELETE", "/v1/vms/web", nil, nil)
	}
}

// TestLoginsOfStrangers: failed logins at the unlock port that were not the orchestrator's are
// in the journal, although they end no VM.
func TestLoginsOfStrangers(t *testing.T) {
	t.Parallel()
	w := newWorld(t, roomy)
	w.template("debian")
	for name, failed := range map[string]int{"quiet": len(unlock.Kinds()), "tried": len(unlock.Kinds()) + 3} {
		g := w.take(w.create(api.CreateVM{Name: name}).ID)
		g.tweak.failed = failed
		g.pass()
		var told []string
		for _, e := range w.journal("login.refused") {
			if e.Reservation == g.id {
				told = append(told, string(e.Reason)+" "+e.Detail["count"])
			}
		}
		if want := map[string][]string{"tried": {"ssh-failed 3"}}[name]; !slices.Equal(told, want) {
			t.Errorf("%s: the journal says %q, want %q", name, told, want)
		}
		w.call("DELETE", "/v1/vms/"+name, nil, nil)
		w.waitGone(g.id)
	}
}

// TestTheAgentsLastWord: an agent that gives up says why by way of its host. What is an outage
// counts under its own reason; anything else ends no VM for good by the word of host and VM.
func TestTheAgentsLastWord(t *testing.T) {
	t.Parallel()
	w := newWorld(t, roomy)
	w.template("debian")
	for said, want := range map[event.Reason]event.Reason{
		event.ServerUntrusted: event.ServerUntrusted, event.GatewayFailed: event.GatewayFailed, event.SSHFailed: event.SSHFailed, event.BootServerFailed: event.BootServerFailed,
		event.AdmissionRefused: event.VMStopped, event.ReportRefused: event.VMStopped, event.AuditFailed: event.VMStopped, event.DiskRefused: event.VMStopped,
		event.GuestPoweredOff: event.VMStopped, "made-up": event.VMStopped,
	} {
		g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
		w.refusedOnce(string(said), "vm.aborted", want, func() {
			w.host.giveUp(g.id, said)
			w.waitPhase(g.id, reservation.Aborted)
		})
		w.waitGone(g.id)
		w.call("DELETE", "/v1/vms/web", nil, nil)
	}
}

// TestAComputingVMAccusesNobody: once it computes, no agent is left to give up. What then comes as
// its last word, of whoever took the VM over, counts for no more than its end.
func TestAComputingVMAccusesNobody(t *testing.T) {
	t.Parallel()
	w := newWorld(t, roomy)
	w.template("debian")
	for said := range byAgent {
		g := w.take(w.create(api.CreateVM{Name: "web", Restart: string(reservation.Never)}).ID)
		g.pass()
		w.host.giveUp(g.id, said)
		if vm := w.waitPhase("web", reservation.Stopped); vm.Reason != event.VMStopped {
			t.Errorf("%s: the VM stopped for %s", said, vm.Reason)
		}
		w.call("DELETE", "/v1/vms/web", nil, nil)
		w.waitGone(g.id)
	}
}
