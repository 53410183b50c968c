package verify

import (
	"bytes"
	"crypto/ed25519"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/internal/tpm"
	"foothold/protocol/digest"
	"foothold/protocol/inventory"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/signed"

	"github.com/google/go-tpm/tpm2"
)

func TestInventory(t *testing.T) {
	w := newWorld(t)
	public := w.inv.Public().(ed25519.PublicKey)
	good := w.inventory()
	inv, err := ParseInventory(seal(t, w.inv, signed.Inventory, good), public, w.makers(), w.now)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range inv.Hosts() {
		if len(s.Problems) > 0 {
			t.Errorf("%s: %v", s.Host.Name, s.Problems)
		}
	}
	if len(inv.Hosts()) != 2 || inv.Version() != 1 || inv.Digest().IsZero() {
		t.Errorf("inventory %+v", inv.Hosts())
	}

	// What concerns the document refuses it.
	for what, change := range map[string]func(*inventory.Inventory){
		"expired":        func(i *inventory.Inventory) { i.Expires = w.now },
		"of the future":  func(i *inventory.Inventory) { i.Issued = w.now.Add(time.Hour) },
		"no version":     func(i *inventory.Inventory) { i.Version = 0 },
		"host twice":     func(i *inventory.Inventory) { i.Hosts = append(i.Hosts, i.Hosts[0]) },
		"malformed name": func(i *inventory.Inventory) { i.Hosts[0].Name = "../x" },
		"no expiry":      func(i *inventory.Inventory) { i.Expires = time.Time{} },
	} {
		bad := good
		bad.Hosts = slices.Clone(good.Hosts)
		change(&bad)
		if _, err := ParseInventory(seal(t, w.inv, signed.Inventory, bad), public, w.makers(), w.now); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
	if _, err := ParseInventory(seal(t, w.plat, signed.Inventory, good), public, w.makers(), w.now); err == nil {
		t.Error("another key: accepted")
	}
	if _, err := ParseInventory(seal(t, w.inv, signed.Platform, good), public, w.makers(), w.now); err == nil {
		t.Error("another label: accepted")
	}

	// What concerns one host refuses that host, and only it.
	unrestricted := w.host.aik.Public
	unrestricted.ObjectAttributes.Restricted = false
	imported := w.host.aik.Public
	imported.ObjectAttributes.FixedTPM = false
	another := tpm.SessionTemplate()
	another.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: bytes.Repeat([]byte{1}, 32)}, Y: tpm2.TPM2BECCParameter{Buffer: make([]byte, 32)}})
	uncertified := w.host.makeKey(inventory.SessionHandle+1, another)
	for what, change := range map[string]func(*inventory.Host){
		"session key that is not certified": func(h *inventory.Host) { h.Session = tpm2.Marshal(uncertified.Public) },
		"no EK certificate":                 func(h *inventory.Host) { h.EK = nil },
		"AIK not restricted":                func(h *inventory.Host) { h.AIK = tpm2.Marshal(unrestricted) },
		"AIK not fixed":                     func(h *inventory.Host) { h.AIK = tpm2.Marshal(imported) },
		"AIK with a tail":                   func(h *inventory.Host) { h.AIK = append(slices.Clone(h.AIK), 0) },
		"no AIK":                            func(h *inventory.Host) { h.AIK = nil },
		"AIK as session key":                func(h *inventory.Host) { h.Session = h.AIK },
		"session key of another TPM":        func(h *inventory.Host) { h.Session = w.rogue.entry.Session },
		"certification by another": func(h *inventory.Host) {
			h.SessionCertify, h.SessionSignature = w.rogue.entry.SessionCertify, w.rogue.entry.SessionSignature
		},
		"no certification":                      func(h *inventory.Host) { h.SessionCertify = nil },
		"certification that another key signed": func(h *inventory.Host) { h.SessionSignature = w.rogue.entry.SessionSignature },
		"certification that nobody signed": func(h *inventory.Host) {
			h.SessionSignature = slices.Clone(h.SessionSignature)
			h.SessionSignature[len(h.SessionSignature)-1] ^= 1
		},
		"quote as certification": func(h *inventory.Host) {
			q := w.host.quote(digest.Of(nil), pcr.BootSelection())
			h.SessionCertify, h.SessionSignature = q.Attest, q.Signature
		},
		"EK of another host":  func(h *inventory.Host) { h.EK, h.EKChain = w.rogue.entry.EK, w.rogue.entry.EKChain },
		"AIK of another host": func(h *inventory.Host) { h.AIK = w.rogue.entry.AIK },
	} {
		bad := good
		bad.Hosts = slices.Clone(good.Hosts)
		change(&bad.Hosts[0])
		inv, err := ParseInventory(seal(t, w.inv, signed.Inventory, bad), public, w.makers(), w.now)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		if s, _ := inv.Host("host-1"); len(s.Problems) == 0 {
			t.Errorf("%s: the host is in good standing", what)
		}
		// A shared key puts both hosts in doubt.
		if s, _ := inv.Host("host-2"); len(s.Problems) != 0 && !strings.Contains(s.Problems[0], "shares") {
			t.Errorf("%s: the other host: %v", what, s.Problems)
		}
		a := w.attempt()
		a.quote()
		w2 := verifierWith(t, w, inv)
		if _, verdict := w2.Boot(a.expect, a.ev); verdict.Good() || !strings.Contains(checks(verdict), "host") {
			t.Errorf("%s: quote of it: %v", what, verdict.Findings)
		}
	}
	if err := tpm.CheckAIK(&w.host.aik.Public); err != nil {
		t.Error(err)
	}
}

