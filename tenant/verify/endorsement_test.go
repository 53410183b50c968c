package verify

import (
	"bytes"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/pem"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/inventory"
	"foothold/protocol/signed"
)

func TestEndorsement(t *testing.T) {
	w := newWorld(t)
	makers := w.makers()
	if err := makers.check(w.host.entry, w.now); err != nil {
		t.Fatalf("a TPM as its manufacturer made it: %v", err)
	}
	issued := w.host.entry.EKChain[0]
	for name, change := range map[string]func(*inventory.Host){
		"no certificate":                  func(h *inventory.Host) { h.EK = nil },
		"malformed":                       func(h *inventory.Host) { h.EK = []byte("certificate") },
		"another byte":                    func(h *inventory.Host) { h.EK = bytes.Clone(h.EK); h.EK[len(h.EK)-1] ^= 1 },
		"no chain":                        func(h *inventory.Host) { h.EKChain = nil },
		"another's chain":                 func(h *inventory.Host) { h.EKChain = w.rogue.entry.EKChain },
		"a malformed chain":               func(h *inventory.Host) { h.EKChain = [][]byte{{1}} },
		"a long chain":                    func(h *inventory.Host) { h.EKChain = slices.Repeat([][]byte{issued}, inventory.MaxEKChain+1) },
		"the authority's own certificate": func(h *inventory.Host) { h.EK = issued },
		"a certificate for something else": func(h *inventory.Host) {
			h.EK, h.EKChain = selfSigned(t, "boot.foothold.internal", &w.ca).der, nil
		},
	} {
		h := w.host.entry
		change(&h)
		if err := makers.check(h, w.now); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	// An authority that the tenant trusts for something else certifies no TPM.
	pemCA := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: w.ca.der})
	other, err := ParseManufacturers(pemCA)
	if err != nil {
		t.Fatal(err)
	}
	if err := other.check(w.host.entry, w.now); err == nil {
		t.Error("another authority: accepted")
	}
	h := w.host.entry
	h.EK, h.EKChain = selfSigned(t, "boot.foothold.internal", &w.ca).der, nil
	if err := other.check(h, w.now); err == nil || !strings.Contains(err.Error(), "not issued for an endorsement key") {
		t.Errorf("a server's certificate of a trusted authority: %v", err)
	}
	cert, err := x509.ParseCertificate(issued)
	if err != nil {
		t.Fatal(err)
	}
	if err := makers.check(w.host.entry, cert.NotAfter.Add(time.Hour)); err == nil {
		t.Error("an authority that expired: accepted")
	}
}

// A host whose TPM nobody knows is in the inventory, and refused.
func TestTPMOfAnUnknownManufacturer(t *testing.T) {
	w := newWorld(t)
	roots, err := os.ReadFile(w.host.tpm.Roots())
	if err != nil {
		t.Fatal(err)
	}
	makers, err := ParseManufacturers(roots)
	if err != nil {
		t.Fatal(err)
	}
	inv, err := ParseInventory(seal(t, w.inv, signed.Inventory, w.inventory()), w.inv.Public().(ed25519.PublicKey), makers, w.now)
	if err != nil {
		t.Fatal(err)
	}
	if s, _ := inv.Host("host-1"); len(s.Problems) != 0 {
		t.Errorf("host-1: %v", s.Problems)
	}
	if s, _ := inv.Host("host-2"); len(s.Problems) != 1 || !strings.Contains(s.Problems[0], "endorsement certificate") {
		t.Errorf("host-2: %v", s.Problems)
	}
	if _, err := ParseInventory(seal(t, w.inv, signed.Inventory, w.inventory()), w.inv.Public().(ed25519.PublicKey), nil, w.now); err == nil {
		t.Error("an inventory was read without any manufacturer")
	}
}

func TestManufacturersMustBeAuthorities(t *testing.T) {
	w := newWorld(t)
	encode := func(kind string, der []byte) []byte {
		return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	}
	good := encode("CERTIFICATE", w.ca.der)
	if _, err := ParseManufacturers(good); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{
		"empty":                nil,
		"text":                 []byte("none"),
		"a server's":           append(bytes.Clone(good), encode("CERTIFICATE", w.server.der)...),
		"a malformed one":      append(bytes.Clone(good), encode("CERTIFICATE", []byte{1})...),
		"something else in it": append(bytes.Clone(good), encode("PRIVATE KEY", w.ca.der)...),
	} {
		if _, err := ParseManufacturers(data); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
