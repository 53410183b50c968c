package verify

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"testing"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/inventory"
	"foothold/protocol/platform"
	"foothold/protocol/signed"
	"foothold/protocol/vmspec"
)

// enclosed is a signed document with any payload: the fuzzer cannot sign.
func enclosed(t testing.TB, key ed25519.PrivateKey, label string, payload []byte) []byte {
	data, err := json.Marshal(signed.Seal(key, label, payload))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// Whatever a provider signs, and whatever is no signed document, is read without a panic;
// a host in good standing has a name and both keys.
func FuzzInventory(f *testing.F) {
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	ca := selfSigned(f, "ca", nil)
	makers, err := ParseManufacturers(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.der}))
	if err != nil {
		f.Fatal(err)
	}
	now := time.Now()
	good, err := json.Marshal(inventory.Inventory{Provider: "p", Version: 1, Issued: now, Expires: now.Add(time.Hour), Hosts: []inventory.Host{
		{Name: "host-1", EK: ca.der, EKChain: [][]byte{ca.der}, AIK: []byte{0, 0x23}, Session: []byte{0, 0x23}, SessionCertify: attestSeed(), SessionSignature: signatureSeed()}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good, enclosed(f, key, signed.Inventory, good))
	f.Add([]byte(`{"hosts":[{},{}]}`), []byte(`{"payload":""}`))
	f.Fuzz(func(t *testing.T, payload, document []byte) {
		if inv, err := ParseInventory(document, public, makers, now); err == nil && inv.Digest() != digest.Of(good) {
			t.Fatal("accepted what was not signed")
		}
		inv, err := ParseInventory(enclosed(t, key, signed.Inventory, payload), public, makers, now)
		if err != nil {
			return
		}
		for _, s := range inv.Hosts() {
			if len(s.Problems) == 0 && (s.Host.Name == "" || len(s.Host.AIK) == 0 || len(s.Host.Session) == 0 || len(s.Host.EK) == 0) {
				t.Fatalf("in good standing: %+v", s.Host)
			}
		}
	})
}

// Whatever a tenant signs as reference values is read without a panic, and counts only
// if it names what it must.
func FuzzPlatform(f *testing.F) {
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		f.Fatal(err)
	}
	now, one := time.Now(), digest.Of(nil)
	firmware := vmspec.Firmware{BIOS: one, LoaderKernel: one, LoaderInitramfs: one}
	for _, doc := range []platform.Manifest{
		{Name: "r", Profile: platform.Lab, ValidFrom: now, ValidUntil: now.Add(time.Hour), Files: []platform.File{{Name: "qemu", SHA256: one}}, Firmware: firmware},
		{Name: "r", Profile: platform.Production, ValidFrom: now, ValidUntil: now.Add(time.Hour), Files: []platform.File{{Name: "/qemu", SHA256: one}}, Firmware: firmware,
			Boot: []platform.Event{{PCR: 0, Component: "x", SHA256: separators}, {PCR: -1}, {PCR: 1 << 20, Optional: true}}},
	} {
		payload, err := json.Marshal(doc)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(payload)
	}
	f.Fuzz(func(t *testing.T, payload []byte) {
		for _, profile := range []string{platform.Lab, platform.Production} {
			p, err := ParsePlatform(enclosed(t, key, signed.Platform, payload), public, profile, now)
			if err != nil {
				continue
			}
			if doc := p.Manifest(); doc.Profile != profile || len(doc.Files) == 0 || doc.Firmware.BIOS.IsZero() || profile == platform.Production && len(doc.Boot) < 8 {
				t.Fatalf("accepted %+v", doc)
			}
		}
	})
}
