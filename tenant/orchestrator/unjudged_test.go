package orchestrator

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/token"
	"foothold/protocol/upstream"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
	"foothold/tenant/verify"
)

// holdsNo looks for a secret in exported evidence, as it is and in base64.
func holdsNo(t *testing.T, data []byte, what, secret string) {
	t.Helper()
	if secret == "" {
		return
	}
	forms := []string{secret}
	for off := range 3 {
		text := base64.StdEncoding.EncodeToString([]byte(strings.Repeat("-", off) + secret))
		forms = append(forms, text[8:len(text)-8])
	}
	for _, f := range forms {
		if bytes.Contains(data, []byte(f)) {
			t.Errorf("a bundle holds %s", what)
		}
	}
}

// unjudged is the one refusal without a judgement of a VM's latest start, audited off line.
func (w *world) unjudged(name string, g *guest) verify.Audited {
	w.t.Helper()
	list, _ := w.audited(name)
	n := slices.IndexFunc(list, func(a verify.Audited) bool { return a.Unjudged })
	if n < 0 || n != len(list)-1 {
		w.t.Fatalf("no refusal without a judgement at the end of %+v", list)
	}
	for _, a := range list {
		data := w.bundleOf(name, a.Digest)
		for _, k := range []token.Kind{token.T1, token.T2, token.T3} {
			if tok := g.own(k); !tok.IsZero() {
				holdsNo(w.t, data, k.String(), tok.Reveal())
			}
		}
		holdsNo(w.t, data, "the password", string(g.hand.Password.Reveal()))
	}
	return list[n]
}

