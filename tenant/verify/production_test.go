package verify

import (
	"bytes"
	"crypto/ed25519"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/imalog/imalogtest"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/platform/platformtest"
	"foothold/protocol/signed"
	"foothold/protocol/tcglog"
)

// machine is a production host, of which the world's first is one.
type machine struct{ *platformtest.Machine }

func newMachine() *machine { return &machine{platformtest.New()} }

// anywhere demands nothing but what every host must have.
var anywhere = Policies{Default: Policy{Locations: []string{"site 1"}}}

// manifest is the reference values of this machine.
func (m *machine) manifest(w *world) platform.Manifest {
	doc := w.manifest()
	doc.Profile, doc.Files, doc.Boot = platform.Production, slices.Clone(m.Files), m.Reference()
	return doc
}

// boot extends the TPM as the machine does, and gives its logs.
func (m *machine) boot(h *host) evidence.Platform {
	h.t.Helper()
	h.reboot()
	launched := false
	for _, e := range m.Measured() {
		switch {
		case e.PCR == pcr.Launch && !launched:
			h.tpm.Launch(e.Name)
			launched = true
		case slices.Contains(pcr.Dynamic, e.PCR):
			h.tpm.Locality(2)
			h.extend(e.PCR, e.Digest)
			h.tpm.Locality(0)
		default:
			h.extend(e.PCR, e.Digest)
		}
	}
	return m.Logs()
}

// production is a verifier for that profile with one release.
func (w *world) production(t *testing.T, doc platform.Manifest) *Verifier {
	t.Helper()
	return w.productionWith(t, doc, anywhere)
}

