// Package gateway admits VMs to the tunnel and relays what they say through it.
//
// A VM comes to the admission listener with the certificate that the orchestrator
// issued for this start. The gateway checks that certificate, address and WireGuard
// key belong together and asks the orchestrator, which decides. An admitted key
// becomes a WireGuard peer with one tunnel address and a pre-shared key that both ends
// take from the admission's TLS connection, so a tunnel is bound to its admission.
//
// A tunnel is quarantined at first: it reaches the gateway's relay and nothing else.
// Zone documents open it, by the flows they list, and end it. Every permission is a
// flow of package ruleset with a deadline in the kernel; a peer whose time is over
// is removed by the daemon besides.
package gateway

import (
	"net/netip"
	"slices"

	"foothold/dmz/ruleset"
	"foothold/dmz/upstream"
	"foothold/internal/harden/fence"
	"foothold/internal/mtls"
)

// Config is the gateway's configuration file.
type Config struct {
	// State is a directory for the WireGuard key, pre-shared keys of admitted peers and the last zone document.
	State string `yaml:"state"`
	// Admission is where VMs ask for a tunnel (mutual TLS; CA issues VMs' certificates).
	Admission netip.AddrPort `yaml:"admission"`
	TLS       mtls.Files     `yaml:"tls"`
	// WireGuard is the UDP endpoint.
	WireGuard netip.AddrPort `yaml:"wireguard"`
	// Pool is the prefix of tunnel addresses; its first address is the gateway's own.
	Pool netip.Prefix `yaml:"pool"`
	// MTU is the path's between gateway and VMs, in bytes [1500]. No ICMP error passes the
	// firewalls, so every network on the way must carry it.
	MTU int `yaml:"mtu"`
	// RelayPort is the agent API's TCP port on the gateway's tunnel address [8443].
	RelayPort int `yaml:"relay_port"`
	// Store is where open tunnels fetch workloads. The zone document's flows decide; the
	// gateway refuses to start when it lies in Pool.
	Store    netip.AddrPort  `yaml:"store"`
	Upstream upstream.Config `yaml:"upstream"`
}

// tunDevice makes the tunnel's interface where the kernel has no WireGuard.
const tunDevice = "/dev/net/tun"

// Files are all that the gateway opens.
func (c Config) Files() fence.Files {
	return fence.Files{
		Own: []string{c.State}, Read: slices.Concat(c.TLS.Paths(), c.Upstream.Reads()),
		Kernel: []string{ruleset.Sysctls}, Devices: []string{tunDevice},
	}
}
