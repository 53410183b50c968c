package unlock

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"foothold/internal/secret"
	"foothold/protocol/audit"
	"foothold/protocol/event"
	"foothold/protocol/frame"
	"foothold/protocol/unlockmsg"

	"golang.org/x/crypto/ssh"
)

const account = "unlock-7f3a"

// vm is a VM's SSH server as it should be; the hooks make it wrong.
type vm struct {
	t        *testing.T
	listener net.Listener
	hostKey  ed25519.PrivateKey
	right    ssh.PublicKey

	configure func(*ssh.ServerConfig)                   // after the right configuration was set
	takeConn  func(n int) bool                          // false: the n-th connection, from 1, is closed at once
	onKey     func(user string, key ssh.PublicKey) bool // true: ends the connection instead of answering
	reply     func(unlockmsg.AuditReply) unlockmsg.AuditReply
	answer    unlockmsg.HandoverReply
	keepOpen  bool // take the right key again and again

	mu       sync.Mutex
	conns    int
	logins   int
	failures int
	received []unlockmsg.Handover
	requests int
}

func newVM(t *testing.T) (*vm, Target) {
	t.Helper()
	_, hostKey, _ := ed25519.GenerateKey(rand.Reader)
	_, client, _ := ed25519.GenerateKey(rand.Reader)
	signer, err := ssh.NewSignerFromKey(client)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	v := &vm{t: t, listener: l, hostKey: hostKey, right: signer.PublicKey(), answer: unlockmsg.HandoverReply{OK: true}}
	t.Cleanup(func() { l.Close() })
	return v, Target{
		Dial: func(ctx context.Context) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
		},
		Account: account, Signer: signer, HostKey: hostKey.Public().(ed25519.PublicKey),
	}
}

func (v *vm) serve() {
	for {
		conn, err := v.listener.Accept()
		if err != nil {
			return
		}
		v.mu.Lock()
		v.conns++
		n := v.conns
		v.mu.Unlock()
		if v.takeConn != nil && !v.takeConn(n) {
			conn.Close()
			continue
		}
		go v.handle(conn)
	}
}

func (v *vm) handle(conn net.Conn) {
	defer conn.Close()
	config := &ssh.ServerConfig{
		PublicKeyCallback: func(c ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
			if v.onKey != nil && v.onKey(c.User(), key) {
				conn.Close()
			}
			v.mu.Lock()
			defer v.mu.Unlock()
			if c.User() == account && bytes.Equal(key.Marshal(), v.right.Marshal()) && (v.logins == 0 || v.keepOpen) {
				return nil, nil
			}
			return nil, errors.New("no")
		},
		AuthLogCallback: func(_ ssh.ConnMetadata, _ string, err error) {
			v.mu.Lock()
			defer v.mu.Unlock()
			if err != nil {
				v.failures++
			}
		},
	}
	signer, _ := ssh.NewSignerFromKey(v.hostKey)
	config.AddHostKey(signer)
	if v.configure != nil {
		v.configure(config)
	}
	sc, chans, reqs, err := ssh.NewServerConn(conn, config)
	if err != nil {
		return
	}
	v.mu.Lock()
	v.logins++
	v.mu.Unlock()
	go ssh.DiscardRequests(reqs)
	for nc := range chans {
		ch, creqs, err := nc.Accept()
		if err != nil {
			return
		}
		go func() {
			for r := range creqs {
				r.Reply(r.Type == "subsystem", nil)
			}
		}()
		go func() { v.converse(ch); sc.Close() }()
	}
}

