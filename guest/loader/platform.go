package loader

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"foothold/internal/strictjson"
	"foothold/protocol/token"
	"foothold/protocol/vmspec"

	"golang.org/x/sys/unix"
)

// fwCfgDir is where the kernel shows what the platform passes.
const fwCfgDir = "/sys/firmware/qemu_fw_cfg/by_name"

// maxSettings bounds the settings in bytes: a certificate of 8 KiB in base64, and room.
const maxSettings = 32 << 10

// ErrDHCP is returned for settings that ask for DHCP. This loader sets addresses
// statically alone; a DHCP exchange would be unauthenticated input before the tunnel.
var ErrDHCP = errors.New("the settings ask for DHCP, which this loader does not do: give the address in the settings")

// Settings reads and checks what the platform passes: settings and T1. T1 must be
// the one whose digest is in the settings, since that digest was measured.
func Settings(settings, text []byte) (vmspec.Spec, token.Token, error) {
	var spec vmspec.Spec
	if len(settings) > maxSettings {
		return spec, token.Token{}, strictjson.ErrTooLarge
	}
	if err := strictjson.Unmarshal(settings, &spec); err != nil {
		return spec, token.Token{}, fmt.Errorf("read settings: %w", err)
	}
	if err := spec.Validate(); err != nil {
		return spec, token.Token{}, err
	}
	if spec.Network.DHCP {
		return spec, token.Token{}, ErrDHCP
	}
	t1, err := token.Parse(token.T1, string(text))
	if err != nil {
		return spec, token.Token{}, fmt.Errorf("read T1: %w", err)
	}
	if t1.Digest() != spec.TokenDigest {
		return spec, token.Token{}, errors.New("read T1: it is not the one of the settings")
	}
	return spec, t1, nil
}

// ReadPlatform reads the platform's items of this machine.
func ReadPlatform() (vmspec.Spec, token.Token, error) {
	settings, err := os.ReadFile(filepath.Join(fwCfgDir, vmspec.FwCfgSettings, "raw"))
	if err != nil {
		return vmspec.Spec{}, token.Token{}, fmt.Errorf("read settings: %w", err)
	}
	text, err := os.ReadFile(filepath.Join(fwCfgDir, vmspec.FwCfgToken, "raw"))
	if err != nil {
		return vmspec.Spec{}, token.Token{}, fmt.Errorf("read T1: %w", err)
	}
	defer clear(text)
	return Settings(settings, text)
}

// Kexec loads a kernel for [Jump] (kexec_file_load(2)).
func Kexec(kernel, initrd *os.File, cmdline string) error {
	return unix.KexecFileLoad(int(kernel.Fd()), int(initrd.Fd()), cmdline, 0)
}

// Jump starts the loaded kernel. It returns only if that fails.
func Jump() error { return unix.Reboot(unix.LINUX_REBOOT_CMD_KEXEC) }
