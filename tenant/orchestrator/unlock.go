package orchestrator

import (
	"context"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"time"

	"foothold/internal/luks"
	"foothold/internal/secret"
	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/token"
	"foothold/protocol/unlockmsg"
	"foothold/protocol/vmcert"
	"foothold/protocol/zone"
	"foothold/tenant/expect"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
	"foothold/tenant/unlock"
	"foothold/tenant/verify"

	"golang.org/x/crypto/ssh"
)

const (
	sshPort = 22
	// certificateLife bounds a VM's certificate; revocation is by the ledger, at once.
	certificateLife = 24 * time.Hour
	passphraseLen   = 32 // bytes: needs no stretching
	passwordLen     = 32
)

// unlock is act 8. It ends with the secrets in the VM's memory and the VM connecting.
func (o *Orchestrator) unlock(ctx context.Context, id string) error {
	r, s, err := o.row(ctx, id)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, r.Deadline.Sub(o.now()))
	defer cancel()
	// 1. The way is opened, the host quoted again and the headers made, all at once:
	// none releases anything.
	if err := o.publish(ctx); err != nil {
		return err
	}
	headers := o.prepareHeaders(ctx, r)
	defer headers.discard()
	admitted, err := o.attestAgain(ctx, id, evidence.RoleUnlock)
	if err != nil {
		return err
	}
	if err := o.waitLive(ctx, zone.External, zone.Internal); err != nil {
		return err
	}
	// 2. Probes, login, audit, handover.
	key, err := o.loginKey(id, r.Start)
	if err != nil {
		return err
	}
	target := unlock.Target{Account: s.Account, Signer: key, HostKey: s.VMKey, Dial: o.dialVM(r.Address)}
	result, err := unlock.Run(ctx, target, func(ctx context.Context, reply unlockmsg.AuditReply, nonce []byte) (unlockmsg.Handover, error) {
		return o.decideHandover(ctx, admitted, r, s, reply, nonce, headers)
	})
	o.journalProbes(context.WithoutCancel(ctx), id, result)
	if err != nil {
		return err
	}
	if !result.Complete() {
		return event.Refuse(event.ProbeAccepted, "not every probe was made and refused")
	}
	// 3. The VM confirmed: its disks are open. A crash before this leaves it unlocking,
	// and recovery ends it.
	return o.unlocked(ctx, r)
}

func (o *Orchestrator) unlocked(ctx context.Context, r ledger.Reservation) error {
	err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		return errors.Join(
			t.Move(r.ID, r.Start, reservation.Unlocking, reservation.Connecting, t.Now.Add(o.limits.Connecting)),
			t.SetFormatted(r.ID),
			t.Journal(event.Event{Kind: "secrets.handed-over", Reservation: r.ID}))
	})
	if err != nil {
		return err
	}
	o.zones.journalled()
	return o.publish(ctx)
}

func (o *Orchestrator) dialVM(a netip.Addr) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		return o.dial(ctx, "tcp", netip.AddrPortFrom(a, sshPort).String())
	}
}

// decideHandover judges the audit; if nothing is too much, it issues the certificate
// and releases the secrets. What was issued is in the ledger before it is sent.
func (o *Orchestrator) decideHandover(ctx context.Context, admitted *verify.Admitted, r ledger.Reservation, s ledger.Start,
	reply unlockmsg.AuditReply, nonce []byte, headers *diskHeaders) (unlockmsg.Handover, error) {
	tpl, err := o.templateOf(ctx, r)
	if err != nil {
		return unlockmsg.Handover{}, err
	}
	expected, err := expect.Parse(tpl.Audit)
	if err != nil {
		return unlockmsg.Handover{}, err
	}
	if err := expect.Err(expect.Initramfs(expected, o.instance(r, s, tpl, nonce), reply.Report)); err != nil {
		return unlockmsg.Handover{}, err
	}
	o.journal(ctx, event.Event{Kind: "audit.passed", Reservation: r.ID, Detail: map[string]string{"stage": reply.Report.Stage}})
	cert, serial, err := o.releaseCertificate(ctx, admitted, r, reply)
	if err != nil {
		return unlockmsg.Handover{}, err
	}
	headers.authenticated = expected.AuthenticatedVolume
	return o.releaseSecrets(ctx, admitted, r, tpl, headers, issued{cert, serial, reply.WireGuardKey})
}

