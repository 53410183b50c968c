package verify

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/platform"
	"foothold/protocol/token"
)

// refusals has one refusal of each cause, after a boot verdict where there must be one.
func (w *world) refusals(boot Verdict) map[Cause]Unjudged {
	a := w.attempt()
	tunnel := &TunnelEnd{a.ev.ExporterHash, a.ev.ServerLeaf, a.ev.LoaderLeaf, a.ev.VMKey}
	u := func(role string, previous digest.SHA256, change func(*Unjudged)) Unjudged {
		u := Unjudged{Role: role, Reservation: a.expect.Reservation, Start: a.expect.Start, Host: a.expect.Host, Phase: "booting", Previous: previous,
			Reason: event.QuoteRefused, Said: "as it was", Nonce: a.expect.Nonce}
		if role == evidence.RoleBoot {
			u.Settings, u.VMKey = &a.expect.Settings, a.expect.Settings.Boot.CA[:32]
		}
		change(&u)
		return u
	}
	none := digest.SHA256{}
	list := map[Cause]Unjudged{
		CauseNonce:    u(evidence.RoleBoot, none, func(u *Unjudged) { u.Tunnel, u.Quote = tunnel, &a.ev.Quote }),
		CauseAgain:    u(evidence.RoleBoot, boot.Digest, func(u *Unjudged) { u.Tunnel, u.Quote = tunnel, &a.ev.Quote }),
		CauseVMKey:    u(evidence.RoleBoot, none, func(u *Unjudged) { u.Tunnel, u.Quote = tunnel, &a.ev.Quote }),
		CauseSession:  u(evidence.RoleBoot, none, func(u *Unjudged) {}),
		CauseUnlisted: u(evidence.RoleUnlock, boot.Digest, func(u *Unjudged) { u.Host = "host-9" }),
		CauseSilent:   u(evidence.RoleConnect, boot.Digest, func(u *Unjudged) {}),
		CauseAnswer:   u(evidence.RoleWatch, boot.Digest, func(u *Unjudged) { u.Asked, u.Answer = AskedQuote, []byte(`{"quote":1}`) }),
		CauseLate:     u(evidence.RoleWatch, boot.Digest, func(u *Unjudged) { u.Since, u.Until = w.now.Add(-time.Hour), w.now.Add(-time.Minute) }),
	}
	for c, one := range list {
		one.Cause = c
		list[c] = one
	}
	return list
}

// TestUnjudged: a refusal before there was a quote to judge has a bundle of one form, which
// leads to the same findings by the pinned keys, says what rests on a word alone, stands in
// its start's chain, and permits nothing.
func TestUnjudged(t *testing.T) {
	w := newWorld(t)
	v, p := w.verifier(), w.pinned()
	boot := w.admitted(t, v)
	first := p.audit(t, boot.bundle(t))
	refusals := w.refusals(boot)
	if len(refusals) != len(causes) {
		t.Fatalf("%d causes, %d of them here", len(causes), len(refusals))
	}
	for cause, u := range refusals {
		verdict := v.Refuse(u, evidence.Platform{})
		if verdict.Good() || admit(verdict) != nil {
			t.Fatalf("%s: admitted", cause)
		}
		for _, f := range verdict.Findings {
			if f.Check == "" || f.Component == "" || f.Expected == "" || f.Seen == "" || f.Do == "" || f.Detail == "" {
				t.Errorf("%s: finding %+v", cause, f)
			}
		}
		a := p.audit(t, verdict.bundle(t))
		if !a.Holds() || a.Derived || a.Cause != cause || a.Digest != verdict.Digest || !a.Unjudged || len(a.Unproved) == 0 || !slices.Equal(a.Findings, verdict.Findings) {
			t.Errorf("%s: %+v", cause, a)
		}
		if cause == CauseUnlisted { // it is of another host than the chain
			continue
		}
		if u.Previous.IsZero() {
			if c := AuditChain([]Audited{a}, nil); !c.Holds() || !c.Complete || c.Last != a.Digest {
				t.Errorf("%s: alone %+v", cause, c)
			}
			continue
		}
		if c := AuditChain([]Audited{first, a}, nil); !c.Holds() || !c.Complete || c.Last != a.Digest || c.Verdicts != 2 {
			t.Errorf("%s: chain %+v", cause, c)
		}
		if c := AuditChain([]Audited{a}, nil); c.Complete {
			t.Errorf("%s: a chain without its boot is complete", cause)
		}
	}

	// A nonce that had served is found in the chain.
	u := refusals[CauseNonce]
	u.Previous, u.Nonce = boot.Digest, first.nonce
	a := p.audit(t, v.Refuse(u, evidence.Platform{}).bundle(t))
	c := AuditChain([]Audited{first, a}, nil)
	if says := c.Tests[len(c.Tests)-1].Says; !c.Holds() || !strings.Contains(says, "that of verdict 1") {
		t.Errorf("a nonce that served: %s", says)
	}
}

