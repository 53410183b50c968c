// Package pinned is a VM's connection to one server of its organisation - boot server,
// gateway, store: TLS 1.3 to a pinned address, authority and name, and HTTP/1.1 on
// it, one exchange at a time.
//
// It is not an http.Client on purpose. A client may dial again behind its caller's
// back; here the state of the conversation belongs to the connection, so a Conn
// cannot be dialled twice: when it breaks, the conversation is over. Every answer is
// bounded, and bytes that nobody asked for end the connection.
package pinned

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"time"

	"foothold/internal/mtls"
	"foothold/internal/strictjson"
	"foothold/protocol/event"
)

// Limits of the connection.
const (
	dialTry      = 2 * time.Second        // one TCP attempt: a dropped SYN is not waited for longer
	dialPause    = 100 * time.Millisecond // between attempts, while the firewall has yet to open
	handshakeMax = 20 * time.Second       // under TCG a handshake takes half a second
	headerMax    = 16 << 10               // bytes of an answer's head and chunk framing
	bufferSize   = 128 << 10              // bytes
)

// ErrRefused is returned when the server answers but refuses. It gives no detail.
var ErrRefused = errors.New("the server refuses")

// ErrUntrusted is returned when the server that answers is not the pinned one.
var ErrUntrusted = errors.New("the server is not the pinned one")

// Reason is the reason of an error of Dial: that the server is not the pinned one, or
// otherwise.
func Reason(err error, otherwise event.Reason) event.Reason {
	if errors.Is(err, ErrUntrusted) {
		return event.ServerUntrusted
	}
	return otherwise
}

// Pins is all that the VM believes of the server.
type Pins struct {
	URL        string // https://ADDRESS:PORT; an IP address, because nothing resolves names here
	ServerName string // DNS name that the certificate must carry
	CA         []byte // DER of the one authority
	Role       string // of package mtls, that the certificate must name; "" where the authority issues for one role alone
}

// Conn is the connection.
type Conn struct {
	tls  *tls.Conn
	host string
}

// Ephemeral makes a self-signed client certificate for one connection.
func Ephemeral() (tls.Certificate, error) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make client key: %w", err)
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make client certificate: %w", err)
	}
	now := time.Now()
	template := &x509.Certificate{SerialNumber: serial, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("make client certificate: %w", err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private}, nil
}

// Dial connects until ctx ends: the firewall opens only when the host has reported
// the VM's start. Once a byte has been sent there is no second try.
func Dial(ctx context.Context, pins Pins, cert tls.Certificate) (*Conn, error) {
	addr, conf, err := pins.config(cert)
	if err != nil {
		return nil, err
	}
	raw, err := dialTCP(ctx, addr)
	if err != nil {
		return nil, fmt.Errorf("reach the server at %s: %w", addr, err)
	}
	conn := tls.Client(raw, conf)
	hello, cancel := context.WithTimeout(ctx, handshakeMax)
	defer cancel()
	if err := conn.HandshakeContext(hello); err != nil {
		raw.Close()
		var verification *tls.CertificateVerificationError
		if errors.As(err, &verification) {
			err = fmt.Errorf("%w: %w", ErrUntrusted, err)
		}
		return nil, fmt.Errorf("authenticate the server: %w", err)
	}
	if s := conn.ConnectionState(); s.Version != tls.VersionTLS13 || s.DidResume || len(s.VerifiedChains) == 0 {
		raw.Close()
		return nil, errors.New("authenticate the server: not a fresh TLS 1.3 connection")
	}
	if err := pins.role(conn.ConnectionState().PeerCertificates[0]); err != nil {
		raw.Close()
		return nil, fmt.Errorf("authenticate the server: %w: %w", ErrUntrusted, err)
	}
	return &Conn{conn, addr.String()}, nil
}

func (p Pins) config(cert tls.Certificate) (netip.AddrPort, *tls.Config, error) {
	var none netip.AddrPort
	addr, err := p.Address()
	if err != nil {
		return none, nil, err
	}
	ca, err := x509.ParseCertificate(p.CA)
	if err != nil {
		return none, nil, fmt.Errorf("read the pinned authority: %w", err)
	}
	if !ca.IsCA || !ca.BasicConstraintsValid {
		return none, nil, errors.New("read the pinned authority: it is no authority")
	}
	if p.ServerName == "" {
		return none, nil, errors.New("no name is pinned for the server")
	}
	pool := x509.NewCertPool()
	pool.AddCert(ca)
	return addr, &tls.Config{
		MinVersion: tls.VersionTLS13, RootCAs: pool, ServerName: p.ServerName, Certificates: []tls.Certificate{cert},
		SessionTicketsDisabled: true, NextProtos: []string{"http/1.1"},
	}, nil
}

func (p Pins) role(leaf *x509.Certificate) error {
	if p.Role == "" {
		return nil
	}
	id, err := mtls.Of(leaf)
	if err == nil && id.Role != p.Role {
		err = fmt.Errorf("%s is not a %s", id, p.Role)
	}
	return err
}

