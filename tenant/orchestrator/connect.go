package orchestrator

import (
	"context"
	"crypto/subtle"
	"crypto/x509"
	"errors"
	"net/netip"
	"slices"

	"foothold/internal/mtls"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/token"
	"foothold/protocol/upstream"
	"foothold/protocol/vmcert"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
	"foothold/tenant/verify"
)

// gatewayAdmit is act 9: it spends T3, checks certificate, user, password and address,
// has the host quoted again, and admits exactly the WireGuard key that the certificate
// names. Any failure after T3 was burnt ends the VM.
func (o *Orchestrator) gatewayAdmit(ctx context.Context, _ mtls.Identity, in upstream.AdmitRequest) (upstream.AdmitResponse, error) {
	defer in.Password.Wipe()
	ctx, done := seenThrough(ctx)
	defer done()
	source := in.Source.Unmap()
	var info vmcert.Info
	serial := ""
	r, err := o.ledger.Spend(ctx, ledger.Presentation{Kind: token.T3, Digest: in.T3.Digest(), Source: source}, func(t *ledger.Tx, r ledger.Reservation) (err error) {
		if info, serial, err = o.checkCertificate(t, r, in.Certificate, source); err != nil {
			return err
		}
		s, err := t.Start(r.ID, r.Start)
		if err != nil {
			return err
		}
		return checkCredentials(s, in, serial)
	})
	o.zones.journalled()
	if err != nil {
		if r.ID != "" {
			o.abort(ctx, r.ID, r.Start, err)
		}
		return upstream.AdmitResponse{}, err
	}
	out, err := o.admitAttested(ctx, r, info, serial, in.Address.Unmap())
	if err != nil {
		o.abort(ctx, r.ID, r.Start, err)
	}
	return out, err
}

// checkCertificate accepts only a certificate that we issued, byte for byte, to this
// start and did not revoke, used from the address that it names.
func (o *Orchestrator) checkCertificate(t *ledger.Tx, r ledger.Reservation, der []byte, source netip.Addr) (vmcert.Info, string, error) {
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return vmcert.Info{}, "", event.Refuse(event.CertificateInvalid, "it is malformed")
	}
	info, err := vmcert.Parse(cert)
	if err != nil {
		return info, "", event.Refuse(event.CertificateInvalid, "%v", err)
	}
	switch {
	case info.Reservation != r.ID || info.Start != r.Start:
		return info, "", event.Refuse(event.CertificateInvalid, "it names start %d of %s", info.Start, info.Reservation)
	case info.Address != source:
		return info, "", event.Refuse(event.CertificateInvalid, "it names the address %s, not %s", info.Address, source)
	}
	serial := cert.SerialNumber.String()
	return info, serial, t.CheckCertificate(serial, der, r.ID, r.Start)
}

// checkCredentials compares in constant time, user and password together.
func checkCredentials(s ledger.Start, in upstream.AdmitRequest, serial string) error {
	user, hash := digest.Of([]byte(in.User)), digest.Of(in.Password.Reveal())
	wantUser := digest.Of([]byte(s.User))
	same := subtle.ConstantTimeCompare(user[:], wantUser[:]) & subtle.ConstantTimeCompare(hash[:], s.PasswordHash[:])
	switch {
	case s.User == "" || s.PasswordHash.IsZero():
		return event.Refuse(event.CredentialsWrong, "none were handed over")
	case same != 1:
		return event.Refuse(event.CredentialsWrong, "user name or password")
	case s.Serial != serial:
		return event.Refuse(event.CertificateInvalid, "it is not this start's latest")
	}
	return nil
}

func (o *Orchestrator) admitAttested(ctx context.Context, r ledger.Reservation, info vmcert.Info, serial string, address netip.Addr) (upstream.AdmitResponse, error) {
	admitted, err := o.attestAgain(ctx, r.ID, evidence.RoleConnect)
	if err != nil {
		return upstream.AdmitResponse{}, err
	}
	return o.admitTunnel(ctx, admitted, r, info, serial, address)
}

// admitTunnel stores the admission and publishes the quarantined peer.
func (o *Orchestrator) admitTunnel(ctx context.Context, admitted *verify.Admitted, r ledger.Reservation, info vmcert.Info, serial string, address netip.Addr) (upstream.AdmitResponse, error) {
	var out upstream.AdmitResponse
	err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		now, err := o.permitted(t, admitted, r, reservation.Connecting)
		if err != nil {
			return err
		}
		if err := o.checkTunnelAddress(t, r.ID, address); err != nil {
			return err
		}
		// Asked again: an end in between has revoked it.
		if err := t.CheckCertificate(serial, nil, r.ID, r.Start); err != nil {
			return err
		}
		out = upstream.AdmitResponse{Reservation: r.ID, Start: r.Start, Serial: serial, PublicKey: info.WireGuardKey, TTL: now.Deadline.Sub(t.Now)}
		return errors.Join(
			t.ChangeStart(r.ID, r.Start, func(s *ledger.Start) { s.TunnelAddress, s.WireGuardKey = address, info.WireGuardKey }),
			t.Journal(event.Event{Kind: "tunnel.admitted", Reservation: r.ID, Detail: map[string]string{
				"address": address.String(), "serial": serial, "verdict": admitted.Verdict().String()}}))
	})
	if err != nil {
		return upstream.AdmitResponse{}, err
	}
	o.zones.journalled()
	return out, o.publish(ctx)
}

// checkTunnelAddress refuses an address outside the pool, the gateway's own, and one
// that another live VM has.
func (o *Orchestrator) checkTunnelAddress(t *ledger.Tx, id string, a netip.Addr) error {
	if !o.conf.Gateway.Pool.Contains(a) || a == o.conf.Gateway.Pool.Masked().Addr() || a == o.conf.Gateway.Pool.Masked().Addr().Next() {
		return event.Refuse(event.AdmissionRefused, "%s is no tunnel address for a VM", a)
	}
	live, err := t.Live()
	if err != nil {
		return err
	}
	taken := slices.ContainsFunc(live, func(r ledger.Reservation) bool {
		s, err := t.Start(r.ID, r.Start)
		return r.ID != id && (err != nil || s.TunnelAddress == a)
	})
	if taken {
		return event.Refuse(event.AdmissionRefused, "%s belongs to another VM", a)
	}
	return nil
}
