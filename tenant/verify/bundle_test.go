package verify

import (
	"bytes"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
)

// pinned is what an auditor of this world has.
func (w *world) pinned() Pinned {
	return Pinned{InventoryKey: w.inv.Public().(ed25519.PublicKey), PlatformKey: w.plat.Public().(ed25519.PublicKey),
		Makers: w.makers(), Profile: platform.Lab, Now: func() time.Time { return w.now }}
}

// bundle is a verdict's bundle as it is exported.
func (v Verdict) bundle(t testing.TB) []byte {
	t.Helper()
	data, err := v.Parts.Bundle()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func (p Pinned) audit(t testing.TB, data []byte) Audited {
	t.Helper()
	b, err := ParseBundle(data)
	if err != nil {
		t.Fatal(err)
	}
	a, err := p.Audit(b)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// chain is a start from its boot to a last watch that is refused.
func (w *world) chain(t *testing.T, v *Verifier) (verdicts []Verdict) {
	verdicts = append(verdicts, w.admitted(t, v))
	for _, role := range []string{evidence.RoleUnlock, evidence.RoleConnect, evidence.RoleWatch, evidence.RoleWatch, evidence.RoleWatch} {
		if len(verdicts) == 5 {
			w.host.extend(pcr.Platform, digest.Of([]byte("rogue")))
			w.host.log = append(w.host.log, pcr.Event{PCR: pcr.Platform, Digest: digest.Of([]byte("rogue")), Name: "rogue <b>"})
		}
		x, ev := w.static(role, verdicts[len(verdicts)-1])
		_, verdict := v.Static(x, ev)
		verdicts = append(verdicts, verdict)
	}
	return verdicts
}

// TestAudit: every bundle, of an acceptance or a refusal, leads to its verdict again by the
// pinned keys alone, and those of a start are one chain, also where links stand for some.
func TestAudit(t *testing.T) {
	w := newWorld(t)
	v, p := w.verifier(), w.pinned()
	verdicts := w.chain(t, v)
	var audited []Audited
	for i, verdict := range verdicts {
		if good := i < 5; verdict.Good() != good {
			t.Fatalf("verdict %d: %v", i, verdict.Err())
		}
		a := p.audit(t, verdict.bundle(t))
		if !a.Holds() || a.Derived != verdict.Good() || a.Accepted != verdict.Good() || a.Digest != verdict.Digest || a.Inventory != 1 || a.Platform != "release-1" ||
			!reflect.DeepEqual(a.Findings, append([]Finding{}, verdict.Findings...)) {
			t.Errorf("%s: %+v", verdict.Role, a)
		}
		if bytes.Contains(verdict.bundle(t), []byte(`"roots"`)) {
			t.Error("a bundle carries roots")
		}
		audited = append(audited, a)
	}
	boot := w.attempt()
	boot.firmware.LoaderInitramfs[0] ^= 1
	boot.claims()
	boot.quote()
	_, refused := v.Boot(boot.expect, boot.ev)
	if a := p.audit(t, refused.bundle(t)); refused.Good() || !a.Holds() || a.Derived || len(a.Findings) < 1 {
		t.Errorf("a refused boot: %+v", a)
	}
	absent := w.attempt()
	absent.expect.Host = "host-9"
	absent.quote()
	_, refused = v.Boot(absent.expect, absent.ev)
	if a := p.audit(t, refused.bundle(t)); refused.Good() || !a.Holds() || a.Platform != "" {
		t.Errorf("a host that is not in the inventory: %+v", a)
	}

	links := make([]Link, len(verdicts))
	for i, verdict := range verdicts {
		links[i] = verdict.Parts.Link
	}
	slices.Reverse(audited) // their order is not the caller's to know
	for what, c := range map[string]struct {
		bundles  []Audited
		links    []Link
		holds    bool
		complete bool
	}{
		"all bundles":              {audited, nil, true, true},
		"all, with links":          {audited, links, true, true},
		"links for some":           {[]Audited{audited[0], audited[2], audited[5]}, links, true, true},
		"links alone":              {nil, links, true, true},
		"the last ones":            {audited[:2], nil, true, false},
		"one":                      {audited[1:2], nil, true, false},
		"one missing":              {slices.Delete(slices.Clone(audited), 2, 3), nil, false, false},
		"boot missing, and unlock": {audited[:3], links[:1], false, false},
		"none":                     {nil, nil, false, false},
	} {
		got := AuditChain(c.bundles, c.links)
		if got.Holds() != c.holds || c.holds && (got.Complete != c.complete || got.Complete == !got.Missing.IsZero()) {
			t.Errorf("%s: %+v", what, got)
		}
	}
	for what, change := range map[string]func([]Link){
		"an accepted refusal":   func(l []Link) { l[5].Accepted = true; l[4].Accepted = false },
		"another host":          func(l []Link) { l[3].Host = "host-2" },
		"another start":         func(l []Link) { l[3].Start = 2 },
		"another order":         func(l []Link) { l[1].Role, l[2].Role = l[2].Role, l[1].Role },
		"no boot":               func(l []Link) { l[0].Role = evidence.RoleUnlock },
		"a boot in the middle":  func(l []Link) { l[2].Role = evidence.RoleBoot },
		"unknown role":          func(l []Link) { l[4].Role = "other" },
		"time that goes back":   func(l []Link) { l[2].At = l[2].At.Add(-time.Hour) },
		"two after the same":    func(l []Link) { l[5].Previous = l[3].Previous },
		"a record that differs": func(l []Link) { l[2].Record[0] ^= 1 },
	} {
		forged := slices.Clone(links)
		change(forged)
		for i := 1; i < len(forged) && what != "a record that differs" && what != "two after the same"; i++ { // whoever forges them can hash
			forged[i].Previous = forged[i-1].Digest()
		}
		if got := AuditChain(nil, forged); got.Holds() {
			t.Errorf("%s: %+v", what, got)
		}
	}
	// Whoever rewrites the whole chain cannot rewrite the quotes.
	forged := slices.Clone(links)
	forged[1].Record[0] ^= 1
	for i := 2; i < len(forged); i++ {
		forged[i].Previous = forged[i-1].Digest()
	}
	if got := AuditChain(audited, forged); got.Holds() {
		t.Errorf("a rewritten chain: %+v", got)
	}
	w.production2(t)
}

// production2 is a bundle of a production host, whose logs are those of firmware and kernel.
func (w *world) production2(t *testing.T) {
	t.Helper()
	m := newMachine()
	logs := m.boot(w.host)
	v := w.production(t, m.manifest(w))
	p := w.pinned()
	p.Profile = platform.Production
	for name, files := range map[string]bool{"as it must be": true, "one file changed": false} {
		if !files {
			m.Files[1].SHA256[0] ^= 1
			logs = m.boot(w.host)
		}
		a := w.attempt()
		a.ev.Platform = logs
		a.quote()
		_, verdict := v.Boot(a.expect, a.ev)
		if got := p.audit(t, verdict.bundle(t)); verdict.Good() != files || !got.Holds() || got.Derived != files {
			t.Errorf("%s: %v, %+v", name, verdict.Err(), got)
		}
		if got := w.pinned().audit(t, verdict.bundle(t)); got.Holds() {
			t.Errorf("%s: a lab's auditor takes it", name)
		}
		if !files {
			return
		}
		m = newMachine()
	}
}

// TestOtherKeys: a bundle is held against what its reader pins and nothing else.
func TestOtherKeys(t *testing.T) {
	w := newWorld(t)
	data := w.admitted(t, w.verifier()).bundle(t)
	for what, change := range map[string]func(*Pinned){
		"another inventory key": func(p *Pinned) { p.InventoryKey = p.PlatformKey },
		"another platform key":  func(p *Pinned) { p.PlatformKey = p.InventoryKey },
		"another profile":       func(p *Pinned) { p.Profile = platform.Production },
		"an earlier clock":      func(p *Pinned) { p.Now = func() time.Time { return w.now.Add(-time.Hour) } },
		"other TPM manufacturers": func(p *Pinned) {
			ca := selfSigned(t, "ca", nil)
			p.Makers = &Manufacturers{pool: poolOf(ca.cert)}
		},
	} {
		p := w.pinned()
		change(&p)
		if a := p.audit(t, data); a.Holds() {
			t.Errorf("%s: %+v", what, a)
		}
	}
	b, err := ParseBundle(data)
	if err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(*Pinned){
		"no inventory key": func(p *Pinned) { p.InventoryKey = nil },
		"no platform key":  func(p *Pinned) { p.PlatformKey = nil },
		"no manufacturers": func(p *Pinned) { p.Makers = nil },
		"no profile":       func(p *Pinned) { p.Profile = "" },
		"no clock":         func(p *Pinned) { p.Now = nil },
	} {
		p := w.pinned()
		change(&p)
		if _, err := p.Audit(b); err == nil {
			t.Errorf("%s: audited", what)
		}
	}
}

// TestAlteredBundle alters every field of bundles, leaves each out, and adds to each object.
// What is altered is refused; if who alters it makes the digest anew and the verdict is
// still derivable, then by the next bundle, whose quote was made over the true digest.
func TestAlteredBundle(t *testing.T) {
	w := newWorld(t)
	v, p := w.verifier(), w.pinned()
	verdicts := w.chain(t, v)
	for _, i := range []int{0, 4, 5} { // boot, watch, and a refusal
		data := verdicts[i].bundle(t)
		var tree any
		dec := json.NewDecoder(bytes.NewReader(data))
		dec.UseNumber()
		if err := dec.Decode(&tree); err != nil {
			t.Fatal(err)
		}
		alone, fields := 0, 0
		each(tree, "", func(path string, put func(any)) {
			fields++
			altered, err := json.Marshal(tree)
			if err != nil {
				t.Fatal(err)
			}
			var b Bundle
			if json.Unmarshal(altered, &b) != nil {
				return // not even of its types
			}
			as, err := b.encode() // in its one form
			if err != nil {
				t.Fatal(err)
			}
			if bytes.Equal(as, data) { // what was left out is zero
				return
			}
			again, err := ParseBundle(as)
			if err != nil {
				return
			}
			if a, err := p.Audit(again); err == nil && a.Holds() {
				t.Errorf("verdict %d: %s altered: accepted", i, path)
			}
			link, err := again.link()
			if err != nil {
				t.Fatal(err)
			}
			again.Digest = link.Digest()
			if again.Digest == verdicts[i].Digest { // it was the digest that was altered, or what it does not cover
				return
			}
			a, err := p.Audit(again)
			if err != nil || !a.Holds() {
				return
			}
			alone++
			if i+1 == len(verdicts) {
				t.Logf("verdict %d: %s altered, digest made anew: its digest alone tells", i, path)
				return
			}
			if c := AuditChain([]Audited{a, p.audit(t, verdicts[i+1].bundle(t))}, nil); c.Holds() {
				t.Errorf("verdict %d: %s altered, digest made anew: accepted with the next", i, path)
			}
		})
		if fields < 60 {
			t.Errorf("verdict %d: only %d alterations", i, fields)
		}
		t.Logf("verdict %d: %d alterations, %d of them told by the next quote alone", i, fields, alone)
		for at := 0; at < len(data); at += 1 + len(data)/3000 {
			bad := slices.Clone(data)
			bad[at] ^= 1
			b, err := ParseBundle(bad)
			if err != nil {
				continue
			}
			if a, err := p.Audit(b); err == nil && a.Holds() {
				t.Errorf("verdict %d: byte %d altered: accepted", i, at)
			}
		}
	}
}

// each alters each value of a JSON tree in turn, leaves it out, and adds to it, calls f, and
// puts it back.
func each(tree any, path string, f func(path string, put func(any))) {
	switch v := tree.(type) {
	case map[string]any:
		for _, key := range slices.Sorted(maps.Keys(v)) {
			old := v[key]
			put := func(x any) { v[key] = x }
			for _, x := range others(old) {
				put(x)
				f(fmt.Sprintf("%s.%s=%.40v", path, key, x), put)
				put(old)
			}
			if old != nil && !reflect.ValueOf(old).IsZero() {
				delete(v, key)
				f(path+"."+key+" left out", put)
				put(old)
			}
			each(old, path+"."+key, f)
		}
	case []any:
		for i := range v {
			old := v[i]
			put := func(x any) { v[i] = x }
			for _, x := range others(old) {
				put(x)
				f(fmt.Sprintf("%s[%d]=%.40v", path, i, x), put)
				put(old)
			}
			each(old, fmt.Sprintf("%s[%d]", path, i), f)
		}
	}
}

// others are values near v.
func others(v any) []any {
	switch v := v.(type) {
	case bool:
		return []any{!v}
	case json.Number:
		n, _ := v.Int64()
		return []any{n + 1, n - 1}
	case string:
		if at, err := time.Parse(time.RFC3339Nano, v); err == nil {
			return []any{at.Add(time.Second).Format(time.RFC3339Nano), at.Add(-time.Nanosecond).Format(time.RFC3339Nano), at.Add(1000 * time.Hour).Format(time.RFC3339Nano)}
		}
		if raw, err := base64.StdEncoding.DecodeString(v); err == nil && len(raw) > 0 && strings.ToLower(v) != v {
			first, middle := slices.Clone(raw), slices.Clone(raw)
			first[0] ^= 1
			middle[len(raw)/2] ^= 1
			return []any{base64.StdEncoding.EncodeToString(first), base64.StdEncoding.EncodeToString(middle), base64.StdEncoding.EncodeToString(raw[1:])}
		}
		if len(v) > 0 {
			last := "0"
			if strings.HasSuffix(v, "0") {
				last = "1"
			}
			return []any{v[:len(v)-1] + last, v[1:]}
		}
		return []any{"x"}
	case []any:
		if len(v) > 0 {
			return []any{v[1:], append(slices.Clone(v), v[0])}
		}
	}
	return nil
}

// TestBundleForm: a bundle has one form.
func TestBundleForm(t *testing.T) {
	w := newWorld(t)
	data := w.admitted(t, w.verifier()).bundle(t)
	if _, err := ParseBundle(data); err != nil {
		t.Fatal(err)
	}
	var pretty bytes.Buffer
	if err := json.Indent(&pretty, data, "", "  "); err != nil {
		t.Fatal(err)
	}
	for what, bad := range map[string][]byte{
		"nothing":         nil,
		"cut":             data[:len(data)-2],
		"no end of line":  data[:len(data)-1],
		"two":             append(slices.Clone(data), data...),
		"indented":        pretty.Bytes(),
		"key in capitals": bytes.Replace(data, []byte(`"record"`), []byte(`"Record"`), 1),
		"key twice":       bytes.Replace(data, []byte(`{"format"`), []byte(`{"format":"x","format"`), 1),
		"unknown key":     bytes.Replace(data, []byte(`{"format"`), []byte(`{"extra":1,"format"`), 1),
		"other format":    bytes.Replace(data, []byte("bundle/v2"), []byte("bundle/v1"), 1),
		"neither quote":   bytes.Replace(data, []byte(`"boot":{`), []byte(`"static":{`), 1),
		"too large":       append(bytes.Repeat([]byte(" "), MaxBundle), data...),
	} {
		if _, err := ParseBundle(bad); err == nil {
			t.Errorf("%s: read", what)
		}
	}
}

// TestOversizedLogs: logs that are too large to be kept are a refusal that can be derived again.
func TestOversizedLogs(t *testing.T) {
	w := newWorld(t)
	a := w.attempt()
	a.ev.Platform.Kernel = make([]byte, maxLogs)
	a.quote()
	_, verdict := w.verifier().Boot(a.expect, a.ev)
	data := verdict.bundle(t)
	if got := w.pinned().audit(t, data); verdict.Good() || !got.Holds() || got.Derived || len(data) > 1<<20 || !strings.Contains(fmt.Sprint(got.Findings), "at most 4194304 are read") {
		t.Errorf("%d bytes, %+v", len(data), got)
	}
}

// TestNoPermissionFromBundles: nothing that reads bundles can give an Admitted.
func TestNoPermissionFromBundles(t *testing.T) {
	permission := reflect.TypeFor[*Admitted]()
	for _, typ := range []reflect.Type{reflect.TypeFor[*Bundle](), reflect.TypeFor[Pinned](), reflect.TypeFor[Audited](), reflect.TypeFor[AuditedChain](), reflect.TypeFor[Parts](), reflect.TypeFor[Link]()} {
		for i := range typ.NumMethod() {
			for out := range typ.Method(i).Type.Outs() {
				if out == permission || out == permission.Elem() {
					t.Errorf("%v.%s gives a permission", typ, typ.Method(i).Name)
				}
			}
		}
	}
	w := newWorld(t)
	verdict := w.admitted(t, w.verifier())
	if admit(Verdict{Role: verdict.Role, Digest: verdict.Digest, At: verdict.At}) != nil {
		t.Error("a verdict that nobody judged admits")
	}
}

// TestFindingsAreComplete: every check has its words, and each finding says what it is about,
// what was expected, what was seen and what to do, all at once.
func TestFindingsAreComplete(t *testing.T) {
	w := newWorld(t)
	v := w.verifier()
	a := w.attempt()
	a.expect.Start, a.expect.Nonce, a.expect.Clock = 2, nil, Clock{AIK: digest.Of([]byte("x"))}
	a.ev.Platform.Log[0].Digest[0] ^= 1
	a.ev.Platform.Log[1], a.ev.Platform.Log[2] = a.ev.Platform.Log[2], a.ev.Platform.Log[1]
	a.ev.Platform.Log = append(a.ev.Platform.Log, a.ev.Platform.Log[0], pcr.Event{PCR: 16})
	a.onHost, a.firmware.BIOS = w.rogue, digest.Of([]byte("other"))
	a.quote()
	a.ev.ServerLeaf = selfSigned(t, "elsewhere", nil).der
	_, verdict := v.Boot(a.expect, a.ev)
	for _, check := range []string{"input", "signature", "binding", "log", "registers", "clock"} {
		if !strings.Contains(checks(verdict), check) {
			t.Errorf("no finding of %s among %v", check, verdict.Findings)
		}
	}
	var many Verdict
	{
		m := newMachine()
		doc := m.manifest(w)
		for i := range 100 {
			m.Files = append(m.Files, file(fmt.Sprintf("/usr/bin/x%d", i)))
		}
		logs := m.boot(w.host)
		b := w.attempt()
		b.ev.Platform = logs
		b.quote()
		_, many = w.production(t, doc).Boot(b.expect, b.ev)
		if last := many.Findings[len(many.Findings)-1]; len(many.Findings) != maxFindings || last.Check != "more" || last.Seen != "37 more findings" {
			t.Errorf("%d findings, the last %+v", len(many.Findings), last)
		}
	}
	for _, f := range append(slices.Clone(verdict.Findings), many.Findings...) {
		if f.Check == "" || f.Component == "" || f.Expected == "" || f.Seen == "" || f.Do == "" || f.Detail == "" {
			t.Errorf("finding %+v", f)
		}
		if _, ok := subjects[f.Check]; !ok {
			t.Errorf("check %q has no words", f.Check)
		}
	}
	for check, s := range subjects {
		if s.component == "" || s.expected == "" || s.do == "" {
			t.Errorf("check %q has no words", check)
		}
	}
}

func poolOf(cert *x509.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return pool
}
