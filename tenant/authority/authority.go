// Package authority issues certificates: one authority for each trust that must not
// pass for another. Private keys lie in the vault, certificates beside it on disk.
//
//	authority  issues to (server)            issues to (client)
//	boot       bootserver                    -                                    what VMs pin
//	dmz        orchestrator, gateway, store  orchestrator, bootserver, gateway,   between daemons
//	                                         firewall, store
//	vm         -                             vm                                   by IssueVM alone
//	operator   orchestrator                  operator
//	tenant     -                             orchestrator                         towards hosts
//	provider   host                          -                                    the provider's own; not made by the tenant
//
// The table is enforced here, and its columns by the extended key usage in the
// authority's own certificate, which every verifier applies to the chain. X.509 name
// constraints would add nothing: crypto/x509 refuses them for opaque URIs, which name
// our holders. Path length is zero. What a request asks for by name is ignored.
// Serial numbers are 128 random bits. Revocation is the ledger's: it knows the serial
// of each VM's certificate.
package authority

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"foothold/internal/durable"
	"foothold/internal/mtls"
	"foothold/internal/secret"
	"foothold/tenant/vault"
)

// Name is one of the authorities.
type Name string

// The authorities.
const (
	Boot     Name = "boot"
	DMZ      Name = "dmz"
	VM       Name = "vm"
	Operator Name = "operator"
	Tenant   Name = "tenant"
	Provider Name = "provider"
)

// Tenants lists the authorities that a tenant has.
func Tenants() []Name { return []Name{Boot, DMZ, VM, Operator, Tenant} }

// rule is a row of the package's table.
type rule struct {
	server, client []string // roles
	browser        bool     // ECDSA P-256, because browsers do not take Ed25519
}

func rules(name Name) (rule, bool) {
	r, ok := map[Name]rule{
		Boot: {server: []string{mtls.BootServer}},
		DMZ: {server: []string{mtls.Orchestrator, mtls.Gateway, mtls.Store},
			client: []string{mtls.Orchestrator, mtls.BootServer, mtls.Gateway, mtls.Firewall, mtls.Store}},
		VM:       {client: []string{mtls.VM}},
		Operator: {server: []string{mtls.Orchestrator}, client: []string{mtls.Operator}, browser: true},
		Tenant:   {client: []string{mtls.Orchestrator}},
		Provider: {server: []string{mtls.Host}},
	}[name]
	return r, ok
}

// SigningKey names an Ed25519 key that signs documents.
type SigningKey string

// The signing keys.
const (
	ManifestKey SigningKey = "manifest" // manifests of VMs and what the orchestrator tells agents
	ZoneKey     SigningKey = "zone"     // zone documents
)

// Set is the open authorities and signing keys. It may be used by many goroutines.
type Set struct {
	dir    string
	issuer map[Name]issuer
	signer map[SigningKey]ed25519.PrivateKey
}

type issuer struct {
	cert *x509.Certificate
	key  crypto.Signer
}

// Create makes the named authorities and the signing keys: keys in the vault,
// certificates in dir. What exists already is kept, so that Create after a crash ends
// what was begun.
func Create(v *vault.Vault, dir string, names ...Name) (*Set, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("create authorities: %w", err)
	}
	for _, name := range names {
		if err := ensureAuthority(v, dir, name); err != nil {
			return nil, fmt.Errorf("create authority %s: %w", name, err)
		}
	}
	for _, key := range []SigningKey{ManifestKey, ZoneKey} {
		if _, err := ensureKey(v, vaultName(key), false); err != nil {
			return nil, fmt.Errorf("create signing key %s: %w", key, err)
		}
	}
	return Open(v, dir, names...)
}

// Open loads the named authorities and the signing keys, and checks that each
// certificate belongs to its key.
func Open(v *vault.Vault, dir string, names ...Name) (*Set, error) {
	s := &Set{dir: dir, issuer: map[Name]issuer{}, signer: map[SigningKey]ed25519.PrivateKey{}}
	for _, name := range names {
		iss, err := load(v, dir, name)
		if err != nil {
			return nil, fmt.Errorf("open authority %s: %w", name, err)
		}
		s.issuer[name] = iss
	}
	for _, name := range []SigningKey{ManifestKey, ZoneKey} {
		key, err := readKey(v, vaultName(name))
		if err != nil {
			return nil, fmt.Errorf("open signing key %s: %w", name, err)
		}
		private, ok := key.(ed25519.PrivateKey)
		if !ok {
			return nil, fmt.Errorf("open signing key %s: it is not Ed25519", name)
		}
		s.signer[name] = private
	}
	return s, nil
}

