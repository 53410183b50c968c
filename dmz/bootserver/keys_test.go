package bootserver

import (
	"crypto/ecdh"
	"crypto/rand"
	"testing"

	"foothold/internal/tpm"
	"foothold/protocol/event"
	"foothold/protocol/inventory"

	"github.com/google/go-tpm/tpm2"
)

// encoded gives a template a point, as a TPM does.
func encoded(t *testing.T, key tpm2.TPMTPublic) []byte {
	t.Helper()
	private, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	point := private.PublicKey().Bytes() // 4, x, y
	key.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: point[1:33]}, Y: tpm2.TPM2BECCParameter{Buffer: point[33:]}})
	return tpm2.Marshal(key)
}

// TestKeyringRemembersGoodPairsOnly: each byte of both keys counts, also once a pair is known.
func TestKeyringRemembersGoodPairsOnly(t *testing.T) {
	var k keyring
	aik, session := encoded(t, tpm.AIKTemplate()), encoded(t, tpm.SessionTemplate())
	first, err := k.read(aik, session, false)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := k.read(aik, session, false); err != nil || again != first {
		t.Errorf("a known pair is read again: %v", err)
	}
	other, err := k.read(encoded(t, tpm.AIKTemplate()), session, false)
	if err != nil || other == first || string(other.name.Buffer) == string(first.name.Buffer) {
		t.Errorf("another attestation key: %+v, %v", other, err)
	}
	for name, pair := range map[string][2][]byte{
		"swapped":                  {session, aik},
		"the AIK as session key":   {aik, aik},
		"a session key as the AIK": {session, session},
		"a migrated key":           {aik, encoded(t, migrated())},
		"moved boundary":           {append(aik[:len(aik):len(aik)], session[0]), session[1:]},
		"none":                     {nil, nil},
	} {
		for range 2 { // a refusal is not remembered as anything else
			if keys, err := k.read(pair[0], pair[1], false); event.ReasonOf(err) != event.BootServerFailed || keys != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	for i := range len(aik) {
		bad := append([]byte{}, aik...)
		bad[i] ^= 1
		if keys, err := k.read(bad, session, false); err == nil || keys != nil {
			t.Errorf("byte %d of the attestation key is not looked at", i)
		}
	}
	if len(k.known) != 2 {
		t.Errorf("%d pairs are known", len(k.known))
	}
}

// migrated is a key of a tenant's own, by its attributes.
func migrated() tpm2.TPMTPublic {
	key := tpm.SessionTemplate()
	key.ObjectAttributes.FixedTPM, key.ObjectAttributes.FixedParent, key.ObjectAttributes.SensitiveDataOrigin = false, false, false
	return key
}

// TestKeyringTellsWhoseTheSessionKeyIs: the inventory's and the tenant's own are not taken
// for each other, whatever is known, and have their handles.
func TestKeyringTellsWhoseTheSessionKeyIs(t *testing.T) {
	var k keyring
	aik, theirs, own := encoded(t, tpm.AIKTemplate()), encoded(t, tpm.SessionTemplate()), encoded(t, migrated())
	for range 2 {
		if keys, err := k.read(aik, theirs, false); err != nil || keys.salt != inventory.SessionHandle {
			t.Errorf("the inventory's: %+v, %v", keys, err)
		}
		if keys, err := k.read(aik, own, true); err != nil || keys.salt != inventory.TenantHandle {
			t.Errorf("the tenant's own: %+v, %v", keys, err)
		}
		if _, err := k.read(aik, theirs, true); err == nil {
			t.Error("the inventory's is taken for the tenant's own")
		}
		if _, err := k.read(aik, own, false); err == nil {
			t.Error("the tenant's own is taken for the inventory's")
		}
	}
}

func TestKeyringIsBounded(t *testing.T) {
	k := keyring{known: map[rawKeys]*hostKeys{}}
	for i := range maxKeys {
		k.known[rawKeys{aik: string(rune(i))}] = nil
	}
	if _, err := k.read(encoded(t, tpm.AIKTemplate()), encoded(t, tpm.SessionTemplate()), false); err != nil || len(k.known) != 1 {
		t.Errorf("%d pairs are known, %v", len(k.known), err)
	}
}
