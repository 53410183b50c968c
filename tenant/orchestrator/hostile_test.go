package orchestrator

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"testing"
	"time"

	"foothold/protocol/agentmsg"
	"foothold/protocol/api"
	"foothold/protocol/audit"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/signed"
	"foothold/protocol/unlockmsg"
	"foothold/protocol/upstream"
	"foothold/protocol/zone"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
	"foothold/tenant/verify"
)

// sealed is the guest's next message, for sending more than once.
func (g *guest) sealed(change ...func(*agentmsg.Up)) signed.Envelope {
	g.seq++
	up := agentmsg.Up{Reservation: g.id, Start: 1, Seq: g.seq, Nonce: g.nonce}
	for _, f := range change {
		f(&up)
	}
	return signed.Seal(g.key, signed.AgentUp, must[[]byte](g.w.t)(json.Marshal(up)))
}

// auditIsDue lets the last passed audit lie an hour back.
func (w *world) auditIsDue(id string) {
	check(w.t, w.o.ledger.Write(w.t.Context(), func(t *ledger.Tx) error {
		return t.ChangeStart(id, 1, func(s *ledger.Start) { s.Audited = t.Now.Add(-time.Hour) })
	}))
}

// TestRepeatedMessageIsNoHeartbeat: a VM or a gateway that sends the last message over
// and over gets its answer, and neither a lease nor a passed audit.
func TestRepeatedMessageIsNoHeartbeat(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	g := w.computing("web")
	again := func(e signed.Envelope) agentmsg.Down {
		t.Helper()
		before := w.vm("web").Deadline
		down, why := g.relay(e)
		if why != "" {
			t.Fatalf("the same message again: %s", why)
		}
		if now := w.vm("web").Deadline; !now.Equal(before) {
			t.Errorf("it renewed the lease by %v", now.Sub(before))
		}
		return down
	}
	beat := g.sealed()
	if _, why := g.relay(beat); why != "" {
		t.Fatal(why)
	}
	again(beat)

	w.auditIsDue(g.id)
	if down := again(beat); down.Audit {
		t.Error("the repeated message is asked for an audit, which its own sender would not answer")
	}
	ask := g.sealed()
	if down, why := g.relay(ask); why != "" || !down.Audit {
		t.Fatalf("no audit is asked for: %s", why)
	}
	if down := again(ask); !down.Audit {
		t.Error("the question got lost with its answer")
	}
	answer := g.sealed(g.withAudit)
	if _, why := g.relay(answer); why != "" {
		t.Fatalf("audit: %s", why)
	}
	w.auditIsDue(g.id)
	again(answer)
	again(answer) // asked meanwhile or not: it holds an audit, of an earlier question
	_, s, err := w.o.row(t.Context(), g.id)
	check(t, err)
	if time.Since(s.Audited) < time.Minute {
		t.Error("an old audit passed again")
	}
	if down, why := g.say(); why != "" || !down.Audit {
		t.Errorf("the next message is not asked for the audit that is due: %s", why)
	}
}

// TestAuditBeforeTheQuestion: an audit that was made before it was asked for counts for
// nothing, however often it is sent.
func TestAuditBeforeTheQuestion(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
	g.boot()
	g.door()
	g.ready()
	w.waitPhase("web", reservation.Connecting)
	if why := g.admit(); why != "" {
		t.Fatal(why)
	}
	made := g.report(audit.OS, []byte{})
	early := g.sealed(func(up *agentmsg.Up) { up.Audit = &made })
	for range 3 {
		if down, why := g.relay(early); why != "" || !down.Audit {
			t.Fatalf("an early audit: %s %+v", why, down)
		}
	}
	if vm := w.vm("web"); vm.Phase != string(reservation.Connecting) {
		t.Errorf("the VM is %s", vm.Phase)
	}
	if _, why := g.say(g.withAudit); why != "" {
		t.Errorf("the audit that was asked for: %s", why)
	}
}

// TestNothingIsReleasedAfterTheEnd: the quote was accepted and the VM has ended since.
func TestNothingIsReleasedAfterTheEnd(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
	g.boot()
	g.ready() // nobody opens the door: it stays unlocking
	w.waitPhase("web", reservation.Unlocking)
	admitted, err := w.o.attestAgain(t.Context(), g.id, evidence.RoleUnlock)
	check(t, err)
	r, _, err := w.o.row(t.Context(), g.id)
	check(t, err)
	tpl, err := w.o.templateOf(t.Context(), r)
	check(t, err)
	headers := w.o.prepareHeaders(t.Context(), r)
	defer headers.discard()
	check(t, headers.wait(t.Context()))
	must[bool](t)(w.o.fail(t.Context(), g.id, 1, fate{Refusal: *event.Refuse(event.DeadlinePassed, "test")}))

	if _, _, err := w.o.releaseCertificate(t.Context(), admitted, r, unlockmsg.AuditReply{}); event.ReasonOf(err) != event.DeadlinePassed {
		t.Errorf("a certificate: %v", err)
	}
	if _, err := w.o.releaseSecrets(t.Context(), admitted, r, tpl, headers, issued{}); event.ReasonOf(err) != event.DeadlinePassed {
		t.Errorf("secrets: %v", err)
	}
	for phase, want := range map[reservation.Phase]event.Reason{reservation.Unlocking: event.DeadlinePassed, reservation.Booting: event.QuoteRefused} {
		check(t, w.o.ledger.Read(t.Context(), func(tx *ledger.Tx) error {
			if _, err := w.o.permitted(tx, admitted, r, phase); event.ReasonOf(err) != want {
				t.Errorf("%s: %v", phase, err)
			}
			return nil
		}))
	}
}

