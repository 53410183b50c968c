package agent

import (
	"context"
	"crypto/ed25519"
	"crypto/subtle"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"foothold/protocol/event"
	"foothold/protocol/unlockmsg"

	"golang.org/x/crypto/ssh"
)

// Limits of the SSH server.
const (
	maxFailures   = 16               // connections that do not become the one login; then the VM ends
	maxConcurrent = 4                // connections at a time
	authTries     = 3                // attempts in one connection
	loginTime     = 20 * time.Second // from connection to login; a key exchange takes a second under TCG
)

var errSpent = errors.New("the login has been used")

// Door is an SSH server that lets one account in with one key, one time. Password,
// keyboard-interactive and none are not offered; shells, commands, forwarding and
// every subsystem but the unlock channel are refused. After the one login even the
// right key is refused; too many failures end the VM.
type Door struct {
	HostKey ed25519.PrivateKey // the VM's own
	Account string
	Key     []byte     // the one public key, SSH wire format
	From    netip.Addr // the one address that may connect; the packet filter says the same
	Say     func(string, ...any)

	spent    atomic.Bool
	failures atomic.Int32
}

// Serve waits on l for the one login, runs conversation over its unlock channel, and
// returns the conversation's result. Meanwhile and afterwards it answers everybody
// else with a refusal; it is over when the conversation is, when there were too many
// failures, or when ctx ends.
func (d *Door) Serve(ctx context.Context, l net.Listener, conversation func(context.Context, ssh.Channel) error) error {
	conf, err := d.config()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var open sync.WaitGroup
	defer open.Wait()
	defer cancel(context.Canceled)
	defer context.AfterFunc(ctx, func() { l.Close() })()
	defer l.Close()
	slots := make(chan struct{}, maxConcurrent)
	for {
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return ended(ctx)
		}
		raw, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return ended(ctx)
			}
			return event.Refuse(event.SSHFailed, "accept connections: %v", err)
		}
		if from, err := netip.ParseAddrPort(raw.RemoteAddr().String()); err != nil || from.Addr().Unmap() != d.From {
			raw.Close()
			<-slots
			continue
		}
		open.Go(func() {
			defer func() { <-slots }()
			defer raw.Close()
			in, err := d.login(ctx, raw, conf)
			if err != nil {
				if d.failures.Add(1) >= maxFailures {
					cancel(event.Refuse(event.SSHFailed, "%d failed logins", maxFailures))
				}
				return
			}
			d.Say("logged in")
			cancel(finished{in.run(ctx, conversation)})
		})
	}
}

// Failed is the number of connections so far that did not become the one login.
func (d *Door) Failed() int { return int(d.failures.Load()) }

// finished is the cause with which a conversation that ran ends the server.
type finished struct{ err error }

func (finished) Error() string { return "the conversation is over" }

func ended(ctx context.Context) error {
	if f, ok := errors.AsType[finished](context.Cause(ctx)); ok {
		return f.err
	}
	return context.Cause(ctx)
}

func (d *Door) config() (*ssh.ServerConfig, error) {
	if _, err := ssh.ParsePublicKey(d.Key); err != nil || d.Account == "" {
		return nil, event.Refuse(event.SSHFailed, "no key or account that could log in")
	}
	host, err := ssh.NewSignerFromKey(d.HostKey)
	if err != nil {
		return nil, fmt.Errorf("make host key: %w", err)
	}
	conf := &ssh.ServerConfig{
		ServerVersion: "SSH-2.0-foothold",
		MaxAuthTries:  authTries,
		PublicKeyCallback: func(meta ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			account := subtle.ConstantTimeCompare([]byte(meta.User()), []byte(d.Account))
			if account&subtle.ConstantTimeCompare(key.Marshal(), d.Key) != 1 || d.spent.Load() {
				return nil, errSpent
			}
			return &ssh.Permissions{}, nil
		},
		// Only here has the client shown that it holds the key; the swap makes the login single.
		VerifiedPublicKeyCallback: func(_ ssh.ConnMetadata, _ ssh.PublicKey, p *ssh.Permissions, _ string) (*ssh.Permissions, error) {
			if !d.spent.CompareAndSwap(false, true) {
				return nil, errSpent
			}
			return p, nil
		},
	}
	conf.KeyExchanges = []string{ssh.KeyExchangeMLKEM768X25519, ssh.KeyExchangeCurve25519}
	conf.Ciphers = []string{ssh.CipherAES256GCM, ssh.CipherChaCha20Poly1305}
	conf.AddHostKey(host)
	return conf, nil
}

// visitor is the one connection that logged in.
type visitor struct {
	conn     *ssh.ServerConn
	channels <-chan ssh.NewChannel
	requests <-chan *ssh.Request
}

func (d *Door) login(ctx context.Context, raw net.Conn, conf *ssh.ServerConfig) (*visitor, error) {
	defer context.AfterFunc(ctx, func() { raw.Close() })()
	if err := raw.SetDeadline(time.Now().Add(loginTime)); err != nil {
		return nil, err
	}
	v := &visitor{}
	var err error
	if v.conn, v.channels, v.requests, err = ssh.NewServerConn(raw, conf); err != nil {
		return nil, err
	}
	return v, raw.SetDeadline(time.Time{})
}

// run serves the one session of the connection. Ending the context closes it.
func (v *visitor) run(ctx context.Context, conversation func(context.Context, ssh.Channel) error) error {
	defer v.conn.Close()
	defer context.AfterFunc(ctx, func() { v.conn.Close() })()
	go ssh.DiscardRequests(v.requests)
	for request := range v.channels {
		if request.ChannelType() != "session" {
			_ = request.Reject(ssh.Prohibited, "refused")
			continue
		}
		channel, requests, err := request.Accept()
		if err != nil {
			return event.Refuse(event.SSHFailed, "open the session: %v", err)
		}
		go refuseChannels(v.channels)
		if !subsystem(requests) {
			channel.Close()
			return event.Refuse(event.SSHFailed, "the session does not ask for the unlock channel")
		}
		go ssh.DiscardRequests(requests)
		err = conversation(ctx, channel)
		channel.CloseWrite()
		channel.Close()
		v.drain()
		return err
	}
	return event.Refuse(event.SSHFailed, "the connection ended before a session began")
}

// drain gives the client a moment to read the last answer and hang up itself.
func (v *visitor) drain() {
	gone := make(chan struct{})
	go func() { _ = v.conn.Wait(); close(gone) }()
	select {
	case <-gone:
	case <-time.After(2 * time.Second):
	}
}

func refuseChannels(channels <-chan ssh.NewChannel) {
	for c := range channels {
		_ = c.Reject(ssh.Prohibited, "refused")
	}
}

// subsystem refuses requests until the one for the unlock channel comes; the client
// has as many tries as attempts to log in.
func subsystem(requests <-chan *ssh.Request) bool {
	for range authTries {
		r, ok := <-requests
		if !ok {
			return false
		}
		var name struct{ Name string }
		good := r.Type == "subsystem" && ssh.Unmarshal(r.Payload, &name) == nil && name.Name == unlockmsg.Subsystem
		_ = r.Reply(good, nil)
		if good {
			return true
		}
	}
	return false
}
