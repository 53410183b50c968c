package serve

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"testing"
	"time"
)

// certificate is a server's or client's for a test, its own authority.
func certificate(t *testing.T) tls.Certificate {
	t.Helper()
	public, key, _ := ed25519.GenerateKey(rand.Reader)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// TestEnd: a server ends as soon as the calls under way are answered, however many
// connections are open on which nothing was asked yet.
func TestEnd(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	called, goOn, ended := make(chan bool), make(chan bool), make(chan error, 1)
	// In TLS 1.2 the server ends its handshake first: a client that is through has a
	// connection on which the server waits for a call.
	conf := &tls.Config{MaxVersion: tls.VersionTLS12, Certificates: []tls.Certificate{certificate(t)}}
	go func() {
		ended <- HTTPS(ctx, l, conf, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			called <- true
			<-goOn
			io.WriteString(w, "done")
		}))
	}()
	client := &tls.Config{InsecureSkipVerify: true}
	dial := func() *tls.Conn {
		c, err := tls.Dial("tcp", l.Addr().String(), client)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	busy := dial()
	io.WriteString(busy, "GET / HTTP/1.0\r\n\r\n")
	<-called
	shaken := dial()
	raw, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()

	began := time.Now()
	cancel()
	for what, c := range map[string]net.Conn{"no handshake": raw, "a handshake": shaken} {
		c.SetDeadline(began.Add(shutdownPeriod / 2))
		if _, err := io.ReadAll(c); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a connection with %s and nothing asked stays open", what)
		}
	}
	select {
	case err := <-ended:
		t.Errorf("ended with a call under way: %v", err)
	default:
	}
	goOn <- true
	if answer, err := io.ReadAll(busy); err != nil || len(answer) < 4 || string(answer[len(answer)-4:]) != "done" {
		t.Errorf("the call under way: %q, %v", answer, err)
	}
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took >= shutdownPeriod/2 {
		t.Errorf("it took %v", took)
	}
}
