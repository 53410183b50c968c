package verify

import (
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"

	"foothold/protocol/inventory"
)

const maxRoots = 1 << 20 // bytes of a file of roots

// ekCertificate is tcg-kp-EKCertificate: the extended key usage of an endorsement key's
// certificate (TCG EK Credential Profile, section 3.2.16).
var ekCertificate = asn1.ObjectIdentifier{2, 23, 133, 8, 1}

// subjectAltName is critical in an endorsement key's certificate, because its subject is
// empty; the TPM's model stands in it, under a name that crypto/x509 does not read. It decides nothing.
var subjectAltName = asn1.ObjectIdentifier{2, 5, 29, 17}

// Manufacturers are the authorities of TPM manufacturers that the tenant trusts to certify
// nothing but TPMs of theirs.
type Manufacturers struct{ pool *x509.CertPool }

// OpenManufacturers reads roots from a PEM file. One that is empty, or holds something else
// than authorities' certificates, is refused.
func OpenManufacturers(file string) (*Manufacturers, error) {
	data, err := readFile(file, maxRoots)
	if err != nil {
		return nil, fmt.Errorf("open TPM manufacturers: %w", err)
	}
	m, err := ParseManufacturers(data)
	if err != nil {
		return nil, fmt.Errorf("open TPM manufacturers %s: %w", file, err)
	}
	return m, nil
}

// ParseManufacturers is OpenManufacturers for PEM in memory.
func ParseManufacturers(data []byte) (*Manufacturers, error) {
	m, n := &Manufacturers{x509.NewCertPool()}, 0
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		cert, err := x509.ParseCertificate(block.Bytes)
		switch {
		case block.Type != "CERTIFICATE":
			return nil, fmt.Errorf("it holds a %.40q", block.Type)
		case err != nil:
			return nil, errors.New("it holds a malformed certificate")
		case !cert.IsCA:
			return nil, fmt.Errorf("%.100q is not an authority's certificate", cert.Subject)
		}
		m.pool.AddCert(cert)
		n++
	}
	if n == 0 {
		return nil, errors.New("it holds no certificate")
	}
	return m, nil
}

// check demands that a manufacturer certified the host's endorsement key as one of a TPM.
// That the attestation key lives beside it is for credential activation to show.
func (m *Manufacturers) check(h inventory.Host, at time.Time) error {
	cert, err := certificate(h.EK)
	if err != nil {
		return fmt.Errorf("endorsement certificate: %w", err)
	}
	if len(h.EKChain) > inventory.MaxEKChain {
		return fmt.Errorf("endorsement certificate: its chain has %d certificates, at most %d are read", len(h.EKChain), inventory.MaxEKChain)
	}
	between := x509.NewCertPool()
	for _, der := range h.EKChain {
		c, err := certificate(der)
		if err != nil {
			return fmt.Errorf("endorsement certificate's chain: %w", err)
		}
		between.AddCert(c)
	}
	cert.UnhandledCriticalExtensions = slices.DeleteFunc(cert.UnhandledCriticalExtensions, subjectAltName.Equal)
	opts := x509.VerifyOptions{Roots: m.pool, Intermediates: between, CurrentTime: at, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	if _, err = cert.Verify(opts); err != nil { // one that is new, while our clock runs behind
		opts.CurrentTime = at.Add(clockSkew)
		if _, again := cert.Verify(opts); again == nil {
			err = nil
		}
	}
	switch {
	case err != nil:
		return fmt.Errorf("endorsement certificate: %w", err)
	case cert.IsCA || !slices.ContainsFunc(cert.UnknownExtKeyUsage, ekCertificate.Equal):
		return errors.New("endorsement certificate: it was not issued for an endorsement key")
	}
	return nil
}
