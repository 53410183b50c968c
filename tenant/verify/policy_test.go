package verify

import (
	"crypto/ed25519"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/platform/platformtest"
	"foothold/protocol/tcglog"
)

// launch are the events of a dynamic launch.
var launch = []platformtest.Event{{PCR: 17, Type: 0x502, Data: "SINIT"}, {PCR: 18, Type: 0x502, Data: "launch policy"}}

func TestHostPolicy(t *testing.T) {
	w := newWorld(t)
	// The release's reference values bear two firmwares, two command lines, either state of
	// secure boot, and a dynamic launch: so the policy alone tells the hosts apart.
	m := newMachine()
	doc := m.manifest(w)
	also := func(data, other string) {
		i := slices.IndexFunc(m.Events, func(e platformtest.Event) bool { return e.Data == data })
		doc.Boot[i].SHA256 = append(doc.Boot[i].SHA256, digest.Of([]byte(other)))
	}
	on, off := platformtest.SecureBoot(1), platformtest.SecureBoot(0)
	const line, otherLine = platformtest.CommandLine, platformtest.CommandLine + " console=ttyS0"
	wide := func(s string) string { return string(tcglog.UTF16(s)) }
	also("firmware 1.0", "firmware 0.9")
	also("firmware 1.0", wide("firmware 1.10"))
	also("firmware 1.0", "beta")
	also(wide(line), wide(otherLine))
	for _, state := range []string{off, platformtest.SecureBoot(), platformtest.SecureBoot(2), platformtest.Variable(tcglog.GUID{1}, "SecureBoot", 1), platformtest.Variable(tcglog.GlobalVariable, "SecureBoo", 1)} {
		also(on, state)
	}
	for _, e := range launch {
		doc.Boot = append(doc.Boot, platform.Event{PCR: e.PCR, Component: e.Data, SHA256: []digest.SHA256{digest.Of([]byte(e.Data))}, Optional: true})
	}
	second := platform.Event{PCR: 7, Component: "another", SHA256: []digest.SHA256{digest.Of([]byte(off)), digest.Of([]byte("x"))}, Optional: true}
	doc.Boot = append(doc.Boot, second)
	doc.Boot = slices.Insert(doc.Boot, 2, second)

	with := func(change func(*Policy)) Policies {
		p := Policy{Locations: []string{"site 1"}}
		change(&p)
		return Policies{Default: p}
	}
	minimum := func(v string) Policies { return with(func(p *Policy) { p.MinimumFirmware = v }) }
	lines := func(l ...string) Policies { return with(func(p *Policy) { p.CommandLines = l }) }
	drtm := with(func(p *Policy) { p.DRTM = DRTMRequired })
	asIs, unforged := func(*machine) {}, func(*evidence.Platform) {}
	for _, c := range []struct {
		name     string
		policies Policies
		change   func(*machine)
		forge    func(*evidence.Platform)
		says     string // "": accepted
	}{
		{"nothing stated", Policies{}, asIs, unforged, "location"},
		{"an allowed place", anywhere, asIs, unforged, ""},
		{"the beginning of a place's name", Policies{Default: Policy{Locations: []string{"site"}}}, asIs, unforged, "location"},
		{"another place", Policies{Default: Policy{Locations: []string{"site 2"}}}, asIs, unforged, `seen "site 1"`},
		{"another place for this host", Policies{Default: anywhere.Default, Hosts: map[string]Policy{"host-1": {Locations: []string{"site 2"}}}}, asIs, unforged, "location"},
		{"another place for another host", Policies{Default: anywhere.Default, Hosts: map[string]Policy{"host-2": {Locations: []string{"site 2"}}}}, asIs, unforged, ""},

		{"secure boot off", anywhere, func(m *machine) { m.Replace(on, off) }, unforged, "seen disabled, want enabled"},
		{"secure boot unknown to the firmware", anywhere, func(m *machine) { m.Replace(on, platformtest.SecureBoot()) }, unforged, "seen disabled, want enabled"},
		{"secure boot in another form", anywhere, func(m *machine) { m.Replace(on, platformtest.SecureBoot(2)) }, unforged, "another form"},
		{"secure boot on where it must be off", with(func(p *Policy) { p.SecureBoot = SecureBootDisabled }), asIs, unforged, "seen enabled, want disabled"},
		{"secure boot off where it must be", with(func(p *Policy) { p.SecureBoot = SecureBootDisabled }), func(m *machine) { m.Replace(on, off) }, unforged, ""},
		{"secure boot of another vendor", anywhere, func(m *machine) { m.Replace(on, platformtest.Variable(tcglog.GUID{1}, "SecureBoot", 1)) }, unforged, "no variable"},
		{"another variable that is on", anywhere, func(m *machine) { m.Replace(on, platformtest.Variable(tcglog.GlobalVariable, "SecureBoo", 1)) }, unforged, "no variable"},
		{"secure boot on by its data alone", anywhere, func(m *machine) { m.Replace(on, off) },
			func(p *evidence.Platform) { platformtest.Falsify(p.Firmware, off, on) }, "no variable"},
		{"secure boot on, its event of another type", anywhere, asIs, func(p *evidence.Platform) { platformtest.Relabel(p.Firmware, on, tcglog.IPL) }, ""},
		{"secure boot off and then on", anywhere, func(m *machine) {
			m.Events = slices.Insert(m.Events, 2, platformtest.Event{PCR: 7, Type: tcglog.VariableConfig, Data: off})
		}, unforged, "more than one state"},
		{"secure boot off after the separator", anywhere, func(m *machine) {
			m.Events = append(m.Events, platformtest.Event{PCR: 7, Type: tcglog.VariableConfig, Data: off})
		}, unforged, ""},

		{"the firmware that is the least", minimum("firmware 1.0"), asIs, unforged, ""},
		{"a later firmware", minimum("firmware 1.9"), func(m *machine) { m.Replace("firmware 1.0", wide("firmware 1.10")) }, unforged, ""},
		{"an earlier firmware", minimum("firmware 1.0"), func(m *machine) { m.Replace("firmware 1.0", "firmware 0.9") }, unforged, `seen "firmware 0.9", want firmware 1.0 or later`},
		{"an earlier firmware that this host may have", Policies{Default: minimum("firmware 1.0").Default, Hosts: map[string]Policy{"host-1": {MinimumFirmware: "firmware 0.9"}}},
			func(m *machine) { m.Replace("firmware 1.0", "firmware 0.9") }, unforged, ""},
		{"an earlier firmware with a later one's data", minimum("firmware 1.0"), func(m *machine) { m.Replace("firmware 1.0", "firmware 0.9") },
			func(p *evidence.Platform) { platformtest.Falsify(p.Firmware, "firmware 0.9", "firmware 9.0") }, "not what was measured"},
		{"a firmware whose version's type is hidden", minimum("firmware 1.1"), asIs, func(p *evidence.Platform) { platformtest.Relabel(p.Firmware, "firmware 1.0", tcglog.IPL) }, "firmware 1.1 or later"},
		{"a version that does not compare", minimum("1.0"), asIs, unforged, "does not compare"},
		{"a version without a number", minimum("firmware 1.0"), func(m *machine) { m.Replace("firmware 1.0", "beta") }, unforged, "does not compare"},

		{"the allowed command line", lines(line), asIs, unforged, ""},
		{"one of the allowed", lines("quiet", otherLine, line), asIs, unforged, ""},
		{"another command line", lines(otherLine), asIs, unforged, "kernel command line: seen another"},
		{"a command line that no reference value has", lines("quiet"), asIs, unforged, "no event of register 9"},
		{"another command line with the allowed one's data", lines(line), func(m *machine) { m.Replace(wide(line), wide(otherLine)) },
			func(p *evidence.Platform) { platformtest.Falsify(p.Firmware, wide(otherLine), wide(line)+"\x00\x00") }, "kernel command line"},

		{"no dynamic launch", drtm, asIs, unforged, "dynamic launch, PCR 17"},
		{"half a dynamic launch", drtm, asIs, func(p *evidence.Platform) {
			p.Firmware = platformtest.FirmwareLog(append(newMachine().Events, launch[0]))
		}, "dynamic launch, PCR 18"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine()
			c.change(m)
			verdict := m.prove(w, w.productionWith(t, doc, c.policies), c.forge)
			if c.says == "" {
				if err := verdict.Err(); err != nil {
					t.Error(err)
				}
				return
			}
			found := slices.ContainsFunc(verdict.Findings, func(f Finding) bool {
				return f.Check == "policy" && strings.Contains(f.Detail, c.says) && f.Component != "" && f.Expected != "" && f.Seen != "" && f.Do != ""
			})
			if verdict.Good() || !found {
				t.Errorf("want a finding of the policy that says %q: %v", c.says, verdict.Findings)
			}
		})
	}
}