// instance is what the tenant knows of one start, for judging audits.
func (o *Orchestrator) instance(r ledger.Reservation, s ledger.Start, tpl ledger.Template, nonce []byte) expect.Instance {
	i := expect.Instance{
		Name: r.Name, Nonce: nonce, Cmdline: s.Cmdline, Network: s.Spec.Network, BootServer: o.conf.Boot.Address.Addr(),
		Orchestrator: o.conf.Network.Self, Gateway: o.conf.Gateway.Admission.Addr(), TemplateSize: tpl.Size,
		VolumeSize: int64(s.Spec.Volume.SizeMiB) << 20, RootHash: tpl.RootHash,
		Tunnel: s.TunnelAddress, TunnelPrefix: o.conf.Gateway.Pool,
	}
	if r.Workload != nil && r.Phase == reservation.Computing {
		i.Workload = expectedWorkload(r.Workload)
		for _, w := range s.Former {
			i.Former = append(i.Former, expectedWorkload(&w))
		}
	}
	return i
}

func expectedWorkload(w *api.Workload) *expect.Workload {
	e := &expect.Workload{Port: w.Port}
	if w.Kind == "executable" {
		e.SHA256 = w.SHA256
	}
	return e
}

// releaseCertificate issues the VM's certificate: for the key that the VM made, naming
// VM, address and WireGuard key.
func (o *Orchestrator) releaseCertificate(ctx context.Context, admitted *verify.Admitted, r ledger.Reservation, reply unlockmsg.AuditReply) (der []byte, serial string, err error) {
	err = o.ledger.Write(ctx, func(t *ledger.Tx) error {
		if _, err := o.permitted(t, admitted, r, reservation.Unlocking); err != nil {
			return err
		}
		info := vmcert.Info{Reservation: r.ID, Start: r.Start, Address: r.Address, WireGuardKey: reply.WireGuardKey}
		if der, serial, err = o.ca.IssueVM(info, reply.Request, certificateLife); err != nil {
			return event.Refuse(event.CertificateInvalid, "%v", err)
		}
		return errors.Join(
			t.AddCertificate(ledger.Certificate{Serial: serial, Reservation: r.ID, Start: r.Start, DER: der, Expires: t.Now.Add(certificateLife)}),
			t.Journal(event.Event{Kind: "certificate.issued", Reservation: r.ID, Detail: map[string]string{"serial": serial, "sha256": digest.Of(der).String()}}))
	})
	return der, serial, err
}

type issued struct {
	der          []byte
	serial       string
	wireGuardKey []byte
}

// releaseSecrets makes the handover: headers and passphrases, T3, user and password,
// certificate. Of T3 and the password only digests are stored.
func (o *Orchestrator) releaseSecrets(ctx context.Context, admitted *verify.Admitted, r ledger.Reservation, tpl ledger.Template,
	headers *diskHeaders, c issued) (unlockmsg.Handover, error) {
	if err := headers.wait(ctx); err != nil {
		return unlockmsg.Handover{}, err
	}
	t3, user, password := token.New(token.T3), newUser(), secret.Random(passwordLen)
	err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		if _, err := o.permitted(t, admitted, r, reservation.Unlocking); err != nil {
			return err
		}
		return errors.Join(
			t.ChangeStart(r.ID, r.Start, func(s *ledger.Start) {
				s.User, s.PasswordHash, s.Serial, s.WireGuardKey = user, digest.Of(password.Reveal()), c.serial, c.wireGuardKey
			}),
			t.AddToken(ledger.Token{Digest: t3.Digest(), Kind: token.T3, Reservation: r.ID, Start: r.Start, Phase: reservation.Connecting, Source: r.Address}),
			t.Journal(event.Event{Kind: "secrets.released", Reservation: r.ID, Detail: map[string]string{
				"verdict": admitted.Verdict().String(), "template-header": digest.Of(headers.template).String(), "volume-header": digest.Of(headers.volume).String()}}))
	})
	if err != nil {
		return unlockmsg.Handover{}, err
	}
	return unlockmsg.Handover{
		Template: unlockmsg.Disk{Device: "vda", Header: headers.template, Passphrase: headers.take(&headers.templatePass)},
		Verity:   unlockmsg.Verity{RootHash: tpl.RootHash, HashOffset: tpl.HashOffset},
		Volume: unlockmsg.Disk{Device: "vdb", Header: headers.volume, Passphrase: headers.take(&headers.volumePass), Format: !r.Formatted,
			Authenticated: headers.authenticated},
		T3: t3, User: user, Password: password, Certificate: c.der,
		Gateway: unlockmsg.Gateway{Address: o.conf.Gateway.Admission, ServerName: o.conf.Gateway.ServerName, CA: o.ground.gatewayCA},
	}, nil
}

