package orchestrator

import (
	"cmp"
	"context"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"foothold/internal/mtls"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/hostapi"
	"foothold/protocol/upstream"
	"foothold/tenant/hostclient"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
	"foothold/tenant/verify"
)

// bootVerdict is act 5: it judges the quote that the boot server fetched through the
// VM's tunnel. The host's log and claims come from the host itself, not through the VM.
// A VM that is not admitted is ended.
func (o *Orchestrator) bootVerdict(ctx context.Context, who mtls.Identity, in upstream.VerdictRequest) (upstream.VerdictResponse, error) {
	ctx, done := seenThrough(ctx)
	defer done()
	r, s, err := o.fromBooting(ctx, in.Reservation, in.Source.Unmap())
	if err != nil {
		return upstream.VerdictResponse{}, o.refusedCall(ctx, who, upstream.PathBootVerdict, r.ID, err)
	}
	out, err := o.judgeBoot(ctx, r, s, in)
	if err != nil {
		o.abort(ctx, r.ID, r.Start, err)
		return upstream.VerdictResponse{}, err
	}
	return out, nil
}

func (o *Orchestrator) judgeBoot(ctx context.Context, r ledger.Reservation, s ledger.Start, in upstream.VerdictRequest) (upstream.VerdictResponse, error) {
	var none upstream.VerdictResponse
	if !s.Verdict.IsZero() {
		return none, bootUnjudged(verify.CauseAgain, s, in, event.Refuse(event.QuoteRefused, "this start was judged before"))
	}
	if subtle.ConstantTimeCompare(in.VMKey, s.VMKey) != 1 {
		return none, bootUnjudged(verify.CauseVMKey, s, in, event.Refuse(event.QuoteRefused, "the VM's key is not the one that came with T1"))
	}
	h, err := o.host(r.Host)
	if err != nil {
		return none, bootUnjudged(verify.CauseSilent, s, in, err)
	}
	platform, vm, err := hearHost(ctx, h, r.ID)
	if err != nil {
		return none, bootUnjudged(verify.CauseSilent, s, in, err)
	}
	expect := verify.BootExpectation{Reservation: r.ID, Start: r.Start, Host: r.Host, Settings: s.Spec, Nonce: s.BootNonce,
		Claim: &verify.Claim{Settings: vm.Settings, Firmware: vm.Firmware}}
	clocks, quoted, err := o.useBootNonce(ctx, r, s.BootNonce, vm.TPMHeld)
	if err != nil {
		return none, withLogs(bootUnjudged(verify.CauseNonce, s, in, err), platform)
	}
	var out upstream.VerdictResponse
	err = o.judge(func(v *verify.Verifier) (*verify.Admitted, verify.Verdict) {
		expect.Clock = v.Last(r.Host, clocks) // by the same inventory as the quote
		expect.Ran = expect.Clock != (verify.Clock{}) && quoted.After(s.HostStarted)
		return v.Boot(expect, verify.BootEvidence{ExporterHash: in.ExporterHash, ServerLeaf: in.ServerLeaf,
			LoaderLeaf: in.LoaderLeaf, VMKey: in.VMKey, Quote: in.Quote, Platform: platform})
	}, func(b *basis, admitted *verify.Admitted, verdict verify.Verdict) (err error) {
		if admitted == nil {
			return o.keepVerdict(ctx, r, b, verdict, nil)
		}
		out, err = o.releaseComponents(ctx, b, admitted, r, verdict)
		return err
	})
	return out, err
}

// hearHost asks at once for the host's log and for what it says it started and how long
// its TPM was held. The latter only explains.
func hearHost(ctx context.Context, h *hostclient.Client, id string) (platform evidence.Platform, vm hostapi.VM, err error) {
	var failed error
	var asking sync.WaitGroup
	asking.Go(func() { vm, failed = h.VM(ctx, id, "") })
	platform, err = h.Platform(ctx)
	asking.Wait()
	return platform, vm, cmp.Or(err, failed)
}

// useBootNonce uses up a nonce in one swap, records how long the TPM was held, and reads
// the host's clocks, and when its last good quote was judged.
func (o *Orchestrator) useBootNonce(ctx context.Context, r ledger.Reservation, nonce []byte, held time.Duration) (clocks verify.Clocks, quoted time.Time, err error) {
	err = o.ledger.Write(ctx, func(t *ledger.Tx) error {
		if err := t.UseNonce(nonce, r.ID, r.Start, evidence.RoleBoot, o.limits.Of(r.Phase)); err != nil {
			return err
		}
		if held > 0 {
			if err := t.ChangeStart(r.ID, r.Start, func(s *ledger.Start) { s.TPMHeld = held }); err != nil {
				return err
			}
		}
		state, err := t.Host(r.Host)
		if err != nil {
			return err
		}
		quoted = state.Quoted
		clocks, err = verify.ParseClocks(state.Clock)
		return err
	})
	return clocks, quoted, err
}