// TestUnjudgedRefusals: each refusal that comes before there is a quote to judge ends its
// start, and leaves one bundle, whatever is sent afterwards; its findings are shown.
func TestUnjudgedRefusals(t *testing.T) {
	t.Parallel()
	quick := func(c *Config) {
		roomy(c)
		c.Limits.Booting, c.Limits.Unlocking = 5*time.Second, 5*time.Second
	}
	late := func(c *Config) { roomy(c); c.Limits.AttestEvery, c.Limits.AttestWithin = time.Second, 3*time.Second }
	open := func(g *guest) upstream.OpenResponse {
		opened, why := g.open(g.vm.t1)
		if why != "" {
			t.Fatal(why)
		}
		return opened
	}
	for name, c := range map[string]struct {
		conf  func(*Config)
		do    func(w *world, g *guest)
		cause verify.Cause
		role  string
		want  event.Reason
		phase reservation.Phase
	}{
		"a nonce that served": {roomy, func(w *world, g *guest) {
			opened := open(g)
			check(t, w.o.ledger.Write(t.Context(), func(t *ledger.Tx) error { return t.UseNonce(opened.Nonce, g.id, 1, evidence.RoleBoot, time.Hour) }))
			g.attest(opened)
		}, verify.CauseNonce, evidence.RoleBoot, event.QuoteRefused, reservation.Aborted},
		"a nonce that is not ours": {roomy, func(w *world, g *guest) {
			opened := open(g)
			check(t, w.o.ledger.Write(t.Context(), func(t *ledger.Tx) error {
				return t.ChangeStart(g.id, 1, func(s *ledger.Start) { s.BootNonce = bytes.Repeat([]byte{7}, evidence.NonceLen) })
			}))
			g.attest(opened)
		}, verify.CauseNonce, evidence.RoleBoot, event.QuoteRefused, reservation.Aborted},
		"a second verdict": {roomy, func(w *world, g *guest) {
			opened := open(g)
			g.attest(opened)
			g.attest(opened)
		}, verify.CauseAgain, evidence.RoleBoot, event.QuoteRefused, reservation.Aborted},
		"another key": {roomy, func(w *world, g *guest) {
			opened := open(g)
			g.tweak.key = w.stranger().key.Public().(ed25519.PublicKey)
			g.attest(opened)
		}, verify.CauseVMKey, evidence.RoleBoot, event.QuoteRefused, reservation.Aborted},
		"a session that failed": {roomy, func(w *world, g *guest) {
			done := upstream.DoneRequest{Reservation: open(g).Reservation, Reason: event.TPMCommandRefused, Detail: "the HMAC of the answer is wrong " + g.vm.t1.Reveal()}
			w.post(context.Background(), "bootserver", upstream.PathBootDone, done, nil)
		}, verify.CauseSession, evidence.RoleBoot, event.TPMCommandRefused, reservation.Aborted},
		"a host that does not answer at the boot": {roomy, func(w *world, g *guest) {
			w.host.failing("GET /v1/platform", 9)
			g.attest(open(g))
		}, verify.CauseSilent, evidence.RoleBoot, event.HostRefused, reservation.Aborted},
		"logs that cannot be read": {roomy, func(w *world, g *guest) {
			w.host.garble("GET /v1/platform")
			g.attest(open(g))
		}, verify.CauseAnswer, evidence.RoleBoot, event.HostRefused, reservation.Aborted},
		"a quote that cannot be read": {roomy, func(w *world, g *guest) {
			g.upTo(token.T2)
			w.host.garble("POST /v1/quote")
			g.ready()
		}, verify.CauseAnswer, evidence.RoleUnlock, event.HostRefused, reservation.Aborted},
		"a host that declines": {roomy, func(w *world, g *guest) {
			g.upTo(token.T2)
			w.host.failing("POST /v1/quote", 9)
			g.ready()
		}, verify.CauseSilent, evidence.RoleUnlock, event.HostRefused, reservation.Aborted},
		"a host that declines at the admission": {roomy, func(w *world, g *guest) {
			g.upTo(token.T3)
			w.host.failing("POST /v1/quote", 9)
			g.admit()
		}, verify.CauseSilent, evidence.RoleConnect, event.HostRefused, reservation.Aborted},
		"no boot quote in time": {quick, func(w *world, g *guest) { open(g) }, verify.CauseLate, evidence.RoleBoot, event.DeadlinePassed, reservation.Aborted},
		"no good quote in time": {late, func(w *world, g *guest) {
			g.pass()
			w.host.failing("POST /v1/quote", 1<<30)
		}, verify.CauseLate, evidence.RoleWatch, event.AttestationLate, reservation.Stopped},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, c.conf)
			w.template("debian")
			g := w.take(w.create(api.CreateVM{Name: "web", Restart: string(reservation.Never)}).ID)
			c.do(w, g)
			vm := w.waitPhase("web", c.phase)
			if strings.Contains(vm.Explanation, "fht1_") {
				t.Errorf("its explanation holds a token: %q", vm.Explanation)
			}
			if vm.Reason != c.want {
				t.Errorf("ended with %q (%s), want %q", vm.Reason, vm.Explanation, c.want)
			}
			w.waitFlows(g.id)
			a := w.unjudged("web", g)
			if a.Cause != c.cause || a.Role != c.role {
				t.Errorf("its evidence is of %s quote, %s", a.Role, a.Cause)
			}
			complete(t, vm.Findings)
			var e api.Explanation
			w.call("GET", "/v1/vms/web/explain", nil, &e)
			if !slices.Equal(vm.Findings, a.Findings) || !slices.Equal(e.Findings, a.Findings) {
				t.Errorf("shown %+v, explained %+v, kept %+v", vm.Findings, e.Findings, a.Findings)
			}
			if kept := w.journal("evidence.kept"); len(kept) != 1 || kept[0].Detail["verdict"] != a.Digest.String() || kept[0].Detail["unjudged"] != string(c.cause) {
				t.Errorf("journal %+v", kept)
			}

			// Whatever comes now adds nothing, and a stopped VM is not ended for it when the
			// orchestrator begins anew.
			for range 3 {
				g.attest(upstream.OpenResponse{Reservation: g.id, Nonce: make([]byte, evidence.NonceLen)})
				w.post(context.Background(), "bootserver", upstream.PathBootDone, upstream.DoneRequest{Reservation: g.id, Reason: event.TPMBusy}, nil)
				w.o.abort(t.Context(), g.id, 1, bootUnjudged(verify.CauseAgain, ledger.Start{}, upstream.VerdictRequest{}, event.Refuse(event.QuoteRefused, "late")))
			}
			before := len(w.evidence("web", "?start=1").Verdicts)
			w.restart()
			if again := w.unjudged("web", g); again.Digest != a.Digest || len(w.evidence("web", "?start=1").Verdicts) != before {
				t.Errorf("%+v, was %+v", again, a)
			}
			if vm := w.vm("web"); vm.Phase != string(c.phase) || vm.Reason != c.want {
				t.Errorf("after a restart it is %s: %s", vm.Phase, vm.Explanation)
			}
			if f := w.fsck(); slices.ContainsFunc(f.Findings, func(m api.Finding) bool { return strings.Contains(m.Code, "evidence") }) {
				t.Errorf("fsck: %+v", f.Findings)
			}
		})
	}
}

