package hostimage

import (
	"crypto/ed25519"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"foothold/internal/mtls"
	"foothold/internal/signingkey"
	"foothold/protocol/digest"
	"foothold/provider/host"
	"foothold/provider/measure"

	"github.com/goccy/go-yaml"
)

// Root is where the OS disk is mounted.
const Root = "/host"

// The host's agent inside the machine.
const (
	HostName      = "alpha"
	Location      = "lab, rack 2, unit 1"
	Release       = "hostimage"
	Orchestrator  = "acme"               // the identity's name that may call
	ConfigFile    = Root + "/host.yaml"  // the agent's configuration
	TPMDevice     = "/dev/tpm0"          //
	TLSDir        = "/run/tls"           // of agent and caller, made in the machine for one run
	EntryFile     = "/run/entry"         // inventory.Host
	InventoryFile = "/run/inventory"     // signed, with that entry alone
	stateDir      = "/run/foothold-host" //
)

// Provider signs the inventory inside the machine. The key follows from the image and is no
// secret: whoever judges the machine signs an inventory of their own.
func Provider() ed25519.PrivateKey {
	seed := digest.Of([]byte("provider of the lab's host image"))
	return ed25519.NewKeyFromSeed(seed[:])
}

// AgentAddress is where the agent listens: nowhere else than in the machine.
func AgentAddress() netip.AddrPort { return netip.MustParseAddrPort("127.0.0.1:7443") }

// agentFiles are what the agent runs for VMs. None is started here, so that they only have
// to be what was measured.
func agentFiles() []string { return []string{"qemu", "bios", "loader-kernel", "loader-initramfs"} }

// agentConfig is the agent's configuration as a host in production has it.
func agentConfig() host.Config {
	at := func(name string) string { return filepath.Join(Root, name) }
	logs := measure.SecurityFS()
	return host.Config{
		Name: HostName, State: stateDir, Listen: AgentAddress(),
		TLS:     mtls.Files{Cert: filepath.Join(TLSDir, "host.crt"), Key: filepath.Join(TLSDir, "host.key"), CA: filepath.Join(TLSDir, "tenant-ca.crt")},
		Tenants: []host.Tenant{{Identity: Orchestrator, Tenant: "acme"}}, TPM: TPMDevice,
		FirmwareLog: logs.Firmware, KernelList: logs.Kernel, UserspaceLog: measure.SystemdLog, Inventory: InventoryFile, InventoryKey: signingkey.Public(Provider()),
		QEMU: at("qemu"), BIOS: at("bios"), LoaderKernel: at("loader-kernel"), LoaderInitramfs: at("loader-initramfs"),
		Bridge: "cloud0", Accel: "kvm",
	}
}

// writeAgent puts the agent's configuration and its files onto the OS disk.
func writeAgent(tree string) error {
	conf, err := yaml.Marshal(agentConfig())
	if err != nil {
		return fmt.Errorf("encode the agent's configuration: %w", err)
	}
	if err := os.WriteFile(filepath.Join(tree, filepath.Base(ConfigFile)), conf, 0o644); err != nil {
		return err
	}
	for _, name := range agentFiles() {
		if err := os.WriteFile(filepath.Join(tree, name), []byte("stands for the host's "+name+"\n"), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// Phases are the words that the first process measures as systemd does, and logs as it does,
// before the agent runs: those of a boot that has left its initramfs.
var Phases = []string{"enter-initrd", "leave-initrd", "sysinit"}
