package agent

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"io"

	"foothold/internal/secret"
	"foothold/internal/wg"
	"foothold/protocol/audit"
	"foothold/protocol/event"
	"foothold/protocol/frame"
	"foothold/protocol/token"
	"foothold/protocol/unlockmsg"
	"foothold/protocol/vmcert"
)

// Bounds of an audit request's nonce in bytes.
const minNonce, maxNonce = 16, 64

// keys are the pairs made in this VM for this start. Their private halves never leave it.
type keys struct {
	tls       ed25519.PrivateKey // of the certificate
	wireguard secret.Bytes
	wgPublic  [wg.KeyLen]byte
}

func newKeys() (*keys, error) {
	k := &keys{}
	var err error
	if _, k.tls, err = ed25519.GenerateKey(rand.Reader); err != nil {
		return nil, fmt.Errorf("make key: %w", err)
	}
	k.wireguard, k.wgPublic = wg.GenerateKey()
	return k, nil
}

func (k *keys) wipe() {
	clear(k.tls)
	k.wireguard.Wipe()
}

// unlock is the guest's side of the unlock channel (package unlockmsg).
type unlock struct {
	keys   *keys
	start  int
	vm     string // reservation
	gather func(nonce []byte) (audit.Report, error)
	open   func(context.Context, *unlockmsg.Handover) error // opens the disks
	failed func() int                                       // failed logins so far
}

// converse answers one audit request and takes one handover. The disks are opened
// before the answer, so that the orchestrator hears of a disk that does not open from
// the VM itself. The returned handover is nil unless it was answered with OK.
func (u *unlock) converse(ctx context.Context, c io.ReadWriter) (*unlockmsg.Handover, error) {
	var ask unlockmsg.AuditRequest
	if err := frame.Read(c, unlockmsg.MaxFrame, &ask); err != nil {
		return nil, event.Refuse(event.SSHFailed, "read the audit request: %v", err)
	}
	if len(ask.Nonce) < minNonce || len(ask.Nonce) > maxNonce {
		return nil, event.Refuse(event.SSHFailed, "the audit request's nonce has %d bytes", len(ask.Nonce))
	}
	report, err := u.gather(ask.Nonce)
	if err != nil {
		return nil, event.Refuse(event.AuditFailed, "%v", err)
	}
	request, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, u.keys.tls)
	if err != nil {
		return nil, fmt.Errorf("make certificate request: %w", err)
	}
	reply := unlockmsg.AuditReply{Report: report, Request: request, WireGuardKey: u.keys.wgPublic[:]}
	if err := frame.Write(c, unlockmsg.MaxFrame, reply); err != nil {
		return nil, event.Refuse(event.SSHFailed, "send the audit: %v", err)
	}
	h := &unlockmsg.Handover{}
	if err := frame.Read(c, unlockmsg.MaxFrame, h); err != nil {
		wipeHandover(h)
		return nil, event.Refuse(event.HandoverFailed, "read the handover: %v", err)
	}
	err = u.accept(ctx, h)
	answer := unlockmsg.HandoverReply{OK: err == nil, FailedLogins: u.failed()}
	if err != nil {
		answer.Reason = string(reasonOf(err))
	}
	if sent := frame.Write(c, unlockmsg.MaxFrame, answer); err == nil && sent != nil {
		err = event.Refuse(event.HandoverFailed, "answer the handover: %v", sent)
	}
	if err != nil {
		wipeHandover(h)
		return nil, err
	}
	return h, nil
}

func (u *unlock) accept(ctx context.Context, h *unlockmsg.Handover) error {
	if err := u.checkCertificate(h); err != nil {
		return event.Refuse(event.HandoverFailed, "%v", err)
	}
	if h.T3.IsZero() || !h.T3.Is(token.T3) || h.User == "" || h.Password.Len() == 0 || !h.Gateway.Address.Addr().Is4() || h.Gateway.ServerName == "" {
		return event.Refuse(event.HandoverFailed, "the handover is not complete")
	}
	return u.open(ctx, h)
}

// checkCertificate: it must be for the keys that were made here, and for this start.
func (u *unlock) checkCertificate(h *unlockmsg.Handover) error {
	cert, err := x509.ParseCertificate(h.Certificate)
	if err != nil {
		return fmt.Errorf("read the certificate: %w", err)
	}
	public, ok := cert.PublicKey.(ed25519.PublicKey)
	if !ok || !public.Equal(u.keys.tls.Public()) {
		return fmt.Errorf("the certificate is for another key")
	}
	info, err := vmcert.Parse(cert)
	if err != nil {
		return err
	}
	if info.Reservation != u.vm || info.Start != u.start || string(info.WireGuardKey) != string(u.keys.wgPublic[:]) {
		return fmt.Errorf("the certificate is for another start")
	}
	return nil
}

// wipeHandover erases what the VM no longer needs.
func wipeHandover(h *unlockmsg.Handover) {
	for _, d := range []*unlockmsg.Disk{&h.Template, &h.Volume} {
		clear(d.Header)
		d.Passphrase.Wipe()
	}
	h.Password.Wipe()
	*h = unlockmsg.Handover{}
}

// reasonOf is the stable code of an error.
func reasonOf(err error) event.Reason {
	if reason := event.ReasonOf(err); reason != event.InternalError {
		return reason
	}
	return event.HandoverFailed
}
