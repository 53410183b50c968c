package signingkey

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"os"
	"path/filepath"
	"testing"
)

func TestEnsureKeepsTheKey(t *testing.T) {
	file := filepath.Join(t.TempDir(), "key")
	first, err := Ensure(file)
	if err != nil {
		t.Fatal(err)
	}
	second, err := Ensure(file)
	if err != nil || !first.Equal(second) {
		t.Fatalf("another key: %v", err)
	}
	if info, _ := os.Stat(file); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", info.Mode())
	}
}

func TestReadRefuses(t *testing.T) {
	good := filepath.Join(t.TempDir(), "good")
	if _, err := Ensure(good); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	ec, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	der, _ := x509.MarshalPKCS8PrivateKey(ec)
	for name, c := range map[string]struct {
		data []byte
		perm os.FileMode
	}{
		"readable by others": {data, 0o644},
		"empty":              {nil, 0o600},
		"two blocks":         {append(append([]byte{}, data...), data...), 0o600},
		"another type":       {pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600},
		"another key":        {pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600},
		"rubbish inside":     {pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")}), 0o600},
	} {
		file := filepath.Join(t.TempDir(), "key")
		if err := os.WriteFile(file, c.data, c.perm); err != nil {
			t.Fatal(err)
		}
		if _, err := Read(file); err == nil {
			t.Errorf("%s: accepted", name)
		}
		if _, err := Ensure(file); err == nil {
			t.Errorf("%s: Ensure accepted, or replaced it", name)
		}
	}
}
