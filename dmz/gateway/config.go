// Package gateway admits VMs to the tunnel and relays what they say through it.
package gateway

import (
	"net/netip"

	"foothold/dmz/upstream"
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
	// RelayPort is the agent API's TCP port on the gateway's tunnel address [8443].
	RelayPort int `yaml:"relay_port"`
	// Store is what an open tunnel may reach in the DMZ besides its policy's destinations.
	Store    netip.AddrPort  `yaml:"store"`
	Upstream upstream.Config `yaml:"upstream"`
}
