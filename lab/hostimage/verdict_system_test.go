//go:build system

package hostimage_test

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"
	"time"

	"foothold/internal/tpm/swtpm"
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
}

// newTenant makes reference values from what a known-good host measured, as
// `foothold platform manifest create` does, and an inventory with that host.
func newTenant(t *testing.T, b *bench, entry inventory.Host, good evidence.Platform) tenant {
	t.Helper()
	now := time.Now()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	check(t, err)
	public := key.Public().(ed25519.PublicKey)
	doc := platform.Manifest{Name: entry.Software, Profile: platform.Production, ValidFrom: now.Add(-time.Hour), ValidUntil: now.Add(time.Hour)}
	doc.Firmware.BIOS, doc.Firmware.LoaderKernel, doc.Firmware.LoaderInitramfs = digest.Of([]byte("bios")), digest.Of([]byte("kernel")), digest.Of([]byte("initramfs"))
	check(t, reference.Add(&doc, good))
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
	v, err := verify.New(verify.Config{Inventory: inv, Platforms: []*verify.Platform{values}, Profile: platform.Production, Now: time.Now})
	check(t, err)
	return tenant{v}
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