// TestTokensInARefusal: a boot server that hides tokens in what it sends gets none of them
// into the evidence.
func TestTokensInARefusal(t *testing.T) {
	t.Parallel()
	w := newWorld(t, roomy)
	w.template("debian")
	g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
	if why := g.boot(); why != "" {
		t.Fatal(why)
	}
	t2 := []byte(g.unique.T2.Reveal()) // open still
	hidden := append([]byte("x"), t2...)
	in := upstream.VerdictRequest{Reservation: g.id, Source: g.address(), ExporterHash: digest.Of(t2), ServerLeaf: hidden, LoaderLeaf: t2, VMKey: g.public(),
		Quote: evidence.Quote{Attest: hidden, Signature: t2}}
	if why := w.post(context.Background(), "bootserver", upstream.PathBootVerdict, in, nil); why != event.QuoteRefused {
		t.Fatalf("a second verdict: %q", why)
	}
	w.waitPhase("web", reservation.Aborted)
	if a := w.unjudged("web", g); !strings.Contains(strings.Join(a.Unproved, "; "), fmt.Sprintf("%d bytes", 2*len(hidden)+2*len(t2))) {
		t.Errorf("%+v", a)
	}
}

// TestUnjudgedOnAFullDisk: a refusal that comes while the disk is full ends the start as soon
// as there is room, with its evidence.
func TestUnjudgedOnAFullDisk(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config) { c.Limits.Lease = time.Minute })
	w.template("debian")
	disk := w.ontoDisk()
	g := w.computing("web")
	_, s, err := w.o.row(t.Context(), g.id)
	check(t, err)
	w.fillUp(disk)
	w.o.abort(t.Context(), g.id, 1, &unjudged{err: event.Refuse(event.AttestationLate, "test"), logs: evidence.Platform{Kernel: []byte("large")},
		facts: verify.Unjudged{Role: evidence.RoleWatch, Cause: verify.CauseLate, Since: s.Attested, Until: s.Attested.Add(time.Millisecond)}})
	if w.o.owesEnd(g.id, 1) == nil {
		t.Fatal("the disk is not full")
	}
	disk.Free(t)
	vm := w.wait("web", "stopped", func(vm api.VM) bool { return vm.Phase == string(reservation.Stopped) })
	if vm.Reason != event.AttestationLate {
		t.Errorf("%+v", vm)
	}
	complete(t, vm.Findings)
	w.waitFlows(g.id)
	if a := w.unjudged("web", g); a.Cause != verify.CauseLate || !slices.Equal(a.Findings, vm.Findings) {
		t.Errorf("%+v", a)
	}
}

// TestUnjudgedIsNoStoredEvidence: what stands for a host's answer is the newest that it gave,
// not a refusal for giving none.
func TestUnjudgedIsNoStoredEvidence(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config) { c.Limits.AttestEvery, c.Limits.AttestWithin = time.Second, 3*time.Second })
	w.template("debian")
	g := w.computing("web")
	w.host.failing("POST /v1/quote", 1<<30)
	w.wait("web", "stopped", func(vm api.VM) bool { return vm.Phase == string(reservation.Stopped) })
	a := w.unjudged("web", g)
	check(t, w.o.ledger.Read(t.Context(), func(tx *ledger.Tx) error {
		newest, err := tx.NewestBundle(g.id, 1)
		if newest == a.Digest {
			t.Error("a refusal without a judgement is taken for a host's evidence")
		}
		return err
	}))
	var j api.Judged
	if status, p := w.call("GET", "/v1/hosts/host-1/platform", nil, &j); status != http.StatusOK || j.Problem == "" || j.Evidence != api.EvidenceStored || !j.Accepted {
		t.Errorf("what the host measures: %d %+v %+v", status, p, j)
	}
}
