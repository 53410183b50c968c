package verify

import (
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/event"
)

// admittedFor is how long a verdict may be acted on: longer than any one phase's use
// of it at the default limits (90 s), short enough that a host has little time to change.
const admittedFor = 2 * time.Minute

// Admitted is the permission to release something to one start of one VM in one phase.
// Only a fresh judgement by a [Verifier] makes one that holds; nil and the zero value never
// do. It does not survive the process, and no kept evidence brings one back.
type Admitted struct {
	reservation string
	start       int
	phase       string
	expires     time.Time
	verdict     digest.SHA256
}

// Check refuses unless the permission is for exactly this start and phase and has not
// expired. Whoever releases something calls it, immediately before.
func (a *Admitted) Check(reservation string, start int, phase string, now time.Time) error {
	switch {
	case a == nil || a.verdict.IsZero() || a.reservation == "" || a.start < 1 || a.phase == "":
		return event.Refuse(event.QuoteRefused, "no quote has admitted this VM")
	case a.reservation != reservation || a.start != start:
		return event.Refuse(event.QuoteRefused, "the quote admitted start %d of %s, not start %d of %s", a.start, a.reservation, start, reservation)
	case a.phase != phase:
		return event.Refuse(event.QuoteRefused, "the quote admitted for phase %s, not for %s", a.phase, phase)
	case !now.Before(a.expires):
		return event.Refuse(event.QuoteRefused, "the quote is too old: it counted until %s", a.expires.UTC().Format(time.RFC3339))
	}
	return nil
}

// Verdict is the digest of the verdict that admitted.
func (a *Admitted) Verdict() digest.SHA256 {
	if a == nil {
		return digest.SHA256{}
	}
	return a.verdict
}

// admit is the one place that makes an Admitted.
func admit(v Verdict) *Admitted {
	phase, ok := phaseOf(v.Role)
	if !v.Good() || !ok {
		return nil
	}
	return &Admitted{reservation: v.Reservation, start: v.Start, phase: phase, expires: v.At.Add(admittedFor), verdict: v.Digest}
}
