// Package store keeps objects by their SHA-256 for VMs and daemons.
package store

import (
	"net/netip"

	"foothold/internal/mtls"
)

// Config is the store's configuration file.
type Config struct {
	// State is the directory of objects, each named by its SHA-256.
	State string `yaml:"state"`
	// Listen serves GET /v1/objects/SHA256 to VMs, boot servers and gateways, and PUT to the orchestrator.
	Listen netip.AddrPort `yaml:"listen"`
	// TLS: its CA file holds the DMZ's and the VMs' authorities.
	TLS mtls.Files `yaml:"tls"`
}
