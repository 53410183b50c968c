// Package upstreamtest is an orchestrator for the tests of DMZ daemons: the real
// protocol over real mutual TLS, with answers that the test gives.
package upstreamtest

import (
	"crypto"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"foothold/internal/mtls"
)

// CA is an authority of a test.
type CA struct {
	t    testing.TB
	dir  string
	name string
	cert *x509.Certificate
	key  ed25519.PrivateKey
	next atomic.Int64 // serial number
}

// NewCA makes an authority whose files lie in a folder of the test.
func NewCA(t testing.TB, name string) *CA {
	t.Helper()
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, pub, key)
	must(t, err)
	cert, err := x509.ParseCertificate(der)
	must(t, err)
	ca := &CA{t: t, dir: t.TempDir(), name: name, cert: cert, key: key}
	ca.next.Store(2)
	must(t, os.WriteFile(ca.File(), pemOf("CERTIFICATE", der), 0o600))
	return ca
}

// File is the authority's certificate (PEM).
func (ca *CA) File() string { return filepath.Join(ca.dir, ca.name+".pem") }

// DER is the authority's certificate.
func (ca *CA) DER() []byte { return ca.cert.Raw }

// Pool holds the authority alone.
func (ca *CA) Pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(ca.cert)
	return pool
}

// Leaf is what an issued certificate says.
type Leaf struct {
	ID         mtls.Identity
	Server     bool
	DNS        string
	Key        crypto.Signer // nil: a new one
	Extensions []pkix.Extension
}

// Issue makes a certificate.
func (ca *CA) Issue(l Leaf) tls.Certificate {
	ca.t.Helper()
	if l.Key == nil {
		_, key, err := ed25519.GenerateKey(rand.Reader)
		must(ca.t, err)
		l.Key = key
	}
	name, err := url.Parse(l.ID.URI())
	must(ca.t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(ca.next.Add(1)), Subject: pkix.Name{CommonName: "ignored"}, URIs: []*url.URL{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), ExtraExtensions: l.Extensions,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if l.Server {
		template.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	}
	if l.DNS != "" {
		template.DNSNames = []string{l.DNS}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.cert, l.Key.Public(), ca.key)
	must(ca.t, err)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: l.Key}
}

// Files issues a certificate and writes it with its key beside peers' authority.
func (ca *CA) Files(l Leaf, peers *CA) mtls.Files {
	ca.t.Helper()
	cert := ca.Issue(l)
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	must(ca.t, err)
	base := filepath.Join(ca.t.TempDir(), l.ID.Role)
	must(ca.t, os.WriteFile(base+".pem", pemOf("CERTIFICATE", cert.Certificate[0]), 0o600))
	must(ca.t, os.WriteFile(base+".key", pemOf("PRIVATE KEY", key), 0o600))
	return mtls.Files{Cert: base + ".pem", Key: base + ".key", CA: peers.File()}
}

func pemOf(kind string, der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
