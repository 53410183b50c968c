package authority

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"foothold/internal/durable"
	"foothold/internal/mtls"
	"foothold/protocol/vmcert"
	"foothold/protocol/vmspec"
)

const (
	authorityLifetime = 10 * 365 * 24 * time.Hour
	maxLifetime       = 398 * 24 * time.Hour // daemons and operators; what browsers take at most
	maxVMLifetime     = 7 * 24 * time.Hour
	// Backdating allows for clocks of peers that run behind: for one that is off by ten
	// minutes, and what a certificate is under way.
	Backdating = 15 * time.Minute
)

// holderForm is the form of the NAME in a holder's URI.
var holderForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9._@-]{0,126}[a-z0-9])?$`)

// Usage is the one direction that a certificate is good for.
type Usage int

// The directions. There is no default.
const (
	Server Usage = iota + 1
	Client
)

// Request asks for a certificate.
type Request struct {
	Identity  mtls.Identity
	DNS       []string         // servers alone
	IPs       []netip.Addr     // servers alone
	Usage     Usage            //
	Lifetime  time.Duration    // at most 398 days
	PublicKey crypto.PublicKey // Ed25519 or ECDSA P-256; [Set.WriteFiles] makes its own
}

// Issue makes a certificate, DER, if the authority issues to that role for that usage.
// It does not issue to VMs: see [Set.IssueVM].
func (s *Set) Issue(name Name, req Request) ([]byte, error) {
	fail := func(text string) ([]byte, error) {
		return nil, fmt.Errorf("issue certificate to %s: %s", req.Identity, text)
	}
	iss, ok := s.issuer[name]
	if !ok {
		return fail("authority " + string(name) + " is not open")
	}
	r, _ := rules(name)
	switch {
	case name == VM || req.Identity.Role == mtls.VM:
		return fail("certificates of VMs are issued for a start of a VM alone")
	case !r.may(req.Identity.Role, req.Usage):
		return fail("authority " + string(name) + " does not issue to that role for that use")
	case !holderForm.MatchString(req.Identity.Name):
		return fail("malformed name")
	case req.Lifetime <= 0 || req.Lifetime > maxLifetime:
		return fail("lifetime must be over 0 and at most 398 days")
	case req.Usage == Client && (len(req.DNS) > 0 || len(req.IPs) > 0):
		return fail("a client has no address to name")
	case req.Usage == Server && len(req.DNS) == 0 && len(req.IPs) == 0:
		return fail("a server needs a name or an address")
	}
	tmpl := leaf(req.Identity, req.Lifetime, req.Usage)
	tmpl.DNSNames = slices.Clone(req.DNS)
	for _, ip := range req.IPs {
		tmpl.IPAddresses = append(tmpl.IPAddresses, net.IP(ip.AsSlice()))
	}
	return iss.sign(tmpl, req.PublicKey, req.Usage)
}

// IssueVM makes the client certificate of one start of a VM. Of the PKCS #10 request
// only the key counts, and that its holder signed the request; the names are info's.
// The serial, decimal, is for the ledger to store before the certificate is released.
func (s *Set) IssueVM(info vmcert.Info, request []byte, lifetime time.Duration) (der []byte, serial string, err error) {
	fail := func(err error) ([]byte, string, error) {
		return nil, "", fmt.Errorf("issue certificate to VM %s: %w", info.Reservation, err)
	}
	iss, ok := s.issuer[VM]
	if !ok {
		return fail(errors.New("authority vm is not open"))
	}
	if lifetime <= 0 || lifetime > maxVMLifetime {
		return fail(errors.New("lifetime must be over 0 and at most 7 days"))
	}
	if !vmspec.ValidID(info.Reservation) {
		return fail(errors.New("malformed reservation"))
	}
	if len(request) > 8192 {
		return fail(errors.New("request is over 8 KiB"))
	}
	csr, err := x509.ParseCertificateRequest(request)
	if err != nil {
		return fail(errors.New("malformed request"))
	}
	if err := csr.CheckSignature(); err != nil {
		return fail(errors.New("request is not signed by the key it names"))
	}
	ext, err := vmcert.Extension(info)
	if err != nil {
		return fail(err)
	}
	tmpl := leaf(mtls.Identity{Role: mtls.VM, Name: info.Reservation}, lifetime, Client)
	tmpl.ExtraExtensions = []pkix.Extension{ext}
	if der, err = iss.sign(tmpl, csr.PublicKey, Client); err != nil {
		return fail(err)
	}
	return der, tmpl.SerialNumber.String(), nil
}

// WriteFiles makes a key and its certificate for a daemon: BASE.key (0600) and
// BASE.crt in dir. The CA in the answer is this authority's; a daemon whose peers are
// another's sets that.
func (s *Set) WriteFiles(dir, base string, name Name, req Request) (mtls.Files, error) {
	r, _ := rules(name)
	key, err := newKey(r.browser)
	if err != nil {
		return mtls.Files{}, fmt.Errorf("make key of %s: %w", req.Identity, err)
	}
	req.PublicKey = key.Public()
	der, err := s.Issue(name, req)
	if err != nil {
		return mtls.Files{}, err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return mtls.Files{}, fmt.Errorf("encode key of %s: %w", req.Identity, err)
	}
	files := mtls.Files{Cert: filepath.Join(dir, base+".crt"), Key: filepath.Join(dir, base+".key"), CA: s.CertFile(name)}
	if err := durable.WriteFile(files.Key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), 0o600); err != nil {
		return mtls.Files{}, err
	}
	return files, durable.WriteFile(files.Cert, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o644)
}

func leaf(id mtls.Identity, lifetime time.Duration, usage Usage) *x509.Certificate {
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{CommonName: id.String()}, // for people; nobody decides by it
		NotBefore:             now.Add(-Backdating),
		NotAfter:              now.Add(lifetime),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		BasicConstraintsValid: true,
		URIs:                  []*url.URL{{Scheme: "foothold", Opaque: id.Role + ":" + id.Name}},
	}
	tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
	if usage == Client {
		tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	}
	return tmpl
}

// sign issues the certificate and verifies it as its users will, so that one that
// its authority's certificate does not permit never leaves.
func (iss issuer) sign(tmpl *x509.Certificate, public crypto.PublicKey, usage Usage) ([]byte, error) {
	switch key := public.(type) {
	case ed25519.PublicKey:
		if len(key) != ed25519.PublicKeySize {
			return nil, errors.New("sign certificate: malformed Ed25519 key")
		}
	case *ecdsa.PublicKey:
		if key.Curve != elliptic.P256() {
			return nil, errors.New("sign certificate: want P-256")
		}
	default:
		return nil, errors.New("sign certificate: want an Ed25519 or ECDSA P-256 key")
	}
	if tmpl.NotAfter.After(iss.cert.NotAfter) {
		return nil, errors.New("sign certificate: it would outlive its authority")
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, iss.cert, public, iss.key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(iss.cert)
	eku := x509.ExtKeyUsageServerAuth
	if usage == Client {
		eku = x509.ExtKeyUsageClientAuth
	}
	if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{eku}}); err != nil {
		return nil, fmt.Errorf("sign certificate: %w", err)
	}
	return der, nil
}

func selfSign(name Name, r rule, key crypto.Signer) ([]byte, error) {
	now := time.Now()
	tmpl := &x509.Certificate{
		SerialNumber:          serial(),
		Subject:               pkix.Name{CommonName: "Foothold " + string(name) + " authority"},
		NotBefore:             now.Add(-Backdating),
		NotAfter:              now.Add(authorityLifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	if len(r.server) > 0 {
		tmpl.ExtKeyUsage = append(tmpl.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
	}
	if len(r.client) > 0 {
		tmpl.ExtKeyUsage = append(tmpl.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("sign authority: %w", err)
	}
	return der, nil
}

// serial is 128 random bits; zero has a chance that needs no care.
func serial() *big.Int {
	b := make([]byte, 16)
	rand.Read(b)
	return new(big.Int).SetBytes(b)
}