// Address is the server's address; a URL without port means 443.
func (p Pins) Address() (netip.AddrPort, error) {
	u, err := url.Parse(p.URL)
	if err != nil || u.Scheme != "https" {
		return netip.AddrPort{}, errors.New("the server's URL is malformed")
	}
	host := u.Host
	if u.Port() == "" {
		host = net.JoinHostPort(u.Hostname(), "443")
	}
	addr, err := netip.ParseAddrPort(host)
	if err != nil {
		return netip.AddrPort{}, errors.New("the server's URL names no address")
	}
	return addr, nil
}

func dialTCP(ctx context.Context, addr netip.AddrPort) (net.Conn, error) {
	dialer := net.Dialer{Timeout: dialTry}
	for {
		raw, err := dialer.DialContext(ctx, "tcp", addr.String())
		if err == nil {
			return raw, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%w (last try: %v)", context.Cause(ctx), err)
		case <-time.After(dialPause):
		}
	}
}

// Exporter is the TLS exporter of this connection (RFC 8446, section 7.5).
func (c *Conn) Exporter(label string, context []byte, length int) ([]byte, error) {
	s := c.tls.ConnectionState()
	out, err := s.ExportKeyingMaterial(label, context, length)
	if err != nil {
		return nil, fmt.Errorf("derive exporter: %w", err)
	}
	return out, nil
}

// ServerLeaf is the DER of the server's certificate.
func (c *Conn) ServerLeaf() []byte { return c.tls.ConnectionState().PeerCertificates[0].Raw }

// Close ends the connection.
func (c *Conn) Close() error { return c.tls.Close() }

// Post sends in and decodes an answer of at most limit bytes strictly into out.
func (c *Conn) Post(ctx context.Context, path string, in, out any, limit int64) error {
	body, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("encode request: %w", err)
	}
	defer clear(body) // it may hold a token
	var answer bytes.Buffer
	if err := c.exchange(ctx, http.MethodPost, path, Coding{}, body, limit, &answer); err != nil {
		return err
	}
	return strictjson.Unmarshal(answer.Bytes(), out)
}

// Get writes an answer of exactly size bytes to w.
func (c *Conn) Get(ctx context.Context, path string, size int64, w io.Writer) error {
	return c.GetCoded(ctx, path, Coding{}, size, w)
}

// GetCoded is Get, but lets the server send the content in a coding. What comes out
// has exactly size bytes; that they are the right ones is for the caller to see.
func (c *Conn) GetCoded(ctx context.Context, path string, coding Coding, size int64, w io.Writer) error {
	counted := &counter{w: w}
	if err := c.exchange(ctx, http.MethodGet, path, coding, nil, size, counted); err != nil {
		return err
	}
	if counted.n != size {
		return fmt.Errorf("%s has %d bytes, want %d", path, counted.n, size)
	}
	return nil
}

type counter struct {
	w io.Writer
	n int64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// exchange is one request and its whole answer. Any error leaves the connection
// unusable and closed.
func (c *Conn) exchange(ctx context.Context, method, path string, coding Coding, body []byte, limit int64, w io.Writer) (err error) {
	stop := context.AfterFunc(ctx, func() { c.tls.NetConn().Close() })
	defer func() {
		if !stop() && err != nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			c.tls.NetConn().Close()
			err = fmt.Errorf("%s %s: %w", method, path, err)
		}
	}()
	req, err := http.NewRequest(method, "https://"+c.host+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("User-Agent", "foothold-guest")
	if coding.Name != "" {
		req.Header.Set("Accept-Encoding", coding.Name)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if err := req.Write(c.tls); err != nil {
		return err
	}
	in := bufio.NewReaderSize(io.LimitReader(c.tls, headerMax+limit+limit/64), bufferSize)
	resp, err := http.ReadResponse(in, req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusForbidden {
		return ErrRefused
	}
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("the server answers with status %d", resp.StatusCode)
	}
	content, err := coding.decode(resp)
	if err != nil {
		return err
	}
	defer content.Close()
	n, err := io.Copy(w, io.LimitReader(content, limit+1))
	switch {
	case err != nil:
		return err
	case n > limit:
		return errors.New("the answer is over its limit")
	case in.Buffered() > 0 || resp.Close:
		return c.finish(in.Buffered() > 0)
	}
	return nil
}

// Coding is a content coding that a request may ask for (RFC 9110, section 8.4).
type Coding struct {
	Name string
	Open func(io.Reader) (io.ReadCloser, error) // bounds the memory that it takes
}

// decode is the answer's content. A coding that was not asked for is refused.
func (c Coding) decode(resp *http.Response) (io.ReadCloser, error) {
	switch resp.Header.Get("Content-Encoding") {
	case "":
		return io.NopCloser(resp.Body), nil
	case c.Name:
		return c.Open(resp.Body)
	}
	return nil, errors.New("the answer has a coding that was not asked for")
}

// finish handles an answer after which no other can follow.
func (c *Conn) finish(unasked bool) error {
	if unasked {
		return errors.New("the server sends what nobody asked for")
	}
	return c.tls.Close()
}
