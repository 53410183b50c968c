package reservation

import (
	"testing"
	"time"

	"foothold/protocol/event"
)

func TestRestartPolicies(t *testing.T) {
	now := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		policy Restart
		why    event.Reason
		again  bool
	}{
		{Always, event.VMStopped, true}, {Always, event.GuestPoweredOff, true}, {Always, event.GuestReset, true}, {Always, event.GuestCrashed, true},
		{OnFailure, event.VMStopped, true}, {OnFailure, event.GuestReset, true}, {OnFailure, event.GuestCrashed, true}, {OnFailure, event.HeartbeatMissed, true},
		{OnFailure, event.GuestPoweredOff, false},
		{Never, event.VMStopped, false}, {Never, event.GuestReset, false}, {Never, event.GuestCrashed, false},
		{"", event.VMStopped, false},
	} {
		next := c.policy.Next(c.why, 0, now)
		if next.IsZero() == c.again || c.again && next.Sub(now) != time.Second {
			t.Errorf("%q after %s: %v", c.policy, c.why, next)
		}
	}
	if p, err := ParseRestart(""); err != nil || p != OnFailure {
		t.Errorf("the default is %q, %v", p, err)
	}
	if _, err := ParseRestart("sometimes"); err == nil {
		t.Error("an unknown policy is accepted")
	}
}

func TestBackoffGrowsToItsMost(t *testing.T) {
	last := time.Duration(0)
	for n := range 20 {
		d := Backoff(n)
		if d < last || d > mostBackoff || n < 8 && d != time.Second<<n {
			t.Errorf("after %d restarts: %v", n, d)
		}
		last = d
	}
	if last != mostBackoff {
		t.Errorf("it grows to %v only", last)
	}
}

// TestWhatIsNotRight: what says that something was not as it must be ends a VM for good,
// in whichever phase and start.
func TestWhatIsNotRight(t *testing.T) {
	for _, why := range []event.Reason{event.QuoteRefused, event.AuditFailed, event.ProbeAccepted, event.HostKeyMismatch, event.TokenWrongAddress, event.TokenWrongPhase,
		event.DigestMismatch, event.SignatureInvalid, event.ChannelMisuse, event.TPMCommandRefused, event.ReportRefused, event.CertificateRevoked, event.CertificateInvalid,
		event.CredentialsWrong, event.DiskRefused, event.HandoverFailed, event.AdmissionRefused, "a reason that nobody knows yet"} {
		for _, p := range Phases() {
			if EndsStart(why, p, 7) {
				t.Errorf("%s in %s ends the start only", why, p)
			}
		}
	}
	for _, why := range []event.Refusal{{Reason: event.AuditFailed}, {Reason: event.ProbeAccepted}, {Reason: event.HostKeyMismatch}, {Reason: event.QuoteRefused, Findings: []event.FailedCheck{{Check: "log"}}}} {
		if !Damning(why) || Outage(why.Reason) {
			t.Errorf("%s is forgotten once its start is over", why.Reason)
		}
	}
	if Damning(event.Refusal{Reason: event.QuoteRefused}) || Damning(event.Refusal{Reason: event.VMStopped}) {
		t.Error("what says nothing of the machine is held against it for good")
	}
	for _, p := range Phases() {
		if got, want := EndsStart(event.VMStopped, p, 1), p == Computing; got != want {
			t.Errorf("the first start's outage in %s: %v", p, got)
		}
		if got, want := EndsStart(event.VMStopped, p, 2), p.Running(); got != want {
			t.Errorf("a further start's outage in %s: %v", p, got)
		}
	}
	if EndsStart(event.WorkloadFailed, Computing, 1) || !EndsStart(event.WorkloadFailed, Computing, 2) {
		t.Error("a workload that never answered does not end the VM in its first start alone")
	}
}
