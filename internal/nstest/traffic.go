package nstest

import (
	"errors"
	"io"
	"net"
	"testing"
	"time"
)

// How long traffic is waited for: what is to pass may be slow on a busy machine, what is
// not to pass is not waited for long.
const (
	Soon   = 8 * time.Second
	Refuse = 400 * time.Millisecond
)

// Listen opens a TCP listener in the place; it ends with the test.
func (p *Place) Listen(t testing.TB, addr string) net.Listener {
	t.Helper()
	var l net.Listener
	p.Do(t, func() (err error) { l, err = net.Listen("tcp4", addr); return err })
	t.Cleanup(func() { l.Close() })
	return l
}

// Echo sends back whatever comes to addr in the place, until the test ends.
func (p *Place) Echo(t testing.TB, addr string) {
	t.Helper()
	l := p.Listen(t, addr)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); io.Copy(c, c) }()
		}
	}()
}

// Dial connects from the place to an echo and has one byte come back, each within wait.
// The connection ends with the test.
func (p *Place) Dial(t testing.TB, addr string, wait time.Duration) (c net.Conn, err error) {
	t.Helper()
	p.Do(t, func() error { c, err = net.DialTimeout("tcp4", addr, wait); return nil })
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { c.Close() })
	return c, Ping(c, wait)
}

// Ping has one byte come back from an echo.
func Ping(c net.Conn, wait time.Duration) error {
	c.SetDeadline(time.Now().Add(wait))
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}

// Passes fails the test unless an echo answers.
func (p *Place) Passes(t testing.TB, addr string) net.Conn {
	t.Helper()
	c, err := p.Dial(t, addr, Soon)
	if err != nil {
		t.Fatalf("to %s: %v", addr, err)
	}
	return c
}

// Blocked fails the test unless there is silence: no answer, and no refusal either.
func (p *Place) Blocked(t testing.TB, addr string) {
	t.Helper()
	_, err := p.Dial(t, addr, Refuse)
	var silent net.Error
	if err == nil || !errors.As(err, &silent) || !silent.Timeout() {
		t.Fatalf("to %s: %v, want silence", addr, err)
	}
}
