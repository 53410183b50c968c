// Package unlock is the orchestrator's side of act 8: it tries a VM's SSH server with
// wrong credentials, logs in with the right ones, tries again, asks for the first
// audit, and hands the secrets over if the caller decides so.
//
//  1. before: wrong key, wrong user, password, no credential - each must be refused
//  2. login with this start's key; the host key must be the one in the quote
//  3. after: the right key a second time, a wrong key - each must be refused too
//  4. AuditRequest, AuditReply; the caller decides
//  5. Handover, HandoverReply
//
// The VM must allow three tries a connection and four connections at a time, and 13
// failed tries in all. One that accepts a single wrong credential gets nothing. A refusal counts only if the
// server said so: a connection that breaks is tried again and, in the end, an error,
// never a refusal. Every error is an event.Refusal.
package unlock

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/frame"
	"foothold/protocol/unlockmsg"

	"golang.org/x/crypto/ssh"
)

// maxRequest bounds a certificate request in bytes.
const maxRequest = 8192

// Target is the VM to unlock.
type Target struct {
	Dial    func(context.Context) (net.Conn, error) // to the VM's SSH port
	Account string                                  // the one that may log in
	Signer  ssh.Signer                              // the one key that may log in
	HostKey ed25519.PublicKey                       // the VM's key, as the quote admitted it
}

// Decide judges the first audit and returns what to hand over, or why nothing is. It is
// called once, after every probe was refused.
type Decide func(ctx context.Context, reply unlockmsg.AuditReply, nonce []byte) (unlockmsg.Handover, error)

// Result is what happened, for the journal; it is complete up to where an error ended
// the unlocking.
type Result struct {
	Probes     []Probe
	LoggedIn   time.Time
	Audited    time.Time // the reply arrived
	HandedOver time.Time // the VM confirmed
	Strangers  int       // failed logins that the VM counted beyond our own, all but for any of the last moment

	failed int // as the VM counted
}

// Run unlocks one VM. ctx carries the phase's deadline.
func Run(ctx context.Context, t Target, decide Decide) (Result, error) {
	var res Result
	if t.Dial == nil || t.Account == "" || t.Signer == nil || len(t.HostKey) != ed25519.PublicKeySize || decide == nil {
		return res, event.Refuse(event.InternalError, "unlock: incomplete target")
	}
	var dialled atomic.Int32
	dial := t.Dial
	t.Dial = func(ctx context.Context) (net.Conn, error) {
		c, err := dial(ctx)
		if err == nil {
			dialled.Add(1)
		}
		return c, err
	}
	if err := t.probe(ctx, &res, Before); err != nil {
		return res, err
	}
	conn, err := t.login(ctx)
	if err != nil {
		return res, err
	}
	defer conn.close()
	res.LoggedIn = time.Now()
	if err := t.probe(ctx, &res, After); err != nil {
		return res, err
	}
	err = conn.converse(ctx, &res, decide)
	res.Strangers = max(0, res.failed-int(dialled.Load()-1)) // one is the login
	return res, err
}

// session is the one login, with its one channel.
type session struct {
	client  ssh.Conn
	channel ssh.Channel
	stop    func() bool
}

func (s *session) close() {
	s.stop()
	s.client.Close()
}

// login opens the connection and the subsystem. Dialling is tried again; once the key
// was offered, nothing is, because the VM takes it once.
func (t Target) login(ctx context.Context) (*session, error) {
	config, host := t.config(t.Account)
	config.Auth = []ssh.AuthMethod{ssh.PublicKeys(t.Signer)}
	raw, err := t.dial(ctx)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	slow := time.AfterFunc(attemptTimeout, func() { raw.Close() })
	client, chans, reqs, err := ssh.NewClientConn(raw, "", config)
	if !slow.Stop() && err == nil {
		err = errors.New("it took too long")
	}
	if err != nil {
		stop()
		raw.Close()
		if host.mismatch {
			return nil, wrongHost()
		}
		return nil, event.Refuse(event.SSHFailed, "login with the VM's key: %v", err)
	}
	go ssh.DiscardRequests(reqs)
	go refuseChannels(chans)
	s := &session{client: client, stop: stop}
	channel, requests, err := client.OpenChannel("session", nil)
	if err != nil {
		s.close()
		return nil, event.Refuse(event.SSHFailed, "open session: %v", err)
	}
	go ssh.DiscardRequests(requests)
	s.channel = channel
	ok, err := channel.SendRequest("subsystem", true, ssh.Marshal(struct{ Name string }{unlockmsg.Subsystem}))
	if err != nil || !ok {
		s.close()
		return nil, event.Refuse(event.SSHFailed, "the VM does not offer the subsystem %s", unlockmsg.Subsystem)
	}
	return s, nil
}

