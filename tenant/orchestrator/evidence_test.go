package orchestrator

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
	"foothold/tenant/verify"
)

// pinned is what an auditor of this world has: nothing of the orchestrator's.
func (w *world) pinned() verify.Pinned {
	w.t.Helper()
	inventoryKey, err := publicKey(w.conf.InventoryKey)
	check(w.t, err)
	platformKey, err := publicKey(w.conf.PlatformKey)
	check(w.t, err)
	makers, err := verify.OpenManufacturers(w.conf.TPMRoots)
	check(w.t, err)
	return verify.Pinned{InventoryKey: inventoryKey, PlatformKey: platformKey, Makers: makers, Profile: w.conf.Profile, Now: time.Now}
}

func (w *world) evidence(name, query string) (e api.Evidence) {
	w.t.Helper()
	if status, p := w.call("GET", "/v1/vms/"+name+"/evidence"+query, nil, &e); status != http.StatusOK {
		w.t.Fatalf("evidence of %s: %d %+v", name, status, p)
	}
	return e
}

// bundleOf fetches a verdict's bundle as an operator does.
func (w *world) bundleOf(name string, sum digest.SHA256) []byte {
	w.t.Helper()
	resp := must[*http.Response](w.t)(w.operator.Get(w.api + "/v1/vms/" + name + "/evidence/" + sum.String()))
	defer resp.Body.Close()
	data := must[[]byte](w.t)(io.ReadAll(resp.Body))
	if resp.StatusCode != http.StatusOK {
		w.t.Fatalf("bundle %s: %d %s", sum.Short(), resp.StatusCode, data)
	}
	return data
}

// audited audits all evidence of a VM's latest start, off line.
func (w *world) audited(name string) (list []verify.Audited, chain verify.AuditedChain) {
	w.t.Helper()
	p, e := w.pinned(), w.evidence(name, "")
	var links []verify.Link
	for _, v := range e.Verdicts {
		links = append(links, verify.Link{Role: v.Role, Reservation: e.ID, Start: e.Start, Host: v.Host, At: v.At, Accepted: v.Accepted, Previous: v.Previous, Record: v.Record, Unjudged: v.Unjudged})
		if !v.Kept {
			continue
		}
		b := must[*verify.Bundle](w.t)(verify.ParseBundle(w.bundleOf(name, v.Digest)))
		a := must[verify.Audited](w.t)(p.Audit(b))
		if !a.Holds() || a.Digest != v.Digest || a.Derived != v.Accepted {
			w.t.Errorf("%s: %+v", v.Role, a)
		}
		list = append(list, a)
	}
	chain = verify.AuditChain(list, links)
	if !chain.Holds() || !chain.Complete {
		w.t.Errorf("chain %+v", chain)
	}
	return list, chain
}

func complete(t *testing.T, findings []event.FailedCheck) {
	t.Helper()
	if len(findings) == 0 {
		t.Error("no findings")
	}
	for _, f := range findings {
		if f.Check == "" || f.Component == "" || f.Expected == "" || f.Seen == "" || f.Do == "" {
			t.Errorf("finding %+v", f)
		}
	}
}