func (v *vm) converse(ch ssh.Channel) {
	var ask unlockmsg.AuditRequest
	if frame.Read(ch, unlockmsg.MaxFrame, &ask) != nil {
		return
	}
	v.mu.Lock()
	v.requests++
	v.mu.Unlock()
	reply := unlockmsg.AuditReply{Report: audit.Report{Nonce: ask.Nonce}, Request: []byte("request"), WireGuardKey: make([]byte, 32)}
	if v.reply != nil {
		reply = v.reply(reply)
	}
	if frame.Write(ch, unlockmsg.MaxFrame, reply) != nil {
		return
	}
	var h unlockmsg.Handover
	if frame.Read(ch, unlockmsg.MaxFrame, &h) != nil {
		return
	}
	v.mu.Lock()
	v.received = append(v.received, h)
	v.mu.Unlock()
	frame.Write(ch, unlockmsg.MaxFrame, v.answer)
}

func handOver(context.Context, unlockmsg.AuditReply, []byte) (unlockmsg.Handover, error) {
	return unlockmsg.Handover{User: "vm", Password: secret.New([]byte("handed over"))}, nil
}

func (v *vm) run(target Target, decide Decide) (Result, error) {
	go v.serve()
	ctx, cancel := context.WithTimeout(v.t.Context(), 20*time.Second)
	defer cancel()
	return Run(ctx, target, decide)
}

func TestUnlock(t *testing.T) {
	v, target := newVM(t)
	res, err := v.run(target, handOver)
	if err != nil {
		t.Fatal(err)
	}
	if !res.Complete() || res.HandedOver.IsZero() {
		t.Errorf("result %+v", res)
	}
	if len(v.received) != 1 || string(v.received[0].Password.Reveal()) != "handed over" {
		t.Errorf("the VM received %d handovers", len(v.received))
	}
	// A VM powers off at 16.
	if v.failures > 13 {
		t.Errorf("the probes cost %d failed attempts, want at most 13", v.failures)
	}
	for _, p := range res.Probes {
		if p.Outcome != Refused {
			t.Errorf("probe %+v, want refused", p)
		}
	}
}

// TestFailedLoginsOfStrangers: what the VM counts beyond our own probes is somebody else's.
func TestFailedLoginsOfStrangers(t *testing.T) {
	for counted, want := range map[int]int{0: 0, len(Kinds()): 0, len(Kinds()) + 2: 2, -1: 0} {
		v, target := newVM(t)
		v.answer.FailedLogins = counted
		if res, err := v.run(target, handOver); err != nil || res.Strangers != want {
			t.Errorf("the VM counts %d: %d of strangers, %v; want %d", counted, res.Strangers, err, want)
		}
	}
}

