package broker

import (
	"bytes"
	"errors"
	"testing"
	"time"

	"foothold/internal/secret"
	"foothold/internal/tpm"
	"foothold/internal/tpm/swtpmtest"
	"foothold/protocol/digest"
	"foothold/protocol/hostapi"
	"foothold/protocol/inventory"

	"github.com/google/go-tpm/tpm2"
)

// migrated is a tenant's key, for the TPM that keys are of.
func migrated(t *testing.T, keys Keys) (key secret.Bytes, m hostapi.MigratedKey) {
	t.Helper()
	key, err := tpm.NewMigrated()
	if err != nil {
		t.Fatal(err)
	}
	pub, err := tpm.MigratedPublic(key)
	if err != nil {
		t.Fatal(err)
	}
	duplicate, seed, err := tpm.Duplicate(&keys.Session, key)
	if err != nil {
		t.Fatal(err)
	}
	return key, hostapi.MigratedKey{Public: tpm2.Marshal(pub), Duplicate: duplicate, Seed: seed}
}

// ownSession opens a session salted to a migrated key and quotes.
func (b *Broker) ownSession(t *testing.T, tenant string, m hostapi.MigratedKey) error {
	t.Helper()
	pub, err := tpm.ParsePublic(m.Public)
	if err != nil {
		t.Fatal(err)
	}
	name := "own of " + tenant
	a := b.begin(t, tenant, name)
	through := commands(t, a)
	s, closeSession, err := tpm2.HMACSession(through, tpm2.TPMAlgSHA256, 16, tpm2.Salted(inventory.TenantHandle, *pub), tpm2.AESEncryption(128, tpm2.EncryptInOut))
	if err != nil {
		return err
	}
	if _, err := bootQuote(b, s, digest.Of(nil)).Execute(through); err != nil {
		return err
	}
	if !a.Quoted() {
		t.Error("not quoted")
	}
	return closeSession()
}

// TestATenantsOwnKey: sessions of that tenant's VMs, and of nobody else's, may be salted
// to it, also by a successor that was given what the TPM wrapped.
func TestATenantsOwnKey(t *testing.T) {
	dev := swtpmtest.New(t).Open()
	keys := enrolled(t, dev)
	b, err := New(dev, keys, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	_, m := migrated(t, keys)
	if err := b.ownSession(t, "a", m); !errors.Is(err, ErrRefused) {
		t.Errorf("before there is one: %v", err)
	}
	wrapped, err := b.Import(t.Context(), "a", m)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.ownSession(t, "a", m); err != nil {
		t.Errorf("the tenant's own: %v", err)
	}
	if err := b.ownSession(t, "b", m); !errors.Is(err, ErrRefused) {
		t.Errorf("another tenant's VM: %v", err)
	}
	// Who has the public part alone, and salts to another key under its handle, fails.
	_, other := migrated(t, keys)
	if err := b.ownSession(t, "a", other); err == nil {
		t.Error("a session salted to another key")
	}
	if err := attest(b, commands(t, b.begin(t, "a", "vm")), "vm"); err != nil {
		t.Errorf("the inventory's key, beside it: %v", err)
	}
	clean(t, b)
	if b, err = New(dev, keys, time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := b.Restore("a", wrapped); err != nil {
		t.Fatal(err)
	}
	if err := b.ownSession(t, "a", m); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	clean(t, b)
}

// TestForeignKeysAreNotImported: what was not made for this TPM, was altered, or is of
// another form.
func TestForeignKeysAreNotImported(t *testing.T) {
	b, dev := newBroker(t, time.Minute)
	mine := Keys{b.aik.Public, b.session.Public}
	theirs := enrolled(t, swtpmtest.New(t).Open())
	_, good := migrated(t, mine)
	flip := func(data []byte, at int) []byte { c := bytes.Clone(data); c[at] ^= 1; return c }
	_, second := migrated(t, mine)
	for name, m := range map[string]hostapi.MigratedKey{
		"for another TPM":         func() hostapi.MigratedKey { _, m := migrated(t, theirs); return m }(),
		"duplicate altered":       {Public: good.Public, Duplicate: flip(good.Duplicate, 40), Seed: good.Seed},
		"seed altered":            {Public: good.Public, Duplicate: good.Duplicate, Seed: flip(good.Seed, 10)},
		"another's public part":   {Public: second.Public, Duplicate: good.Duplicate, Seed: good.Seed},
		"the AIK's public part":   {Public: tpm2.Marshal(b.aik.Public), Duplicate: good.Duplicate, Seed: good.Seed},
		"a key bound to a TPM":    {Public: tpm2.Marshal(b.session.Public), Duplicate: good.Duplicate, Seed: good.Seed},
		"public part with a tail": {Public: append(bytes.Clone(good.Public), 0), Duplicate: good.Duplicate, Seed: good.Seed},
		"no duplicate":            {Public: good.Public, Duplicate: nil, Seed: good.Seed},
		"no seed":                 {Public: good.Public, Duplicate: good.Duplicate, Seed: nil},
		"duplicate too long":      {Public: good.Public, Duplicate: make([]byte, 1000), Seed: good.Seed},
	} {
		if wrapped, err := b.Import(t.Context(), "a", m); err == nil {
			t.Errorf("%s: imported as %x", name, wrapped)
		}
	}
	if err := b.ownSession(t, "a", good); !errors.Is(err, ErrRefused) {
		t.Errorf("a session after all that: %v", err)
	}
	if _, err := b.Import(t.Context(), "a", good); err != nil {
		t.Errorf("the good one: %v", err)
	}
	if err := b.Restore("a", []byte(`{"public":"AAAA"}`)); err == nil {
		t.Error("garbage was restored")
	}
	if rsp, err := (tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: 0x80000000, PropertyCount: 8}).Execute(dev); err != nil {
		t.Error(err)
	} else if list, err := rsp.CapabilityData.Data.Handles(); err != nil || len(list.Handle) != 0 {
		t.Errorf("objects %v are left in the TPM (%v)", list, err)
	}
}
