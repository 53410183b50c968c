package orchestrator

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"foothold/internal/tpm"
	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/hostaudit"
	"foothold/protocol/inventory"
	"foothold/protocol/signed"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"

	"github.com/google/go-tpm/tpm2"
)

// audit orders one and makes the report that a medium makes at the host.
func (w *world) audit(change func(*hostaudit.Report)) signed.Envelope {
	w.t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	check(w.t, err)
	var o hostaudit.Order
	body, err := json.Marshal(api.OrderHostAudit{Key: public})
	check(w.t, err)
	if code, p := w.call("POST", "/v1/hosts/host-1/audits", body, &o); code != 201 {
		w.t.Fatalf("order: %d %+v", code, p)
	}
	h := w.host
	h.tpmMu.Lock()
	defer h.tpmMu.Unlock()
	r := hostaudit.Report{Number: o.Number, Host: o.Host, EK: h.entry.EK, AIK: h.entry.AIK, Session: h.entry.Session, Asset: "a1"}
	r.Answer, err = tpm.Activate(h.dev, h.aik, o.Blob, o.Secret)
	check(w.t, err)
	session, err := tpm.ReadKey(h.dev, inventory.SessionHandle)
	check(w.t, err)
	qualifying := o.Qualifying()
	rsp, err := tpm2.Certify{ObjectHandle: session.Auth(tpm2.PasswordAuth(nil)), SignHandle: h.aik.Auth(tpm2.PasswordAuth(nil)),
		QualifyingData: tpm2.TPM2BData{Buffer: qualifying[:]}, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}}.Execute(h.dev)
	check(w.t, err)
	r.Certify, r.Signed = rsp.CertifyInfo.Bytes(), tpm2.Marshal(rsp.Signature)
	if change != nil {
		change(&r)
	}
	payload, err := json.Marshal(r)
	check(w.t, err)
	return signed.Seal(private, signed.HostAudit, payload)
}

// judge hands a report in.
func (w *world) judge(env signed.Envelope) (a api.HostAudit, code int, p api.Problem) {
	w.t.Helper()
	body, err := json.Marshal(env)
	check(w.t, err)
	code, p = w.call("POST", "/v1/hosts/host-1/audits/report", body, &a)
	return a, code, p
}

// TestHostAuditDecidesStanding: a failed audit takes a host's standing at once, whatever it
// quotes, tells it for every VM there, and holds over a restart until a later one is good.
func TestHostAuditDecidesStanding(t *testing.T) {
	w := newWorld(t, func(conf *Config) { conf.HostLost = lostAlert })
	w.template("debian")
	before := w.take(w.create(api.CreateVM{Name: "before"}).ID)
	a, code, p := w.judge(w.audit(func(r *hostaudit.Report) { r.EK = []byte("another TPM's") }))
	if code != 200 || a.Good || len(a.Checks) != 1 || a.Checks[0].Component != "endorsement certificate" || a.Checks[0].Do == "" {
		t.Fatalf("%d %+v %+v", code, p, a)
	}
	if kinds := w.events("before"); !slices.Contains(kinds, "vm.host-audit-failed") {
		t.Errorf("it is not told for the VM that runs there: %q", kinds)
	}
	if why := before.boot(); why != event.HostAuditFailed {
		t.Errorf("its boot quote, which is good: %q", why)
	}
	if vm := w.waitPhase("before", reservation.Aborted); vm.Reason != event.HostAuditFailed || !strings.Contains(vm.Explanation, "audit from trusted media failed") {
		t.Errorf("it ended with %q: %s", vm.Reason, vm.Explanation)
	}
	if kinds := w.events("before"); slices.Contains(kinds, "components.released") || !slices.Contains(kinds, "quote.accepted") {
		t.Errorf("it got components there: %q", kinds)
	}
	refused := func(name string) {
		t.Helper()
		vm := w.create(api.CreateVM{Name: name})
		if got := w.waitPhase(vm.ID, reservation.Aborted); got.Reason != event.NoHost {
			t.Errorf("%s ended with %q: %s", name, got.Reason, got.Explanation)
		}
		if w.host.has(vm.ID) {
			t.Errorf("the host got %s", name)
		}
	}
	if err := w.o.ledger.Read(t.Context(), func(tx *ledger.Tx) error { return w.o.basis().mayHost(tx, "host-1") }); event.ReasonOf(err) != event.HostAuditFailed {
		t.Errorf("a further start there: %v", err)
	}
	refused("after")
	w.restart()
	refused("after-a-restart")
	var hosts []api.Host
	w.call("GET", "/v1/hosts", nil, &hosts)
	if len(hosts) != 1 || !strings.Contains(hosts[0].Standing, "audit from trusted media failed") {
		t.Errorf("standing: %+v", hosts)
	}
	if a, code, p := w.judge(w.audit(nil)); code != 200 || !a.Good || a.Asset != "a1" || a.Inventory != "a1" {
		t.Fatalf("%d %+v %+v", code, p, a)
	}
	w.waitPhase(w.create(api.CreateVM{Name: "again"}).ID, reservation.Booting)
	var list []api.HostAudit
	if code, p := w.call("GET", "/v1/hosts/host-1/audits", nil, &list); code != 200 || len(list) != 2 || !list[0].Good || list[1].Good || len(list[1].Checks) != 1 {
		t.Errorf("%d %+v %+v", code, p, list)
	}
}

