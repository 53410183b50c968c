package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
	"foothold/tenant/verify"

	"github.com/danielgtaylor/huma/v2"
)

// evidenceOperations are the calls about quotes and the evidence that they leave.
func (o *Orchestrator) evidenceOperations(a huma.API) {
	huma.Register(a, operation("POST", "/v1/vms/{name}/attest", "attest-vm", "Have the host of a computing VM quoted now", http.StatusOK),
		func(ctx context.Context, in *byName) (*body[api.Verdict], error) {
			return answer(o.Attest(ctx, in.Name, caller(ctx)))
		})
	huma.Register(a, operation("GET", "/v1/vms/{name}/evidence", "list-evidence", "List the verdicts of one start of a VM", http.StatusOK),
		func(ctx context.Context, in *struct {
			Name  string `path:"name" maxLength:"64" doc:"name or id"`
			Start int    `query:"start" minimum:"0" doc:"number of the start; 0: the latest"`
		}) (*body[api.Evidence], error) {
			return answer(o.evidence(ctx, in.Name, in.Start))
		})
	huma.Register(a, operation("GET", "/v1/vms/{name}/evidence/{digest}", "get-evidence", "A verdict's evidence bundle", http.StatusOK),
		func(ctx context.Context, in *struct {
			Name   string `path:"name" maxLength:"64" doc:"name or id"`
			Digest string `path:"digest" maxLength:"64" doc:"of the verdict"`
		}) (*huma.StreamResponse, error) {
			bundle, err := o.bundle(ctx, in.Name, in.Digest)
			if err != nil {
				return nil, problem(err)
			}
			return &huma.StreamResponse{Body: func(c huma.Context) {
				c.SetHeader("Content-Type", "application/json")
				c.SetHeader("X-Content-Type-Options", "nosniff")
				c.BodyWriter().Write(bundle)
			}}, nil
		})
}

// Attest has the host of a computing VM quoted now, by an operator's wish. A refused quote
// ends the VM, as one of the watch does; a host that does not answer is for the watch to
// bear or not.
func (o *Orchestrator) Attest(ctx context.Context, nameOrID, by string) (api.Verdict, error) {
	r, err := o.find(ctx, nameOrID)
	if err != nil {
		return api.Verdict{}, err
	}
	if r.Phase != reservation.Computing {
		return api.Verdict{}, event.Refuse(event.WrongPhase, "VM %s is %s; on its way up a VM's host is quoted by itself", r.Name, r.Phase)
	}
	o.journal(ctx, event.Event{Kind: "attestation.asked", Reservation: r.ID, Detail: map[string]string{"by": by}})
	ctx, done := seenThrough(ctx)
	defer done()
	_, v, err := o.attestNow(ctx, r.ID, evidence.RoleWatch)
	if len(v.Findings) > 0 {
		o.abort(ctx, r.ID, r.Start, err)
	}
	if err != nil {
		return api.Verdict{}, err
	}
	return verdictOf(ledger.BundleRow{Link: v.Parts.Link, Digest: v.Digest, Kept: true}), nil
}

// silent reports whether a host gave no evidence at all: it did not answer, or declined. That
// says nothing of the machine, and is borne for limits.attest_within.
func silent(err error) bool {
	why := event.ReasonOf(err)
	return why == event.HostUnreachable || why == event.HostRefused
}

func verdictOf(r ledger.BundleRow) api.Verdict {
	return api.Verdict{Role: r.Role, Host: r.Host, At: r.At, Accepted: r.Accepted, Previous: r.Previous, Record: r.Link.Record, Digest: r.Digest, Kept: r.Kept, Unjudged: r.Unjudged}
}