// TestEvidence: every decision about a VM, from its boot to the refusal that ends it, leaves
// a bundle from which anybody with the public keys derives the same; those of a start are
// one chain, and no secret is in them.
func TestEvidence(t *testing.T) {
	w := newWorld(t)
	w.template("debian")
	g := w.computing("web")
	var v api.Verdict
	if status, p := w.call("POST", "/v1/vms/web/attest", nil, &v); status != http.StatusOK || !v.Accepted || v.Role != evidence.RoleWatch {
		t.Fatalf("attest: %d %+v %+v", status, p, v)
	}
	if vm := w.vm("web"); vm.Verdict != v.Digest || !vm.Attested.Equal(v.At) || len(vm.Findings) != 0 {
		t.Errorf("VM %+v after verdict %+v", vm, v)
	}
	list, chain := w.audited("web")
	var roles []string
	for _, a := range list {
		roles = append(roles, a.Role)
		if !a.Derived {
			t.Errorf("%s: %v", a.Role, a.Findings)
		}
	}
	if !slices.Equal(roles, []string{evidence.RoleBoot, evidence.RoleUnlock, evidence.RoleConnect, evidence.RoleWatch}) || chain.Last != v.Digest {
		t.Errorf("roles %v, chain %+v", roles, chain)
	}

	// 2. The host starts other software: asked for, the refusal is shown whole, and ends the VM.
	w.host.measureRogue()
	status, p := w.call("POST", "/v1/vms/web/attest", nil, &v)
	if status != http.StatusForbidden || p.Reason != event.QuoteRefused {
		t.Fatalf("attest of a changed host: %d %+v", status, p)
	}
	complete(t, p.Findings)
	vm := w.waitPhase("web", reservation.Aborted)
	complete(t, vm.Findings)
	var e api.Explanation
	w.call("GET", "/v1/vms/web/explain", nil, &e)
	if vm.Reason != event.QuoteRefused || !slices.Equal(e.Findings, p.Findings) || !slices.Equal(vm.Findings, p.Findings) {
		t.Errorf("shown are %+v, explained %+v, answered %+v", vm.Findings, e.Findings, p.Findings)
	}
	w.waitGone(g.id)
	w.waitFlows(g.id)
	list, _ = w.audited("web")
	last := list[len(list)-1]
	if len(list) != 5 || last.Derived || !slices.Equal(last.Findings, p.Findings) {
		t.Errorf("the refusal's bundle: %+v, want %+v", last.Findings, p.Findings)
	}
	if kept := w.journal("evidence.kept"); len(kept) != 1 || kept[0].Detail["verdict"] != last.Digest.String() {
		t.Errorf("journal %+v", kept)
	}

	// 3. No secret of the start is in what was exported.
	for _, a := range list {
		data := w.bundleOf("web", a.Digest)
		for what, s := range map[string]string{"T2": g.hand.User, "T3": must[string](t)(tokenText(g)), "password": string(g.hand.Password.Reveal())} {
			if s != "" && bytes.Contains(data, []byte(s)) {
				t.Errorf("the bundle of %s holds %s", a.Role, what)
			}
		}
		if text := string(data); strings.Contains(text, "fht1_") || strings.Contains(text, "fht2_") || strings.Contains(text, "fht3_") {
			t.Errorf("the bundle of %s holds a token", a.Role)
		}
	}

	// 4. What is not there is refused.
	for path, want := range map[string]int{
		"/v1/vms/web/evidence?start=2":                            http.StatusNotFound,
		"/v1/vms/web/evidence/" + digest.Of([]byte("x")).String(): http.StatusNotFound,
		"/v1/vms/web/evidence/x":                                  http.StatusBadRequest,
		"/v1/vms/none/evidence":                                   http.StatusNotFound,
	} {
		if status, p := w.call("GET", path, nil, nil); status != want || p.Next == "" {
			t.Errorf("%s: %d %+v", path, status, p)
		}
	}
	if status, p := w.call("POST", "/v1/vms/web/attest", nil, nil); status != http.StatusConflict || p.Reason != event.WrongPhase {
		t.Errorf("attest of an ended VM: %d %+v", status, p)
	}
}

func tokenText(g *guest) (string, error) {
	data, err := json.Marshal(g.hand.T3)
	return strings.Trim(string(data), `"`), err
}

// TestEvidenceOfARefusedBoot: a VM that was never admitted leaves its evidence, also after
// the orchestrator began anew.
func TestEvidenceOfARefusedBoot(t *testing.T) {
	w := newWorld(t)
	w.template("debian")
	w.host.measureRogue()
	g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
	if why := g.boot(); why != event.QuoteRefused {
		t.Fatalf("boot: %q", why)
	}
	vm := w.waitPhase("web", reservation.Aborted)
	complete(t, vm.Findings)
	w.restart()
	list, _ := w.audited("web")
	if len(list) != 1 || list[0].Role != evidence.RoleBoot || list[0].Derived || !slices.Equal(list[0].Findings, vm.Findings) {
		t.Errorf("%+v", list)
	}
}