// converse is steps 4 and 5.
func (s *session) converse(ctx context.Context, res *Result, decide Decide) error {
	nonce := make([]byte, evidence.NonceLen)
	rand.Read(nonce)
	if err := frame.Write(s.channel, unlockmsg.MaxFrame, unlockmsg.AuditRequest{Nonce: nonce}); err != nil {
		return event.Refuse(event.SSHFailed, "ask for the audit: %v", err)
	}
	var reply unlockmsg.AuditReply
	if err := frame.Read(s.channel, unlockmsg.MaxFrame, &reply); err != nil {
		return event.Refuse(event.SSHFailed, "read the audit: %v", err)
	}
	res.Audited = time.Now()
	if err := checkReply(reply, nonce); err != nil {
		return err
	}
	handover, err := decide(ctx, reply, nonce)
	if err != nil {
		return err
	}
	defer wipe(&handover)
	if err := frame.Write(s.channel, unlockmsg.MaxFrame, handover); err != nil {
		return event.Refuse(event.SSHFailed, "send the handover: %v", err)
	}
	var done unlockmsg.HandoverReply
	if err := frame.Read(s.channel, unlockmsg.MaxFrame, &done); err != nil {
		// The VM may have the secrets: the caller ends it.
		return event.Refuse(event.SSHFailed, "no confirmation of the handover: %v", err)
	}
	res.failed = done.FailedLogins
	if !done.OK {
		why := event.HandoverFailed
		if done.Reason == string(event.DiskRefused) { // which the VM alone can see, and it has passed its audit
			why = event.DiskRefused
		}
		return event.Refuse(why, "the VM says %.60q", done.Reason)
	}
	res.HandedOver = time.Now()
	return nil
}

func checkReply(reply unlockmsg.AuditReply, nonce []byte) error {
	switch {
	case subtle.ConstantTimeCompare(reply.Report.Nonce, nonce) != 1:
		return event.Refuse(event.AuditFailed, "the audit does not answer this request")
	case len(reply.WireGuardKey) != 32:
		return event.Refuse(event.AuditFailed, "the VM's WireGuard key has %d bytes, want 32", len(reply.WireGuardKey))
	case len(reply.Request) == 0 || len(reply.Request) > maxRequest:
		return event.Refuse(event.AuditFailed, "the VM's certificate request has %d bytes, want 1 to %d", len(reply.Request), maxRequest)
	}
	return nil
}

// wipe erases our copy; the encoder's and the SSH transport's are the collector's.
func wipe(h *unlockmsg.Handover) {
	h.Template.Passphrase.Wipe()
	h.Volume.Passphrase.Wipe()
	h.Password.Wipe()
}

func refuseChannels(chans <-chan ssh.NewChannel) {
	for c := range chans {
		c.Reject(ssh.Prohibited, "")
	}
}

func wrongHost() error {
	return event.Refuse(event.HostKeyMismatch, "the SSH server's key is not the one that the quote admitted")
}

// host remembers what the server's host key was.
type host struct{ met, mismatch bool }

// config accepts the VM's host key alone and present-day algorithms.
func (t Target) config(user string) (*ssh.ClientConfig, *host) {
	h := &host{}
	return &ssh.ClientConfig{
		Config: ssh.Config{
			KeyExchanges: []string{ssh.KeyExchangeMLKEM768X25519, ssh.KeyExchangeCurve25519},
			Ciphers:      []string{ssh.CipherAES256GCM, ssh.CipherChaCha20Poly1305, ssh.CipherAES128GCM},
		},
		User:              user,
		HostKeyAlgorithms: []string{ssh.KeyAlgoED25519},
		HostKeyCallback: func(_ string, _ net.Addr, key ssh.PublicKey) error {
			want, err := ssh.NewPublicKey(t.HostKey)
			if err != nil || subtle.ConstantTimeCompare(key.Marshal(), want.Marshal()) != 1 {
				h.mismatch = true
				return fmt.Errorf("host key differs")
			}
			h.met = true
			return nil
		},
	}, h
}