func verifierWith(t *testing.T, w *world, inv *Inventory) *Verifier {
	t.Helper()
	p, err := ParsePlatform(seal(t, w.plat, signed.Platform, w.manifest()), w.plat.Public().(ed25519.PublicKey), platform.Lab, w.now)
	if err != nil {
		t.Fatal(err)
	}
	v, err := New(Config{Inventory: inv, Platforms: []*Platform{p}, Profile: platform.Lab, Now: func() time.Time { return w.now }})
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestPlatform(t *testing.T) {
	w := newWorld(t)
	public := w.plat.Public().(ed25519.PublicKey)
	parse := func(m platform.Manifest, profile string) (*Platform, error) {
		return ParsePlatform(seal(t, w.plat, signed.Platform, m), public, profile, w.now)
	}
	p, err := parse(w.manifest(), platform.Lab)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parse(w.manifest(), platform.Production); err == nil {
		t.Error("a production installation takes a lab's reference values")
	}
	for what, change := range map[string]func(*platform.Manifest){
		"no profile":         func(m *platform.Manifest) { m.Profile = "" },
		"no name":            func(m *platform.Manifest) { m.Name = "" },
		"no files":           func(m *platform.Manifest) { m.Files = nil },
		"file w/o digest":    func(m *platform.Manifest) { m.Files = []platform.File{{Name: "x"}} },
		"no loader":          func(m *platform.Manifest) { m.Firmware.LoaderInitramfs = digest.SHA256{} },
		"expired":            func(m *platform.Manifest) { m.ValidUntil = w.now },
		"not yet in force":   func(m *platform.Manifest) { m.ValidFrom = w.now.Add(time.Hour) },
		"no end of validity": func(m *platform.Manifest) { m.ValidUntil = time.Time{} },
	} {
		m := w.manifest()
		change(&m)
		if _, err := parse(m, m.Profile); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
	if _, err := ParsePlatform(seal(t, w.inv, signed.Platform, w.manifest()), public, platform.Lab, w.now); err == nil {
		t.Error("another key: accepted")
	}

	inv, err := ParseInventory(seal(t, w.inv, signed.Inventory, w.inventory()), w.inv.Public().(ed25519.PublicKey), w.makers(), w.now)
	if err != nil {
		t.Fatal(err)
	}
	good := Config{Inventory: inv, Platforms: []*Platform{p}, Profile: platform.Lab, Now: time.Now}
	if _, err := New(good); err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(*Config){
		"no inventory":   func(c *Config) { c.Inventory = nil },
		"no platform":    func(c *Config) { c.Platforms = nil },
		"nil platform":   func(c *Config) { c.Platforms = []*Platform{nil} },
		"platform twice": func(c *Config) { c.Platforms = []*Platform{p, p} },
		"other profile":  func(c *Config) { c.Profile = platform.Production },
		"no profile":     func(c *Config) { c.Profile = "" },
		"no clock":       func(c *Config) { c.Now = nil },
	} {
		c := good
		change(&c)
		if _, err := New(c); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
}
