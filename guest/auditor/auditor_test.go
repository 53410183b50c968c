package auditor_test

import (
	"bytes"
	"crypto/ed25519"
	"crypto/x509"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"foothold/guest/auditor"
	"foothold/internal/tpm"
	"foothold/internal/tpm/swtpmtest"
	"foothold/protocol/hostaudit"
	"foothold/protocol/inventory"
	"foothold/protocol/signed"

	"github.com/google/go-tpm/tpm2"
)

// enrolled makes the host's two keys in the TPM, as foothold-host does.
func enrolled(t *testing.T, dev *tpm.Device) (keys map[tpm2.TPMHandle]tpm.Key) {
	t.Helper()
	keys = map[tpm2.TPMHandle]tpm.Key{}
	for handle, template := range map[tpm2.TPMHandle]tpm2.TPMTPublic{inventory.AIKHandle: tpm.AIKTemplate(), inventory.SessionHandle: tpm.SessionTemplate()} {
		rsp, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
			InPublic: tpm2.New2B(template)}.Execute(dev)
		if err == nil {
			_, err = tpm2.EvictControl{Auth: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
				ObjectHandle: &tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name}, PersistentHandle: handle}.Execute(dev)
		}
		if err == nil {
			_, err = tpm2.FlushContext{FlushHandle: rsp.ObjectHandle}.Execute(dev)
		}
		if err != nil {
			t.Fatal(err)
		}
		if keys[handle], err = tpm.ReadKey(dev, handle); err != nil {
			t.Fatal(err)
		}
	}
	return keys
}

func TestExamine(t *testing.T) {
	chip := swtpmtest.New(t)
	dev := chip.Open()
	der, _ := chip.Endorsement(dev)
	ek, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	order := hostaudit.Order{Number: strings.Repeat("0a", 16), Host: "alpha", Nonce: bytes.Repeat([]byte{1}, 32)}

	// Without keys it says what is missing, and gives what there is.
	r := auditor.Examine(dev, order)
	if !bytes.Equal(r.EK, der) || len(r.Problems) != 2 || r.AIK != nil || r.Session != nil {
		t.Errorf("of a TPM without keys: %+v", r)
	}

	keys := enrolled(t, dev)
	secret := bytes.Repeat([]byte{7}, tpm.SecretLen)
	aik := keys[inventory.AIKHandle].Public
	if order.Blob, order.Secret, err = tpm.Challenge(ek, &aik, secret); err != nil {
		t.Fatal(err)
	}
	r = auditor.Examine(dev, order)
	if len(r.Problems) > 0 || !bytes.Equal(r.Answer, secret) || !bytes.Equal(r.AIK, tpm2.Marshal(aik)) ||
		!bytes.Equal(r.Session, tpm2.Marshal(keys[inventory.SessionHandle].Public)) || len(r.Certify) == 0 || len(r.Signed) == 0 {
		t.Errorf("of an enrolled TPM: %+v", r)
	}

	// A challenge for another TPM's keys stays unanswered, and the rest is asked.
	order.Blob = bytes.Clone(order.Blob)
	order.Blob[len(order.Blob)-1] ^= 1
	r = auditor.Examine(dev, order)
	if len(r.Problems) != 1 || r.Answer != nil || len(r.Certify) == 0 {
		t.Errorf("with another's challenge: %+v", r)
	}
}

func TestMediumIsReadStrictly(t *testing.T) {
	dir := t.TempDir()
	for what, text := range map[string]string{
		"no key":        `{"order":{},"seed":"AAAA"}`,
		"unknown field": `{"order":{},"seed":"","more":1}`,
		"cut off":       `{"order":`,
	} {
		file := filepath.Join(dir, "medium")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := auditor.ReadMedium(file); err == nil {
			t.Errorf("%s: it is taken", what)
		}
	}
}

func TestDescribeIsBounded(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "chassis_asset_tag"), []byte(strings.Repeat("x", 1000)+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var r hostaudit.Report
	auditor.Describe(&r, dir)
	if len(r.Asset) != 128 || r.Serial != "" {
		t.Errorf("%d bytes of an asset tag, serial %q", len(r.Asset), r.Serial)
	}
	m := hostaudit.Medium{Seed: bytes.Repeat([]byte{3}, 32)}
	key, err := m.Key()
	if err != nil {
		t.Fatal(err)
	}
	env, err := auditor.Sign(key, r)
	if err != nil {
		t.Fatal(err)
	}
	var back hostaudit.Report
	if err := env.Open(key.Public().(ed25519.PublicKey), signed.HostAudit, &back); err != nil || back.Asset != r.Asset {
		t.Errorf("%+v, %v", back, err)
	}
}