// A VM with one weakness is not unlocked, whichever it is.
func TestWeakVMs(t *testing.T) {
	allow := func(ssh.ConnMetadata) (*ssh.Permissions, error) { return nil, nil }
	for kind, c := range map[string]struct {
		weaken func(*vm)
		probe  string // that finds it
	}{
		"no credential": {func(v *vm) {
			v.configure = func(s *ssh.ServerConfig) { s.NoClientAuth, s.NoClientAuthCallback = true, allow }
		}, "no credential"},
		"any key": {func(v *vm) {
			v.configure = func(s *ssh.ServerConfig) {
				s.PublicKeyCallback = func(ssh.ConnMetadata, ssh.PublicKey) (*ssh.Permissions, error) { return nil, nil }
			}
		}, "wrong key"},
		"any user": {func(v *vm) {
			v.configure = func(s *ssh.ServerConfig) {
				s.PublicKeyCallback = func(_ ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
					if bytes.Equal(key.Marshal(), v.right.Marshal()) {
						return nil, nil
					}
					return nil, errors.New("no")
				}
			}
		}, "wrong user"},
		"password": {func(v *vm) {
			v.configure = func(s *ssh.ServerConfig) {
				s.PasswordCallback = func(ssh.ConnMetadata, []byte) (*ssh.Permissions, error) { return nil, nil }
			}
		}, "password"},
		"keyboard-interactive": {func(v *vm) {
			v.configure = func(s *ssh.ServerConfig) {
				s.KeyboardInteractiveCallback = func(_ ssh.ConnMetadata, ask ssh.KeyboardInteractiveChallenge) (*ssh.Permissions, error) {
					_, err := ask("", "", []string{"Password: "}, []bool{false})
					return nil, err
				}
			}
		}, "password"},
		"password as second factor": {func(v *vm) {
			v.configure = func(s *ssh.ServerConfig) {
				s.PasswordCallback = func(ssh.ConnMetadata, []byte) (*ssh.Permissions, error) {
					return nil, &ssh.PartialSuccessError{Next: ssh.ServerAuthCallbacks{PublicKeyCallback: s.PublicKeyCallback}}
				}
			}
		}, "password"},
		"the right key twice": {func(v *vm) { v.keepOpen = true }, "right key again"},
		"any key once somebody is in": {func(v *vm) {
			v.configure = func(s *ssh.ServerConfig) {
				strict := s.PublicKeyCallback
				s.PublicKeyCallback = func(c ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
					v.mu.Lock()
					open := v.logins > 0 && !bytes.Equal(key.Marshal(), v.right.Marshal())
					v.mu.Unlock()
					if open {
						return nil, nil
					}
					return strict(c, key)
				}
			}
		}, "wrong key"},
	} {
		t.Run(kind, func(t *testing.T) {
			v, target := newVM(t)
			c.weaken(v)
			res, err := v.run(target, handOver)
			if event.ReasonOf(err) != event.ProbeAccepted {
				t.Fatalf("got %v, want %s", err, event.ProbeAccepted)
			}
			if len(v.received) != 0 {
				t.Fatal("secrets were handed over")
			}
			found := slices.ContainsFunc(res.Probes, func(p Probe) bool { return p.Kind == c.probe && p.Outcome == Accepted })
			if !found || res.Complete() {
				t.Errorf("found by %+v, want %q", res.Probes, c.probe)
			}
		})
	}
}

// A connection that breaks is no refusal.
func TestBrokenConnections(t *testing.T) {
	t.Run("during every wrong key", func(t *testing.T) {
		v, target := newVM(t)
		v.onKey = func(string, ssh.PublicKey) bool { return true }
		res, err := v.run(target, handOver)
		if event.ReasonOf(err) != event.SSHFailed || len(v.received) != 0 || res.Complete() {
			t.Errorf("got %+v, %v", res, err)
		}
	})
	t.Run("once, then all is well", func(t *testing.T) {
		v, target := newVM(t)
		v.takeConn = func(n int) bool { return n != 2 }
		if res, err := v.run(target, handOver); err != nil || !res.Complete() {
			t.Errorf("got %+v, %v", res, err)
		}
	})
	t.Run("nobody listens", func(t *testing.T) {
		v, target := newVM(t)
		v.listener.Close()
		if res, err := v.run(target, handOver); event.ReasonOf(err) != event.SSHFailed || len(res.Probes) != 0 {
			t.Errorf("got %+v, %v", res, err)
		}
	})
	t.Run("after the login the VM takes no connection", func(t *testing.T) {
		v, target := newVM(t)
		v.takeConn = func(n int) bool { return n <= 5 }
		res, err := v.run(target, handOver)
		if err != nil || !res.Complete() || res.Probes[4].Outcome != Closed {
			t.Errorf("got %+v, %v", res, err)
		}
	})
	t.Run("the caller gives up", func(t *testing.T) {
		v, target := newVM(t)
		target.Dial = func(ctx context.Context) (net.Conn, error) { <-ctx.Done(); return nil, ctx.Err() }
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, err := Run(ctx, target, handOver); event.ReasonOf(err) != event.SSHFailed {
			t.Errorf("got %v", err)
		}
		_ = v
	})
}

