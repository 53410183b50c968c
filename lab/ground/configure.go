package ground

import (
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"time"

	"github.com/goccy/go-yaml"

	"foothold/dmz/bootserver"
	"foothold/dmz/firewall"
	"foothold/dmz/gateway"
	"foothold/dmz/store"
	"foothold/dmz/upstream"
	"foothold/internal/durable"
	"foothold/internal/mtls"
	"foothold/internal/signingkey"
	"foothold/lab"
	"foothold/protocol/platform"
	"foothold/protocol/zone"
	"foothold/tenant/authority"
	"foothold/tenant/orchestrator"
)

// Addresses of the daemons, from the table of places.
func at(place, lan string, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(lab.Address(place, lan), port)
}

func single(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func writeConfig(file string, conf any) error {
	data, err := yaml.Marshal(conf)
	if err != nil {
		return fmt.Errorf("write %s: %w", file, err)
	}
	return durable.WriteFile(file, data, 0o600)
}

func (m *maker) configureAll(context.Context) error {
	for file, conf := range map[string]any{
		m.Tenant("orchestrator.yaml"):        m.orchestratorConfig(),
		m.DMZ(lab.BootServer, "config.yaml"): m.bootserverConfig(),
		m.DMZ(lab.Gateway, "config.yaml"):    m.gatewayConfig(),
		m.DMZ(lab.Store, "config.yaml"):      m.storeConfig(),
		m.DMZ(lab.External, "config.yaml"):   m.firewallConfig(lab.External),
		m.DMZ(lab.Internal, "config.yaml"):   m.firewallConfig(lab.Internal),
	} {
		if err := writeConfig(file, conf); err != nil {
			return err
		}
	}
	return nil
}

// upstreamAddress is the orchestrator as the DMZ's daemons reach it.
func upstreamAddress() netip.AddrPort { return at(lab.Tenant, lab.TenantLAN, upstreamPort) }

// apiFile is the number of the open file with which the orchestrator gets the
// operators' listening socket.
const apiFile = "fd:3"

func (m *maker) orchestratorConfig() orchestrator.Config {
	tls := func(base, ca string) mtls.Files {
		return mtls.Files{Cert: m.Tenant("tls", base+".crt"), Key: m.Tenant("tls", base+".key"), CA: ca}
	}
	ca := m.tenant.CertFile
	self := lab.Address(lab.Tenant, lab.TenantLAN)
	storeAddress := at(lab.Store, lab.DMZLAN, storePort)
	return orchestrator.Config{
		State: m.Tenant("orchestrator"), Profile: platform.Lab, API: apiFile, Upstream: upstreamAddress(), Tenant: TenantName,
		OperatorTLS: tls("operator", ca(authority.Operator)),
		UpstreamTLS: tls("upstream", ca(authority.DMZ)),
		StoreTLS:    tls("store", ca(authority.DMZ)),
		HostTLS:     tls("host", m.Tenant("tls", "provider-ca.crt")),

		Inventory: m.Tenant("inventory.json"), InventoryKey: signingkey.Public(m.inventoryKey), TPMRoots: m.Tenant("tpm-roots.pem"),
		Platform: m.Tenant("platform.json"), PlatformKey: signingkey.Public(m.platformKey), HostLost: "close", QuoteRefused: "close",
		ComponentKey: signingkey.Public(m.componentKey),

		Boot: orchestrator.Boot{Address: at(lab.BootServer, lab.DMZLAN, bootPort), ServerName: bootDNS, CA: ca(authority.Boot)},
		Gateway: orchestrator.Gateway{
			Admission: at(lab.Gateway, lab.DMZLAN, admissionPort), WireGuard: at(lab.Gateway, lab.DMZLAN, wireguardPort),
			ServerName: gatewayDNS, CA: ca(authority.DMZ), Pool: lab.TunnelPrefix,
		},
		Store: orchestrator.Store{Address: storeAddress, ServerName: storeDNS},
		Network: orchestrator.Network{
			Prefix: lab.CloudPrefix, Gateway: lab.Address(lab.External, lab.CloudLAN),
			First: lab.FirstVM, Last: lab.LastVM, MTU: lab.MTU, Self: self,
		},
		Limits: orchestrator.Limits{
			Reserved: m.limit(30 * time.Second), Booting: m.limit(bootLimit), Unlocking: m.limit(60 * time.Second),
			Connecting: m.limit(90 * time.Second), Lease: m.limit(60 * time.Second), VMs: 64, MemoryMiB: 65536,
			BootsAtOnce: bootsAtOnce(), AttestEvery: time.Minute, AttestWithin: 5 * time.Minute,
		},
		Standing:        standing(self, storeAddress),
		Destinations:    []orchestrator.Destination{{Prefix: single(lab.Address(lab.Intranet, lab.TenantLAN)), Proto: "tcp", Port: 80}},
		WorkloadClients: []netip.Prefix{lab.TenantPrefix},
	}
}

// bootsAtOnce is how many VMs boot at the lab's host at once: more on its processors, which
// may have to emulate theirs, would all come too late.
func bootsAtOnce() int { return max(4, 2*runtime.NumCPU()) }

// bootLimit is how long a VM may take to boot, by the orchestrator's clock and by the host's.
const bootLimit = 60 * time.Second

func (m *maker) limit(d time.Duration) time.Duration { return d * time.Duration(max(m.Patience, 1)) }

// standing lists the flows between daemons that cross the internal firewall.
func standing(self netip.Addr, storeAddress netip.AddrPort) []orchestrator.Standing {
	internal := func(from, to netip.Addr, port uint16) orchestrator.Standing {
		return orchestrator.Standing{Zone: zone.Internal, From: single(from), To: single(to), Proto: "tcp", Port: int(port)}
	}
	flows := []orchestrator.Standing{
		internal(self, lab.Address(lab.Host, lab.MgmtLAN), hostPort),
		internal(self, storeAddress.Addr(), storeAddress.Port()),
	}
	for _, name := range []string{lab.BootServer, lab.Gateway, lab.Store, lab.External} {
		flows = append(flows, internal(lab.Address(name, lab.DMZLAN), self, upstreamPort))
	}
	return flows
}

func (m *maker) upstreamConfig(name string) upstream.Config {
	return upstream.Config{
		Address: upstreamAddress(), ServerName: orchestratorDNS, ZoneKey: m.init.ZoneKey,
		TLS: mtls.Files{Cert: m.DMZ(name, "client.crt"), Key: m.DMZ(name, "client.key"), CA: m.DMZ(name, "dmz-ca.crt")},
	}
}

func (m *maker) bootserverConfig() bootserver.Config {
	dir := func(file string) string { return m.DMZ(lab.BootServer, file) }
	return bootserver.Config{
		State: dir("state"), Listen: at(lab.BootServer, lab.DMZLAN, bootPort), Cert: dir("boot.crt"), Key: dir("boot.key"),
		Upstream: m.upstreamConfig(lab.BootServer),
		Store:    at(lab.Store, lab.DMZLAN, storePort), StoreName: storeDNS,
		StoreTLS: mtls.Files{Cert: dir("client.crt"), Key: dir("client.key"), CA: dir("dmz-ca.crt")},
	}
}

func (m *maker) gatewayConfig() gateway.Config {
	dir := func(file string) string { return m.DMZ(lab.Gateway, file) }
	return gateway.Config{
		State: dir("state"), Admission: at(lab.Gateway, lab.DMZLAN, admissionPort), WireGuard: at(lab.Gateway, lab.DMZLAN, wireguardPort),
		TLS:  mtls.Files{Cert: dir("gateway.crt"), Key: dir("gateway.key"), CA: dir("vm-ca.crt")},
		Pool: lab.TunnelPrefix, MTU: lab.MTU, RelayPort: relayPort, Store: at(lab.Store, lab.DMZLAN, storePort),
		Upstream: m.upstreamConfig(lab.Gateway),
	}
}

func (m *maker) storeConfig() store.Config {
	dir := func(file string) string { return m.DMZ(lab.Store, file) }
	return store.Config{
		State: dir("state"), Listen: at(lab.Store, lab.DMZLAN, storePort),
		TLS:  mtls.Files{Cert: dir("store.crt"), Key: dir("store.key"), CA: dir("dmz-ca.crt")},
		VMCA: dir("vm-ca.crt"), Upstream: m.upstreamConfig(lab.Store),
	}
}

// firewallConfig names what must pass before the first zone document: the way of
// every DMZ daemon, and of the firewalls themselves, to the orchestrator.
func (m *maker) firewallConfig(name string) firewall.Config {
	conf := firewall.Config{State: m.DMZ(name, "state"), Zone: name, Upstream: m.upstreamConfig(name)}
	to := upstreamAddress()
	from := []netip.Addr{lab.Address(lab.External, lab.DMZLAN)}
	if name == lab.External {
		conf.Adjacent = lab.CloudInterface
	} else {
		from = append(from, lab.Address(lab.Internal, lab.TenantLAN), lab.Address(lab.BootServer, lab.DMZLAN), lab.Address(lab.Gateway, lab.DMZLAN), lab.Address(lab.Store, lab.DMZLAN))
	}
	for _, a := range from {
		conf.Bootstrap = append(conf.Bootstrap, firewall.Bootstrap{
			From: single(a).String(), To: single(to.Addr()).String(), Proto: "tcp", Port: int(to.Port()),
		})
	}
	return conf
}