func (w *world) productionWith(t *testing.T, doc platform.Manifest, policies Policies) *Verifier {
	t.Helper()
	p, err := ParsePlatform(seal(t, w.plat, signed.Platform, doc), w.plat.Public().(ed25519.PublicKey), platform.Production, w.now)
	if err != nil {
		t.Fatal(err)
	}
	inv, err := ParseInventory(seal(t, w.inv, signed.Inventory, w.inventory()), w.inv.Public().(ed25519.PublicKey), w.makers(), w.now)
	if err != nil {
		t.Fatal(err)
	}
	v, err := New(Config{Inventory: inv, Platforms: []*Platform{p}, Profile: platform.Production, Policies: policies, Now: func() time.Time { return w.now }})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// prove boots the machine and has it quote; forge may alter the logs.
func (m *machine) prove(w *world, v *Verifier, forge func(*evidence.Platform)) Verdict {
	logs := m.boot(w.host)
	a := w.attempt()
	a.ev.Platform = logs
	if forge != nil {
		forge(&a.ev.Platform)
	}
	a.quote()
	_, verdict := v.Boot(a.expect, a.ev)
	return verdict
}

func TestProductionHost(t *testing.T) {
	w := newWorld(t)
	m := newMachine()
	doc := m.manifest(w)
	doc.Boot = append(doc.Boot, platform.Event{PCR: 5, Component: "a second disk", SHA256: []digest.SHA256{digest.Of([]byte("disk"))}, Optional: true})
	v := w.production(t, doc)
	if err := m.prove(w, v, nil).Err(); err != nil {
		t.Fatalf("as the release is: %v", err)
	}
	m.Events = append(m.Events, platformtest.Event{PCR: 5, Type: 0x80000006, Data: "disk"})
	if err := m.prove(w, v, nil).Err(); err != nil {
		t.Errorf("with what may be there: %v", err)
	}
	m.Late = []platform.File{m.Files[0]}
	if err := m.prove(w, v, nil).Err(); err != nil {
		t.Errorf("with a list that has grown since the quote: %v", err)
	}

	// The machine differs, and its logs say so truly: the finding names what does.
	for name, c := range map[string]struct {
		change func(*machine)
		says   []string
	}{
		"other firmware":           {func(m *machine) { m.Events[0].Data = "firmware 0.9" }, []string{"part 1, PCR 0"}},
		"secure boot off":          {func(m *machine) { m.Events[1].Data = platformtest.SecureBoot(0) }, []string{"part 2, PCR 7"}},
		"one more kernel argument": {func(m *machine) { m.Events[len(m.Events)-2].Data = "quiet lockdown init=/bin/sh" }, []string{"part 15, PCR 11"}},
		"an event missing":         {func(m *machine) { m.Events = slices.Delete(m.Events, 10, 11) }, []string{"part 11, PCR 4", "no such event"}},
		"a separator missing":      {func(m *machine) { m.Events = slices.Delete(m.Events, 3, 4) }, []string{"part 4, PCR 1", "no such event"}},
		"an event more": {func(m *machine) {
			m.Events = append(m.Events, platformtest.Event{PCR: 4, Type: 0x80000003, Data: "another loader"})
		}, []string{"PCR 4", "no further event"}},
		"an event twice":          {func(m *machine) { m.Events = append(m.Events, m.Events[10]) }, []string{"PCR 4", "no further event"}},
		"events in another order": {func(m *machine) { m.Events[11], m.Events[12] = m.Events[12], m.Events[11] }, []string{"part 12, PCR 11"}},
		"two faults at once": {func(m *machine) { m.Events[0].Data, m.Files[1] = "firmware 0.9", file("/usr/lib/modules/spy.ko") },
			[]string{"part 1, PCR 0", "/usr/lib/modules/spy.ko"}},
		"a register of nobody": {func(m *machine) {
			m.Events = append(m.Events, platformtest.Event{PCR: 14 + 1, Type: tcglog.IPL, Data: "x"})
		}, []string{"register 15"}},
		"one changed byte":          {func(m *machine) { m.Files[0].SHA256[0] ^= 1 }, []string{`file "/usr/bin/foothold-host"`, "want " + file("/usr/bin/foothold-host").SHA256.String()}},
		"one extra module":          {func(m *machine) { m.Files = append(m.Files, file("/usr/lib/modules/spy.ko")) }, []string{`file "/usr/lib/modules/spy.ko"`, "not to be there"}},
		"one after the quote":       {func(m *machine) { m.Late = append(m.Late, file("/tmp/spy")) }, []string{`file "/tmp/spy"`}},
		"a good file's other name":  {func(m *machine) { m.Files = append(m.Files, platform.File{Name: "/tmp/x", SHA256: m.Files[0].SHA256}) }, []string{`file "/tmp/x"`}},
		"an aggregate of elsewhere": {func(m *machine) { m.Aggregate = make([]byte, 32) }, []string{"boot_aggregate", "not of one boot"}},
	} {
		m := newMachine()
		c.change(m)
		verdict := m.prove(w, v, nil)
		text := fmt.Sprint(verdict.Err())
		if verdict.Good() {
			t.Errorf("%s: accepted", name)
		}
		for _, want := range c.says {
			if !strings.Contains(text, want) {
				t.Errorf("%s: does not say %q: %v", name, want, text)
			}
		}
	}
}

// The logs lie: what the registers hold is something else.
func TestProductionLogsThatLie(t *testing.T) {
	w := newWorld(t)
	good := newMachine()
	v := w.production(t, good.manifest(w))
	truth := good.boot(w.host)
	bad := newMachine()
	bad.Events[0].Data = "firmware 0.9"
	bad.Files[1] = file("/usr/lib/modules/spy.ko")
	for name, forge := range map[string]func(*evidence.Platform){
		"another machine's logs":        func(p *evidence.Platform) { *p = truth },
		"another machine's firmware":    func(p *evidence.Platform) { p.Firmware = truth.Firmware },
		"another machine's kernel list": func(p *evidence.Platform) { p.Kernel = truth.Kernel },
	} {
		if verdict := bad.prove(w, v, forge); verdict.Good() || !strings.Contains(checks(verdict), "registers") {
			t.Errorf("%s: %v", name, verdict.Findings)
		}
	}
	for name, c := range map[string]struct {
		forge func(*evidence.Platform)
		check string
	}{
		"no firmware log":          {func(p *evidence.Platform) { p.Firmware = nil }, "log"},
		"a firmware log cut short": {func(p *evidence.Platform) { p.Firmware = p.Firmware[:len(p.Firmware)-60] }, "log"},
		"an entry of the list left out": {func(p *evidence.Platform) {
			p.Kernel = bytes.Replace(p.Kernel, platformtest.Measurement(good.Files[1]), nil, 1)
		}, "registers"},
		"a list behind the quote": {func(p *evidence.Platform) {
			p.Kernel = bytes.TrimSuffix(p.Kernel, platformtest.Measurement(good.Files[2]))
		}, "registers"},
		"no list":                    {func(p *evidence.Platform) { p.Kernel = nil }, "log"},
		"a garbled list":             {func(p *evidence.Platform) { p.Kernel = p.Kernel[1:] }, "log"},
		"a launcher's log":           {func(p *evidence.Platform) { *p = evidence.Platform{Log: w.host.log} }, "log"},
		"a launcher's log beside it": {func(p *evidence.Platform) { p.Log = []pcr.Event{{PCR: pcr.Platform, Digest: digest.Of(nil)}} }, "log"},
		"a violation hidden as another file": {func(p *evidence.Platform) {
			p.Kernel = append(bytes.Clone(p.Kernel), platformtest.Violation("/usr/bin/foothold-host")...)
		}, "log"},
	} {
		if verdict := good.prove(w, v, c.forge); verdict.Good() || !strings.Contains(checks(verdict), c.check) {
			t.Errorf("%s: want a finding of %q, got %v", name, c.check, verdict.Findings)
		}
	}
	silent := newMachine()
	silent.Silent = true
	if verdict := silent.prove(w, v, nil); verdict.Good() || !strings.Contains(checks(verdict), "registers") {
		t.Errorf("a list that the kernel never wrote: %v", verdict.Findings)
	}
	// What types and data say decides nothing; the same digests under other names are accepted.
	renamed := newMachine()
	if verdict := renamed.prove(w, v, func(p *evidence.Platform) {
		p.Firmware = bytes.Replace(p.Firmware, []byte("boot loader"), []byte("b00t l0ader"), 1)
	}); !verdict.Good() {
		t.Errorf("data that nothing is read from: %v", verdict.Err())
	}
}

func TestProductionStaticQuote(t *testing.T) {
	w := newWorld(t)
	m := newMachine()
	v := w.production(t, m.manifest(w))
	logs := m.boot(w.host)
	a := w.attempt()
	a.ev.Platform = logs
	a.quote()
	_, boot := v.Boot(a.expect, a.ev)
	if err := boot.Err(); err != nil {
		t.Fatal(err)
	}
	x, ev := w.static(evidence.RoleWatch, boot)
	ev.Platform = logs
	if _, verdict := v.Static(x, ev); !verdict.Good() {
		t.Fatal(verdict.Err())
	}
	// The host ran another file since.
	spy := file("/tmp/spy")
	entry, extended := imalogtest.Entry(spy.Name, spy.SHA256[:])
	w.host.extend(pcr.Platform, extended)
	x, ev = w.static(evidence.RoleWatch, boot)
	ev.Platform = logs
	if _, verdict := v.Static(x, ev); verdict.Good() || !strings.Contains(checks(verdict), "registers") {
		t.Errorf("a file that was run and not logged: %v", verdict.Findings)
	}
	x, ev = w.static(evidence.RoleWatch, boot)
	ev.Platform = evidence.Platform{Firmware: logs.Firmware, Kernel: append(bytes.Clone(logs.Kernel), entry...)}
	if _, verdict := v.Static(x, ev); verdict.Good() || !strings.Contains(verdict.Err().Error(), "/tmp/spy") {
		t.Errorf("a file that was run: %v", verdict.Findings)
	}
}

func TestProductionReferenceValues(t *testing.T) {
	w := newWorld(t)
	m := newMachine()
	public := w.plat.Public().(ed25519.PublicKey)
	for name, change := range map[string]func(*platform.Manifest){
		"no boot":             func(p *platform.Manifest) { p.Boot = nil },
		"no separator":        func(p *platform.Manifest) { p.Boot = slices.Delete(p.Boot, 4, 5) },
		"a separator twice":   func(p *platform.Manifest) { p.Boot = append(p.Boot, p.Boot[4]) },
		"a separator at will": func(p *platform.Manifest) { p.Boot[4].Optional = true },
		"an error separator": func(p *platform.Manifest) {
			p.Boot[4].SHA256 = append(p.Boot[4].SHA256, digest.Of([]byte("\xff\xff\xff\xff")))
		},
		"no digest":             func(p *platform.Manifest) { p.Boot[0].SHA256 = nil },
		"a zero digest":         func(p *platform.Manifest) { p.Boot[0].SHA256 = append(p.Boot[0].SHA256, digest.SHA256{}) },
		"no component":          func(p *platform.Manifest) { p.Boot[0].Component = "" },
		"the kernel's register": func(p *platform.Manifest) { p.Boot[0].PCR = pcr.Platform },
		"a VM's register":       func(p *platform.Manifest) { p.Boot[0].PCR = pcr.VM },
		"more than is read": func(p *platform.Manifest) {
			for i := range 25000 {
				p.Files = append(p.Files, file(fmt.Sprintf("/usr/share/%0100d", i)))
			}
		},
		"a file without path": func(p *platform.Manifest) { p.Files[0].Name = "" },
		"a lab's":             func(p *platform.Manifest) { p.Profile = platform.Lab },
	} {
		doc := m.manifest(w)
		change(&doc)
		if _, err := ParsePlatform(seal(t, w.plat, signed.Platform, doc), public, doc.Profile, w.now); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	lab := w.manifest()
	lab.Boot = m.manifest(w).Boot
	if _, err := ParsePlatform(seal(t, w.plat, signed.Platform, lab), public, platform.Lab, w.now); err == nil {
		t.Error("a lab's reference values with a measured boot: accepted")
	}
}

// A lab accepts no log that its launcher did not write.
func TestLabTakesNoOtherLog(t *testing.T) {
	w := newWorld(t)
	v := w.verifier()
	a := w.attempt()
	a.ev.Platform.Firmware = platformtest.FirmwareLog(newMachine().Events)
	a.quote()
	if _, verdict := v.Boot(a.expect, a.ev); verdict.Good() || !strings.Contains(checks(verdict), "log") {
		t.Errorf("%v", verdict.Findings)
	}
}
