package authority

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"foothold/internal/mtls"
	"foothold/protocol/vmcert"
)

// shakeAt joins two ends whose clocks are off by so much.
func shakeAt(t *testing.T, server, client *tls.Config, serverOff, clientOff time.Duration) error {
	t.Helper()
	server, client = server.Clone(), client.Clone()
	server.Time = func() time.Time { return time.Now().Add(serverOff) }
	client.Time = func() time.Time { return time.Now().Add(clientOff) }
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	served := make(chan error, 1)
	go func() {
		s := tls.Server(a, server)
		err := s.Handshake()
		if err == nil {
			_, err = s.Write([]byte{1}) // the client hears only after the handshake whether it was accepted
		} else {
			a.Close()
		}
		served <- err
	}()
	c := tls.Client(b, client)
	if err := c.Handshake(); err != nil {
		b.Close()
		<-served
		return err
	}
	if _, err := c.Read(make([]byte, 1)); err != nil {
		if serverErr := <-served; serverErr != nil {
			return serverErr
		}
		return err
	}
	return <-served
}

// TestPeersClocks: whoever's clock is off by ten minutes - orchestrator, gateway, boot
// server, or the VM - certificates that were issued this moment are accepted. Past what
// they are backdated by, the refusal names the time.
func TestPeersClocks(t *testing.T) {
	s, _, dir := newSet(t, Tenants()...)
	issue := func(name Name, role, holder string, usage Usage, dns ...string) (tls.Certificate, *x509.CertPool) {
		f, err := s.WriteFiles(dir, role+holder+usageName(usage), name, Request{Identity: mtls.Identity{Role: role, Name: holder}, Usage: usage, Lifetime: time.Hour, DNS: dns})
		if err != nil {
			t.Fatal(err)
		}
		cert, pool, err := f.Load()
		if err != nil {
			t.Fatal(err)
		}
		return cert, pool
	}
	pool := func(name Name) *x509.CertPool {
		p, err := mtls.LoadPool(s.CertFile(name))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	orchestrator, dmz := issue(DMZ, mtls.Orchestrator, "o", Server, "orchestrator.foothold.internal")
	bootClient, _ := issue(DMZ, mtls.BootServer, "b", Client)
	gatewayClient, _ := issue(DMZ, mtls.Gateway, "g", Client)
	gateway, _ := issue(DMZ, mtls.Gateway, "g", Server, "gateway.foothold.internal")
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	der, _, err := s.IssueVM(vmcert.Info{Reservation: reservation, Start: 1, Address: netip.MustParseAddr("10.82.0.10"), WireGuardKey: make([]byte, 32)}, csr, 24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	vm := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}

	up := mtls.ServerConfig(orchestrator, dmz, mtls.BootServer, mtls.Gateway)
	calls := map[string]struct{ server, client *tls.Config }{
		"boot server to orchestrator": {up, mtls.ClientConfig(bootClient, dmz, "orchestrator.foothold.internal", mtls.Orchestrator)},
		"gateway to orchestrator":     {up, mtls.ClientConfig(gatewayClient, dmz, "orchestrator.foothold.internal", mtls.Orchestrator)},
		"VM to gateway":               {mtls.ServerConfig(gateway, pool(VM), mtls.VM), mtls.ClientConfig(vm, dmz, "gateway.foothold.internal", mtls.Gateway)},
	}
	const off = 10 * time.Minute
	for what, c := range calls {
		for _, o := range []struct{ server, client time.Duration }{{0, 0}, {off, 0}, {-off, 0}, {0, off}, {0, -off}, {-off, -off}} {
			if err := shakeAt(t, c.server, c.client, o.server, o.client); err != nil {
				t.Errorf("%s, clocks off by %v and %v: %v", what, o.server, o.client, err)
			}
		}
		for _, o := range []struct{ server, client time.Duration }{{-Backdating - time.Minute, 0}, {0, -Backdating - time.Minute}} {
			err := shakeAt(t, c.server, c.client, o.server, o.client)
			if err == nil || !strings.Contains(err.Error(), "current time") {
				t.Errorf("%s, clocks off by %v and %v: %v", what, o.server, o.client, err)
			}
		}
	}
}

func usageName(u Usage) string {
	if u == Server {
		return "-server"
	}
	return "-client"
}