// Signer is a signing key's private half, for signed.Seal.
func (s *Set) Signer(name SigningKey) ed25519.PrivateKey { return s.signer[name] }

// Public is a signing key's public half.
func (s *Set) Public(name SigningKey) ed25519.PublicKey {
	key, ok := s.signer[name]
	if !ok {
		return nil
	}
	return key.Public().(ed25519.PublicKey)
}

// Certificate is an authority's own certificate, DER.
func (s *Set) Certificate(name Name) ([]byte, error) {
	iss, ok := s.issuer[name]
	if !ok {
		return nil, fmt.Errorf("authority %s is not open", name)
	}
	return bytes.Clone(iss.cert.Raw), nil
}

// Pool is a pool of this one authority.
func (s *Set) Pool(name Name) (*x509.CertPool, error) {
	iss, ok := s.issuer[name]
	if !ok {
		return nil, fmt.Errorf("authority %s is not open", name)
	}
	pool := x509.NewCertPool()
	pool.AddCert(iss.cert)
	return pool, nil
}

// CertFile is where an authority's certificate lies, PEM.
func (s *Set) CertFile(name Name) string { return certFile(s.dir, name) }

func certFile(dir string, name Name) string { return filepath.Join(dir, string(name)+"-ca.crt") }

func vaultName(name SigningKey) string { return "signing-" + string(name) }

func ensureAuthority(v *vault.Vault, dir string, name Name) error {
	r, ok := rules(name)
	if !ok {
		return errors.New("no such authority")
	}
	key, err := ensureKey(v, "authority-"+string(name), r.browser)
	if err != nil {
		return err
	}
	// A crash here leaves a key without certificate; the next Create goes on below.
	file := certFile(dir, name)
	if _, err := os.Lstat(file); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	der, err := selfSign(name, r, key)
	if err != nil {
		return err
	}
	return durable.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
}

// ensureKey makes a private key in the vault, or reads the one that is there.
func ensureKey(v *vault.Vault, name string, browser bool) (crypto.Signer, error) {
	if has, err := v.Has(name); err != nil || has {
		if err != nil {
			return nil, err
		}
		return readKey(v, name)
	}
	key, err := newKey(browser)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode key: %w", err)
	}
	value := secret.New(der)
	defer value.Wipe()
	return key, v.Put(name, value)
}

func newKey(browser bool) (crypto.Signer, error) {
	if browser {
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	return key, err
}

func readKey(v *vault.Vault, name string) (crypto.Signer, error) {
	value, err := v.Get(name)
	if err != nil {
		return nil, err
	}
	defer value.Wipe()
	key, err := x509.ParsePKCS8PrivateKey(value.Reveal())
	if err != nil {
		return nil, errors.New("the vault's key is not PKCS #8")
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, errors.New("the vault's key cannot sign")
	}
	return signer, nil
}

func load(v *vault.Vault, dir string, name Name) (issuer, error) {
	if _, ok := rules(name); !ok {
		return issuer{}, errors.New("no such authority")
	}
	key, err := readKey(v, "authority-"+string(name))
	if err != nil {
		return issuer{}, err
	}
	der, err := mtls.LoadDER(certFile(dir, name))
	if err != nil {
		return issuer{}, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return issuer{}, fmt.Errorf("parse certificate: %w", err)
	}
	public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(cert.PublicKey) || !cert.IsCA {
		return issuer{}, errors.New("the certificate on disk is not of the vault's key")
	}
	return issuer{cert, key}, nil
}

// may reports whether the authority issues to that role for that direction.
func (r rule) may(role string, usage Usage) bool {
	switch usage {
	case Server:
		return slices.Contains(r.server, role)
	case Client:
		return slices.Contains(r.client, role)
	}
	return false
}
