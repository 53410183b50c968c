// Package vault keeps the tenant's secrets: keys of authorities, signing keys, volume
// keys. Each lies in a file of its own, sealed under one key-encryption key, so that
// destroying a key is removing a file.
//
// A sealed file is
//
//	"foothold/vault/v1\n" nonce[12] AES-256-GCM(value) tag[16]
//
// with transcript("foothold/vault/v1", name) as additional data: a file moved to
// another name does not open. The key-encryption key is 32 bytes in a file that only
// its owner may read; whoever has it and the folder has everything. Keep the two on
// different media, and back both up apart.
//
// What it does not give: a file that someone put back from a copy opens again (the
// ledger knows which keys should exist), and [Vault.Destroy] erases as far as the
// medium lets it; see there.
//
// Durability: when Put or Destroy returns nil, the change survives a power cut. A
// crash in between leaves the old or the new state, or, in Destroy, a file that does
// not open. A Vault may be used by many goroutines.
package vault

import (
	"crypto/aes"
	"crypto/cipher"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"foothold/internal/secret"
	"foothold/protocol/transcript"

	"golang.org/x/sys/unix"
)

const (
	label    = "foothold/vault/v1"
	magic    = label + "\n"
	suffix   = ".sealed"
	kekSize  = 32       // bytes, AES-256
	maxValue = 64 << 10 // bytes of one secret; the longest is a PKCS #8 key
	// checkName is sealed at creation, so that a wrong key-encryption key is noticed at once.
	checkName = "vault-check"
)

// Errors that callers tell apart.
var (
	ErrAbsent = errors.New("vault holds no such secret")
	ErrExists = errors.New("vault holds that secret already")
	ErrSealed = errors.New("vault: secret does not open: wrong key-encryption key, or an altered file")
)

