package orchestrator

import (
	"errors"
	"strconv"

	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/upstream"
	"foothold/tenant/hostclient"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
	"foothold/tenant/verify"
)

// unjudged is a refusal that came before there was all that a quote is judged by. It leaves
// its evidence in the transaction that stores the end which it brings: one for each start.
type unjudged struct {
	err   error
	facts verify.Unjudged   // what the act knows of it; the rest is filled in with the end
	logs  evidence.Platform // as far as they had come
}

func (u *unjudged) Error() string { return u.err.Error() }
func (u *unjudged) Unwrap() error { return u.err }

// bootUnjudged is a refusal of what the boot server sent to be judged. A fault of ours is none.
func bootUnjudged(cause verify.Cause, s ledger.Start, in upstream.VerdictRequest, err error) error {
	u := &unjudged{err: err, facts: verify.Unjudged{Role: evidence.RoleBoot, Cause: cause, Settings: &s.Spec, Nonce: s.BootNonce, VMKey: s.VMKey,
		Tunnel: &verify.TunnelEnd{ExporterHash: in.ExporterHash, ServerLeaf: in.ServerLeaf, LoaderLeaf: in.LoaderLeaf, VMKey: in.VMKey}, Quote: &in.Quote}}
	return u.ofHost()
}

// staticUnjudged is the same of a static quote.
func staticUnjudged(cause verify.Cause, x verify.StaticExpectation, q *evidence.Quote, err error) error {
	u := &unjudged{err: err, facts: verify.Unjudged{Role: x.Role, Cause: cause, Nonce: x.Nonce, Quote: q}}
	return u.ofHost()
}

// withLogs adds the host's logs, which had come.
func withLogs(err error, logs evidence.Platform) error {
	var u *unjudged
	if errors.As(err, &u) {
		u.logs = logs
	}
	return err
}

// ofHost completes a refusal for what a host did not give: not listed, garbled or none.
// Where another cause stands, it stays.
func (u *unjudged) ofHost() error {
	var why *event.Refusal
	if !errors.As(u.err, &why) {
		return u.err
	}
	if u.facts.Cause != verify.CauseSilent {
		return u
	}
	var garbled *hostclient.Garbled
	switch {
	case errors.As(u.err, &garbled):
		u.facts.Cause, u.facts.Asked, u.facts.Answer, u.facts.Dropped = verify.CauseAnswer, askedFor(garbled.Path), garbled.Answer, garbled.Dropped
	case why.Reason == event.NoHost:
		u.facts.Cause = verify.CauseUnlisted
	}
	return u
}

// askedFor names what a host was asked for, by the path of the call.
func askedFor(path string) string {
	switch path {
	case "/v1/quote":
		return verify.AskedQuote
	case "/v1/platform":
		return verify.AskedPlatform
	}
	return verify.AskedVM
}

// noQuote is a boot conversation that the boot server ended before anything was judged.
func noQuote(s ledger.Start, err error) error {
	if !s.Verdict.IsZero() {
		return err
	}
	return &unjudged{err: err, facts: verify.Unjudged{Role: evidence.RoleBoot, Cause: verify.CauseSession, Settings: &s.Spec, Nonce: s.BootNonce, VMKey: s.VMKey}}
}

// lateQuote is the end of a phase in which a quote was awaited; err if none was.
func lateQuote(t *ledger.Tx, r ledger.Reservation, err *event.Refusal) (error, error) {
	role, known := map[reservation.Phase]string{reservation.Booting: evidence.RoleBoot, reservation.Unlocking: evidence.RoleUnlock,
		reservation.Connecting: evidence.RoleConnect}[r.Phase]
	if !known {
		return err, nil
	}
	since, fault := t.AwaitedQuote(r.ID, r.Start, role)
	if fault != nil || since.IsZero() {
		return err, fault
	}
	return &unjudged{err: err, facts: verify.Unjudged{Role: role, Cause: verify.CauseLate, Since: since, Until: r.Deadline}}, nil
}

// seal makes the evidence of a refusal that ends this start now, and puts its findings into why.
func (o *Orchestrator) seal(t *ledger.Tx, r ledger.Reservation, u *unjudged, why *event.Refusal) (verify.Parts, error) {
	s, err := t.Start(r.ID, r.Start)
	if err != nil {
		return verify.Parts{}, err
	}
	x := u.facts
	x.Reservation, x.Start, x.Host, x.Phase, x.Previous = r.ID, r.Start, r.Host, string(r.Phase), s.Verdict
	x.Reason, x.Said = why.Reason, why.Detail
	v := o.basis().verifier.Refuse(x, u.logs)
	why.Findings = v.Findings
	return v.Parts, nil
}

// keepUnjudged keeps the evidence of a refusal that has just ended its start.
func keepUnjudged(t *ledger.Tx, p verify.Parts, u *unjudged, findings int) error {
	if len(p.Record) == 0 { // it is too large: its findings are in the journal
		return nil
	}
	if err := t.AddBundle(p); err != nil {
		return err
	}
	return t.Journal(event.Event{Kind: "evidence.kept", Reservation: p.Link.Reservation, Detail: map[string]string{"role": p.Link.Role, "host": p.Link.Host,
		"verdict": p.Link.Digest().String(), "findings": strconv.Itoa(findings), "unjudged": string(u.facts.Cause)}})
}
