package verify

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/inventory"
	"foothold/protocol/signed"
)

// TestSharedKeys: two hosts may have no key of a TPM in common, each of which alone would
// be in order; nor one endorsement key under two certificates. Both are refused.
func TestSharedKeys(t *testing.T) {
	s := newSoft(t)
	first, roots := s.host, s.roots
	s.enrol()
	other := s.host
	other.Name = "host-2"
	makers, err := ParseManufacturers(slices.Concat(roots, s.roots))
	s.must(err)
	ek, err := x509.ParseCertificate(first.EK)
	s.must(err)
	signer := s.certificate("ca", nil)
	again, err := x509.CreateCertificate(rand.Reader, ek, signer.cert, ek.PublicKey, signer.key)
	s.must(err)
	for what, change := range map[string]func(*inventory.Host){
		"nothing":         func(*inventory.Host) {},
		"EK certificate":  func(h *inventory.Host) { h.EK = first.EK },
		"endorsement key": func(h *inventory.Host) { h.EK = again },
		"session key":     func(h *inventory.Host) { h.Session = first.Session },
		"attestation key": func(h *inventory.Host) { h.AIK = first.AIK },
	} {
		h := other
		change(&h)
		inv, err := ParseInventory(seal(t, s.inv, signed.Inventory, inventory.Inventory{Provider: "lab", Version: 3, Issued: s.now, Expires: s.now.Add(time.Hour),
			Hosts: []inventory.Host{first, h}}), s.inv.Public().(ed25519.PublicKey), makers, s.now)
		s.must(err)
		for name, with := range map[string]string{"host-1": "host-2", "host-2": "host-1"} {
			got, _ := inv.Host(name)
			shared := slices.Contains(got.Problems, "shares a TPM key with host "+with)
			if shared != (what != "nothing") || what == "nothing" && len(got.Problems) != 0 {
				t.Errorf("%s: %s has %q", what, name, strings.Join(got.Problems, "; "))
			}
		}
	}
}
