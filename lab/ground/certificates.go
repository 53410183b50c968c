package ground

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"

	"foothold/internal/mtls"
	"foothold/lab"
	"foothold/tenant/authority"
	"foothold/tenant/vault"
)

// openProvider opens the provider's own authority, or makes it.
func openProvider(dir string) (*authority.Set, error) {
	sealed, kek := filepath.Join(dir, "vault"), filepath.Join(dir, "kek")
	v, err := vault.Open(sealed, kek)
	if errors.Is(err, fs.ErrNotExist) {
		if err := os.RemoveAll(dir); err != nil { // a crash may have left half of it
			return nil, fmt.Errorf("make the provider's authority: %w", err)
		}
		if err := folders(dir); err != nil {
			return nil, err
		}
		v, err = vault.Create(sealed, kek)
	}
	if err != nil {
		return nil, err
	}
	return authority.Create(v, filepath.Join(dir, "ca"), authority.Provider)
}

// issue makes a key and a certificate in dir.
func issue(set *authority.Set, dir, base string, by authority.Name, id mtls.Identity, usage authority.Usage, dns ...string) error {
	req := authority.Request{Identity: id, Usage: usage, Lifetime: lifetime, DNS: dns}
	if usage == authority.Server && by == authority.Operator {
		req.IPs = []netip.Addr{netip.MustParseAddr("127.0.0.1")}
	}
	_, err := set.WriteFiles(dir, base, by, req)
	return err
}

// issueAll issues every daemon's certificates and hands out the authorities'
// certificates that its listeners and dialers pin.
func (m *maker) issueAll(context.Context) error {
	type cert struct {
		set   *authority.Set
		dir   string
		base  string
		by    authority.Name
		id    mtls.Identity
		usage authority.Usage
		dns   string
	}
	orchestrator := mtls.Identity{Role: mtls.Orchestrator, Name: TenantName}
	daemon := func(role, name string) mtls.Identity { return mtls.Identity{Role: role, Name: name} }
	tls, server, client := m.Tenant("tls"), authority.Server, authority.Client
	dmz := func(name string) string { return m.DMZ(name) }
	for _, name := range []string{lab.BootServer, lab.Gateway, lab.Store, lab.External, lab.Internal} {
		if err := folders(dmz(name), m.DMZ(name, "state")); err != nil {
			return err
		}
	}
	for _, c := range []cert{
		{m.tenant, tls, "operator", authority.Operator, orchestrator, server, "localhost"},
		{m.tenant, tls, "upstream", authority.DMZ, orchestrator, server, orchestratorDNS},
		{m.tenant, tls, "store", authority.DMZ, orchestrator, client, ""},
		{m.tenant, tls, "host", authority.Tenant, orchestrator, client, ""},
		{m.tenant, dmz(lab.BootServer), "boot", authority.Boot, daemon(mtls.BootServer, lab.BootServer), server, bootDNS},
		{m.tenant, dmz(lab.BootServer), "client", authority.DMZ, daemon(mtls.BootServer, lab.BootServer), client, ""},
		{m.tenant, dmz(lab.Gateway), "gateway", authority.DMZ, daemon(mtls.Gateway, lab.Gateway), server, gatewayDNS},
		{m.tenant, dmz(lab.Gateway), "client", authority.DMZ, daemon(mtls.Gateway, lab.Gateway), client, ""},
		{m.tenant, dmz(lab.Store), "store", authority.DMZ, daemon(mtls.Store, lab.Store), server, storeDNS},
		{m.tenant, dmz(lab.Store), "client", authority.DMZ, daemon(mtls.Store, lab.Store), client, ""},
		{m.tenant, dmz(lab.External), "client", authority.DMZ, daemon(mtls.Firewall, lab.External), client, ""},
		{m.tenant, dmz(lab.Internal), "client", authority.DMZ, daemon(mtls.Firewall, lab.Internal), client, ""},
		{m.provider, m.Provider("tls"), "host", authority.Provider, daemon(mtls.Host, HostName), server, hostDNS},
	} {
		var dns []string
		if c.dns != "" {
			dns = []string{c.dns}
		}
		if err := issue(c.set, c.dir, c.base, c.by, c.id, c.usage, dns...); err != nil {
			return err
		}
	}
	return m.handOut()
}

// handOut copies authorities' certificates, which are public, to where they are pinned.
func (m *maker) handOut() error {
	ca := m.tenant.CertFile
	for to, from := range map[string]string{
		m.Tenant("tls", "provider-ca.crt"):  m.provider.CertFile(authority.Provider),
		m.Provider("tls", "tenant-ca.crt"):  ca(authority.Tenant),
		m.DMZ(lab.BootServer, "dmz-ca.crt"): ca(authority.DMZ),
		m.DMZ(lab.Gateway, "dmz-ca.crt"):    ca(authority.DMZ),
		m.DMZ(lab.Gateway, "vm-ca.crt"):     ca(authority.VM),
		m.DMZ(lab.Store, "dmz-ca.crt"):      ca(authority.DMZ),
		m.DMZ(lab.Store, "vm-ca.crt"):       ca(authority.VM),
		m.DMZ(lab.External, "dmz-ca.crt"):   ca(authority.DMZ),
		m.DMZ(lab.Internal, "dmz-ca.crt"):   ca(authority.DMZ),
	} {
		if err := hand(from, to); err != nil {
			return err
		}
	}
	return nil
}
