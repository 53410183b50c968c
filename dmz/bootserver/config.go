// Package bootserver carries acts 4 to 7 between VMs and the orchestrator.
package bootserver

import (
	"net/netip"
	"slices"

	"foothold/dmz/upstream"
	"foothold/internal/harden/fence"
	"foothold/internal/mtls"
)

// Config is the boot server's configuration file.
type Config struct {
	// State is a directory for the cached components and the last zone document.
	State string `yaml:"state"`
	// Listen is where VMs boot from.
	Listen netip.AddrPort `yaml:"listen"`
	// Cert and Key are the certificate that VMs check against the boot CA (PEM).
	Cert string `yaml:"cert"`
	Key  string `yaml:"key"`
	// Upstream is the orchestrator.
	Upstream upstream.Config `yaml:"upstream"`
	// Store holds kernels and shared initramfs.
	Store netip.AddrPort `yaml:"store"`
	// StoreName is the DNS name in the store's certificate.
	StoreName string `yaml:"store_name"`
	// StoreTLS is how the boot server reaches the store.
	StoreTLS mtls.Files `yaml:"store_tls"`
}

// Files are all that the boot server opens.
func (c Config) Files() fence.Files {
	return fence.Files{Own: []string{c.State}, Read: slices.Concat([]string{c.Cert, c.Key}, c.StoreTLS.Paths(), c.Upstream.Reads())}
}
