package mtls

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"testing"
	"time"
)

// ca is a test authority.
type ca struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pool *x509.CertPool
}

func newCA(t *testing.T) *ca {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, _ := x509.ParseCertificate(der)
	pool := x509.NewCertPool()
	pool.AddCert(cert)
	return &ca{cert, key, pool}
}

func (a *ca) issue(t *testing.T, usage x509.ExtKeyUsage, uris ...string) tls.Certificate {
	t.Helper()
	key, _ := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "foothold:operator:root"}, DNSNames: []string{"srv.test"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), ExtKeyUsage: []x509.ExtKeyUsage{usage},
	}
	for _, u := range uris {
		parsed, err := url.Parse(u)
		if err != nil {
			t.Fatal(err)
		}
		tmpl.URIs = append(tmpl.URIs, parsed)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, key.Public(), a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// call makes one request from client to server and returns the status, or 0 when the
// connection was refused.
func call(t *testing.T, server, client *tls.Config, allow ...string) int {
	t.Helper()
	h := Allow(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, ok := Caller(r.Context())
		if !ok {
			t.Error("no caller in the context")
		}
		io.WriteString(w, id.String())
	}), allow...)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(h)
	srv.Listener.Close()
	srv.Listener, srv.TLS = l, server
	srv.Config.ErrorLog = nil
	srv.StartTLS()
	defer srv.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	tr := &http.Transport{TLSClientConfig: client}
	defer tr.CloseIdleConnections()
	req, _ := http.NewRequestWithContext(ctx, "GET", "https://"+l.Addr().String()+"/", nil)
	resp, err := (&http.Client{Transport: tr}).Do(req)
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	return resp.StatusCode
}

func TestWhoMayCall(t *testing.T) {
	clients, servers, other := newCA(t), newCA(t), newCA(t)
	const (
		su = x509.ExtKeyUsageServerAuth
		cu = x509.ExtKeyUsageClientAuth
	)
	srv := servers.issue(t, su, "foothold:orchestrator:main")
	gw := clients.issue(t, cu, "foothold:gateway:gw-1")
	conf := func(c tls.Certificate) *tls.Config { return ClientConfig(c, servers.pool, "srv.test", Orchestrator) }
	listener := func(c tls.Certificate) *tls.Config { return ServerConfig(c, clients.pool, Gateway, BootServer) }
	old := conf(gw)
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12

	for name, tc := range map[string]struct {
		server, client *tls.Config
		allow          string
		want           int
	}{
		"permitted":                      {listener(srv), conf(gw), Gateway, 200},
		"role of the listener, not call": {listener(srv), conf(gw), BootServer, 403},
		"role not of the listener":       {listener(srv), conf(clients.issue(t, cu, "foothold:vm:x")), VM, 0},
		"client of another authority":    {listener(srv), conf(other.issue(t, cu, "foothold:gateway:gw-1")), Gateway, 0},
		"server certificate as client":   {listener(srv), conf(clients.issue(t, su, "foothold:gateway:gw-1")), Gateway, 0},
		"no foothold name":               {listener(srv), conf(clients.issue(t, cu)), Gateway, 0},
		"two foothold names":             {listener(srv), conf(clients.issue(t, cu, "foothold:gateway:a", "foothold:operator:b")), Gateway, 0},
		"name with further colons":       {listener(srv), conf(clients.issue(t, cu, "foothold:gateway:a:b")), Gateway, 0},
		"another scheme":                 {listener(srv), conf(clients.issue(t, cu, "spiffe:gateway:a")), Gateway, 0},
		"TLS 1.2":                        {listener(srv), old, Gateway, 0},
		"no client certificate":          {listener(srv), &tls.Config{RootCAs: servers.pool, ServerName: "srv.test", MinVersion: tls.VersionTLS13}, Gateway, 0},
		"server of another authority":    {listener(other.issue(t, su, "foothold:orchestrator:main")), conf(gw), Gateway, 0},
		"server of another role":         {listener(servers.issue(t, su, "foothold:vm:main")), conf(gw), Gateway, 0},
		"client certificate as server":   {listener(servers.issue(t, cu, "foothold:orchestrator:main")), conf(gw), Gateway, 0},
		"server of another DNS name":     {listener(srv), ClientConfig(gw, servers.pool, "evil.test", Orchestrator), Gateway, 0},
	} {
		t.Run(name, func(t *testing.T) {
			if got := call(t, tc.server, tc.client, tc.allow); got != tc.want {
				t.Fatalf("status %d, want %d", got, tc.want)
			}
		})
	}
}

// A session cannot be resumed, even by a client that keeps tickets, at one server.
func TestNoResumption(t *testing.T) {
	clients, servers := newCA(t), newCA(t)
	conf := ServerConfig(servers.issue(t, x509.ExtKeyUsageServerAuth, "foothold:orchestrator:main"), clients.pool, Gateway)
	cl := ClientConfig(clients.issue(t, x509.ExtKeyUsageClientAuth, "foothold:gateway:gw-1"), servers.pool, "srv.test", Orchestrator)
	cl.SessionTicketsDisabled, cl.ClientSessionCache, cl.VerifyConnection = false, tls.NewLRUClientSessionCache(4), nil
	l, err := tls.Listen("tcp", "127.0.0.1:0", conf)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, "hello")
			c.Close()
		}
	}()
	for range 3 {
		c, err := tls.Dial("tcp", l.Addr().String(), cl)
		if err != nil {
			t.Fatal(err)
		}
		if text, err := io.ReadAll(c); string(text) != "hello" { // a ticket would come before it
			t.Errorf("%q, %v", text, err)
		}
		if c.ConnectionState().DidResume {
			t.Error("session was resumed")
		}
		c.Close()
	}
}

func TestAllowRefusesPlainHTTP(t *testing.T) {
	w := httptest.NewRecorder()
	Allow(http.NotFoundHandler(), Gateway).ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	if w.Code != http.StatusForbidden {
		t.Fatalf("status %d", w.Code)
	}
}