// A dynamic launch is proved by the registers that it alone resets, each by its own reference
// values; that a log names one proves nothing.
func TestDynamicLaunchIsProved(t *testing.T) {
	w := newWorld(t)
	whole := []platformtest.Event{{PCR: 17, Type: 0x402, Data: "SINIT"}, {PCR: 17, Type: 0x403, Data: "details"}, {PCR: 18, Type: 0x404, Data: "authorities"}, {PCR: 19, Type: 0x501, Data: "kernel"}, {PCR: 22, Type: 0x501, Data: "configuration"}}
	m := newMachine()
	m.Events = append(m.Events, whole...)
	doc := m.manifest(w)
	required := Policies{Default: Policy{Locations: []string{"site 1"}, DRTM: DRTMRequired}}
	v := w.productionWith(t, doc, required)
	launched := func(events ...platformtest.Event) *machine {
		m := newMachine()
		m.Events = append(m.Events, events...)
		return m
	}
	inLog := func(events ...platformtest.Event) func(*evidence.Platform) {
		return func(p *evidence.Platform) {
			p.Firmware = platformtest.FirmwareLog(append(newMachine().Events, events...))
		}
	}
	if err := launched(whole...).prove(w, v, nil).Err(); err != nil {
		t.Errorf("as it is: %v", err)
	}
	one := launched(whole[0])
	if err := one.prove(w, w.productionWith(t, one.manifest(w), required), nil).Err(); err != nil {
		t.Errorf("of register 17 alone, the others being zeros: %v", err)
	}
	if err := launched(whole...).prove(w, w.productionWith(t, doc, anywhere), nil).Err(); err != nil {
		t.Errorf("where none is required: %v", err)
	}
	if verdict := newMachine().prove(w, w.productionWith(t, newMachine().manifest(w), required), nil); verdict.Good() || !strings.Contains(verdict.Err().Error(), "policy: dynamic launch, PCR 17") {
		t.Errorf("required of reference values without one: %v", verdict.Findings)
	}
	other := func(at int, data string) []platformtest.Event {
		events := slices.Clone(whole)
		events[at].Data = data
		return events
	}
	for name, c := range map[string]struct {
		machine *machine
		forge   func(*evidence.Platform)
		says    string
	}{
		"in the log alone":                         {newMachine(), inLog(whole...), "registers: "},
		"by a log of another":                      {launched(other(0, "another SINIT")...), inLog(whole...), "registers: "},
		"another configuration by a log of this":   {launched(other(4, "another")...), inLog(whole...), "registers: "},
		"with something in a register of its own":  {launched(append(slices.Clone(whole), platformtest.Event{PCR: 21, Type: 0x501, Data: "x"})...), inLog(whole...), "registers: "},
		"hidden by the log":                        {launched(whole...), inLog(), "PCR 17: seen no such event"},
		"of another module":                        {launched(other(0, "another SINIT")...), nil, "part 17, PCR 17"},
		"of another kernel":                        {launched(other(3, "another kernel")...), nil, "part 20, PCR 19"},
		"with more than is named":                  {launched(append(slices.Clone(whole), platformtest.Event{PCR: 20, Type: 0x501, Data: "x"})...), nil, "log: PCR 20: seen"},
		"without what it was to measure":           {launched(whole[:4]...), nil, "part 21, PCR 22"},
		"whose module the log does not have first": {launched(whole...), inLog(whole[2], whole[0], whole[1], whole[3], whole[4]), "before a dynamic launch"},
	} {
		verdict := c.machine.prove(w, v, c.forge)
		if verdict.Good() || !strings.Contains(verdict.Err().Error(), c.says) {
			t.Errorf("%s: does not say %q: %v", name, c.says, verdict.Findings)
		}
		if c.says == "registers: " && checks(verdict) != "registers " {
			t.Errorf("%s: %v", name, verdict.Findings)
		}
	}
	// Values that leave it open whether there is one, and a policy that does not.
	doc = m.manifest(w)
	for i := range doc.Boot {
		doc.Boot[i].Optional = doc.Boot[i].PCR >= pcr.Launch
	}
	open := w.productionWith(t, doc, required)
	if err := launched(whole...).prove(w, open, nil).Err(); err != nil {
		t.Errorf("optional, and there: %v", err)
	}
	for n := range len(whole) {
		if verdict := launched(whole[:n]...).prove(w, open, nil); verdict.Good() || !strings.Contains(checks(verdict), "policy") {
			t.Errorf("the first %d events: %v", n, verdict.Findings)
		}
	}
}

