package unlock

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"foothold/internal/secret"
	"foothold/protocol/event"

	"golang.org/x/crypto/ssh"
)

// Stages of probing.
const (
	Before = "before" // the right login
	After  = "after"  // it, while its session is open
)

// Outcomes of a probe.
const (
	Refused  = "refused"  // the server said no
	Closed   = "closed"   // after the login: the server takes no further connection
	Accepted = "accepted" // the VM must not be unlocked
)

// Probe is one wrong credential and what the VM made of it.
type Probe struct {
	Stage   string        `json:"stage"`
	Kind    string        `json:"kind"`
	Outcome string        `json:"outcome"`
	Took    time.Duration `json:"took"`
}

const (
	// attemptTimeout bounds one connection with its handshake; generous, for emulated VMs.
	attemptTimeout = 10 * time.Second
	// maxAttempts bounds connections that break. The VM counts failed logins and
	// powers off after 16; the probes take 13.
	maxAttempts = 3
	// retryAfter is the pause before a broken connection is tried again.
	retryAfter = 200 * time.Millisecond
)

// trial is a kind of wrong credential.
type trial struct {
	kind string
	user string
	// methods are forced on the server in this order, whether it offers them or not;
	// the last one calls refused when the server has said no to it.
	methods func(refused func()) []ssh.AuthMethod
}

func (t Target) trials(stage string) ([]trial, error) {
	_, stranger, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	wrong, err := ssh.NewSignerFromKey(stranger)
	if err != nil {
		return nil, err
	}
	wrongKey := trial{"wrong key", t.Account, keys(wrong)}
	if stage == After {
		return []trial{{"right key again", t.Account, keys(t.Signer)}, wrongKey}, nil
	}
	return []trial{
		{"no credential", t.Account, nil},
		wrongKey,
		{"wrong user", otherUser(t.Account), keys(t.Signer)},
		{"password", t.Account, passwords},
	}, nil
}

func otherUser(account string) string {
	if account == "root" {
		return "admin"
	}
	return "root"
}

// keys and passwords are tried twice in name only: the method asks for the credential
// a second time exactly if the server has refused the first one, and then gets none.
// That tells a refusal from a connection that broke, which the client reports alike.
func keys(signer ssh.Signer) func(func()) []ssh.AuthMethod {
	return func(refused func()) []ssh.AuthMethod {
		asked := false
		return []ssh.AuthMethod{ssh.RetryableAuthMethod(ssh.PublicKeysCallback(func() ([]ssh.Signer, error) {
			if asked {
				refused()
				return nil, errRefused
			}
			asked = true
			return []ssh.Signer{signer}, nil
		}), 2)}
	}
}

func passwords(refused func()) []ssh.AuthMethod {
	asked := false
	guess := func() string { return string(secret.Random(16).Reveal()) }
	return []ssh.AuthMethod{
		ssh.KeyboardInteractive(func(_, _ string, questions []string, _ []bool) ([]string, error) {
			answers := make([]string, len(questions))
			for i := range answers {
				answers[i] = guess()
			}
			return answers, nil
		}),
		ssh.RetryableAuthMethod(ssh.PasswordCallback(func() (string, error) {
			if asked {
				refused()
				return "", errRefused
			}
			asked = true
			return guess(), nil
		}), 2),
	}
}

var (
	errRefused = errors.New("refused")
	errPartial = errors.New("accepted as one of several factors")
	errClosed  = errors.New("the VM takes no connection")
)