// errRebased says that another basis came while a quote was judged.
var errRebased = errors.New("the inventory or the reference values have changed")

// judge has a quote judged by the documents that count, and the verdict kept, by keepVerdict.
// One that was reached while an import or a withdrawal went on is reached again: what counts
// when it is stored decides. The nonce was used up before, once.
func (o *Orchestrator) judge(by func(*verify.Verifier) (*verify.Admitted, verify.Verdict), keep func(*basis, *verify.Admitted, verify.Verdict) error) error {
	for {
		b := o.basis()
		admitted, verdict := by(b.verifier)
		if err := keep(b, admitted, verdict); !errors.Is(err, errRebased) {
			return err
		}
	}
}

// keepVerdict stores a verdict's evidence bundle and what follows from it for its host, and
// returns the refusal of a bad one. It stores nothing of a basis that is not the current one.
// release, unless nil, is what a good one permits: it
// is in the same transaction, so that nothing leaves whose evidence is not kept. It must
// refuse before it changes anything: the verdict is kept then, and the refusal returned.
// Another error undoes everything. A bad one is refused also where nothing can be stored,
// as on a full disk: its findings enter the journal with the end that they bring.
func (o *Orchestrator) keepVerdict(ctx context.Context, r ledger.Reservation, b *basis, v verify.Verdict, release func(*ledger.Tx, *ledger.Start) error) error {
	refused := v.Err()
	if changed(v) {
		defer o.quoteNeighbours(ctx, r)
	}
	err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		if o.basis() != b {
			return errRebased
		}
		state, err := t.Host(r.Host)
		if err != nil {
			return err
		}
		if err := keepBundle(t, v); err != nil {
			return err
		}
		if refused != nil {
			state.Standing = fmt.Sprintf("its %s quote was refused at %s", v.Role, v.At.UTC().Format("2006-01-02T15:04:05Z"))
			if !barring(v) {
				return t.PutHost(r.Host, state)
			}
			state.Barred = state.Standing
			return errors.Join(t.PutHost(r.Host, state), tellNeighbours(t, r, "host "+r.Host+": "+state.Barred))
		}
		state.Standing, state.Quoted = "", v.At
		if state.Clock, err = keepClock(state.Clock, v.Clock); err != nil {
			return err
		}
		s, err := t.Start(r.ID, r.Start)
		if err != nil {
			return err
		}
		if s.Clock, err = json.Marshal(v.Clock); err != nil {
			return err
		}
		s.Verdict, s.Attested, s.Manifest = v.Digest, v.At, v.Manifest
		if err := errors.Join(
			t.PutHost(r.Host, state),
			t.Journal(event.Event{Kind: "quote.accepted", Reservation: r.ID, Detail: map[string]string{
				"role": v.Role, "host": v.Host, "verdict": v.Digest.String(), "manifest": v.Manifest.String()}})); err != nil {
			return err
		}
		if release != nil {
			var refusal *event.Refusal
			if err := release(t, &s); errors.As(err, &refusal) {
				refused = err
			} else if err != nil {
				return err
			}
		}
		return t.PutStart(r.ID, r.Start, s)
	})
	switch {
	case err == nil:
		o.zones.journalled()
		return refused
	case v.Good():
		return fmt.Errorf("keep verdict: %w", err)
	case o.basis() != b: // nothing may have come to asking
		return errRebased
	}
	slog.Error("a refusal is not kept, but holds", "reservation", r.ID, "role", v.Role, "host", r.Host, "error", err)
	return refused
}

// keepBundle keeps the evidence of a verdict. A refusal that is too large to be kept leaves
// its findings alone.
func keepBundle(t *ledger.Tx, v verify.Verdict) error {
	if len(v.Parts.Record) == 0 {
		if v.Good() {
			return errors.New("an accepted quote has no evidence to keep")
		}
		return nil
	}
	if err := t.AddBundle(v.Parts); err != nil || v.Good() {
		return err
	}
	return t.Journal(event.Event{Kind: "evidence.kept", Reservation: v.Reservation, Detail: map[string]string{
		"role": v.Role, "host": v.Host, "verdict": v.Digest.String(), "findings": strconv.Itoa(len(v.Findings))}})
}

