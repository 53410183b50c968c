package agent

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"foothold/protocol/event"
	"foothold/protocol/unlockmsg"

	"golang.org/x/crypto/ssh"
)

// house is a door that is being served.
type house struct {
	t       *testing.T
	door    *Door
	addr    string
	signer  ssh.Signer
	result  chan error
	visited chan struct{}
	leave   chan struct{} // the conversation lasts until it is closed
}

func newSigner(t *testing.T) ssh.Signer {
	t.Helper()
	_, key, _ := ed25519.GenerateKey(rand.Reader)
	s, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newHouse(t *testing.T, from string) *house {
	t.Helper()
	_, host, _ := ed25519.GenerateKey(rand.Reader)
	h := &house{t: t, signer: newSigner(t), result: make(chan error, 1), visited: make(chan struct{}, 1), leave: make(chan struct{})}
	h.door = &Door{HostKey: host, Account: "fh-1234", Key: h.signer.PublicKey().Marshal(), From: netip.MustParseAddr(from), Say: t.Logf}
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h.addr = l.Addr().String()
	go func() {
		h.result <- h.door.Serve(t.Context(), l, func(ctx context.Context, c ssh.Channel) error {
			h.visited <- struct{}{}
			select {
			case <-h.leave:
			case <-ctx.Done():
			}
			_, err := io.WriteString(c, "goodbye")
			return err
		})
	}()
	return h
}

// dial logs in with methods forced on the server.
func (h *house) dial(user string, methods ...ssh.AuthMethod) (*ssh.Client, error) {
	return ssh.Dial("tcp", h.addr, &ssh.ClientConfig{User: user, Auth: methods, Timeout: 10 * time.Second,
		HostKeyCallback: ssh.FixedHostKey(h.hostKey())})
}

func (h *house) hostKey() ssh.PublicKey {
	k, err := ssh.NewPublicKey(h.door.HostKey.Public())
	if err != nil {
		h.t.Fatal(err)
	}
	return k
}

func (h *house) right() (*ssh.Client, error) { return h.dial("fh-1234", ssh.PublicKeys(h.signer)) }

// enter opens the unlock channel.
func enter(t *testing.T, c *ssh.Client) (*ssh.Session, io.Reader) {
	t.Helper()
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	out, _ := s.StdoutPipe()
	if err := s.RequestSubsystem(unlockmsg.Subsystem); err != nil {
		t.Fatal(err)
	}
	return s, out
}

func TestOnlyTheOneLoginIsAccepted(t *testing.T) {
	h := newHouse(t, "127.0.0.1")
	wrong := func(stage string) {
		t.Helper()
		for name, try := range map[string]func() (*ssh.Client, error){
			"wrong key":  func() (*ssh.Client, error) { return h.dial("fh-1234", ssh.PublicKeys(newSigner(t))) },
			"wrong user": func() (*ssh.Client, error) { return h.dial("root", ssh.PublicKeys(h.signer)) },
			"password":   func() (*ssh.Client, error) { return h.dial("fh-1234", ssh.Password("x")) },
			"keyboard-interactive": func() (*ssh.Client, error) {
				return h.dial("fh-1234", ssh.KeyboardInteractive(func(_, _ string, q []string, _ []bool) ([]string, error) { return make([]string, len(q)), nil }))
			},
			"none": func() (*ssh.Client, error) { return h.dial("fh-1234") },
		} {
			c, err := try()
			if err == nil {
				c.Close()
				t.Errorf("%s: %s is accepted", stage, name)
			} else if !strings.Contains(err.Error(), "unable to authenticate") {
				t.Errorf("%s: %s: %v", stage, name, err)
			}
		}
	}
	wrong("before")
	c, err := h.right()
	if err != nil {
		t.Fatal(err)
	}
	_, out := enter(t, c)
	<-h.visited
	wrong("during")
	if again, err := h.right(); err == nil {
		again.Close()
		t.Error("the right key is accepted a second time")
	}
	close(h.leave)
	if text, _ := io.ReadAll(out); string(text) != "goodbye" {
		t.Errorf("the last answer is lost: %q", text)
	}
	c.Close()
	if err := <-h.result; err != nil {
		t.Error(err)
	}
	if c, err := net.Dial("tcp", h.addr); err == nil {
		c.Close()
		t.Error("the port is open after the conversation")
	}
}

func TestRacingLoginsWithTheRightKey(t *testing.T) {
	h := newHouse(t, "127.0.0.1")
	var wg sync.WaitGroup
	in := make(chan *ssh.Client, 8)
	for range 4 {
		wg.Go(func() {
			if c, err := h.right(); err == nil {
				in <- c
			}
		})
	}
	wg.Wait()
	if len(in) != 1 {
		t.Fatalf("%d logins, want 1", len(in))
	}
	c := <-in
	enter(t, c)
	close(h.leave)
	c.Close()
	<-h.result
}

func TestTheLoginReachesNothingButTheUnlockChannel(t *testing.T) {
	h := newHouse(t, "127.0.0.1")
	c, err := h.right()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Dial("tcp", "127.0.0.1:22"); err == nil {
		t.Error("forwards outwards")
	}
	if l, err := c.Listen("tcp", "127.0.0.1:0"); err == nil {
		l.Close()
		t.Error("forwards inwards")
	}
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Run("id"); err == nil {
		t.Error("runs a command")
	}
	if err := s.RequestSubsystem("sftp"); err == nil {
		t.Error("offers sftp")
	}
	if err := s.RequestPty("xterm", 1, 1, nil); err == nil {
		t.Error("offers a terminal")
	}
	if err := <-h.result; event.ReasonOf(err) != event.SSHFailed {
		t.Errorf("a session without the unlock channel ends with %v", err)
	}
}

func TestTooManyFailuresEndTheMachine(t *testing.T) {
	h := newHouse(t, "127.0.0.1")
	for range maxFailures {
		if c, err := h.dial("fh-1234", ssh.PublicKeys(newSigner(t))); err == nil {
			c.Close()
			t.Fatal("accepted")
		}
	}
	select {
	case err := <-h.result:
		if event.ReasonOf(err) != event.SSHFailed {
			t.Error(err)
		}
		if n := h.door.Failed(); n < maxFailures {
			t.Errorf("it counted %d failed logins", n)
		}
	case <-time.After(10 * time.Second):
		t.Error("still serving")
	}
}

func TestOtherAddressesAreNotServed(t *testing.T) {
	h := newHouse(t, "127.0.0.2")
	if c, err := h.right(); err == nil {
		c.Close()
		t.Error("served")
	}
	if n := h.door.Failed(); n != 0 {
		t.Errorf("a stranger's connections count as failures: %d", n)
	}
}

func TestServeEndsWithItsContext(t *testing.T) {
	_, host, _ := ed25519.GenerateKey(rand.Reader)
	d := &Door{HostKey: host, Account: "a", Key: newSigner(t).PublicKey().Marshal(), Say: t.Logf}
	l, _ := net.Listen("tcp4", "127.0.0.1:0")
	gone := errors.New("deadline")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(gone)
	if err := d.Serve(ctx, l, nil); !errors.Is(err, gone) {
		t.Error(err)
	}
	d.Key = nil
	if err := d.Serve(t.Context(), l, nil); err == nil {
		t.Error("serves without a key")
	}
}
