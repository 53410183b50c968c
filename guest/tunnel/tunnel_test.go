package tunnel

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"testing"
	"time"

	"foothold/internal/mtls"
	"foothold/internal/secret"
	"foothold/protocol/agentmsg"
	"foothold/protocol/event"
	"foothold/protocol/token"
	"foothold/protocol/unlockmsg"
)

const (
	reservation = "0f0e0d0c-0b0a-4908-8706-050403020100"
	gatewayDNS  = "gateway.foothold.internal"
)

// ca is an authority of the test.
type ca struct {
	t    *testing.T
	cert *x509.Certificate
	key  ed25519.PrivateKey
}

func newCA(t *testing.T) *ca {
	t.Helper()
	public, key, _ := ed25519.GenerateKey(rand.Reader)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, public, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &ca{t, cert, key}
}

func (c *ca) issue(role, dns string, usage x509.ExtKeyUsage) tls.Certificate {
	c.t.Helper()
	public, key, _ := ed25519.GenerateKey(rand.Reader)
	name, err := url.Parse(mtls.Identity{Role: role, Name: reservation}.URI())
	if err != nil {
		c.t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), URIs: []*url.URL{name}, DNSNames: []string{dns}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{usage}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, c.cert, public, c.key)
	if err != nil {
		c.t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// TestOnlyThePinnedGatewayIsAsked: T3, user name and password go to the gateway of the
// handover and to nobody who answers in its place.
func TestOnlyThePinnedGatewayIsAsked(t *testing.T) {
	dmz, stranger := newCA(t), newCA(t)
	const server, client = x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth
	for name, c := range map[string]struct {
		cert tls.Certificate
		bend func(*tls.Config)
		want event.Reason
	}{
		"the gateway":                    {cert: dmz.issue(mtls.Gateway, gatewayDNS, server)},
		"another authority":              {cert: stranger.issue(mtls.Gateway, gatewayDNS, server), want: event.ServerUntrusted},
		"another name":                   {cert: dmz.issue(mtls.Gateway, "store.foothold.internal", server), want: event.ServerUntrusted},
		"another role":                   {cert: dmz.issue(mtls.Store, gatewayDNS, server), want: event.ServerUntrusted},
		"a VM's certificate":             {cert: dmz.issue(mtls.VM, gatewayDNS, client), want: event.ServerUntrusted},
		"a VM's, good for servers":       {cert: dmz.issue(mtls.VM, gatewayDNS, server), want: event.ServerUntrusted},
		"the gateway's own for clients":  {cert: dmz.issue(mtls.Gateway, gatewayDNS, client), want: event.ServerUntrusted},
		"TLS 1.2":                        {cert: dmz.issue(mtls.Gateway, gatewayDNS, server), bend: func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, want: event.GatewayFailed},
		"the gateway, and sessions kept": {cert: dmz.issue(mtls.Gateway, gatewayDNS, server), bend: func(c *tls.Config) { c.SessionTicketsDisabled = false }},
	} {
		t.Run(name, func(t *testing.T) {
			asked := 0
			srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				asked++
				if r.TLS.DidResume {
					t.Error("the session was resumed")
				}
				at := netip.MustParseAddrPort(r.Context().Value(http.LocalAddrContextKey).(interface{ String() string }).String())
				json.NewEncoder(w).Encode(agentmsg.AdmitResponse{Address: netip.MustParseAddr("10.84.0.2"), GatewayKey: make([]byte, 32),
					Endpoint: netip.AddrPortFrom(at.Addr(), 51820), Relay: netip.MustParseAddrPort("10.84.0.1:8443"), MTU: 1420, Keepalive: 20})
			}))
			srv.Config.ErrorLog = log.New(io.Discard, "", 0)
			srv.TLS = &tls.Config{Certificates: []tls.Certificate{c.cert}, ClientAuth: tls.RequireAnyClientCert}
			if c.bend != nil {
				c.bend(srv.TLS)
			}
			srv.StartTLS()
			defer srv.Close()
			own := dmz.issue(mtls.VM, "", client)
			a := Admission{Reservation: reservation, Key: own.PrivateKey.(ed25519.PrivateKey), Handover: &unlockmsg.Handover{
				T3: token.New(token.T3), User: "vm", Password: secret.Random(16), Certificate: own.Certificate[0],
				Gateway: unlockmsg.Gateway{Address: netip.MustParseAddrPort(srv.Listener.Addr().String()), ServerName: gatewayDNS, CA: dmz.cert.Raw}}}
			for range 2 { // the second may not resume what the first began
				_, err := Admit(t.Context(), a)
				if got := event.ReasonOf(err); got != c.want {
					t.Fatalf("%v, want reason %q", err, c.want)
				}
			}
			if c.want != "" && asked != 0 {
				t.Error("the false gateway was shown T3 and password")
			}
		})
	}
}

// TestWhatAGatewayMaySetUp: an answer that would lead the tunnel elsewhere is refused.
func TestWhatAGatewayMaySetUp(t *testing.T) {
	gateway := netip.MustParseAddr("10.81.0.20")
	good := agentmsg.AdmitResponse{Address: netip.MustParseAddr("10.84.0.2"), GatewayKey: make([]byte, 32), Endpoint: netip.AddrPortFrom(gateway, 51820),
		Relay: netip.MustParseAddrPort("10.84.0.1:8443"), MTU: 1420, Keepalive: 20}
	if err := (&Tunnel{AdmitResponse: good}).check(gateway); err != nil {
		t.Fatal(err)
	}
	for name, bend := range map[string]func(*agentmsg.AdmitResponse){
		"no address":            func(a *agentmsg.AdmitResponse) { a.Address = netip.Addr{} },
		"IPv6":                  func(a *agentmsg.AdmitResponse) { a.Address = netip.MustParseAddr("fd00::2") },
		"the relay's address":   func(a *agentmsg.AdmitResponse) { a.Address = a.Relay.Addr() },
		"no relay":              func(a *agentmsg.AdmitResponse) { a.Relay = netip.AddrPort{} },
		"short key":             func(a *agentmsg.AdmitResponse) { a.GatewayKey = a.GatewayKey[1:] },
		"an endpoint elsewhere": func(a *agentmsg.AdmitResponse) { a.Endpoint = netip.MustParseAddrPort("192.0.2.1:51820") },
		"no port":               func(a *agentmsg.AdmitResponse) { a.Endpoint = netip.AddrPortFrom(gateway, 0) },
		"small MTU":             func(a *agentmsg.AdmitResponse) { a.MTU = 500 },
		"keepalive of a day":    func(a *agentmsg.AdmitResponse) { a.Keepalive = 86400 },
	} {
		a := good
		bend(&a)
		if err := (&Tunnel{AdmitResponse: a}).check(gateway); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
