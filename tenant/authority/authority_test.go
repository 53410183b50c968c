package authority

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"foothold/internal/mtls"
	"foothold/protocol/vmcert"
	"foothold/tenant/vault"
)

const domain = "foothold.internal"

const reservation = "0b6c2f4e-5a7d-4c1b-9e57-3d2a8f60c911"

func newSet(t *testing.T, names ...Name) (*Set, *vault.Vault, string) {
	t.Helper()
	v, err := vault.Create(filepath.Join(t.TempDir(), "vault"), filepath.Join(t.TempDir(), "kek"))
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	s, err := Create(v, dir, names...)
	if err != nil {
		t.Fatal(err)
	}
	return s, v, dir
}

func public(t *testing.T) ed25519.PublicKey {
	t.Helper()
	pub, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return pub
}

func request(t *testing.T, tmpl *x509.CertificateRequest) []byte {
	t.Helper()
	_, key, _ := ed25519.GenerateKey(rand.Reader)
	der, err := x509.CreateCertificateRequest(rand.Reader, tmpl, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func TestCreateIsRepeatable(t *testing.T) {
	s, v, dir := newSet(t, Tenants()...)
	again, err := Create(v, dir, Tenants()...)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range Tenants() {
		a, _ := s.Certificate(name)
		b, _ := again.Certificate(name)
		if len(a) == 0 || string(a) != string(b) {
			t.Errorf("authority %s changed", name)
		}
	}
	if !s.Public(ManifestKey).Equal(again.Public(ManifestKey)) || s.Public(ManifestKey).Equal(s.Public(ZoneKey)) {
		t.Error("signing keys changed, or are one")
	}
	// A crash between key and certificate: the certificate is made for the key that is there.
	os.Remove(s.CertFile(Boot))
	if _, err := Create(v, dir, Tenants()...); err != nil {
		t.Errorf("Create after a lost certificate: %v", err)
	}
	// A certificate of another key is not taken.
	data, _ := os.ReadFile(s.CertFile(DMZ))
	os.WriteFile(s.CertFile(Boot), data, 0o644)
	if _, err := Open(v, dir, Tenants()...); err == nil {
		t.Error("Open took a certificate of another key")
	}
}

// Every pair of authority, role and usage that the table does not name is refused.
func TestTable(t *testing.T) {
	all := append(Tenants(), Provider)
	s, _, _ := newSet(t, all...)
	allowed := map[Name]map[Usage][]string{
		Boot:     {Server: {mtls.BootServer}},
		DMZ:      {Server: {mtls.Orchestrator, mtls.Gateway, mtls.Store}, Client: {mtls.Orchestrator, mtls.BootServer, mtls.Gateway, mtls.Firewall, mtls.Store}},
		Operator: {Server: {mtls.Orchestrator}, Client: {mtls.Operator}},
		Tenant:   {Client: {mtls.Orchestrator}},
		Provider: {Server: {mtls.Host}},
	}
	roles := []string{mtls.Orchestrator, mtls.BootServer, mtls.Gateway, mtls.Firewall, mtls.Store, mtls.Host, mtls.Operator, mtls.VM}
	for _, name := range all {
		for _, usage := range []Usage{0, Server, Client} {
			for _, role := range roles {
				want := false
				for _, r := range allowed[name][usage] {
					want = want || r == role
				}
				req := Request{Identity: mtls.Identity{Role: role, Name: "x"}, Usage: usage, Lifetime: time.Hour, PublicKey: public(t)}
				if usage == Server {
					req.DNS = []string{"x." + domain}
				}
				if _, err := s.Issue(name, req); (err == nil) != want {
					t.Errorf("authority %s, usage %d, role %s: %v, allowed %v", name, usage, role, err, want)
				}
			}
		}
	}
}

func TestIssueRefuses(t *testing.T) {
	s, _, _ := newSet(t, Tenants()...)
	p384, _ := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	weak, _ := rsa.GenerateKey(rand.Reader, 2048)
	good := Request{Identity: mtls.Identity{Role: mtls.Gateway, Name: "g1"}, DNS: []string{"gateway." + domain}, Usage: Server, Lifetime: time.Hour, PublicKey: public(t)}
	if _, err := s.Issue(DMZ, good); err != nil {
		t.Fatal(err)
	}
	for what, change := range map[string]func(*Request){
		"no lifetime":       func(r *Request) { r.Lifetime = 0 },
		"long lifetime":     func(r *Request) { r.Lifetime = 399 * 24 * time.Hour },
		"no name":           func(r *Request) { r.DNS = nil },
		"client with names": func(r *Request) { r.Usage = Client },
		"no key":            func(r *Request) { r.PublicKey = nil },
		"P-384":             func(r *Request) { r.PublicKey = p384.Public() },
		"RSA":               func(r *Request) { r.PublicKey = weak.Public() },
		"empty holder":      func(r *Request) { r.Identity.Name = "" },
		"holder with colon": func(r *Request) { r.Identity.Name = "a:b" },
	} {
		r := good
		change(&r)
		if _, err := s.Issue(DMZ, r); err == nil {
			t.Errorf("%s: issued", what)
		}
	}
}

func TestIssueVM(t *testing.T) {
	s, _, _ := newSet(t, Tenants()...)
	info := vmcert.Info{Reservation: reservation, Start: 2, Address: netip.MustParseAddr("10.82.0.10"), WireGuardKey: make([]byte, 32)}
	csr := request(t, &x509.CertificateRequest{
		DNSNames:    []string{"gateway." + domain},
		IPAddresses: []net.IP{net.IPv4(10, 81, 0, 20)},
		URIs:        []*url.URL{{Scheme: "foothold", Opaque: "operator:root"}},
	})
	der, serial, err := s.IssueVM(info, csr, 24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	got, err := vmcert.Parse(cert)
	if err != nil || got.Reservation != reservation || got.Start != 2 || got.Address != info.Address {
		t.Errorf("certificate says %+v, %v", got, err)
	}
	if len(cert.DNSNames)+len(cert.IPAddresses) != 0 || len(cert.URIs) != 1 || cert.IsCA || cert.SerialNumber.String() != serial {
		t.Errorf("the request's names were taken, or the serial differs")
	}
	pool, _ := s.Pool(VM)
	if _, err := cert.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}); err == nil {
		t.Error("a VM's certificate passes for a server's")
	}

	bad := append([]byte{}, csr...)
	bad[len(bad)-1] ^= 1
	for what, try := range map[string]func() error{
		"altered request":  func() error { _, _, err := s.IssueVM(info, bad, time.Hour); return err },
		"trailing bytes":   func() error { _, _, err := s.IssueVM(info, append(csr[:len(csr):len(csr)], 0), time.Hour); return err },
		"no request":       func() error { _, _, err := s.IssueVM(info, nil, time.Hour); return err },
		"lifetime":         func() error { _, _, err := s.IssueVM(info, csr, 8*24*time.Hour); return err },
		"reservation":      func() error { i := info; i.Reservation = "x"; _, _, err := s.IssueVM(i, csr, time.Hour); return err },
		"no WireGuard key": func() error { i := info; i.WireGuardKey = nil; _, _, err := s.IssueVM(i, csr, time.Hour); return err },
		"start zero":       func() error { i := info; i.Start = 0; _, _, err := s.IssueVM(i, csr, time.Hour); return err },
		"closed authority": func() error { _, _, err := (&Set{}).IssueVM(info, csr, time.Hour); return err },
		"Issue for VM role": func() error {
			_, err := s.Issue(VM, Request{Identity: mtls.Identity{Role: mtls.VM, Name: reservation}, Usage: Client, Lifetime: time.Hour, PublicKey: public(t)})
			return err
		},
	} {
		if try() == nil {
			t.Errorf("%s: issued", what)
		}
	}
}

// Daemons talk with the files that WriteFiles makes; a certificate of another
// authority, or for the other direction, does not connect.
func TestWriteFiles(t *testing.T) {
	s, _, _ := newSet(t, Tenants()...)
	dir := t.TempDir()
	files := func(base string, name Name, id mtls.Identity, usage Usage) mtls.Files {
		req := Request{Identity: id, Usage: usage, Lifetime: time.Hour}
		if usage == Server {
			req.DNS = []string{"orchestrator." + domain}
			if name == Operator {
				req.DNS, req.IPs = []string{"localhost"}, []netip.Addr{netip.MustParseAddr("127.0.0.1")}
			}
		}
		f, err := s.WriteFiles(dir, base, name, req)
		if err != nil {
			t.Fatal(err)
		}
		if st, _ := os.Stat(f.Key); st.Mode().Perm() != 0o600 {
			t.Errorf("key has mode %v", st.Mode())
		}
		return f
	}
	server := files("orchestrator", DMZ, mtls.Identity{Role: mtls.Orchestrator, Name: "o1"}, Server)
	files("operator-api", Operator, mtls.Identity{Role: mtls.Orchestrator, Name: "o1"}, Server)
	gateway := files("gateway", DMZ, mtls.Identity{Role: mtls.Gateway, Name: "g1"}, Client)
	other := files("operator", Operator, mtls.Identity{Role: mtls.Operator, Name: "ada"}, Client)
	other.CA = server.CA

	for _, c := range []struct {
		what   string
		client mtls.Files
		want   bool
	}{
		{"gateway", gateway, true},
		{"certificate of another authority", other, false},
		{"server certificate as client's", server, false},
	} {
		if err := handshake(t, server, c.client); (err == nil) != c.want {
			t.Errorf("%s: %v, want success %v", c.what, err, c.want)
		}
	}
	if data, _ := os.ReadFile(server.Cert); len(data) == 0 {
		t.Error("no certificate on disk")
	} else if block, _ := pem.Decode(data); block == nil {
		t.Error("certificate is not PEM")
	}
}

func handshake(t *testing.T, server, client mtls.Files) error {
	t.Helper()
	scert, spool, err := server.Load()
	if err != nil {
		t.Fatal(err)
	}
	ccert, cpool, err := client.Load()
	if err != nil {
		t.Fatal(err)
	}
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	done := make(chan error, 1)
	go func() {
		conn := tls.Server(a, mtls.ServerConfig(scert, spool, mtls.Gateway, mtls.Orchestrator))
		err := conn.Handshake()
		a.Close()
		done <- err
	}()
	conn := tls.Client(b, mtls.ClientConfig(ccert, cpool, "orchestrator."+domain, mtls.Orchestrator))
	if err := conn.Handshake(); err != nil {
		b.Close()
		<-done
		return err
	}
	// In TLS 1.3 the client ends its handshake before the server has judged it.
	conn.Read(make([]byte, 1))
	b.Close()
	return <-done
}
