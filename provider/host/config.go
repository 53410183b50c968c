// Package host is the agent on a hypervisor: VMs, their disks, the TPM.
package host

import (
	"net/netip"

	"foothold/internal/mtls"
)

// Config is the host agent's configuration file. It is measured: one changed byte
// changes the host's quotes.
type Config struct {
	// Name is the host's name in the inventory.
	Name string `yaml:"name"`
	// State is the directory of VMs, volumes and templates.
	State string `yaml:"state"`
	// Listen is the management API.
	Listen netip.AddrPort `yaml:"listen"`
	// TLS: its CA issues the tenants' client certificates.
	TLS mtls.Files `yaml:"tls"`
	// Tenants lists who may call: the identity's name in the client certificate is
	// the orchestrator's, Tenant is the name its VMs run under.
	Tenants []Tenant `yaml:"tenants"`
	// TPM is the socket of the physical TPM, opened by this process alone.
	TPM string `yaml:"tpm"`
	// Log is the measurement log that firmware and launcher left.
	Log string `yaml:"log"`
	// Inventory is the provider's signed inventory, served as it is.
	Inventory string `yaml:"inventory"`
	// QEMU, BIOS, LoaderKernel and LoaderInitramfs are the measured files of the platform.
	QEMU            string `yaml:"qemu"`
	BIOS            string `yaml:"bios"`
	LoaderKernel    string `yaml:"loader_kernel"`
	LoaderInitramfs string `yaml:"loader_initramfs"`
	LoaderCmdline   string `yaml:"loader_cmdline"`
	// Bridge is the cloud network's bridge, to which each VM's tap is added as an isolated port.
	Bridge string `yaml:"bridge"`
	// Accel is kvm or tcg.
	Accel string `yaml:"accel"`
	// Boot timer: a VM that was not handed its components within this time is destroyed [60s].
	BootTimeout string `yaml:"boot_timeout"`
	// HoldTimeout ends a hold of the TPM that does not come to its quote [5s].
	HoldTimeout string `yaml:"hold_timeout"`
}

// Tenant is one permitted caller.
type Tenant struct {
	Identity string `yaml:"identity"` // NAME in the client certificate's foothold:orchestrator:NAME
	Tenant   string `yaml:"tenant"`
}
