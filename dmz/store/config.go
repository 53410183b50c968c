// Package store keeps objects - workloads, kernels, initramfs - by their SHA-256, for
// VMs and daemons:
//
//	PUT  /v1/objects/SHA256   orchestrator
//	GET  /v1/objects/SHA256   VMs, boot servers, gateways, orchestrator
//	HEAD /v1/objects/SHA256   the same
//
// An object's name is its content: it never changes, and whoever fetches it checks it.
// There is no listing. A VM's certificate counts only from the VMs' authority, any
// other only from the DMZ's.
//
// What it refuses enters the tenant's journal: connections as tls.refused, calls as
// store.refused. It serves whether the orchestrator takes that or not.
package store

import (
	"net/netip"
	"slices"

	"foothold/dmz/upstream"
	"foothold/internal/harden/fence"
	"foothold/internal/mtls"
)

// Config is the store's configuration file.
type Config struct {
	// State is the directory of objects, each named by its SHA-256.
	State string `yaml:"state"`
	// Listen serves GET /v1/objects/SHA256 to VMs, boot servers and gateways, and PUT to the orchestrator.
	Listen netip.AddrPort `yaml:"listen"`
	// TLS: its CA file is the DMZ's authority.
	TLS mtls.Files `yaml:"tls"`
	// VMCA is the authority of the VMs' certificates (PEM).
	VMCA string `yaml:"vm_ca"`
	// Upstream is the orchestrator, which is told what was refused.
	Upstream upstream.Config `yaml:"upstream"`
}

// Files are all that the store opens.
func (c Config) Files() fence.Files {
	return fence.Files{Own: []string{c.State}, Read: slices.Concat(c.TLS.Paths(), []string{c.VMCA}, c.Upstream.Reads())}
}
