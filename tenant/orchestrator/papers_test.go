package orchestrator

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"foothold/internal/foldertest"
	"foothold/internal/mtls"
	"foothold/protocol/zone"
	"foothold/tenant/authority"
	"foothold/tenant/vault"
)

// day is how long certificates of tests are good.
const day = 24 * time.Hour

// holder is who has a certificate in a test's world.
type holder struct {
	from  authority.Name
	role  string
	name  string
	usage authority.Usage
	dns   string // of a server
}

// All of them, by whose authority certifies them.
var (
	hostAPI    = hostNamed("host-1")
	ofProvider = []holder{hostAPI, hostNamed("host-2"), hostNamed("host-3")}

	objectStore   = holder{authority.DMZ, mtls.Store, "store", authority.Server, "store.foothold.internal"}
	operatorAPI   = holder{authority.Operator, mtls.Orchestrator, "o", authority.Server, "localhost"}
	upstreamAPI   = holder{authority.DMZ, mtls.Orchestrator, "o", authority.Server, "orchestrator.foothold.internal"}
	clientOfStore = holder{authority.DMZ, mtls.Orchestrator, "o", authority.Client, ""}
	clientOfHosts = holder{authority.Tenant, mtls.Orchestrator, "acme", authority.Client, ""}
	operator      = holder{authority.Operator, mtls.Operator, "alice", authority.Client, ""}
	dmzDaemons    = []holder{
		{authority.DMZ, mtls.BootServer, "bootserver", authority.Client, ""},
		{authority.DMZ, mtls.Gateway, "gateway", authority.Client, ""},
		{authority.DMZ, mtls.Firewall, zone.External, authority.Client, ""},
		{authority.DMZ, mtls.Firewall, zone.Internal, authority.Client, ""},
		{authority.DMZ, mtls.Store, "store", authority.Client, ""},
	}
	ofTenant = append([]holder{objectStore, operatorAPI, upstreamAPI, clientOfStore, clientOfHosts, operator}, dmzDaemons...)
)

func hostNamed(name string) holder {
	return holder{authority.Provider, mtls.Host, name, authority.Server, name + ".host.provider.internal"}
}

// base names a holder's files.
func (h holder) base() string { return fmt.Sprintf("%s-%s-%s-%d", h.from, h.role, h.name, h.usage) }

func (h holder) issue(set *authority.Set, dir string) error {
	req := authority.Request{Identity: mtls.Identity{Role: h.role, Name: h.name}, Usage: h.usage, Lifetime: day}
	if h.dns != "" {
		req.DNS = []string{h.dns}
	}
	if h == operatorAPI {
		req.IPs = []netip.Addr{netip.MustParseAddr("127.0.0.1")}
	}
	_, err := set.WriteFiles(dir, h.base(), h.from, req)
	return err
}

// beginning is what a world begins with: a new orchestrator's state, a provider's authority,
// and everybody's certificates. It is made once; each world changes a copy.
var beginning = sync.OnceValues(func() (foldertest.Folder, error) {
	return foldertest.Make(func(dir string) error {
		if _, err := Init(context.Background(), filepath.Join(dir, "tenant")); err != nil {
			return err
		}
		_, ca, err := Open(filepath.Join(dir, "tenant"))
		if err != nil {
			return err
		}
		v, err := vault.Create(filepath.Join(dir, "pvault"), filepath.Join(dir, "pkey"))
		if err != nil {
			return err
		}
		provider, err := authority.Create(v, filepath.Join(dir, "provider"), authority.Provider)
		if err != nil {
			return err
		}
		for _, h := range ofTenant {
			if err := h.issue(ca, dir); err != nil {
				return err
			}
		}
		for _, h := range ofProvider {
			if err := h.issue(provider, dir); err != nil {
				return err
			}
		}
		return nil
	})
})

// papers are the files of a world's beginning.
type papers struct {
	dir   string
	state string // the orchestrator's
	ca    *authority.Set
}

func newPapers(t testing.TB, dir string) papers {
	t.Helper()
	folder, err := beginning()
	check(t, err)
	folder.Copy(t, dir)
	p := papers{dir: dir, state: filepath.Join(dir, "tenant")}
	_, p.ca, err = Open(p.state)
	check(t, err)
	return p
}

// authority is the PEM file of an authority's certificate.
func (p papers) authority(name authority.Name) string {
	if name == authority.Provider {
		return filepath.Join(p.dir, "provider", filepath.Base(p.ca.CertFile(name)))
	}
	return p.ca.CertFile(name)
}

// of is a holder's key and certificate; the authority is that of its peers, if it is
// ours: a host's and its clients' are each other's.
func (p papers) of(h holder) mtls.Files {
	peers := h.from
	switch {
	case h.role == mtls.Host:
		peers = authority.Tenant
	case h == clientOfHosts:
		peers = authority.Provider
	}
	base := filepath.Join(p.dir, h.base())
	return mtls.Files{Cert: base + ".crt", Key: base + ".key", CA: p.authority(peers)}
}