func newUser() string {
	b := make([]byte, 8)
	rand.Read(b)
	return "vm-" + hex.EncodeToString(b)
}

// loginKey derives this start's SSH key from the vault's root, so that it is nowhere
// stored and a restarted orchestrator has it again.
func (o *Orchestrator) loginKey(id string, start int) (ssh.Signer, error) {
	root, err := o.vault.Get(loginRoot)
	if err != nil {
		return nil, fmt.Errorf("read login root: %w", err)
	}
	defer root.Wipe()
	key, err := LoginKey(root, o.zones.epoch, id, start)
	if err != nil {
		return nil, err
	}
	return ssh.NewSignerFromKey(key)
}

// LoginKey is the key that may log in at one start of a VM, derived from the vault's root
// by HKDF-SHA-256 (RFC 5869), no salt. The epoch is in it: a ledger that was put back may
// count a start that there was before.
func LoginKey(root secret.Bytes, epoch int64, id string, start int) (ed25519.PrivateKey, error) {
	seed, err := hkdf.Key(sha256.New, root.Reveal(), nil, fmt.Sprintf("foothold/login-key/v2 %d %s %d", epoch, id, start), ed25519.SeedSize)
	if err != nil {
		return nil, fmt.Errorf("derive login key: %w", err)
	}
	defer clear(seed)
	return ed25519.NewKeyFromSeed(seed), nil
}

func (o *Orchestrator) journalProbes(ctx context.Context, id string, res unlock.Result) {
	detail := map[string]string{}
	for _, p := range res.Probes {
		detail[p.Stage+"/"+p.Kind] = p.Outcome
	}
	o.journal(ctx, event.Event{Kind: "vm.probed", Reservation: id, Detail: detail})
	if res.Strangers > 0 {
		o.journal(ctx, event.Event{Kind: "login.refused", Reservation: id, Reason: event.SSHFailed,
			Detail: map[string]string{"count": strconv.Itoa(res.Strangers), "detail": "the VM counts failed logins that were not the orchestrator's: somebody uses its address"}})
	}
}

// diskHeaders are fresh headers around the two volume keys, with fresh passphrases:
// made while the probes run, released or discarded.
type diskHeaders struct {
	done                     chan struct{}
	err                      error // the following are set when done is closed
	template, volume         []byte
	templatePass, volumePass secret.Bytes
	authenticated            bool // the template's policy for the volume
}

func (o *Orchestrator) prepareHeaders(ctx context.Context, r ledger.Reservation) *diskHeaders {
	h := &diskHeaders{done: make(chan struct{})}
	o.task(func() {
		defer close(h.done)
		h.err = o.makeHeaders(ctx, r, h)
	})
	return h
}

func (o *Orchestrator) makeHeaders(ctx context.Context, r ledger.Reservation, h *diskHeaders) error {
	_, s, err := o.row(ctx, r.ID)
	if err != nil {
		return err
	}
	tpl, err := o.templateOf(ctx, r)
	if err != nil {
		return err
	}
	h.templatePass, h.volumePass = secret.Random(passphraseLen), secret.Random(passphraseLen)
	if h.template, err = o.makeHeader(ctx, templateKeyName(tpl), tpl.Size, h.templatePass); err != nil {
		return err
	}
	h.volume, err = o.makeHeader(ctx, volumeKeyName(r.Volume), int64(s.Spec.Volume.SizeMiB)<<20, h.volumePass)
	return err
}

func (o *Orchestrator) makeHeader(ctx context.Context, keyName string, size int64, pass secret.Bytes) ([]byte, error) {
	key, err := o.vault.Get(keyName)
	if err != nil {
		return nil, fmt.Errorf("read disk key: %w", err)
	}
	defer key.Wipe()
	return luks.Header(ctx, size, key, pass)
}

func (h *diskHeaders) wait(ctx context.Context) error {
	select {
	case <-h.done:
		return h.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// take hands a passphrase to the handover, which wipes it.
func (h *diskHeaders) take(p *secret.Bytes) secret.Bytes {
	v := *p
	*p = secret.Bytes{}
	return v
}

// discard wipes what was not handed over.
func (h *diskHeaders) discard() {
	<-h.done
	h.templatePass.Wipe()
	h.volumePass.Wipe()
}
