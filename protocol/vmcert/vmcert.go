// Package vmcert is what a VM's client certificate says beyond X.509: which start of
// which reservation it belongs to, from which address it may be used, and which
// WireGuard key the gateway may admit with it. One private extension carries it. It is
// not critical, because TLS stacks verify chains themselves and would refuse it; who
// accepts a VM's certificate calls [Parse], which refuses one without it.
package vmcert

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"net/netip"

	"foothold/internal/mtls"
)

// oid is in the UUID arc (ITU-T X.667), for 6f0c9d0e-2c5f-4b2f-9b2e-3a54c6c1d7e1 cut to 31-bit arcs.
var oid = asn1.ObjectIdentifier{2, 25, 1862049038, 744442671, 1, 1}

// Info is the extension's content. The reservation is the certificate's foothold name.
type Info struct {
	Reservation  string
	Start        int
	Address      netip.Addr // on the cloud network
	WireGuardKey []byte     // Curve25519 public key, 32 bytes
}

type extension struct {
	Start        int
	Address      []byte
	WireGuardKey []byte
}

// Extension encodes info for a certificate template; the caller sets the URI name.
func Extension(info Info) (pkix.Extension, error) {
	if len(info.WireGuardKey) != 32 || !info.Address.Is4() || info.Start < 1 {
		return pkix.Extension{}, errors.New("VM certificate: incomplete extension")
	}
	der, err := asn1.Marshal(extension{info.Start, info.Address.AsSlice(), info.WireGuardKey})
	if err != nil {
		return pkix.Extension{}, fmt.Errorf("VM certificate: %w", err)
	}
	return pkix.Extension{Id: oid, Value: der}, nil
}

// Parse reads the extension and the reservation of a verified VM certificate.
func Parse(cert *x509.Certificate) (Info, error) {
	id, err := mtls.Of(cert)
	if err != nil {
		return Info{}, err
	}
	if id.Role != mtls.VM {
		return Info{}, fmt.Errorf("%s is not a VM", id)
	}
	for _, e := range cert.Extensions {
		if !e.Id.Equal(oid) {
			continue
		}
		var ext extension
		rest, err := asn1.Unmarshal(e.Value, &ext)
		addr, ok := netip.AddrFromSlice(ext.Address)
		if err != nil || len(rest) != 0 || !ok || !addr.Is4() || len(ext.WireGuardKey) != 32 || ext.Start < 1 {
			return Info{}, errors.New("VM certificate: malformed extension")
		}
		return Info{Reservation: id.Name, Start: ext.Start, Address: addr, WireGuardKey: ext.WireGuardKey}, nil
	}
	return Info{}, errors.New("VM certificate: no extension")
}
