package hostimage

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"

	"foothold/internal/bootimage"
	"foothold/internal/command"
	"foothold/internal/tpm/swtpm"
	"foothold/provider/qemu"
)

// Medium is a program of EFI's that a machine is booted from once.
type Medium struct {
	CacheDir string
	EFI      string    // the program
	TPM      string    // folder of the machine's TPM, which package swtpm made
	Asset    string    // chassis asset tag that the firmware states
	Console  io.Writer // takes what the serial console prints
	Progress func(string)
}

// Boot powers a machine on with the medium as its only disk, and returns when it is off.
func (m Medium) Boot(ctx context.Context) error {
	ovmf, err := bootimage.FetchTree(ctx, m.CacheDir, "ovmf", m.Progress)
	if err != nil {
		return err
	}
	work, err := os.MkdirTemp("", "foothold-") // sockets' paths are short
	if err != nil {
		return fmt.Errorf("boot medium: %w", err)
	}
	defer os.RemoveAll(work)
	esp := filepath.Join(work, "esp", "EFI", "BOOT")
	variables := filepath.Join(work, "variables")
	if err := os.MkdirAll(esp, 0o700); err != nil {
		return fmt.Errorf("boot medium: %w", err)
	}
	if err := copyFile(filepath.Join(esp, "BOOTX64.EFI"), m.EFI, 0o600); err != nil {
		return fmt.Errorf("boot medium: %w", err)
	}
	if err := copyFile(variables, filepath.Join(ovmf, "usr/share/OVMF/OVMF_VARS_4M.fd"), 0o600); err != nil {
		return fmt.Errorf("boot medium: %w", err)
	}
	runtime.LockOSThread() // the TPM ends with the thread that starts it
	defer runtime.UnlockOSThread()
	tpm, err := swtpm.StartFor(ctx, m.TPM, filepath.Join(work, "tpm"))
	if err != nil {
		return err
	}
	defer tpm.Stop()
	cmd, err := command.New(ctx, "qemu-system-x86_64", "-machine", "q35,accel=tcg,smm=off", "-cpu", qemu.EmulatedCPU, "-smp", "1", "-m", "512",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-smbios", "type=3,asset="+m.Asset,
		"-drive", "if=pflash,format=raw,readonly=on,file="+filepath.Join(ovmf, "usr/share/OVMF/OVMF_CODE_4M.fd"),
		"-drive", "if=pflash,format=raw,file="+variables,
		"-chardev", "socket,id=tpm,path="+tpm.Socket, "-tpmdev", "emulator,id=tpm,chardev=tpm", "-device", "tpm-crb,tpmdev=tpm",
		"-drive", "if=none,id=esp,format=raw,readonly=on,file=fat:"+filepath.Join(work, "esp"), "-device", "virtio-blk-pci,drive=esp,bootindex=1")
	if err != nil {
		return err
	}
	cmd.Stdout = m.Console
	if _, err := command.Wait(cmd); err != nil {
		return fmt.Errorf("boot medium: %w", err)
	}
	return nil
}