// TestNonceAfterARestart: a nonce that served before the orchestrator began anew serves
// nobody after it.
func TestNonceAfterARestart(t *testing.T) {
	w := newWorld(t)
	w.template("debian")
	g := w.computing("web")
	use := func(nonce []byte) error {
		return w.o.ledger.Write(t.Context(), func(t *ledger.Tx) error { return t.UseNonce(nonce, g.id, 1, evidence.RoleWatch, time.Hour) })
	}
	nonces := make([][]byte, 2)
	check(t, w.o.ledger.Write(t.Context(), func(t *ledger.Tx) (err error) {
		for i := range nonces {
			if nonces[i], err = t.NewNonce(g.id, 1, evidence.RoleWatch); err != nil {
				return err
			}
		}
		return nil
	}))
	check(t, use(nonces[0]))
	w.restart()
	w.vm("web") // it serves
	if err := use(nonces[0]); event.ReasonOf(err) != event.QuoteRefused {
		t.Errorf("a nonce that was used: %v", err)
	}
	check(t, use(nonces[1]))
	if err := use(nonces[1]); event.ReasonOf(err) != event.QuoteRefused {
		t.Errorf("twice after the restart: %v", err)
	}
}

// TestHostSilentForTooLong: a host that declines to quote, or lets the question hang, is
// borne for a while and no longer; then the VM's rules and tunnel are closed, and it may
// start again, from act 2.
func TestHostSilentForTooLong(t *testing.T) {
	for name, silence := range map[string]func(*fakeHost){
		"it declines": func(h *fakeHost) { h.failing("POST /v1/quote", 1<<30) },
		"it hangs":    func(h *fakeHost) { h.muteNext("POST /v1/quote", false) },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(c *Config) { c.Limits.AttestEvery, c.Limits.AttestWithin = time.Second, 4*time.Second })
			w.template("debian")
			g := w.computing("web")
			silence(w.host)
			borne := w.vm("web").Attested.Add(4 * time.Second)
			w.wait("web", "explained", func(vm api.VM) bool {
				var e api.Explanation
				w.call("GET", "/v1/vms/web/explain", nil, &e)
				return slices.ContainsFunc(e.Findings, func(f event.FailedCheck) bool { return f.Check == "time" && f.Seen != "" && f.Do != "" })
			})
			if vm := w.vm("web"); vm.Phase != string(reservation.Computing) {
				t.Errorf("it was %s before it was told of", vm.Phase)
			}
			vm := w.wait("web", "stopped", func(vm api.VM) bool { return vm.Phase == string(reservation.Stopped) })
			if vm.Reason != event.AttestationLate || time.Now().Before(borne) {
				t.Errorf("ended with %q (%s) %v before it was late", vm.Reason, vm.Explanation, time.Until(borne))
			}
			complete(t, vm.Findings)
			w.waitFlows(g.id)
			for _, v := range w.evidence("web", "?start=1").Verdicts {
				if !v.Accepted && !v.Unjudged {
					t.Errorf("silence was judged as evidence: %+v", v)
				}
			}
			w.host.failing("POST /v1/quote", 0)
			w.ask("start", "web")
			if vm := w.wait("web", "started again", func(vm api.VM) bool { return vm.Start == 2 }); len(vm.Findings) != 0 {
				t.Errorf("the next start has the findings of the last: %+v", vm.Findings)
			}
		})
	}
}

// TestSilenceIsBorne: a host that does not quote for a moment loses nothing.
func TestSilenceIsBorne(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits.AttestEvery, c.Limits.AttestWithin = time.Second, 20*time.Second })
	w.template("debian")
	w.computing("web")
	w.host.failing("POST /v1/quote", 2)
	before := w.vm("web").Attested
	w.wait("web", "quoted again", func(vm api.VM) bool { return vm.Attested.After(before) && len(w.journal("host.silent")) > 0 })
	if vm := w.vm("web"); vm.Phase != string(reservation.Computing) {
		t.Errorf("the VM is %s: %s", vm.Phase, vm.Explanation)
	}
}

// TestAttestLimits: no configuration turns the watch off.
func TestAttestLimits(t *testing.T) {
	w := newWorld(t)
	w.template("debian") // it serves
	for _, c := range []struct{ every, within time.Duration }{
		{0, 0}, {0, time.Minute}, {time.Minute, 0}, {time.Minute, time.Minute}, {2 * time.Hour, 3 * time.Hour}, {time.Minute, 48 * time.Hour}, {-time.Minute, time.Minute}, {time.Millisecond, time.Minute},
	} {
		conf := w.conf
		conf.Limits.AttestEvery, conf.Limits.AttestWithin = c.every, c.within
		if err := conf.Validate(); err == nil || !strings.Contains(fmt.Sprint(err), "attest_every") {
			t.Errorf("every %v within %v: %v", c.every, c.within, err)
		}
	}
}
