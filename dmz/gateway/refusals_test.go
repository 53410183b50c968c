package gateway

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/netip"
	"testing"
	"time"

	"foothold/dmz/upstream/upstreamtest"
	"foothold/internal/mtls"
	"foothold/internal/wg"
	"foothold/protocol/agentmsg"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
)

// send makes one connection to the admission port and posts body over it; refused is the
// handshake's error, or what the first read says of it.
func (w *world) send(conf *tls.Config, body []byte) (status int, answer []byte, state tls.ConnectionState, err error) {
	w.t.Helper()
	var raw net.Conn
	w.vm.Do(w.t, func() (err error) { raw, err = net.DialTimeout("tcp4", "10.82.0.1:8443", 20*time.Second); return err })
	defer raw.Close()
	raw.SetDeadline(time.Now().Add(20 * time.Second))
	c := tls.Client(raw, conf)
	req, err := http.NewRequest(http.MethodPost, "https://"+gatewayDNS+agentmsg.PathAdmit, bytes.NewReader(body))
	if err != nil {
		w.t.Fatal(err)
	}
	if err := c.Handshake(); err != nil {
		return 0, nil, state, err
	}
	go req.Write(c)
	res, err := http.ReadResponse(bufio.NewReader(c), req)
	if err != nil {
		return 0, nil, state, err
	}
	defer res.Body.Close()
	answer, _ = io.ReadAll(res.Body)
	return res.StatusCode, answer, c.ConnectionState(), nil
}

// told counts the daemon's events of a kind and reason.
func (w *world) told(kind string, r event.Reason) (n int) {
	for _, e := range w.orch.Events() {
		if e.Kind == kind && e.Reason == r {
			n++
		}
	}
	return n
}

func (w *world) unasked() {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.admitted.User != "" {
		w.t.Error("the orchestrator was asked")
	}
}

// TestRefusedCertificates: nobody gets as far as showing T3 with a certificate of another
// authority, role or usage, in an older TLS, or in a session that was begun before.
func TestRefusedCertificates(t *testing.T) {
	w := newWorld(t)
	body, err := json.Marshal(w.request())
	if err != nil {
		t.Fatal(err)
	}
	vm := mtls.Identity{Role: mtls.VM, Name: reservation}
	conf := func(cert tls.Certificate) *tls.Config {
		return mtls.ClientConfig(cert, w.servers.Pool(), gatewayDNS, mtls.Gateway)
	}
	old := conf(w.certificate())
	old.MinVersion, old.MaxVersion = 0, tls.VersionTLS12
	none := conf(tls.Certificate{})
	none.Certificates = nil
	for name, c := range map[string]*tls.Config{
		"another authority":     conf(upstreamtest.NewCA(t, "vm").Issue(upstreamtest.Leaf{ID: vm})),
		"the DMZ's authority":   conf(w.orch.DMZ.Issue(upstreamtest.Leaf{ID: vm})),
		"another role":          conf(w.vms.Issue(upstreamtest.Leaf{ID: mtls.Identity{Role: mtls.Orchestrator, Name: "main"}})),
		"a server's, as a VM's": conf(w.vms.Issue(upstreamtest.Leaf{ID: vm, Server: true, DNS: gatewayDNS})),
		"TLS 1.2":               old,
		"no certificate":        none,
	} {
		before := w.told("tls.refused", event.NotPermitted)
		if status, _, _, err := w.send(c, body); err == nil {
			t.Errorf("%s: status %d", name, status)
		}
		w.orch.WaitEvent(name, func(event.Event) bool { return w.told("tls.refused", event.NotPermitted) > before })
	}
	kept := conf(w.certificate())
	kept.SessionTicketsDisabled, kept.ClientSessionCache, kept.VerifyConnection = false, tls.NewLRUClientSessionCache(4), nil
	for range 2 {
		if _, _, state, err := w.send(kept, []byte("{}")); err != nil || state.DidResume {
			t.Errorf("a client that keeps sessions: %v, resumed %v", err, state.DidResume)
		}
	}
	w.unasked()
}

// TestMalformedAdmissions: each is refused without a word of why to the VM, and told to
// the journal under its reason.
func TestMalformedAdmissions(t *testing.T) {
	w := newWorld(t)
	good, err := json.Marshal(w.request())
	if err != nil {
		t.Fatal(err)
	}
	cert := w.certificate()
	for name, body := range map[string][]byte{
		"malformed":     good[:len(good)-1],
		"trailing data": append(bytes.Clone(good), "{}"...),
		"duplicate key": append([]byte(`{"user":"a",`), good[1:]...),
		"unknown field": append([]byte(`{"colour":"a",`), good[1:]...),
		"oversized":     append(bytes.Repeat([]byte(" "), maxAdmit), good...),
	} {
		before := w.told("admission.refused", event.BadRequest)
		status, answer, _, err := w.send(mtls.ClientConfig(cert, w.servers.Pool(), gatewayDNS, mtls.Gateway), body)
		if err != nil || status != http.StatusForbidden || string(bytes.TrimSpace(answer)) != `{"error":"refused"}` {
			t.Errorf("%s: %d %q %v", name, status, answer, err)
		}
		w.orch.WaitEvent(name, func(e event.Event) bool { return w.told("admission.refused", event.BadRequest) == before+1 })
	}
	w.unasked()
}

// TestOnlyTheCertificatesKeyOpensTheTunnel: the VM is admitted, and somebody else at its
// address tries the tunnel: with another key than the certificate's, or with that key and
// without the admission's TLS session.
func TestOnlyTheCertificatesKeyOpensTheTunnel(t *testing.T) {
	for name, steal := range map[string]func(w *world, psk []byte) []byte{
		"another key":             func(w *world, psk []byte) []byte { w.private, _ = wg.GenerateKey(); return psk },
		"another pre-shared key":  func(*world, []byte) []byte { return make([]byte, evidence.PSKLen) },
		"neither (it must pass!)": nil,
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			cert := w.certificate()
			var out agentmsg.AdmitResponse
			state, status, err := w.post("10.82.0.1:8443", agentmsg.PathAdmit, cert, w.request(), &out)
			if err != nil || status != http.StatusOK {
				t.Fatalf("admission: status %d, %v", status, err)
			}
			psk, err := state.ExportKeyingMaterial(evidence.PSKLabel, []byte(reservation), evidence.PSKLen)
			if err != nil {
				t.Fatal(err)
			}
			if steal == nil {
				w.tunnel(out, psk)
				w.relays(out, cert)
				return
			}
			w.tunnel(out, steal(w, psk))
			var c net.Conn
			w.vm.Do(t, func() error {
				c, err = net.DialTimeout("tcp4", netip.AddrPort(out.Relay).String(), 3*time.Second)
				return nil
			})
			if err == nil {
				c.Close()
				t.Error("the tunnel carries")
			}
		})
	}
}
