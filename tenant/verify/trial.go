package verify

import (
	"encoding/json"
	"fmt"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
)

// Trial judges hosts for people: by the reference values in force, or by others, signed or
// not, before they are. All checks are those of a quote that is to admit; nothing is
// released by what comes out.
type Trial struct{ v *Verifier }

// Current judges by the reference values in force.
func (v *Verifier) Current() *Trial {
	current := *v
	current.most = maxTrial
	return &Trial{&current}
}

// Try judges every host by these reference values, whatever release the inventory names for
// it and whenever they count. A document that could not be signed is refused. Of each answer
// as many findings are named as of a refusal, or all for people, where few are judged.
func (v *Verifier) Try(doc platform.Manifest, all bool) (*Trial, error) {
	p, err := proposed(doc, v.profile)
	if err != nil {
		return nil, err
	}
	shadow := *v
	shadow.platforms, shadow.most = map[string][]*Platform{}, maxFindings
	if all {
		shadow.most = maxTrial
	}
	for _, h := range v.inventory.doc.Hosts {
		shadow.platforms[h.Software] = []*Platform{p}
	}
	return &Trial{&shadow}, nil
}

// proposed is a document as it will be judged by once it is signed and counts.
func proposed(doc platform.Manifest, profile string) (*Platform, error) {
	if !validProfile(profile) || doc.Profile != profile {
		return nil, fmt.Errorf("reference values: they are of profile %q, this installation accepts %q", doc.Profile, profile)
	}
	if !doc.ValidFrom.Before(doc.ValidUntil) {
		return nil, fmt.Errorf("reference values: they would count from %s to %s", doc.ValidFrom.UTC().Format(time.RFC3339), doc.ValidUntil.UTC().Format(time.RFC3339))
	}
	payload, err := json.Marshal(doc)
	if err != nil {
		return nil, fmt.Errorf("reference values: %w", err)
	}
	doc.ValidFrom, doc.ValidUntil = time.Time{}, time.Unix(1<<40, 0)
	p := &Platform{doc: doc, digest: digest.Of(payload)}
	p.index()
	if err := p.complete(); err != nil {
		return nil, fmt.Errorf("reference values: %w", err)
	}
	return p, nil
}

// Stored judges the evidence of a verdict again, as of when it was first judged, by the
// inventory and the policies of now.
func (t *Trial) Stored(p Parts) (Verdict, error) {
	data, err := p.Bundle()
	if err != nil {
		return Verdict{}, err
	}
	b, err := ParseBundle(data)
	if err != nil {
		return Verdict{}, err
	}
	if now := t.v.now(); b.Record.At.After(now.Add(clockSkew)) { // this machine's clock was set back
		return Verdict{}, ahead("stored evidence: it was judged", b.Record.At, now)
	}
	return t.v.derive(b.Record, b.Logs), nil
}

// Survey judges what a host answered that was asked for no VM, with the nonce of that very
// question and the clock last stored for it.
func (t *Trial) Survey(host string, nonce []byte, clock Clock, e StaticEvidence) Verdict {
	at := t.v.now().UTC().Round(0)
	return t.v.byAny(host, at, func(p *Platform) Verdict {
		j := t.v.begin(evidence.RoleSurvey, "", 0, host, at, p, e.Platform, 0)
		j.nonce(nonce)
		static, claimed := j.readLogs(j.logs)
		j.quote(e.Quote, quoteExpectation{
			binding:   evidence.SurveyBinding(host, nonce),
			selection: pcr.StaticSelection(),
			static:    static,
			registers: map[int]digest.SHA256{},
			claimed:   claimed,
			clock:     clock,
		})
		j.verdict.good = len(j.verdict.Findings) == 0
		return j.verdict
	})
}

// CompareLogs holds logs alone against reference values: what a host says that it measured,
// which no quote proves here, and without what is demanded of single hosts.
func CompareLogs(doc platform.Manifest, logs evidence.Platform) ([]Finding, error) {
	p, err := proposed(doc, doc.Profile)
	if err != nil {
		return nil, err
	}
	j := &judgement{v: &Verifier{profile: doc.Profile, most: maxTrial}, platform: p}
	j.readLogs(logs)
	return j.verdict.Findings, nil
}