// TestUnjudgedThatCannotBe: a record of a refusal that does not fit what is in it is found out,
// though its digest is made anew.
func TestUnjudgedThatCannotBe(t *testing.T) {
	w := newWorld(t)
	v, p := w.verifier(), w.pinned()
	boot := w.admitted(t, v)
	for name, c := range map[string]struct {
		cause  Cause
		change func(*Unjudged)
	}{
		"no cause":             {CauseNonce, func(u *Unjudged) { u.Cause = "whim" }},
		"no role":              {CauseNonce, func(u *Unjudged) { u.Role = "guess" }},
		"no quote":             {CauseNonce, func(u *Unjudged) { u.Quote = nil }},
		"no nonce":             {CauseNonce, func(u *Unjudged) { u.Nonce = u.Nonce[1:] }},
		"no first verdict":     {CauseAgain, func(u *Unjudged) { u.Previous = digest.SHA256{} }},
		"the same key":         {CauseVMKey, func(u *Unjudged) { u.VMKey = u.Tunnel.VMKey }},
		"a quote after all":    {CauseSession, func(u *Unjudged) { u.Quote = &evidence.Quote{} }},
		"a listed host":        {CauseUnlisted, func(u *Unjudged) { u.Host = w.attempt().expect.Host }},
		"an answer after all":  {CauseSilent, func(u *Unjudged) { u.Answer = []byte("x") }},
		"an answer of nothing": {CauseAnswer, func(u *Unjudged) { u.Asked = "weather" }},
		"a readable answer":    {CauseAnswer, func(u *Unjudged) { u.Asked, u.Answer = AskedPlatform, []byte(`{}`) }},
		"not late yet":         {CauseLate, func(u *Unjudged) { u.Until = w.now.Add(time.Minute) }},
		"no time at all":       {CauseLate, func(u *Unjudged) { u.Until = u.Since }},
	} {
		u := w.refusals(boot)[c.cause]
		c.change(&u)
		if a := p.audit(t, v.Refuse(u, evidence.Platform{}).bundle(t)); a.Holds() {
			t.Errorf("%s: %+v", name, a.Tests)
		}
	}
}

// TestAlteredRefusal: each altered field of such a bundle is found out by its digest.
func TestAlteredRefusal(t *testing.T) {
	w := newWorld(t)
	v, p := w.verifier(), w.pinned()
	data := v.Refuse(w.refusals(w.admitted(t, v))[CauseAgain], w.attempt().ev.Platform).bundle(t)
	var tree any
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.UseNumber()
	if err := dec.Decode(&tree); err != nil {
		t.Fatal(err)
	}
	fields := 0
	each(tree, "", func(path string, put func(any)) {
		altered, err := json.Marshal(tree)
		if err != nil {
			t.Fatal(err)
		}
		var b Bundle
		if json.Unmarshal(altered, &b) != nil {
			return
		}
		as, err := b.encode()
		if err != nil || bytes.Equal(as, data) {
			return
		}
		fields++
		again, err := ParseBundle(as)
		if err != nil {
			return
		}
		if a, err := p.Audit(again); err == nil && a.Holds() {
			t.Errorf("%s altered: holds", path)
		}
	})
	if fields < 40 {
		t.Errorf("only %d alterations", fields)
	}
}

