package verify

import (
	"crypto/ed25519"
	"strings"
	"testing"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/platform"
	"foothold/protocol/signed"
)

// TestSeveralReferenceValues: a quote is good if it satisfies all of any one document that
// counts for the host's release; else it is told by the one that it misses least. What is
// not in force, or not of the release, helps nobody.
func TestSeveralReferenceValues(t *testing.T) {
	w := newWorld(t)
	public := w.plat.Public().(ed25519.PublicKey)
	document := func(change func(*platform.Manifest)) *Platform {
		t.Helper()
		m := w.manifest()
		change(&m)
		p, err := StoredPlatform(seal(t, w.plat, signed.Platform, m), public, platform.Lab, w.now)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	good := document(func(*platform.Manifest) {})
	oneOff := document(func(m *platform.Manifest) {
		m.Files = append([]platform.File{}, m.Files...)
		m.Files[0].SHA256 = digest.Of([]byte("other"))
	})
	allOff := document(func(m *platform.Manifest) {
		m.ValidFrom = m.ValidFrom.Add(time.Minute) // newer
		m.Files = append([]platform.File{}, m.Files...)
		for i := range m.Files {
			m.Files[i].SHA256 = digest.Of([]byte{byte(i)})
		}
	})
	ended := document(func(m *platform.Manifest) { m.ValidFrom, m.ValidUntil = w.now.Add(-2*time.Hour), w.now.Add(-time.Hour) })
	later := document(func(m *platform.Manifest) { m.ValidFrom = w.now.Add(time.Hour) })
	foreign := document(func(m *platform.Manifest) { m.Name = "release-2" })
	inv, err := ParseInventory(seal(t, w.inv, signed.Inventory, w.inventory()), w.inv.Public().(ed25519.PublicKey), w.makers(), w.now)
	if err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		list  []*Platform
		by    *Platform // nil: none
		check string    // "" for a good verdict
	}{
		"one":                      {[]*Platform{good}, good, ""},
		"the right one is last":    {[]*Platform{allOff, oneOff, good}, good, ""},
		"the right one is first":   {[]*Platform{good, oneOff, allOff}, good, ""},
		"the right one with ended": {[]*Platform{ended, later, good}, good, ""},
		"told by the closest":      {[]*Platform{allOff, oneOff}, oneOff, "log"},
		"ended alone":              {[]*Platform{ended}, ended, "platform"},
		"to come":                  {[]*Platform{later}, later, "platform"},
		"of another release":       {[]*Platform{foreign}, nil, "platform"},
		"none":                     {[]*Platform{}, nil, "platform"},
		"ended beside a wrong one": {[]*Platform{ended, oneOff}, oneOff, "log"},
	} {
		v, err := New(Config{Inventory: inv, Platforms: c.list, Profile: platform.Lab, Now: func() time.Time { return w.now }})
		if err != nil {
			t.Fatal(err)
		}
		a := w.attempt()
		a.quote()
		admitted, verdict := v.Boot(a.expect, a.ev)
		if (admitted != nil) != (c.check == "") || verdict.Good() != (c.check == "") || !strings.Contains(checks(verdict), c.check) {
			t.Errorf("%s: %v", what, verdict.Findings)
		}
		want := digest.SHA256{}
		if c.by != nil {
			want = c.by.Digest()
		}
		if verdict.Manifest != want {
			t.Errorf("%s: judged by %s, want %s", what, verdict.Manifest.Short(), want.Short())
		}
		if audited := w.pinned().audit(t, verdict.bundle(t)); !audited.Holds() || audited.Derived != (c.check == "") {
			t.Errorf("%s: an auditor derives %v: %+v", what, audited.Derived, audited.Tests)
		}
		if fit := v.Host("host-1") == nil; fit != (c.check != "platform") {
			t.Errorf("%s: the host is fit: %v", what, fit)
		}
		if c.check != "" {
			continue
		}
		x, ev := w.static(evidence.RoleUnlock, verdict)
		if _, again := v.Static(x, ev); !again.Good() || again.Manifest != want {
			t.Errorf("%s: static quote by %s: %v", what, again.Manifest.Short(), again.Findings)
		}
	}
}
