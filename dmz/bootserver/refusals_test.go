package bootserver

import (
	"bytes"
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
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"foothold/internal/mtls/mtlstest"
	"foothold/protocol/bootmsg"
	"foothold/protocol/event"
	"foothold/protocol/token"
	wire "foothold/protocol/upstream"
)

// TestRefusedHandshakes: what is no fresh TLS 1.3 connection with one small client
// certificate is told to the journal, with its source and cause.
func TestRefusedHandshakes(t *testing.T) {
	w := newWorld(t)
	public, key, _ := ed25519.GenerateKey(rand.Reader)
	made := func(extra []byte) []byte {
		tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), SubjectKeyId: extra}
		der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, public, key)
		w.must(err)
		return der
	}
	for name, change := range map[string]func(*tls.Config){
		"TLS 1.2":        func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 },
		"no certificate": func(c *tls.Config) { c.Certificates = nil },
		"two certificates": func(c *tls.Config) {
			c.Certificates = []tls.Certificate{{Certificate: [][]byte{made(nil), made(nil)}, PrivateKey: key}}
		},
		"a large certificate": func(c *tls.Config) {
			c.Certificates = []tls.Certificate{{Certificate: [][]byte{made(make([]byte, maxLeaf))}, PrivateKey: key}}
		},
	} {
		told := func() (n int) {
			for _, e := range w.orch.Events() {
				if e.Kind == "tls.refused" {
					n++
				}
			}
			return n
		}
		before := told()
		v, err := w.dial(change)
		if err == nil {
			_, err = v.call("POST", bootmsg.PathOpen, bootmsg.OpenRequest{Token: w.t1, VMKey: v.key}, nil)
			v.conn.Close()
		}
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
		w.orch.WaitEvent(name, func(e event.Event) bool {
			return e.Kind == "tls.refused" && told() > before && e.Reason == event.NotPermitted && e.Detail["from"] == "127.0.0.1" && e.Detail["why"] != ""
		})
	}
}

// TestNoBootIsResumed: a second connection begins anew, even of a client that keeps
// tickets: T1, key and tunnel belong to one.
func TestNoBootIsResumed(t *testing.T) {
	w := newWorld(t)
	cache := tls.NewLRUClientSessionCache(4)
	for range 2 {
		v, err := w.dial(func(c *tls.Config) { c.ClientSessionCache = cache })
		w.must(err)
		if _, err := v.call("POST", bootmsg.PathOpen, bootmsg.OpenRequest{Token: token.New(token.T1), VMKey: v.key}, nil); err != nil {
			t.Fatalf("a fresh connection: %v", err) // it would have read a ticket here
		}
		if v.conn.ConnectionState().DidResume {
			t.Error("resumed")
		}
		v.conn.Close()
	}
}

// TestNothingBeforeTheHandshake: data ahead of the handshake - TLS 1.3 early data, or a
// record out of nowhere - ends the connection, and nobody reads it.
func TestNothingBeforeTheHandshake(t *testing.T) {
	w := newWorld(t)
	v := w.connect()
	body, _ := json.Marshal(bootmsg.OpenRequest{Token: w.t1, VMKey: v.key})
	request := fmt.Appendf(nil, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n%s", bootmsg.PathOpen, bootDNS, len(body), body)
	record := append([]byte{23, 3, 3, byte(len(request) >> 8), byte(len(request))}, request...) // application data, RFC 8446, section 5.1
	var opened atomic.Bool
	pass := w.orch.Open
	w.orch.Open = func(in wire.OpenRequest) (wire.OpenResponse, error) { opened.Store(true); return pass(in) }
	for name, first := range map[string][]byte{
		"early data":                append(mtlstest.EarlyHello(t, bootDNS), record...),
		"data without a handshake":  record,
		"a request without any TLS": request,
	} {
		conn, err := net.Dial("tcp", w.addr)
		w.must(err)
		w.must(conn.SetDeadline(time.Now().Add(10 * time.Second)))
		_, err = conn.Write(first)
		w.must(err)
		answer, err := io.ReadAll(conn)
		var timeout net.Error
		if errors.As(err, &timeout) && timeout.Timeout() || bytes.Contains(answer, []byte("200 OK")) {
			t.Errorf("%s: the connection stays (%v), or is answered: %q", name, err, answer)
		}
		conn.Close()
	}
	if opened.Load() {
		t.Error("somebody read a token from it")
	}
	w.orch.WaitEvent("refusal", func(e event.Event) bool {
		return e.Kind == "tls.refused" && strings.Contains(e.Detail["why"], "early data")
	})
}

// TestMalformedRequestsAreTold: each ends its conversation, is told to the journal under
// its reason, and is asked of nobody. The VM learns that it is refused, and no more.
func TestMalformedRequestsAreTold(t *testing.T) {
	w := newWorld(t)
	v := w.connect()
	good, _ := json.Marshal(bootmsg.OpenRequest{Token: w.t1, VMKey: v.key})
	text := w.t1.Reveal()
	flipped := map[bool]string{true: "b", false: "a"}[text[len(text)-1] == 'a']
	for name, body := range map[string][]byte{
		"malformed":       good[:len(good)-1],
		"trailing data":   append(bytes.Clone(good), " {}"...),
		"duplicate key":   bytes.Replace(good, []byte(`{"token"`), []byte(`{"token":"","token"`), 1),
		"unknown field":   bytes.Replace(good, []byte(`{"token"`), []byte(`{"colour":1,"token"`), 1),
		"oversized":       append(bytes.Repeat([]byte(" "), bootmsg.MaxMessage), good...),
		"malformed token": bytes.Replace(good, []byte(text), []byte(text[:len(text)-1]+flipped), 1),
	} {
		refusals := func() (n int) {
			for _, e := range w.orch.Events() {
				if e.Kind == "boot.refused" && e.Reason == event.BadRequest {
					n++
				}
			}
			return n
		}
		before := refusals()
		v := w.connect()
		v.refused("POST", bootmsg.PathOpen, body)
		v.conn.Close()
		w.orch.WaitEvent(name, func(e event.Event) bool { return refusals() == before+1 })
	}
	v.open() // T1 was not spent by any of them
}