// probe tries every wrong credential of a stage, side by side to save round trips.
// Every outcome is recorded, in the stage's order.
func (t Target) probe(ctx context.Context, res *Result, stage string) error {
	trials, err := t.trials(stage)
	if err != nil {
		return event.Refuse(event.InternalError, "unlock: %v", err)
	}
	probes, failures := make([]Probe, len(trials)), make([]error, len(trials))
	var all sync.WaitGroup
	for i, tr := range trials {
		all.Go(func() {
			began := time.Now()
			var outcome string
			outcome, failures[i] = t.tryUntilClear(ctx, tr, stage)
			probes[i] = Probe{stage, tr.kind, outcome, time.Since(began)}
		})
	}
	all.Wait()
	for _, p := range probes {
		if p.Outcome != "" {
			res.Probes = append(res.Probes, p)
		}
	}
	for _, p := range probes {
		if p.Outcome == Accepted {
			return event.Refuse(event.ProbeAccepted, "the VM accepts a login with %s, %s the right one", p.Kind, stage)
		}
	}
	for _, err := range failures {
		if err != nil {
			return err
		}
	}
	return nil
}

// tryUntilClear repeats a probe whose connection breaks before the server has answered.
func (t Target) tryUntilClear(ctx context.Context, tr trial, stage string) (string, error) {
	for attempt := 1; ; attempt++ {
		err := t.try(ctx, tr)
		var refusal *event.Refusal
		switch {
		case err == nil, errors.Is(err, errPartial):
			return Accepted, nil
		case errors.Is(err, errRefused):
			return Refused, nil
		case errors.As(err, &refusal):
			return "", err
		case attempt < maxAttempts && ctx.Err() == nil:
			if err := pause(ctx, retryAfter); err != nil {
				return "", event.Refuse(event.SSHFailed, "probe with %s: %v", tr.kind, err)
			}
		case stage == After && errors.Is(err, errClosed):
			return Closed, nil
		default:
			return "", event.Refuse(event.SSHFailed, "probe with %s: the VM is not reachable: %v", tr.kind, err)
		}
	}
}

// try makes one connection. It returns nil if the VM let us in, errRefused if it said
// no, errClosed if it did not take the connection, and other errors if it broke.
func (t Target) try(ctx context.Context, tr trial) error {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	raw, err := t.Dial(ctx)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return errClosed
	}
	if err != nil {
		return err
	}
	defer raw.Close()
	defer context.AfterFunc(ctx, func() { raw.Close() })()

	config, host := t.config(tr.user)
	said := false
	var methods []ssh.AuthMethod
	if tr.methods != nil {
		methods = tr.methods(func() { said = true })
	}
	config.AuthCallback = func(c *ssh.ClientAuthContext) (ssh.AuthMethod, error) {
		// "none" was tried before the first call. Only a server's answer names methods.
		if len(c.PartialSuccessMethods) > 0 {
			return nil, errPartial
		}
		if len(methods) == 0 {
			if said || tr.methods == nil && len(c.AllowedMethods) > 0 {
				return nil, errRefused
			}
			return nil, errors.New("the connection broke before the VM answered")
		}
		next := methods[0]
		methods = methods[1:]
		return next, nil
	}
	client, chans, reqs, err := ssh.NewClientConn(raw, "", config)
	switch {
	case err == nil:
		go ssh.DiscardRequests(reqs)
		go refuseChannels(chans)
		client.Close()
		return nil
	case host.mismatch:
		return wrongHost()
	case said:
		return errRefused
	case !host.met && (errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET)):
		return errClosed
	}
	return err
}

// dial connects for the login, again and again until ctx ends.
func (t Target) dial(ctx context.Context) (net.Conn, error) {
	for {
		conn, err := t.Dial(ctx)
		if err == nil {
			return conn, nil
		}
		if pause(ctx, retryAfter) != nil {
			return nil, event.Refuse(event.SSHFailed, "the VM is not reachable: %v", err)
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Kinds lists what a complete result holds, in order, as STAGE/KIND.
func Kinds() []string {
	return []string{"before/no credential", "before/wrong key", "before/wrong user", "before/password", "after/right key again", "after/wrong key"}
}

// Complete reports whether every probe was made and refused.
func (r Result) Complete() bool {
	var got []string
	for _, p := range r.Probes {
		if p.Outcome != Refused && !(p.Stage == After && p.Outcome == Closed) {
			return false
		}
		got = append(got, p.Stage+"/"+p.Kind)
	}
	return slices.Equal(got, Kinds())
}
