package orchestrator

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"foothold/internal/secret"
	"foothold/tenant/authority"
	"foothold/tenant/ledger"
	"foothold/tenant/vault"
)

// What lies in the state directory.
const (
	ledgerFile  = "ledger.db"
	vaultDir    = "vault"
	kekFile     = "vault.key" // key-encryption key
	authorities = "authorities"
	uploads     = "uploads" // template images on their way to the hosts
)

// loginRoot names the vault's secret that login keys are derived from.
const loginRoot = "login-root"

// InitResult is what others need to know of a new orchestrator. Nothing in it is secret.
type InitResult struct {
	State       string            `json:"state"`
	ManifestKey string            `json:"manifest_key"` // hex
	ZoneKey     string            `json:"zone_key"`     // hex
	Authorities map[string]string `json:"authorities"`  // name → PEM file
}

// Init makes the state directory: vault, authorities, signing keys, ledger. What exists
// is kept, so Init after a crash ends what was begun.
func Init(ctx context.Context, dir string) (InitResult, error) {
	if err := os.MkdirAll(filepath.Join(dir, uploads), 0o700); err != nil {
		return InitResult{}, fmt.Errorf("make state directory: %w", err)
	}
	v, err := openOrCreateVault(dir)
	if err != nil {
		return InitResult{}, err
	}
	if err := v.Put(loginRoot, secret.Random(32)); err != nil && !errors.Is(err, vault.ErrExists) {
		return InitResult{}, fmt.Errorf("make login root: %w", err)
	}
	set, err := authority.Create(v, filepath.Join(dir, authorities), authority.Tenants()...)
	if err != nil {
		return InitResult{}, err
	}
	l, err := ledger.Open(ctx, filepath.Join(dir, ledgerFile), time.Now)
	if err != nil {
		return InitResult{}, err
	}
	if err := l.Close(); err != nil {
		return InitResult{}, fmt.Errorf("close ledger: %w", err)
	}
	res := InitResult{State: dir, Authorities: map[string]string{},
		ManifestKey: hex.EncodeToString(set.Public(authority.ManifestKey)), ZoneKey: hex.EncodeToString(set.Public(authority.ZoneKey))}
	for _, name := range authority.Tenants() {
		res.Authorities[string(name)] = set.CertFile(name)
	}
	return res, nil
}

// Open opens the vault and the authorities that Init made, for issuing certificates
// to daemons and operators.
func Open(dir string) (*vault.Vault, *authority.Set, error) {
	v, err := vault.Open(filepath.Join(dir, vaultDir), filepath.Join(dir, kekFile))
	if err != nil {
		return nil, nil, err
	}
	set, err := authority.Open(v, filepath.Join(dir, authorities), authority.Tenants()...)
	if err != nil {
		return nil, nil, err
	}
	return v, set, nil
}

// openOrCreateVault makes a new vault only where none can be: a key-encryption key
// that a crash left beside an empty one protects nothing and is replaced.
func openOrCreateVault(dir string) (*vault.Vault, error) {
	place, kek := filepath.Join(dir, vaultDir), filepath.Join(dir, kekFile)
	entries, err := os.ReadDir(place)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("look for vault: %w", err)
	}
	if len(entries) > 0 {
		return vault.Open(place, kek)
	}
	if err := os.Remove(kek); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove unused key: %w", err)
	}
	return vault.Create(place, kek)
}