func TestPoliciesAreChecked(t *testing.T) {
	for name, c := range map[string]struct {
		profile string
		policy  Policy
	}{
		"secure boot by another word": {platform.Production, Policy{SecureBoot: "any"}},
		"DRTM by another word":        {platform.Production, Policy{DRTM: "off"}},
		"a minimum without a number":  {platform.Production, Policy{MinimumFirmware: "newest"}},
		"an empty place":              {platform.Production, Policy{Locations: []string{""}}},
		"an empty command line":       {platform.Production, Policy{CommandLines: []string{" "}}},
		"secure boot in a lab":        {platform.Lab, Policy{SecureBoot: SecureBootEnabled}},
		"DRTM in a lab":               {platform.Lab, Policy{DRTM: DRTMRequired}},
	} {
		for _, p := range []Policies{{Default: c.policy}, {Hosts: map[string]Policy{"host-1": c.policy}}} {
			if err := p.Check(c.profile); err == nil {
				t.Errorf("%s: accepted", name)
			}
		}
	}
	if err := (Policies{Default: Policy{Locations: []string{"here"}}}).Check(platform.Lab); err != nil {
		t.Error(err)
	}
}

func TestVersionsCompare(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want int // 2: they do not
	}{
		{"1.0", "1.0", 0}, {"1.10", "1.9", 1}, {"1.9", "1.10", -1}, {"2", "10", -1}, {"1.0", "1.00", 0}, {"1.0.1", "1.0", 1}, {"1.0", "1.0.1", -1},
		{"U30 v2.80 (01/20/2023)", "U30 v2.80", 1}, {"U30 v2.80", "U32 v2.80", -1}, {"A2.1", "B2.1", 2}, {"", "1", -1}, {"1", "v1", 2},
		{"99999999999999999999999999", "100000000000000000000000000", -1}, {"2022.11-6", "2022.11-5", 1},
	} {
		order, ok := compareVersions(c.a, c.b)
		if got := sign(order); ok && got != c.want || !ok && c.want != 2 {
			t.Errorf("%q and %q: %d, %v, want %d", c.a, c.b, order, ok, c.want)
		}
	}
}

