// Package lab describes the whole system on one machine: its places, their
// addresses, and where each keeps its files.
//
// The table [Places] is the one truth about the lab's networks. lab/wiring builds
// them, lab/ground writes the daemons' configurations from the same addresses, and
// lab/supervisor runs the daemons in them.
//
//	tenant 10.80.0.0/24        tenant .10   intranet .20   internal .1
//	dmz    10.81.0.0/24        internal .1  external .2    bootserver .10  gateway .20  store .30
//	vpc    10.82.0.0/24        external .1  VMs .10-.150   neighbour .200
//	mgmt   10.83.0.0/24        internal .1  host .10
//	tunnel 10.84.0.0/16        gateway .0.1, VMs           (WireGuard, made by the gateway)
//
// Each local network is a bridge in the switch's namespace; the cloud network's
// bridge is the host's own, as on a hypervisor.
package lab

import "net/netip"

// Names of the places.
const (
	Tenant     = "tenant"
	Intranet   = "intranet"
	Internal   = "internal"
	BootServer = "bootserver"
	Gateway    = "gateway"
	Store      = "store"
	External   = "external"
	Host       = "host"
	Neighbour  = "neighbour"
)

// MTU of every local network, in bytes: jumbo frames, as between the racks of a data
// centre. Under emulation a packet costs a VM more than its bytes.
const MTU = 9000

// Local networks.
const (
	TenantLAN = "tenant"
	DMZLAN    = "dmz"
	CloudLAN  = "vpc"
	MgmtLAN   = "mgmt"
)

// Accelerators of the host's VMs.
const (
	KVM = "kvm"
	TCG = "tcg"
)

// CloudBridge is the host's bridge of the cloud network.
const CloudBridge = "cloud0"

// CloudInterface is the external firewall's interface to the cloud network.
const CloudInterface = "vpc0"

// TunnelPrefix holds the tunnel addresses; TunnelGateway is the gateway's own. VMs
// have addresses from FirstVM to LastVM on the cloud network.
var (
	TenantPrefix  = netip.MustParsePrefix("10.80.0.0/24")
	DMZPrefix     = netip.MustParsePrefix("10.81.0.0/24")
	CloudPrefix   = netip.MustParsePrefix("10.82.0.0/24")
	TunnelPrefix  = netip.MustParsePrefix("10.84.0.0/16")
	TunnelGateway = netip.MustParseAddr("10.84.0.1")
	FirstVM       = netip.MustParseAddr("10.82.0.10")
	LastVM        = netip.MustParseAddr("10.82.0.150")
)

// Port is one network interface of a place.
type Port struct {
	LAN     string
	Name    string
	Address netip.Prefix
	// Isolated ports of the bridge reach only its uplink, never each other.
	Isolated bool
}

// Route leads to a prefix.
type Route struct {
	To  netip.Prefix
	Via netip.Addr
}

// Place is one machine of the lab: a network namespace with the daemons in it.
type Place struct {
	Name   string
	About  string
	Ports  []Port
	Routes []Route
}

// Address is the place's address on a local network.
func (p Place) Address(lan string) netip.Addr {
	for _, port := range p.Ports {
		if port.LAN == lan {
			return port.Address.Addr()
		}
	}
	return netip.Addr{}
}

// Places lists every place of the lab.
func Places() []Place {
	all := netip.MustParsePrefix("0.0.0.0/0")
	route := func(to netip.Prefix, via string) Route { return Route{to, netip.MustParseAddr(via)} }
	port := func(lan, name, address string) Port {
		return Port{LAN: lan, Name: name, Address: netip.MustParsePrefix(address)}
	}
	dmz := func(name, about, address string, more ...Route) Place {
		return Place{name, about, []Port{port(DMZLAN, "dmz0", address)},
			append([]Route{route(all, "10.81.0.1"), route(CloudPrefix, "10.81.0.2")}, more...)}
	}
	return []Place{
		{Tenant, "the tenant's data centre: orchestrator, and what an employee's desk sees",
			[]Port{port(TenantLAN, "tenant0", "10.80.0.10/24")}, []Route{route(all, "10.80.0.1")}},
		{Intranet, "a small page of the tenant's intranet",
			[]Port{port(TenantLAN, "tenant0", "10.80.0.20/24")}, []Route{route(all, "10.80.0.1")}},
		{Internal, "internal firewall: tenant, DMZ, provider's management network",
			[]Port{port(TenantLAN, "tenant0", "10.80.0.1/24"), port(DMZLAN, "dmz0", "10.81.0.1/24"), port(MgmtLAN, "mgmt0", "10.83.0.1/24")},
			[]Route{route(CloudPrefix, "10.81.0.2"), route(TunnelPrefix, "10.81.0.20")}},
		dmz(BootServer, "boot server", "10.81.0.10/24"),
		dmz(Gateway, "tunnel gateway", "10.81.0.20/24"),
		dmz(Store, "store of workloads and boot components", "10.81.0.30/24", route(TunnelPrefix, "10.81.0.20")),
		{External, "external firewall: DMZ, cloud network",
			[]Port{port(DMZLAN, "dmz0", "10.81.0.2/24"), port(CloudLAN, CloudInterface, "10.82.0.1/24")},
			[]Route{route(all, "10.81.0.1")}},
		{Host, "the provider's hypervisor, with its TPM and the bridge of the cloud network",
			[]Port{port(MgmtLAN, "mgmt0", "10.83.0.10/24")}, []Route{route(all, "10.83.0.1")}},
		{Neighbour, "another tenant's machine on the cloud network",
			[]Port{{LAN: CloudLAN, Name: "vpc0", Address: netip.MustParsePrefix("10.82.0.200/24"), Isolated: true}},
			[]Route{route(all, "10.82.0.1")}},
	}
}

// Find returns the place of that name.
func Find(name string) (Place, bool) {
	for _, p := range Places() {
		if p.Name == name {
			return p, true
		}
	}
	return Place{}, false
}

// Address is where a place is on one of its networks; the table holds it.
func Address(place, lan string) netip.Addr {
	p, _ := Find(place)
	return p.Address(lan)
}