var nameForm = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,126}(\.[0-9]{1,9})?$`)

// Vault is an open vault.
type Vault struct {
	dir  string
	aead cipher.AEAD
}

// Create makes an empty vault in dir and a new key-encryption key in kekFile. Neither
// may exist before; dir may be an empty folder.
func Create(dir, kekFile string) (*Vault, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("create vault: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("create vault: %w", err)
	}
	if len(entries) > 0 {
		return nil, fmt.Errorf("create vault: %s is not empty", dir)
	}
	kek := secret.Random(kekSize)
	defer kek.Wipe()
	if err := writeNew(kekFile, kek.Reveal()); err != nil {
		return nil, fmt.Errorf("create key-encryption key: %w", err)
	}
	v, err := open(dir, kek)
	if err != nil {
		return nil, err
	}
	// A crash before this leaves a key-encryption key that Open accepts for no vault.
	if err := v.Put(checkName, secret.New([]byte(label))); err != nil {
		return nil, err
	}
	return v, nil
}

// Open opens the vault in dir with the key in kekFile.
func Open(dir, kekFile string) (*Vault, error) {
	if err := private(kekFile, false); err != nil {
		return nil, fmt.Errorf("open vault: key-encryption key: %w", err)
	}
	data, err := os.ReadFile(kekFile)
	if err != nil {
		return nil, fmt.Errorf("open vault: %w", err)
	}
	kek := secret.New(data)
	defer kek.Wipe()
	v, err := open(dir, kek)
	if err != nil {
		return nil, err
	}
	check, err := v.Get(checkName)
	if err != nil {
		return nil, fmt.Errorf("open vault %s: %w", dir, err)
	}
	if !check.Equal(secret.New([]byte(label))) {
		return nil, fmt.Errorf("open vault %s: %w", dir, ErrSealed)
	}
	return v, nil
}

func open(dir string, kek secret.Bytes) (*Vault, error) {
	if err := private(dir, true); err != nil {
		return nil, fmt.Errorf("open vault: %w", err)
	}
	if kek.Len() != kekSize {
		return nil, fmt.Errorf("open vault: key-encryption key has %d bytes, want %d", kek.Len(), kekSize)
	}
	block, err := aes.NewCipher(kek.Reveal())
	if err != nil {
		return nil, fmt.Errorf("open vault: %w", err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		return nil, fmt.Errorf("open vault: %w", err)
	}
	return &Vault{dir: dir, aead: aead}, nil
}

// Put stores a secret under a new name of lower-case letters, digits and hyphens.
// A name that exists is refused with [ErrExists]: keys are made anew, not changed.
func (v *Vault) Put(name string, value secret.Bytes) error {
	path, err := v.path(name)
	if err != nil {
		return err
	}
	if value.Len() == 0 || value.Len() > maxValue {
		return fmt.Errorf("store secret %s: it has %d bytes, want 1 to %d", name, value.Len(), maxValue)
	}
	sealed := v.aead.Seal([]byte(magic), nil, value.Reveal(), transcript.Bytes(label, []byte(name)))
	err = writeNew(path, sealed)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("store secret %s: %w", name, ErrExists)
	}
	if err != nil {
		return fmt.Errorf("store secret %s: %w", name, err)
	}
	return nil
}

// Get returns a secret; the caller wipes it after use.
func (v *Vault) Get(name string) (secret.Bytes, error) {
	path, err := v.path(name)
	if err != nil {
		return secret.Bytes{}, err
	}
	data, err := readBounded(path)
	if errors.Is(err, fs.ErrNotExist) {
		return secret.Bytes{}, fmt.Errorf("read secret %s: %w", name, ErrAbsent)
	}
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("read secret %s: %w", name, err)
	}
	body, ok := strings.CutPrefix(string(data), magic)
	if !ok {
		return secret.Bytes{}, fmt.Errorf("read secret %s: %w", name, ErrSealed)
	}
	value, err := v.aead.Open(nil, nil, []byte(body), transcript.Bytes(label, []byte(name)))
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("read secret %s: %w", name, ErrSealed)
	}
	return secret.New(value), nil
}

// Has reports whether a secret of that name exists; it does not open it.
func (v *Vault) Has(name string) (bool, error) {
	path, err := v.path(name)
	if err != nil {
		return false, err
	}
	_, err = os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

// Names lists the secrets, sorted.
func (v *Vault) Names() ([]string, error) {
	entries, err := os.ReadDir(v.dir)
	if err != nil {
		return nil, fmt.Errorf("list vault: %w", err)
	}
	var names []string
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), suffix)
		if ok && nameForm.MatchString(name) && name != checkName {
			names = append(names, name)
		}
	}
	return names, nil
}

// Destroy overwrites a secret's file, removes it and makes both durable; an absent
// one is success, so that a crash is mended by doing it again.
//
// The overwriting is best effort: copy-on-write and journalling file systems, flash
// and backups keep old blocks. What they keep is sealed, so erasure is certain once
// the key-encryption key is destroyed as well, or never left its module.
func (v *Vault) Destroy(name string) error {
	path, err := v.path(name)
	if err != nil {
		return err
	}
	if name == checkName {
		return fmt.Errorf("destroy secret %s: the vault needs it", name)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) { // its removal may not be durable yet
		return syncDir(v.dir)
	}
	if err != nil {
		return fmt.Errorf("destroy secret %s: %w", name, err)
	}
	if err := overwrite(f); err != nil {
		return fmt.Errorf("destroy secret %s: %w", name, err)
	}
	// A crash here leaves a file that does not open.
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) { // another Destroy may have been faster
		return fmt.Errorf("destroy secret %s: %w", name, err)
	}
	if err := syncDir(v.dir); err != nil {
		return fmt.Errorf("destroy secret %s: %w", name, err)
	}
	return nil
}

func (v *Vault) path(name string) (string, error) {
	if !nameForm.MatchString(name) {
		return "", errors.New("name of a secret: want lower-case letters, digits and hyphens, at most 127")
	}
	return filepath.Join(v.dir, name+suffix), nil
}