// TestVerdictAndReleaseAreOne: what a good verdict does not permit leaves the verdict
// stored; what fails by a fault of ours leaves nothing of either.
func TestVerdictAndReleaseAreOne(t *testing.T) {
	w := newWorld(t)
	w.template("debian")
	g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
	g.boot()
	quotes := &w.o.run(g.id).quotes // the quote of act 8 waits
	quotes.Lock()
	defer quotes.Unlock()
	g.ready()
	w.waitPhase("web", reservation.Unlocking)
	r, before, err := w.o.row(t.Context(), g.id)
	check(t, err)
	x := verify.StaticExpectation{Role: evidence.RoleUnlock, Reservation: g.id, Start: 1, Host: r.Host, Previous: before.Verdict}
	check(t, json.Unmarshal(before.Clock, &x.Clock))
	check(t, w.o.ledger.Write(t.Context(), func(tx *ledger.Tx) (err error) { x.Nonce, err = tx.NewNonce(g.id, 1, x.Role); return err }))
	h, err := w.o.host(r.Host)
	check(t, err)
	q, err := h.Quote(t.Context(), evidence.StaticBinding(x.Role, g.id, x.Previous, x.Nonce))
	check(t, err)
	admitted, verdict := w.o.basis().verifier.Static(x, verify.StaticEvidence{Quote: q.Quote, Platform: q.Platform})
	check(t, verdict.Err())
	kept := func() (newest digest.SHA256, s ledger.Start, released int) {
		check(t, w.o.ledger.Read(t.Context(), func(tx *ledger.Tx) error {
			list, err := tx.Bundles(g.id, 1)
			if err == nil {
				newest = list[len(list)-1].Digest
				s, err = tx.Start(g.id, 1)
			}
			return err
		}))
		for _, kind := range w.events("web") {
			if kind == "components.released" {
				released++
			}
		}
		return newest, s, released
	}

	fault := errors.New("fault")
	err = w.o.keepVerdict(t.Context(), r, w.o.basis(), verdict, func(tx *ledger.Tx, s *ledger.Start) error {
		s.Account = "somebody"
		return errors.Join(tx.Journal(event.Event{Kind: "components.released", Reservation: g.id}), fault)
	})
	if !errors.Is(err, fault) {
		t.Errorf("a fault: %v", err)
	}
	if newest, s, released := kept(); newest != before.Verdict || s.Verdict != before.Verdict || s.Account != before.Account || released != 1 {
		t.Errorf("after a fault: verdict %s, %+v, released %d times", newest.Short(), s, released)
	}

	out, err := w.o.releaseComponents(t.Context(), w.o.basis(), admitted, r, verdict) // of another phase
	if event.ReasonOf(err) != event.QuoteRefused || len(out.Unique) != 0 || len(out.Grant.Manifest.Payload) != 0 {
		t.Errorf("components without a permission: %v, %+v", err, out)
	}
	if newest, s, released := kept(); newest != verdict.Digest || s.Verdict != verdict.Digest || s.Account != before.Account || released != 1 {
		t.Errorf("after a refusal: verdict %s, %+v, released %d times", newest.Short(), s, released)
	}
}

// TestTemplateKeyIsNotReplaced: a second registration of an image cannot take its key.
func TestTemplateKeyIsNotReplaced(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	name := templateKeyName(ledger.Template{Name: "debian"})
	before, err := w.o.vault.Get(name)
	check(t, err)
	reg, _ := w.registration("debian")
	status, p := w.call("POST", "/v1/templates", must[[]byte](t)(json.Marshal(reg)), nil)
	if status != http.StatusConflict || p.Reason != event.TemplateTaken {
		t.Errorf("the same image with another key: %d %+v", status, p)
	}
	after, err := w.o.vault.Get(name)
	if check(t, err); !after.Equal(before) {
		t.Error("the key of a registered template was replaced")
	}
}

// TestGatewayBreaksOff: a gateway that goes away while the orchestrator acts on a VM's
// message does not end the VM.
func TestGatewayBreaksOff(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	g := w.take(w.create(api.CreateVM{Name: "web"}).ID)
	g.boot()
	g.door()
	g.ready()
	w.waitPhase("web", reservation.Connecting)
	if why := g.admit(); why != "" {
		t.Fatal(why)
	}
	if _, why := g.say(); why != "" {
		t.Fatal(why)
	}
	deaf := func(is bool) {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.deaf[zone.Gateway] = is
	}
	deaf(true)
	ctx, cancel := context.WithCancel(t.Context())
	relayed := make(chan event.Reason, 1)
	message := g.sealed(g.withAudit)
	go func() {
		relayed <- w.post(ctx, "gateway", upstream.PathGatewayAgent, upstream.AgentRequest{Address: g.tunnel, Serial: g.serial(), Envelope: message}, nil)
	}()
	w.waitPhase("web", reservation.Computing) // and it waits for the deaf gateway
	cancel()
	<-relayed
	deaf(false)
	check(t, w.o.ledger.Write(t.Context(), func(t *ledger.Tx) error { // any change brings the next document
		return t.ChangeStart(g.id, 1, func(s *ledger.Start) { s.TunnelAddress = s.TunnelAddress.Next() })
	}))
	g.tunnel = g.tunnel.Next()
	check(t, w.o.publish(t.Context()))
	if _, why := g.relay(message); why != "" {
		t.Fatalf("the message again: %s", why)
	}
	if _, why := g.say(); why != "" {
		t.Errorf("the next message: %s", why)
	}
	if vm := w.vm("web"); vm.Phase != string(reservation.Computing) {
		t.Errorf("the VM is %s: %s", vm.Phase, vm.Explanation)
	}
}
