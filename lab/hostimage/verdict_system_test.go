//go:build system

package hostimage_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"foothold/internal/tpm/swtpm"
	"foothold/lab/hostimage"
	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/hostapi"
	"foothold/protocol/inventory"
	"foothold/protocol/platform"
	"foothold/protocol/signed"
	"foothold/tenant/reference"
	"foothold/tenant/verify"

	"github.com/google/go-tpm/tpm2"
)

// vm is a VM for which the hosts are asked.
const vm = "0b6c2f4e-5a7d-4c1b-9e57-3d2a8f60c911"

// question is what a tenant that watches the VM knows, but host and clock.
func question(name string) verify.StaticExpectation {
	nonce := digest.Of([]byte("nonce of " + name))
	return verify.StaticExpectation{Role: evidence.RoleWatch, Reservation: vm, Start: 1,
		Previous: digest.Of([]byte("the verdict before")), Nonce: nonce[:]}
}

// binding is what the quote answers.
func binding(x verify.StaticExpectation) digest.SHA256 {
	return evidence.StaticBinding(x.Role, x.Reservation, x.Previous, x.Nonce)
}

// tenant believes one TPM's manufacturer, and the reference values that one host gave.
type tenant struct {
	verifier *verify.Verifier
	config   verify.Config
}

// policy is what the good host is: it stands where the inventory says, its firmware knows no
// secure boot, and it boots with the line of its image.
func policy() verify.Policy {
	return verify.Policy{Locations: []string{"lab"}, SecureBoot: verify.SecureBootDisabled, CommandLines: []string{hostimage.Cmdline}}
}

// newTenant makes reference values from what a known-good host measured, as
// `foothold platform manifest create` does, and an inventory with that host.
func newTenant(t *testing.T, b *bench, entry inventory.Host, good evidence.Platform) tenant {
	t.Helper()
	return tenantBy(t, b, entry, func(doc *platform.Manifest) error { return reference.Add(doc, good) })
}

// tenantBy has reference values that fill makes.
func tenantBy(t *testing.T, b *bench, entry inventory.Host, fill func(*platform.Manifest) error) tenant {
	t.Helper()
	now := time.Now()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	check(t, err)
	public := key.Public().(ed25519.PublicKey)
	doc := platform.Manifest{Name: entry.Software, Profile: platform.Production, ValidFrom: now.Add(-time.Hour), ValidUntil: now.Add(time.Hour)}
	doc.Firmware.BIOS, doc.Firmware.LoaderKernel, doc.Firmware.LoaderInitramfs = digest.Of([]byte("bios")), digest.Of([]byte("kernel")), digest.Of([]byte("initramfs"))
	check(t, fill(&doc))
	env, err := reference.Sign(key, encoded(t, doc))
	check(t, err)
	values, err := verify.ParsePlatform(encoded(t, env), public, platform.Production, now)
	check(t, err)
	roots, err := os.ReadFile(filepath.Join(b.tpm, swtpm.RootFile))
	check(t, err)
	makers, err := verify.ParseManufacturers(roots)
	check(t, err)
	list := inventory.Inventory{Provider: "provider", Version: 1, Issued: now, Expires: now.Add(time.Hour), Hosts: []inventory.Host{entry}}
	inv, err := verify.ParseInventory(encoded(t, signed.Seal(key, signed.Inventory, encoded(t, list))), public, makers, now)
	check(t, err)
	config := verify.Config{Inventory: inv, Platforms: []*verify.Platform{values}, Profile: platform.Production,
		Policies: verify.Policies{Default: policy()}, Now: time.Now}
	v, err := verify.New(config)
	check(t, err)
	return tenant{v, config}
}

// demands holds the good host's genuine logs against policies that they do not prove.
func (c tenant) demands(t *testing.T, good boot) {
	for says, change := range map[string]func(*verify.Policy){
		"location: seen \"lab, rack 2, unit 1\"":       func(p *verify.Policy) { p.Locations = []string{"lab, rack 3"} },
		"secure boot: seen disabled, want enabled":     func(p *verify.Policy) { p.SecureBoot = verify.SecureBootEnabled },
		"kernel command line":                          func(p *verify.Policy) { p.CommandLines = []string{hostimage.Cmdline + " init=/bin/sh"} },
		"firmware version: seen a version that is no ": func(p *verify.Policy) { p.MinimumFirmware = "1.0" },
		"dynamic launch, PCR 17":                       func(p *verify.Policy) { p.DRTM = verify.DRTMRequired },
	} {
		config := c.config
		change(&config.Policies.Default)
		v, err := verify.New(config)
		check(t, err)
		verdict := tenant{verifier: v}.judge(t, question("good"), good.entry, good.answer)
		if verdict.Good() || len(verdict.Findings) > 2 || !strings.Contains(verdict.Err().Error(), "policy: "+says) {
			t.Errorf("the verdict does not say %q: %v", says, verdict.Findings)
		}
	}
}

// judge judges what a host answered to a question.
func (c tenant) judge(t *testing.T, x verify.StaticExpectation, entry inventory.Host, answer hostapi.QuoteResponse) verify.Verdict {
	t.Helper()
	attest, err := tpm2.Unmarshal[tpm2.TPMSAttest](answer.Quote.Attest)
	check(t, err)
	x.Host = entry.Name
	x.Clock = verify.Clock{AIK: digest.Of(entry.AIK), Resets: attest.ClockInfo.ResetCount, Restarts: attest.ClockInfo.RestartCount}
	_, verdict := c.verifier.Static(x, verify.StaticEvidence{Quote: answer.Quote, Platform: answer.Platform})
	return verdict
}

func encoded(t *testing.T, v any) []byte {
	t.Helper()
	data, err := json.Marshal(v)
	check(t, err)
	return data
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