// TestHostAuditRefusals: what is no report on an open order changes nothing.
func TestHostAuditRefusals(t *testing.T) {
	w := newWorld(t)
	env := w.audit(nil)
	_, key, err := ed25519.GenerateKey(rand.Reader)
	check(t, err)
	forged := signed.Seal(key, signed.HostAudit, env.Payload)
	if _, _, p := w.judge(forged); p.Reason != event.SignatureInvalid {
		t.Errorf("a forged report: %+v", p)
	}
	var unknown hostaudit.Report
	check(t, json.Unmarshal(env.Payload, &unknown))
	unknown.Number = strings.Repeat("0d", 16)
	payload, err := json.Marshal(unknown)
	check(t, err)
	if _, _, p := w.judge(signed.Seal(key, signed.HostAudit, payload)); p.Reason != event.BadRequest {
		t.Errorf("a report on no order: %+v", p)
	}
	if a, code, p := w.judge(env); code != 200 || !a.Good {
		t.Fatalf("the report itself: %d %+v", code, p)
	}
	if _, _, p := w.judge(env); p.Reason != event.BadRequest || !strings.Contains(p.Detail, "has had its report") {
		t.Errorf("the same report again: %+v", p)
	}
	body, err := json.Marshal(api.OrderHostAudit{Key: make([]byte, 31)})
	check(t, err)
	for path, reason := range map[string]event.Reason{"/v1/hosts/host-9/audits": event.NoHost, "/v1/hosts/host-1/audits": event.BadRequest} {
		if _, p := w.call("POST", path, body, nil); p.Reason != reason {
			t.Errorf("order at %s: %+v", path, p)
		}
	}
}

// TestNothingIsReleasedAtAHostOutOfStanding: whatever its quote said before, nothing is
// released to a VM whose host was barred, or failed an audit, since.
func TestNothingIsReleasedAtAHostOutOfStanding(t *testing.T) {
	w := newWorld(t, func(conf *Config) { conf.HostLost = lostAlert })
	w.template("debian")
	g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
	g.boot()
	g.ready() // nobody opens the door: it stays unlocking
	w.waitPhase("web", reservation.Unlocking)
	admitted, err := w.o.attestAgain(t.Context(), g.id, evidence.RoleUnlock)
	check(t, err)
	r, _, err := w.o.row(t.Context(), g.id)
	check(t, err)
	release := func(want event.Reason) {
		t.Helper()
		check(t, w.o.ledger.Read(t.Context(), func(tx *ledger.Tx) error {
			if _, err := w.o.permitted(tx, admitted, r, reservation.Unlocking); event.ReasonOf(err) != want {
				t.Errorf("permitted: %v, want %q", err, want)
			}
			return nil
		}))
	}
	barred := func(why string) {
		check(t, w.o.ledger.Write(t.Context(), func(tx *ledger.Tx) error {
			state, err := tx.Host("host-1")
			state.Barred = why
			return errors.Join(err, tx.PutHost("host-1", state))
		}))
	}
	release("")
	barred("its watch quote was refused")
	release(event.HostLost)
	barred("")
	release("")
	w.judge(w.audit(func(r *hostaudit.Report) { r.EK = []byte("another TPM's") }))
	release(event.HostAuditFailed)
}

