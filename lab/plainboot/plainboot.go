// Package plainboot boots a template's OS in QEMU without Foothold: the same kernel,
// root and machine settings, but no encryption, no attestation, no tunnel. The time
// to the sample workload's first answer is the yardstick for a VM's real start.
//
// With Crypt it opens the encrypted template by a detached header and dm-verity
// first, which shows that what the tenant's side writes is what a guest can open.
package plainboot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"foothold/internal/bootimage"
	"foothold/internal/command"
	"foothold/internal/cpio"
	"foothold/internal/secret"
	"foothold/protocol/digest"
	"foothold/provider/qemu"
)

// poll is the time between two looks for the workload's first answer.
const poll = 20 * time.Millisecond

// Options of one boot. Every path is a file.
type Options struct {
	Kernel    *bootimage.Kernel
	Init      string // lab/plainboot/init, static
	Workload  string // lab/sample/web, static
	Disk      string // vda: the OS image, plain or encrypted
	Volume    string // vdb, an ext4 image; "" for a memory file system
	WorkDir   string // for the initramfs
	MemoryMiB int    // 0: 512
	Accel     string // "kvm", or "" for tcg
	Cmdline   string // more kernel arguments
	Crypt     *Crypt // how to open Disk; nil for a plain one
}

// Crypt opens an encrypted template and volume.
type Crypt struct {
	Template, Volume Opening
	RootHash         digest.SHA256
	HashOffset       int64
}

// Opening opens one disk.
type Opening struct {
	Header     []byte
	Passphrase secret.Bytes
}

// Result of one boot.
type Result struct {
	Answer     time.Duration            // from QEMU's start to the workload's first answer
	Milestones map[string]time.Duration // what the first process said, since the kernel's start
	Console    string
}

var milestone = regexp.MustCompile(`PLAINBOOT (.*) at ([0-9.]+)`)

// Run boots until the workload answers, then ends the machine.
func Run(ctx context.Context, o Options) (Result, error) {
	initramfs, err := o.initramfs()
	if err != nil {
		return Result{}, err
	}
	port, err := freePort()
	if err != nil {
		return Result{}, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	cmd, err := command.New(ctx, "qemu-system-x86_64", o.arguments(initramfs, port)...)
	if err != nil {
		return Result{}, err
	}
	var console bytes.Buffer
	cmd.Stdout = &console
	start := time.Now()
	ended := make(chan error, 1)
	go func() {
		_, err := command.Wait(cmd)
		ended <- err
	}()
	answer, err := firstAnswer(ctx, port, start, ended)
	cancel()
	if err == nil {
		<-ended
	}
	r := Result{Answer: answer, Console: strings.ReplaceAll(console.String(), "\r", ""), Milestones: map[string]time.Duration{}}
	for _, m := range milestone.FindAllStringSubmatch(r.Console, -1) {
		seconds, _ := strconv.ParseFloat(m[2], 64)
		r.Milestones[m[1]] = time.Duration(seconds * float64(time.Second))
	}
	if err != nil {
		return r, fmt.Errorf("plain boot: %w", err)
	}
	return r, nil
}

// initramfs writes the first archive of the machine.
func (o *Options) initramfs() (string, error) {
	workload, err := os.ReadFile(o.Workload)
	if err != nil {
		return "", fmt.Errorf("read workload: %w", err)
	}
	spec := bootimage.Spec{Init: o.Init, Kernel: o.Kernel, Modules: []string{"virtio_pci", "virtio_net", "virtio_blk", "erofs", "overlay", "ext4"},
		Files: []cpio.Entry{cpio.File("workload", 0o755, workload)}}
	if c := o.Crypt; c != nil {
		spec.Modules = bootimage.GuestModules()
		spec.Files = append(spec.Files, cpio.File("template.header", 0o600, c.Template.Header), cpio.File("template.passphrase", 0o600, c.Template.Passphrase.Reveal()),
			cpio.File("volume.header", 0o600, c.Volume.Header), cpio.File("volume.passphrase", 0o600, c.Volume.Passphrase.Reveal()),
			cpio.File("verity", 0o600, fmt.Appendf(nil, "%s %d", c.RootHash, c.HashOffset)))
	}
	path := filepath.Join(o.WorkDir, "plainboot.initramfs")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return "", fmt.Errorf("write initramfs: %w", err)
	}
	return path, errors.Join(spec.Write(f), f.Close())
}

// arguments are QEMU's, the same machine that a host gives a VM.
func (o *Options) arguments(initramfs string, port int) []string {
	memory := o.MemoryMiB
	if memory == 0 {
		memory = 512
	}
	accel, cpu := "tcg", qemu.EmulatedCPU
	if o.Accel == "kvm" {
		accel, cpu = "kvm", "host"
	}
	cmdline := bootimage.GuestCmdline + " plainboot.address=10.0.2.15/24 plainboot.gateway=10.0.2.2 " + o.Cmdline
	if o.Crypt != nil {
		cmdline += " plainboot.crypt=1"
	}
	args := []string{"-machine", "q35,accel=" + accel, "-cpu", cpu, "-smp", "1", "-m", strconv.Itoa(memory), "-bios", "qboot.rom",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-kernel", o.Kernel.Image(), "-initrd", initramfs, "-append", cmdline,
		"-netdev", "user,id=n,restrict=on,hostfwd=tcp:127.0.0.1:" + strconv.Itoa(port) + "-10.0.2.15:8080", "-device", "virtio-net-pci,netdev=n,romfile=",
		"-drive", "if=none,id=a,format=raw,readonly=on,file=" + o.Disk, "-device", "virtio-blk-pci,drive=a"}
	if o.Volume != "" {
		args = append(args, "-drive", "if=none,id=b,format=raw,file="+o.Volume, "-device", "virtio-blk-pci,drive=b")
	}
	return args
}

// firstAnswer waits for the workload, the machine's end, or ctx.
func firstAnswer(ctx context.Context, port int, start time.Time, ended <-chan error) (time.Duration, error) {
	client := &http.Client{Timeout: 2 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	url := fmt.Sprintf("http://127.0.0.1:%d/healthz", port)
	for {
		if answer, err := client.Get(url); err == nil {
			answer.Body.Close()
			if answer.StatusCode == http.StatusOK {
				return time.Since(start), nil
			}
		}
		select {
		case err := <-ended:
			return 0, errors.Join(errors.New("the machine ended before its workload answered"), err)
		case <-ctx.Done():
			<-ended
			return 0, fmt.Errorf("wait for the workload: %w", context.Cause(ctx))
		case <-time.After(poll):
		}
	}
}

// freePort finds a port on the loopback; another process may still take it first,
// then QEMU says so.
func freePort() (int, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("find a free port: %w", err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}