// permitted is asked in the transaction that releases something: the quote has admitted
// this start for the phase, the reservation is in it now, before its deadline, its host is
// one that would get a VM - a failed audit, or a neighbour's refused quote, outdoes a good one -
// and what it was admitted by still counts. A reservation that ended while its quote was
// judged, or should have, gets nothing.
func (o *Orchestrator) permitted(t *ledger.Tx, admitted *verify.Admitted, r ledger.Reservation, phase reservation.Phase) (ledger.Reservation, error) {
	if err := admitted.Check(r.ID, r.Start, string(phase), t.Now); err != nil {
		return r, err
	}
	now, err := t.Reservation(r.ID)
	if err != nil {
		return now, err
	}
	if now.Phase != phase || now.Start != r.Start || !now.Deadline.After(t.Now) {
		return now, event.Refuse(event.DeadlinePassed, "the VM is %s by now", now.Phase)
	}
	host, err := t.Host(r.Host)
	if err != nil {
		return now, err
	}
	if err := trusted(r.Host, host, event.HostLost); err != nil {
		return now, err
	}
	s, err := t.Start(r.ID, r.Start)
	if err != nil {
		return now, err
	}
	l, err := o.basis().lost(t, now, s)
	if err != nil {
		return now, err
	}
	if l != nil {
		return now, &l.why
	}
	return now, o.owesEnd(r.ID, r.Start)
}

func keepClock(stored []byte, c verify.Clock) ([]byte, error) {
	clocks, err := verify.ParseClocks(stored)
	if err != nil {
		return nil, err
	}
	return json.Marshal(clocks.Keep(c))
}

// attestAgain asks the host of a live VM again what it runs: a static quote, chained to
// the last verdict of this start. One at a time for each VM, because of the chain.
func (o *Orchestrator) attestAgain(ctx context.Context, id, role string) (*verify.Admitted, error) {
	admitted, _, err := o.attestNow(ctx, id, role)
	return admitted, err
}

// attestNow is attestAgain with the verdict, which has a digest only if one was reached.
func (o *Orchestrator) attestNow(ctx context.Context, id, role string) (*verify.Admitted, verify.Verdict, error) {
	var none verify.Verdict
	run := o.run(id)
	run.quotes.Lock()
	defer run.quotes.Unlock()
	r, s, err := o.row(ctx, id)
	if err != nil {
		return nil, none, err
	}
	x := verify.StaticExpectation{Role: role, Reservation: id, Start: r.Start, Host: r.Host, Previous: s.Verdict}
	h, err := o.host(r.Host)
	if err != nil {
		return nil, none, staticUnjudged(verify.CauseSilent, x, nil, err)
	}
	if len(s.Clock) > 0 {
		if err := json.Unmarshal(s.Clock, &x.Clock); err != nil {
			return nil, none, fmt.Errorf("stored clock: %w", err)
		}
	}
	if err := o.ledger.Write(ctx, func(t *ledger.Tx) (err error) { x.Nonce, err = t.NewNonce(id, r.Start, role); return err }); err != nil {
		return nil, none, err
	}
	q, err := h.Quote(ctx, evidence.StaticBinding(role, id, s.Verdict, x.Nonce))
	if err != nil {
		return nil, none, staticUnjudged(verify.CauseSilent, x, nil, err)
	}
	if err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		return t.UseNonce(x.Nonce, id, r.Start, role, o.limits.Of(r.Phase))
	}); err != nil {
		return nil, none, withLogs(staticUnjudged(verify.CauseNonce, x, &q.Quote, err), q.Platform)
	}
	var admitted *verify.Admitted
	var verdict verify.Verdict
	err = o.judge(func(v *verify.Verifier) (*verify.Admitted, verify.Verdict) {
		return v.Static(x, verify.StaticEvidence{Quote: q.Quote, Platform: q.Platform})
	}, func(b *basis, a *verify.Admitted, v verify.Verdict) error {
		if l := b.disowned(r, s); l != nil && l.why.Reason == event.HostLost {
			return &l.why // what the documents say of the host is no judgement of its answer
		}
		admitted, verdict = a, v
		return o.keepVerdict(ctx, r, b, v, nil)
	})
	if err != nil {
		return nil, verdict, err
	}
	slog.Info("host attested again", "reservation", id, "role", role)
	return admitted, verdict, nil
}
