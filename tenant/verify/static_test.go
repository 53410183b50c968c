package verify

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/pcr"
	"foothold/tenant/reservation"
)

// static makes a right static quote after previous.
func (w *world) static(role string, previous Verdict) (StaticExpectation, StaticEvidence) {
	x := StaticExpectation{Role: role, Reservation: vmID, Start: 1, Host: "host-1", Previous: previous.Digest, Nonce: nonce(), Clock: previous.Clock}
	q := w.host.quote(evidence.StaticBinding(role, vmID, x.Previous, x.Nonce), pcr.StaticSelection())
	return x, StaticEvidence{Quote: q, Platform: evidence.Platform{Log: slices.Clone(w.host.log)}}
}

func (w *world) admitted(t *testing.T, v *Verifier) Verdict {
	t.Helper()
	a := w.attempt()
	a.quote()
	_, verdict := v.Boot(a.expect, a.ev)
	if err := verdict.Err(); err != nil {
		t.Fatal(err)
	}
	return verdict
}

func TestStaticChain(t *testing.T) {
	w := newWorld(t)
	v := w.verifier()
	last := w.admitted(t, v)
	boot := last
	for role, phase := range map[string]string{evidence.RoleUnlock: "unlocking", evidence.RoleConnect: "connecting", evidence.RoleWatch: "computing"} {
		x, ev := w.static(role, last)
		admitted, verdict := v.Static(x, ev)
		if err := verdict.Err(); err != nil {
			t.Fatal(err)
		}
		for _, p := range []string{"booting", "unlocking", "connecting", "computing"} {
			if (admitted.Check(vmID, 1, p, w.now) == nil) != (p == phase) {
				t.Errorf("%s: permission for %s", role, p)
			}
		}
		if verdict.Previous != last.Digest || verdict.Digest == last.Digest {
			t.Error("the chain is broken")
		}
		last = verdict
	}

	for what, c := range map[string]struct {
		change func(*StaticExpectation, *StaticEvidence)
		check  string
	}{
		"chained to another verdict": {func(x *StaticExpectation, _ *StaticEvidence) { x.Previous = boot.Digest }, "binding"},
		"chained to none":            {func(x *StaticExpectation, _ *StaticEvidence) { x.Previous = digest.SHA256{} }, "input"},
		"another role":               {func(x *StaticExpectation, _ *StaticEvidence) { x.Role = evidence.RoleConnect }, "binding"},
		"role of a boot quote":       {func(x *StaticExpectation, _ *StaticEvidence) { x.Role = evidence.RoleBoot }, "input"},
		"no role":                    {func(x *StaticExpectation, _ *StaticEvidence) { x.Role = "" }, "input"},
		"another reservation":        {func(x *StaticExpectation, _ *StaticEvidence) { x.Reservation = "1b6c2f4e-5a7d-4c1b-9e57-3d2a8f60c911" }, "binding"},
		"replayed":                   {func(x *StaticExpectation, _ *StaticEvidence) { x.Nonce = nonce() }, "binding"},
		"another host":               {func(x *StaticExpectation, _ *StaticEvidence) { x.Host = "host-2" }, "signature"},
		"no clock":                   {func(x *StaticExpectation, _ *StaticEvidence) { x.Clock = Clock{} }, "clock"},
		"log cut":                    {func(_ *StaticExpectation, e *StaticEvidence) { e.Platform.Log = e.Platform.Log[1:] }, "log"},
		"boot selection": {func(x *StaticExpectation, e *StaticEvidence) {
			e.Quote = w.host.quote(evidence.StaticBinding(x.Role, x.Reservation, x.Previous, x.Nonce), pcr.BootSelection())
		}, "selection"},
	} {
		x, ev := w.static(evidence.RoleUnlock, last)
		c.change(&x, &ev)
		if admitted, verdict := v.Static(x, ev); admitted != nil || !strings.Contains(checks(verdict), c.check) {
			t.Errorf("%s: want a finding of %q, got %v", what, c.check, verdict.Findings)
		}
	}
}