// TestFailedAuditEndsWhatRunsThere: as host_lost says, at once, and it is told in the answer,
// the journal and of the VM.
func TestFailedAuditEndsWhatRunsThere(t *testing.T) {
	for policy, c := range map[string]struct {
		action string
		phase  reservation.Phase
	}{
		lostAlert:     {api.ActionNone, reservation.Computing},
		lostClose:     {api.ActionClosed, reservation.Stopped},
		lostTerminate: {api.ActionTerminated, reservation.Aborted},
	} {
		t.Run(policy, func(t *testing.T) {
			w := newWorld(t, func(conf *Config) { conf.HostLost = policy })
			w.template("debian")
			g := w.computing("web")
			a, code, p := w.judge(w.audit(func(r *hostaudit.Report) { r.EK = []byte("another TPM's") }))
			if code != 200 || len(a.Alerts) != 1 || a.Alerts[0].VM != "web" || a.Alerts[0].Reason != event.HostAuditFailed || a.Alerts[0].Action != c.action {
				t.Errorf("%d %+v: %+v", code, p, a.Alerts)
			}
			vm := w.waitPhase("web", c.phase)
			if vm.Reason != event.HostAuditFailed || !strings.Contains(vm.Explanation, "audit from trusted media failed") {
				t.Errorf("%q: %s", vm.Reason, vm.Explanation)
			}
			var e api.Explanation
			if w.call("GET", "/v1/vms/web/explain", nil, &e); e.Reason != event.HostAuditFailed {
				t.Errorf("explained: %+v", e)
			}
			if got := w.count("web", "vm.host-audit-failed"); got != 1 {
				t.Errorf("%d alerts", got)
			}
			if policy != lostAlert {
				w.waitFlows(g.id)
				w.waitGone(g.id)
				return
			}
			before, told := w.count("web", "quote.accepted"), ""
			if err := w.o.attestWatched(t.Context(), g.id, &told); err != nil || w.count("web", "quote.accepted") != before+1 {
				t.Errorf("it is not quoted any more: %v", err)
			}
		})
	}
}

// TestGoodAuditHeldBack: what an earlier order found clears no later failure, and the answer says so.
func TestGoodAuditHeldBack(t *testing.T) {
	w := newWorld(t)
	held := w.audit(nil)
	w.judge(w.audit(func(r *hostaudit.Report) { r.EK = []byte("another TPM's") }))
	if a, code, p := w.judge(held); code != 200 || !a.Good || !strings.Contains(a.Outdone, "audit from trusted media failed") {
		t.Errorf("%d %+v %+v", code, p, a)
	}
	if a, _, _ := w.judge(w.audit(nil)); !a.Good || a.Outdone != "" {
		t.Errorf("a later one: %+v", a)
	}
}

// TestHostAuditByTheCurrentInventory: a report that was judged by an inventory that counts no
// more when it would be stored is not stored, and is judged again.
func TestHostAuditByTheCurrentInventory(t *testing.T) {
	w := newWorld(t)
	env := w.audit(nil)
	stale := w.o.basis()
	var report hostaudit.Report
	check(t, json.Unmarshal(env.Payload, &report))
	var row ledger.HostAudit
	check(t, w.o.ledger.Read(t.Context(), func(tx *ledger.Tx) (err error) { row, err = tx.HostAudit(report.Number); return err }))
	var order hostaudit.Order
	check(t, json.Unmarshal(row.Order, &order))
	changed := w.host.entry
	changed.Session = changed.AIK // other keys than those in the TPM
	w.publish(2, changed)
	if _, err := w.o.auditBy(t.Context(), stale, row, order, env, "test"); !errors.Is(err, errRebased) {
		t.Errorf("by the inventory before: %v", err)
	}
	if a, code, p := w.judge(env); code != 200 || a.Good || len(a.Checks) == 0 {
		t.Errorf("by the current one: %d %+v %+v", code, p, a)
	}
}
