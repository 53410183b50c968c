package agent

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"foothold/internal/mtls"
	"foothold/internal/secret"
	"foothold/protocol/audit"
	"foothold/protocol/bootmsg"
	"foothold/protocol/bundle"
	"foothold/protocol/event"
	"foothold/protocol/frame"
	"foothold/protocol/token"
	"foothold/protocol/unlockmsg"
	"foothold/protocol/vmcert"

	"encoding/json"
)

const reservation = "0f0e0d0c-0b0a-4908-8706-050403020100"

// certify issues what the orchestrator would for a request.
func certify(t *testing.T, reply unlockmsg.AuditReply, info vmcert.Info) []byte {
	t.Helper()
	csr, err := x509.ParseCertificateRequest(reply.Request)
	if err != nil || csr.CheckSignature() != nil {
		t.Fatalf("certificate request: %v", err)
	}
	ext, err := vmcert.Extension(info)
	if err != nil {
		t.Fatal(err)
	}
	name, _ := url.Parse(mtls.Identity{Role: mtls.VM, Name: info.Reservation}.URI())
	template := &x509.Certificate{SerialNumber: big.NewInt(1), URIs: []*url.URL{name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), ExtraExtensions: nil}
	template.ExtraExtensions = append(template.ExtraExtensions, ext)
	_, ca, _ := ed25519.GenerateKey(rand.Reader)
	der, err := x509.CreateCertificate(rand.Reader, template, template, csr.PublicKey, ca)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// session runs the guest's side against a script of the orchestrator's.
func session(t *testing.T, u *unlock, script func(net.Conn)) (*unlockmsg.Handover, error) {
	t.Helper()
	near, far := net.Pipe()
	done := make(chan struct{})
	go func() { defer close(done); defer far.Close(); script(far) }()
	h, err := u.converse(t.Context(), near)
	near.Close()
	<-done
	return h, err
}

// failedLogins is what the door has counted.
const failedLogins = 5

func newUnlock(t *testing.T) *unlock {
	t.Helper()
	k, err := newKeys()
	if err != nil {
		t.Fatal(err)
	}
	return &unlock{keys: k, vm: reservation, start: 2,
		gather: func(nonce []byte) (audit.Report, error) {
			return audit.Report{Stage: audit.Initramfs, Nonce: nonce}, nil
		},
		open: func(context.Context, *unlockmsg.Handover) error { return nil }, failed: func() int { return failedLogins }}
}

func goodHandover(t *testing.T, reply unlockmsg.AuditReply) unlockmsg.Handover {
	return unlockmsg.Handover{T3: token.New(token.T3), User: "u", Password: secret.Random(16),
		Template: unlockmsg.Disk{Device: "vda", Passphrase: secret.Random(32)}, Volume: unlockmsg.Disk{Device: "vdb", Passphrase: secret.Random(32)},
		Certificate: certify(t, reply, vmcert.Info{Reservation: reservation, Start: 2, Address: netip.MustParseAddr("10.82.0.10"), WireGuardKey: reply.WireGuardKey}),
		Gateway:     unlockmsg.Gateway{Address: netip.MustParseAddrPort("10.81.0.20:8443"), ServerName: "gateway.foothold.internal"}}
}

func TestConverse(t *testing.T) {
	nonce := bytes.Repeat([]byte{3}, 32)
	other := vmcert.Info{Reservation: reservation, Start: 1, Address: netip.MustParseAddr("10.82.0.10"), WireGuardKey: make([]byte, 32)}
	for name, tc := range map[string]struct {
		nonce  []byte
		bend   func(*unlockmsg.Handover, unlockmsg.AuditReply)
		open   error
		reason event.Reason
	}{
		"good":               {nonce: nonce},
		"short nonce":        {nonce: nonce[:15], reason: event.SSHFailed},
		"disk does not open": {nonce: nonce, open: event.Refuse(event.DiskRefused, "no"), reason: event.DiskRefused},
		"certificate for another key": {nonce: nonce, reason: event.HandoverFailed, bend: func(h *unlockmsg.Handover, r unlockmsg.AuditReply) {
			_, key, _ := ed25519.GenerateKey(rand.Reader)
			r.Request, _ = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
			*h = goodHandover(t, r)
		}},
		"certificate for another start": {nonce: nonce, reason: event.HandoverFailed, bend: func(h *unlockmsg.Handover, r unlockmsg.AuditReply) { h.Certificate = certify(t, r, other) }},
		"no certificate":                {nonce: nonce, reason: event.HandoverFailed, bend: func(h *unlockmsg.Handover, _ unlockmsg.AuditReply) { h.Certificate = nil }},
		"T1 for T3":                     {nonce: nonce, reason: event.HandoverFailed, bend: func(h *unlockmsg.Handover, _ unlockmsg.AuditReply) { h.T3 = token.New(token.T1) }},
		"no password":                   {nonce: nonce, reason: event.HandoverFailed, bend: func(h *unlockmsg.Handover, _ unlockmsg.AuditReply) { h.Password.Wipe() }},
		"no gateway":                    {nonce: nonce, reason: event.HandoverFailed, bend: func(h *unlockmsg.Handover, _ unlockmsg.AuditReply) { h.Gateway = unlockmsg.Gateway{} }},
	} {
		t.Run(name, func(t *testing.T) {
			u := newUnlock(t)
			opened := false
			u.open = func(context.Context, *unlockmsg.Handover) error { opened = true; return tc.open }
			var answer unlockmsg.HandoverReply
			h, err := session(t, u, func(c net.Conn) {
				_ = frame.Write(c, unlockmsg.MaxFrame, unlockmsg.AuditRequest{Nonce: tc.nonce})
				var reply unlockmsg.AuditReply
				if frame.Read(c, unlockmsg.MaxFrame, &reply) != nil {
					return
				}
				if !bytes.Equal(reply.Report.Nonce, tc.nonce) {
					t.Error("the report answers another nonce")
				}
				hand := goodHandover(t, reply)
				if tc.bend != nil {
					tc.bend(&hand, reply)
				}
				_ = frame.Write(c, unlockmsg.MaxFrame, hand)
				_ = frame.Read(c, unlockmsg.MaxFrame, &answer)
			})
			if tc.reason == "" {
				if err != nil || h == nil || !answer.OK || !opened || answer.FailedLogins != failedLogins {
					t.Fatalf("%v, answer %+v", err, answer)
				}
				return
			}
			if err == nil || h != nil || reasonOf(err) != tc.reason || answer.OK {
				t.Errorf("%v, want %s; answer %+v", err, tc.reason, answer)
			}
			if tc.open == nil && opened {
				t.Error("disks were opened all the same")
			}
			if answer.Reason != "" && answer.Reason != string(tc.reason) {
				t.Errorf("the orchestrator is told %q", answer.Reason)
			}
		})
	}
}

func TestFailedAuditEndsTheConversation(t *testing.T) {
	u := newUnlock(t)
	u.gather = func([]byte) (audit.Report, error) { return audit.Report{}, errors.New("no") }
	_, err := session(t, u, func(c net.Conn) {
		_ = frame.Write(c, unlockmsg.MaxFrame, unlockmsg.AuditRequest{Nonce: make([]byte, 32)})
		var reply unlockmsg.AuditReply
		if frame.Read(c, unlockmsg.MaxFrame, &reply) == nil {
			t.Error("a report is sent")
		}
	})
	if reasonOf(err) != event.AuditFailed {
		t.Error(err)
	}
}

func TestInstanceIsReadOnceAndErased(t *testing.T) {
	u := bootmsg.Unique{Reservation: reservation, Start: 1, Name: "web", Account: "fh", AuthorizedKey: []byte("k"), T2: token.New(token.T2),
		Network: bootmsg.Network{MAC: "02:00:00:00:00:01", Address: netip.MustParsePrefix("10.82.0.10/24"), Gateway: netip.MustParseAddr("10.82.0.1"), MTU: 1500},
		BootURL: "https://10.81.0.10:443", ServerName: "boot", BootCA: []byte("ca"), ManifestKey: make([]byte, 32), Orchestrator: netip.MustParseAddr("10.80.0.10")}
	put := func(u bootmsg.Unique, seed []byte) string {
		root := t.TempDir()
		os.Mkdir(filepath.Join(root, "foothold"), 0o700)
		data, _ := json.Marshal(u)
		os.WriteFile(filepath.Join(root, bundle.UniquePath), data, 0o600)
		os.WriteFile(filepath.Join(root, bundle.PrivateKeyPath), seed, 0o600)
		return root
	}
	seed := bytes.Repeat([]byte{9}, ed25519.SeedSize)
	root := put(u, seed)
	held, err := os.Open(filepath.Join(root, bundle.PrivateKeyPath))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	i, err := readInstance(root)
	if err != nil || !i.key.Equal(ed25519.NewKeyFromSeed(bytes.Repeat([]byte{9}, ed25519.SeedSize))) {
		t.Fatalf("%v", err)
	}
	left := make([]byte, ed25519.SeedSize)
	if _, err := held.ReadAt(left, 0); err != nil || !bytes.Equal(left, make([]byte, ed25519.SeedSize)) {
		t.Error("the key's file is removed but not overwritten")
	}
	if _, err := readInstance(root); err == nil {
		t.Error("read a second time")
	}
	noT2 := u
	noT2.T2 = token.New(token.T1)
	for name, root := range map[string]string{"T1 for T2": put(noT2, seed), "short key": put(u, seed[1:]), "long key": put(u, append(seed, 1))} {
		if _, err := readInstance(root); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
