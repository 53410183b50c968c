package verify

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
)

// survey has the host quote for nobody's VM.
func (w *world) survey(logs evidence.Platform) (n []byte, e StaticEvidence) {
	n = nonce()
	return n, StaticEvidence{Quote: w.host.quote(evidence.SurveyBinding("host-1", n), pcr.StaticSelection()), Platform: logs}
}

func TestSurvey(t *testing.T) {
	w := newWorld(t)
	m := newMachine()
	v := w.production(t, m.manifest(w))
	logs := m.boot(w.host)
	n, e := w.survey(logs)
	verdict := v.Current().Survey("host-1", n, Clock{}, e)
	if err := verdict.Err(); err != nil {
		t.Fatal(err)
	}
	if admit(verdict) != nil {
		t.Error("a survey admits something")
	}
	last := verdict.Clock
	later := last
	later.Resets++
	for name, c := range map[string]struct {
		host  string
		nonce []byte
		clock Clock
		check string
	}{
		"another host":     {"host-2", n, last, "signature"},
		"an unknown host":  {"host-3", n, last, "host"},
		"another question": {"host-1", nonce(), last, "binding"},
		"no nonce":         {"host-1", nil, last, "input"},
		"from before":      {"host-1", n, later, "clock"},
	} {
		if verdict := v.Current().Survey(c.host, c.nonce, c.clock, e); verdict.Good() || !strings.Contains(checks(verdict), c.check) {
			t.Errorf("%s: want a finding of %q, got %v", name, c.check, verdict.Findings)
		}
	}
	// A survey's quote admits no VM, and a VM's quote is no survey's answer.
	a := w.attempt()
	a.ev.Platform = logs
	a.quote()
	_, boot := v.Boot(a.expect, a.ev)
	x, _ := w.static(evidence.RoleWatch, boot)
	x.Nonce = n
	if _, verdict := v.Static(x, e); verdict.Good() || !strings.Contains(checks(verdict), "binding") {
		t.Errorf("a survey's quote for a VM: %v", verdict.Findings)
	}
	x, watch := w.static(evidence.RoleWatch, boot)
	watch.Platform = logs
	if verdict := v.Current().Survey("host-1", x.Nonce, last, watch); verdict.Good() {
		t.Error("a VM's quote answers a survey")
	}
	// A host may have booted since.
	n, e = w.survey(m.boot(w.host))
	if err := v.Current().Survey("host-1", n, last, e).Err(); err != nil {
		t.Errorf("after a boot: %v", err)
	}
}

// What is evaluated before it counts is judged as it will be, and nothing changes by it.
func TestTrial(t *testing.T) {
	w := newWorld(t)
	m := newMachine()
	doc := m.manifest(w)
	v := w.production(t, doc)
	logs := m.boot(w.host)
	a := w.attempt()
	a.ev.Platform = logs
	a.quote()
	admitted, boot := v.Boot(a.expect, a.ev)
	if admitted == nil {
		t.Fatal(boot.Err())
	}
	n, e := w.survey(logs)

	next := m.manifest(w)
	next.Name, next.ValidFrom, next.ValidUntil = "release-2", w.now.Add(24*time.Hour), w.now.Add(48*time.Hour)
	next.Files = append(next.Files, file("/usr/bin/new"))
	same, err := v.Try(next, true)
	if err != nil {
		t.Fatal(err)
	}
	if verdict, err := same.Stored(boot.Parts); err != nil || verdict.Err() != nil {
		t.Errorf("stored: %v, %v", err, verdict.Err())
	}
	if err := same.Survey("host-1", n, Clock{}, e).Err(); err != nil {
		t.Errorf("asked now: %v", err)
	}
	gone := next
	gone.Files = slices.Clone(next.Files)
	gone.Files[0].SHA256[0] ^= 1
	other, err := v.Try(gone, true)
	if err != nil {
		t.Fatal(err)
	}
	stored, err := other.Stored(boot.Parts)
	if err != nil {
		t.Fatal(err)
	}
	for name, verdict := range map[string]Verdict{"stored": stored, "asked now": other.Survey("host-1", n, Clock{}, e)} {
		if verdict.Good() || len(verdict.Findings) != 1 || verdict.Findings[0].Component != `file "/usr/bin/foothold-host"` {
			t.Errorf("%s: %v", name, verdict.Findings)
		}
		if admit(verdict) != nil {
			t.Errorf("%s: admitted", name)
		}
	}
	// Evidence is proved anew: nothing of it may have been altered where it lay.
	spoiled := boot.Parts
	spoiled.Record = bytes.Replace(spoiled.Record, []byte(`"attest":"`), []byte(`"attest":"AAAA`), 1)
	if verdict, err := same.Stored(spoiled); err == nil && verdict.Good() {
		t.Error("altered evidence was accepted")
	}
	if verdict, err := v.Current().Stored(boot.Parts); err != nil || verdict.Err() != nil || verdict.Digest != boot.Digest {
		t.Errorf("the verifier judges otherwise since: %v, %v", err, verdict.Err())
	}

	if found, err := CompareLogs(next, logs); err != nil || len(found) != 0 {
		t.Errorf("logs alone: %v, %v", found, err)
	}
	if found, err := CompareLogs(gone, logs); err != nil || len(found) != 1 || found[0].Component != `file "/usr/bin/foothold-host"` {
		t.Errorf("logs alone: %v, %v", found, err)
	}
	// A release may change more files than one refusal names.
	all := m.manifest(w)
	all.Files = nil
	for i := range 100 {
		all.Files = append(all.Files, file(fmt.Sprintf("/usr/lib/%d", i)))
	}
	many := newMachine()
	many.Files = all.Files
	changed := many.boot(w.host)
	if found, err := CompareLogs(doc, changed); err != nil || len(found) != 100 {
		t.Errorf("%d findings for 100 files, %v", len(found), err)
	}
	n, e = w.survey(changed)
	if found := v.Current().Survey("host-1", n, Clock{}, e).Findings; len(found) != 100 {
		t.Errorf("%d findings for 100 files", len(found))
	}
	for name, change := range map[string]func(*platform.Manifest){
		"of a lab":            func(d *platform.Manifest) { d.Profile = platform.Lab },
		"without a boot":      func(d *platform.Manifest) { d.Boot = nil },
		"without files":       func(d *platform.Manifest) { d.Files = nil },
		"that never counts":   func(d *platform.Manifest) { d.ValidUntil = d.ValidFrom },
		"without the loader":  func(d *platform.Manifest) { d.Firmware.LoaderKernel = digest.SHA256{} },
		"of no known profile": func(d *platform.Manifest) { d.Profile = "other" },
	} {
		bad := m.manifest(w)
		change(&bad)
		if _, err := v.Try(bad, true); err == nil {
			t.Errorf("reference values %s are tried", name)
		}
	}
}