// A VM must allow three tries a connection. One that disconnects earlier is reported as
// what it is: it neither accepted nor refused.
func TestTriesAConnection(t *testing.T) {
	for tries, want := range map[int]event.Reason{1: event.SSHFailed, 2: event.SSHFailed, 3: ""} {
		v, target := newVM(t)
		v.configure = func(s *ssh.ServerConfig) { s.MaxAuthTries = tries }
		res, err := v.run(target, handOver)
		if event.ReasonOf(err) != want || res.Complete() != (want == "") {
			t.Errorf("%d tries: %+v, %v", tries, res, err)
		}
	}
}

func TestWrongHostKey(t *testing.T) {
	v, target := newVM(t)
	_, v.hostKey, _ = ed25519.GenerateKey(rand.Reader)
	if _, err := v.run(target, handOver); event.ReasonOf(err) != event.HostKeyMismatch {
		t.Errorf("got %v, want %s", err, event.HostKeyMismatch)
	}
}

func TestConversation(t *testing.T) {
	for what, c := range map[string]struct {
		prepare func(*vm)
		decide  Decide
		want    event.Reason
	}{
		"audit of another request": {func(v *vm) {
			v.reply = func(r unlockmsg.AuditReply) unlockmsg.AuditReply { r.Report.Nonce = make([]byte, 32); return r }
		}, handOver, event.AuditFailed},
		"no WireGuard key": {func(v *vm) {
			v.reply = func(r unlockmsg.AuditReply) unlockmsg.AuditReply { r.WireGuardKey = nil; return r }
		}, handOver, event.AuditFailed},
		"no request": {func(v *vm) {
			v.reply = func(r unlockmsg.AuditReply) unlockmsg.AuditReply { r.Request = nil; return r }
		}, handOver, event.AuditFailed},
		"the caller refuses": {func(*vm) {}, func(context.Context, unlockmsg.AuditReply, []byte) (unlockmsg.Handover, error) {
			return unlockmsg.Handover{}, event.Refuse(event.QuoteRefused, "test")
		}, event.QuoteRefused},
		"the VM refuses a disk":              {func(v *vm) { v.answer = unlockmsg.HandoverReply{Reason: "disk-refused"} }, handOver, event.DiskRefused},
		"the VM refuses the rest":            {func(v *vm) { v.answer = unlockmsg.HandoverReply{Reason: "handover-failed"} }, handOver, event.HandoverFailed},
		"the VM refuses for what it may not": {func(v *vm) { v.answer = unlockmsg.HandoverReply{Reason: "released"} }, handOver, event.HandoverFailed},
	} {
		t.Run(what, func(t *testing.T) {
			v, target := newVM(t)
			c.prepare(v)
			res, err := v.run(target, c.decide)
			if event.ReasonOf(err) != c.want || !res.HandedOver.IsZero() {
				t.Errorf("got %v, want %s", err, c.want)
			}
			if !strings.HasPrefix(what, "the VM refuses") && len(v.received) != 0 {
				t.Error("secrets were handed over")
			}
		})
	}
}

func TestIncompleteTarget(t *testing.T) {
	_, target := newVM(t)
	for what, change := range map[string]func(*Target){
		"dial":     func(t *Target) { t.Dial = nil },
		"account":  func(t *Target) { t.Account = "" },
		"signer":   func(t *Target) { t.Signer = nil },
		"host key": func(t *Target) { t.HostKey = nil },
	} {
		bad := target
		change(&bad)
		if _, err := Run(t.Context(), bad, handOver); err == nil {
			t.Errorf("no %s: accepted", what)
		}
	}
	if _, err := Run(t.Context(), target, nil); err == nil {
		t.Error("no decision: accepted")
	}
}

func TestCompleteWantsEveryProbe(t *testing.T) {
	v, target := newVM(t)
	res, err := v.run(target, handOver)
	if err != nil {
		t.Fatal(err)
	}
	for i := range res.Probes {
		less := Result{Probes: slices.Delete(slices.Clone(res.Probes), i, i+1)}
		if less.Complete() {
			t.Errorf("complete without %+v", res.Probes[i])
		}
	}
}