// TestUnjudgedIsBounded: whoever sends the bytes of a refusal fills nothing up, and puts no
// token into it.
func TestUnjudgedIsBounded(t *testing.T) {
	w := newWorld(t)
	v := w.verifier()
	boot := w.admitted(t, v)
	big := bytes.Repeat([]byte("x"), 1<<20)
	u := w.refusals(boot)[CauseNonce]
	u.Tunnel = &TunnelEnd{ServerLeaf: big, LoaderLeaf: big, VMKey: big}
	u.Quote, u.Answer, u.Said = &evidence.Quote{Attest: big, Signature: big}, big, string(big)
	verdict := v.Refuse(u, evidence.Platform{Kernel: bytes.Repeat([]byte("x"), maxLogs)})
	data := verdict.bundle(t)
	if most := len(verdict.Parts.Inventory.Data) + len(verdict.Parts.Platform.Data) + 2*maxAnswer; len(data) > most {
		t.Errorf("%d bytes, at most %d", len(data), most)
	}
	if a := w.pinned().audit(t, data); !a.Holds() || !strings.Contains(strings.Join(a.Unproved, "; "), "are not kept") {
		t.Errorf("%+v", a)
	}

	secret := token.New(token.T2).Reveal()
	u = w.refusals(boot)[CauseNonce]
	leaf := []byte("a leaf with " + secret)
	u.Tunnel, u.Said = &TunnelEnd{ServerLeaf: leaf, LoaderLeaf: leaf, VMKey: []byte(secret)}, "said "+secret
	u.Quote, u.Answer = &evidence.Quote{Attest: leaf, Signature: leaf}, leaf
	data = v.Refuse(u, evidence.Platform{}).bundle(t)
	if bytes.Contains(data, []byte(secret)) {
		t.Error("the bundle holds a token as it is")
	}
	for off := range 3 {
		inside := base64.StdEncoding.EncodeToString([]byte(strings.Repeat("-", off) + secret))
		if bytes.Contains(data, []byte(inside[8:len(inside)-8])) {
			t.Error("the bundle holds a token in base64")
		}
	}
}

// TestUnjudgedOfNoHost: also in production a host that is not in the inventory leaves evidence
// that can be audited, though there is no policy for it.
func TestUnjudgedOfNoHost(t *testing.T) {
	w := newWorld(t)
	v := w.production(t, newMachine().manifest(w))
	u := w.refusals(Verdict{Digest: digest.Of([]byte("boot"))})[CauseUnlisted]
	p := w.pinned()
	p.Profile = platform.Production
	if a := p.audit(t, v.Refuse(u, evidence.Platform{}).bundle(t)); !a.Holds() {
		t.Errorf("%+v", a.Tests)
	}
}

// TestUnjudgedInAChain: what hangs at a chain and does not belong there is found out.
func TestUnjudgedInAChain(t *testing.T) {
	w := newWorld(t)
	v := w.verifier()
	boot := w.admitted(t, v)
	link := boot.Parts.Link
	refusal := v.Refuse(w.refusals(boot)[CauseSilent], evidence.Platform{}).Parts.Link
	if c := AuditChain(nil, []Link{link, refusal}); !c.Holds() || c.Last != refusal.Digest() {
		t.Fatalf("%+v", c)
	}
	with := func(change func(*Link)) []Link {
		l := refusal
		change(&l)
		return []Link{link, l}
	}
	for name, links := range map[string][]Link{
		"accepted":             with(func(l *Link) { l.Accepted = true }),
		"of another start":     with(func(l *Link) { l.Start++ }),
		"of another VM":        with(func(l *Link) { l.Reservation = "x" }),
		"of another host":      with(func(l *Link) { l.Host = "host-9" }),
		"of no role":           with(func(l *Link) { l.Role = evidence.RoleSurvey }),
		"after nothing":        with(func(l *Link) { l.Previous = digest.SHA256{} }),
		"after what is absent": with(func(l *Link) { l.Previous = digest.Of([]byte("x")) }),
		"before the verdict":   with(func(l *Link) { l.At = link.At.Add(-time.Hour) }),
		"two":                  append(with(func(l *Link) { l.Role = evidence.RoleUnlock }), refusal),
	} {
		if c := AuditChain(nil, links); c.Holds() {
			t.Errorf("%s: %+v", name, c)
		}
	}
	judged := refusal
	judged.Unjudged = false
	if judged.Digest() == refusal.Digest() {
		t.Error("the digest does not tell a refusal without a judgement from a verdict")
	}
}