// A host boot ends every admitted start; a new one begins after it.
func TestReboot(t *testing.T) {
	w := newWorld(t)
	v := w.verifier()
	before := w.admitted(t, v)
	w.host.reboot()
	lost := w.attempt() // its TPM was started anew, and nobody has measured the host
	lost.expect.Clock = before.Clock
	lost.quote()
	if _, verdict := v.Boot(lost.expect, lost.ev); verdict.Good() || !strings.Contains(fmt.Sprint(verdict.Findings), "static registers are empty") {
		t.Errorf("boot quote of a TPM that has lost its registers: %v", verdict.Findings)
	}
	x, ev := w.static(evidence.RoleWatch, before)
	if _, verdict := v.Static(x, ev); verdict.Good() || !strings.Contains(fmt.Sprint(verdict.Findings), "static registers are empty") {
		t.Errorf("static quote of a TPM that has lost its registers: %v", verdict.Findings)
	}
	w.host.boot(w.files)
	x, ev = w.static(evidence.RoleWatch, before)
	if _, verdict := v.Static(x, ev); verdict.Good() || !strings.Contains(checks(verdict), "clock") {
		t.Errorf("static quote over a host boot: %v", verdict.Findings)
	}
	a := w.attempt()
	a.expect.Clock = before.Clock
	a.quote()
	_, after := v.Boot(a.expect, a.ev)
	if !after.Good() || !after.Rebooted || after.Clock.Resets != before.Clock.Resets+1 {
		t.Errorf("boot quote after a host boot: %+v, %v", after.Clock, after.Err())
	}
	a.expect.Ran = true
	if _, verdict := v.Boot(a.expect, a.ev); checks(verdict) != "clock " {
		t.Errorf("boot quote for a VM that ran before a host boot: %v", verdict.Findings)
	}
	if before.Clock.Later(after.Clock) != after.Clock || after.Clock.Later(before.Clock) != after.Clock {
		t.Error("Later keeps the older clock")
	}
}

func TestAdmitted(t *testing.T) {
	now := time.Now()
	good := Admitted{reservation: vmID, start: 2, phase: "unlocking", expires: now.Add(time.Minute), verdict: digest.Of([]byte("v"))}
	if err := good.Check(vmID, 2, "unlocking", now); err != nil {
		t.Fatal(err)
	}
	var none *Admitted
	for what, err := range map[string]error{
		"nil":                none.Check(vmID, 2, "unlocking", now),
		"zero":               (&Admitted{}).Check("", 0, "", now),
		"zero with names":    (&Admitted{}).Check(vmID, 2, "unlocking", now),
		"other reservation":  good.Check("x", 2, "unlocking", now),
		"other start":        good.Check(vmID, 1, "unlocking", now),
		"other phase":        good.Check(vmID, 2, "connecting", now),
		"expired":            good.Check(vmID, 2, "unlocking", now.Add(time.Minute)),
		"verdict not judged": Verdict{}.Err(),
	} {
		if err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
	if (Verdict{}).Good() || admit(Verdict{Role: evidence.RoleBoot}) != nil {
		t.Error("the zero verdict is good")
	}
}

// Permissions name phases of the one closed set.
func TestPhases(t *testing.T) {
	for role, want := range map[string]reservation.Phase{
		evidence.RoleBoot: reservation.Booting, evidence.RoleUnlock: reservation.Unlocking,
		evidence.RoleConnect: reservation.Connecting, evidence.RoleWatch: reservation.Computing,
	} {
		if phase, ok := phaseOf(role); !ok || phase != string(want) {
			t.Errorf("role %s is for phase %q, want %s", role, phase, want)
		}
	}
	if _, ok := phaseOf("other"); ok {
		t.Error("an unknown role has a phase")
	}
}