func sign(n int) int { return min(1, max(-1, n)) }

// A lab's host may be anywhere, until the tenant says where.
func TestLabLocation(t *testing.T) {
	w := newWorld(t)
	v := w.verifier()
	for _, c := range []struct {
		locations []string
		good      bool
	}{{nil, true}, {[]string{"site 1"}, true}, {[]string{"site 2"}, false}} {
		v.policies.Default.Locations = c.locations
		a := w.attempt()
		a.quote()
		if _, verdict := v.Boot(a.expect, a.ev); verdict.Good() != c.good || !c.good && !strings.Contains(checks(verdict), "policy") {
			t.Errorf("%q: %v", c.locations, verdict.Findings)
		}
	}
}

// Who audits a decision sees which policy it was judged by, and derives it by that one.
func TestAuditKnowsThePolicy(t *testing.T) {
	w := newWorld(t)
	m := newMachine()
	policies := Policies{Default: Policy{Locations: []string{"site 1"}, MinimumFirmware: "firmware 1.0"}}
	v := w.productionWith(t, m.manifest(w), policies)
	pinned := Pinned{InventoryKey: w.inv.Public().(ed25519.PublicKey), PlatformKey: w.plat.Public().(ed25519.PublicKey), Makers: w.makers(),
		Profile: platform.Production, Now: func() time.Time { return w.now }}
	audit := func(verdict Verdict, change func(*Bundle)) Audited {
		data, err := verdict.Parts.Bundle()
		w.host.must(err)
		b, err := ParseBundle(data)
		w.host.must(err)
		change(b)
		a, err := pinned.Audit(b)
		w.host.must(err)
		return a
	}
	good := m.prove(w, v, nil)
	a := audit(good, func(*Bundle) {})
	if !a.Holds() || !a.Derived || a.Policy == nil || a.Policy.MinimumFirmware != "firmware 1.0" || a.Policy.SecureBoot != SecureBootEnabled {
		t.Errorf("an acceptance: %+v", a)
	}
	v = w.productionWith(t, m.manifest(w), Policies{Default: Policy{Locations: []string{"site 1"}, MinimumFirmware: "firmware 2.0"}})
	bad := m.prove(w, v, nil)
	if a := audit(bad, func(*Bundle) {}); !a.Holds() || a.Derived || len(a.Findings) != 1 || a.Findings[0].Check != "policy" {
		t.Errorf("a refusal: %+v", a)
	}
	for name, change := range map[string]func(*Policy){
		"a lower minimum": func(p *Policy) { p.MinimumFirmware = "firmware 1.0" },
		"another word":    func(p *Policy) { p.SecureBoot = "any" },
	} {
		if a := audit(bad, func(b *Bundle) { p := *b.Record.Policy; change(&p); b.Record.Policy = &p }); a.Holds() {
			t.Errorf("%s in the record: %+v", name, a)
		}
	}
	if a := audit(good, func(b *Bundle) { b.Record.Policy = nil }); a.Holds() {
		t.Errorf("no policy in the record: %+v", a)
	}
}
