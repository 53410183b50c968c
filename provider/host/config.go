package host

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"foothold/internal/mtls"
	"foothold/protocol/vmspec"
	"foothold/provider/qemu"
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
	// Log is the measurement log that a lab's launcher left. A host in production has none,
	// and names FirmwareLog and KernelList instead: exactly one of the two.
	Log string `yaml:"log,omitempty"`
	// FirmwareLog and KernelList are the logs of firmware and kernel, in production:
	// /sys/kernel/security/tpm0/binary_bios_measurements and
	// /sys/kernel/security/ima/binary_runtime_measurements. The agent's user must be able to
	// read them, and the kernel's policy must measure what that user reads.
	FirmwareLog string `yaml:"firmware_log,omitempty"`
	KernelList  string `yaml:"kernel_list,omitempty"`
	// UserspaceLog is the log of what the host's systemd measures (from 254), beside the two:
	// /run/log/systemd/tpm2-measure.log. Without it only the reference values say what a
	// system may have measured. The agent's user must be able to read it.
	UserspaceLog string `yaml:"userspace_log,omitempty"`
	// Inventory is the provider's signed inventory, served as it is. This host's TPM keys
	// are taken from its entry.
	Inventory string `yaml:"inventory"`
	// InventoryKey is the provider's key that signs it: Ed25519, 64 hexadecimal digits.
	InventoryKey string `yaml:"inventory_key"`
	// QEMU, BIOS, LoaderKernel and LoaderInitramfs are the measured files of the
	// platform: the agent refuses one whose digest is not in Log, or in KernelList.
	QEMU            string `yaml:"qemu"`
	BIOS            string `yaml:"bios"`
	LoaderKernel    string `yaml:"loader_kernel"`
	LoaderInitramfs string `yaml:"loader_initramfs"`
	LoaderCmdline   string `yaml:"loader_cmdline"`
	// QEMUModule is the file of QEMU's TCG accelerator, which distributions build as a
	// module of its own; measured as well. KVM needs none.
	QEMUModule string `yaml:"qemu_module,omitempty"`
	// Bridge is the cloud network's bridge, to which each VM's tap is added as an isolated port.
	Bridge string `yaml:"bridge"`
	// Accel is kvm or tcg.
	Accel string `yaml:"accel"`
	// Boot timer: a VM that was not handed its components within this time is destroyed [60s].
	BootTimeout string `yaml:"boot_timeout"`
	// HoldTimeout ends a VM that does not send its next command for the TPM in time [5s].
	HoldTimeout string `yaml:"hold_timeout"`
}

// Tenant is one permitted caller.
type Tenant struct {
	Identity string `yaml:"identity"` // NAME in the client certificate's foothold:orchestrator:NAME
	Tenant   string `yaml:"tenant"`
}

// Defaults of the times.
const (
	defaultBootTimeout = 60 * time.Second
	defaultHoldTimeout = 5 * time.Second
)

// limits are the parsed times.
type limits struct{ boot, hold time.Duration }

// check refuses a configuration that lacks something or contradicts itself.
func (c *Config) check() (limits, error) {
	for field, value := range map[string]string{
		"state": c.State, "tpm": c.TPM, "inventory": c.Inventory, "inventory_key": c.InventoryKey, "qemu": c.QEMU, "bios": c.BIOS,
		"loader_kernel": c.LoaderKernel, "loader_initramfs": c.LoaderInitramfs, "bridge": c.Bridge,
	} {
		if value == "" {
			return limits{}, fmt.Errorf("configuration: %s is missing", field)
		}
	}
	switch {
	case (c.Log == "") == (c.FirmwareLog == "") || (c.FirmwareLog == "") != (c.KernelList == ""):
		return limits{}, errors.New("configuration: want either log, which a lab's launcher left, or firmware_log and kernel_list")
	case c.UserspaceLog != "" && c.FirmwareLog == "":
		return limits{}, errors.New("configuration: userspace_log: it goes with firmware_log and kernel_list")
	case !vmspec.ValidName(c.Name):
		return limits{}, errors.New("configuration: name: want a lower-case DNS label")
	case !c.Listen.IsValid():
		return limits{}, errors.New("configuration: listen: want ADDRESS:PORT")
	case c.Accel != qemu.KVM && c.Accel != qemu.TCG:
		return limits{}, errors.New("configuration: accel: want kvm or tcg")
	case c.Accel == qemu.TCG && c.QEMUModule == "":
		return limits{}, errors.New("configuration: qemu_module: want the file of the TCG accelerator")
	case len(c.Tenants) == 0:
		return limits{}, errors.New("configuration: tenants: want at least one")
	}
	seen := map[string]bool{}
	for _, t := range c.Tenants {
		if !vmspec.ValidName(t.Tenant) || t.Identity == "" || seen[t.Identity] {
			return limits{}, fmt.Errorf("configuration: tenants: %q: want each identity once, with a lower-case DNS label as tenant", t.Identity)
		}
		seen[t.Identity] = true
	}
	boot, err := duration("boot_timeout", c.BootTimeout, defaultBootTimeout)
	if err != nil {
		return limits{}, err
	}
	hold, err := duration("hold_timeout", c.HoldTimeout, defaultHoldTimeout)
	return limits{boot, hold}, err
}

func duration(field, text string, otherwise time.Duration) (time.Duration, error) {
	if text == "" {
		return otherwise, nil
	}
	d, err := time.ParseDuration(text)
	if err != nil || d <= 0 {
		return 0, fmt.Errorf("configuration: %s: want a positive duration such as %s", field, otherwise)
	}
	return d, nil
}

// tenant is the name under which the caller's VMs run.
func (c *Config) tenant(identity string) (string, bool) {
	for _, t := range c.Tenants {
		if t.Identity == identity {
			return t.Tenant, true
		}
	}
	return "", false
}