// evidence lists the verdicts of a start.
func (o *Orchestrator) evidence(ctx context.Context, nameOrID string, start int) (api.Evidence, error) {
	r, err := o.find(ctx, nameOrID)
	if err != nil {
		return api.Evidence{}, err
	}
	if start == 0 {
		start = r.Start
	}
	if start > r.Start {
		return api.Evidence{}, event.Refuse(event.UnknownEvidence, "VM %s has had %d starts", r.Name, r.Start)
	}
	e := api.Evidence{Name: r.Name, ID: r.ID, Start: start, Verdicts: []api.Verdict{}}
	err = o.ledger.Read(ctx, func(t *ledger.Tx) error {
		rows, err := t.Bundles(r.ID, start)
		for _, row := range rows {
			e.Verdicts = append(e.Verdicts, verdictOf(row))
		}
		return err
	})
	return e, err
}

// bundle is one verdict's evidence, as `foothold verify` reads it.
func (o *Orchestrator) bundle(ctx context.Context, nameOrID, verdict string) ([]byte, error) {
	r, err := o.find(ctx, nameOrID)
	if err != nil {
		return nil, err
	}
	sum, err := digest.Parse(verdict)
	if err != nil {
		return nil, event.Refuse(event.BadRequest, "want the digest of a verdict, 64 hexadecimal digits")
	}
	var parts verify.Parts
	err = o.ledger.Read(ctx, func(t *ledger.Tx) (err error) { parts, err = t.Bundle(r.ID, sum); return err })
	if errors.Is(err, ledger.ErrNotFound) {
		return nil, event.Refuse(event.UnknownEvidence, "VM %s has no evidence of verdict %s, or it is not kept any more", r.Name, sum.Short())
	}
	if err != nil {
		return nil, err
	}
	return parts.Bundle()
}

// attestGrace is what an orchestrator that begins anew gives each host to answer in, however
// long it was away itself.
const attestGrace = 30 * time.Second

// limitAttestation ends a VM whose host gives no good quote for longer than it may, whatever
// hangs meanwhile. It holds beside heartbeats and leases.
func (o *Orchestrator) limitAttestation(ctx context.Context, id string) error {
	begun := o.now()
	for {
		r, s, err := o.row(ctx, id)
		if err != nil {
			return err
		}
		late := s.Attested.Add(o.attestWithin)
		if first := begun.Add(min(attestGrace, o.attestWithin)); first.After(late) {
			late = first
		}
		left := late.Sub(o.now())
		if left <= 0 {
			return &unjudged{err: lateRefusal(r, s, o.attestWithin), facts: verify.Unjudged{Role: evidence.RoleWatch, Cause: verify.CauseLate,
				Since: s.Attested, Until: s.Attested.Add(o.attestWithin)}}
		}
		if err := pause(ctx, left); err != nil {
			return err
		}
	}
}

// hostSilent is the finding about a host that has missed a quote, and is borne still.
func (o *Orchestrator) hostSilent(r ledger.Reservation, s ledger.Start) (event.FailedCheck, bool) {
	if r.Phase != reservation.Computing || s.Attested.IsZero() || o.now().Sub(s.Attested) < 2*o.watchEvery {
		return event.FailedCheck{}, false
	}
	f := event.FailedCheck{Check: "time", Component: "the static quote of host " + r.Host, Expected: fmt.Sprintf("a good one every %v", o.watchEvery),
		Seen: fmt.Sprintf("none since %s; it is borne until %s", s.Attested.UTC().Format(time.RFC3339), s.Attested.Add(o.attestWithin).UTC().Format(time.RFC3339)),
		Do:   event.Explain(event.HostUnreachable).Next}
	f.Detail = f.Component + ": " + f.Seen
	return f, true
}

func lateRefusal(r ledger.Reservation, s ledger.Start, within time.Duration) *event.Refusal {
	since := s.Attested.UTC().Format(time.RFC3339)
	why := event.Refuse(event.AttestationLate, "host %s gave its last good quote at %s, %v are borne", r.Host, since, within)
	why.Findings = []event.FailedCheck{{Check: "time", Component: "the static quote of host " + r.Host, Expected: fmt.Sprintf("a good one within %v (limits.attest_within)", within),
		Seen: "none since " + since, Do: event.Explain(event.AttestationLate).Next, Detail: why.Detail}}
	return why
}
