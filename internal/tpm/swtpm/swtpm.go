// Package swtpm makes and runs a software TPM that stands for a host's physical one,
// in the lab and in tests. It is a TPM 2.0 in its behaviour and interface, without a
// TPM's protection.
package swtpm

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"foothold/internal/command"
)

// Files of a TPM's folder.
const (
	stateDir = "state"
	caDir    = "ca"
	logFile  = "log"

	// IssuerFile and RootFile are PEM certificates of the manufacturer that signed
	// the endorsement key.
	IssuerFile = "ca/issuercert.pem"
	RootFile   = "ca/swtpm-localca-rootca-cert.pem"
)

// startTimeout is how long a TPM may take until it listens.
const startTimeout = 10 * time.Second

// Manufacture makes a new TPM in dir, which must be empty or absent: endorsement keys
// with certificates of a manufacturer of its own, SHA-256 registers alone.
func Manufacture(ctx context.Context, dir string) error {
	for _, sub := range []string{stateDir, caDir} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return fmt.Errorf("make TPM: %w", err)
		}
	}
	localca, err := command.Find("swtpm_localca")
	if err != nil {
		return err
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	files := map[string][]string{
		"setup.conf": {"create_certs_tool = " + localca, "create_certs_tool_config = " + path("ca.conf"), "create_certs_tool_options = " + path("ca.options")},
		"ca.conf":    {"statedir = " + path(caDir), "signingkey = " + path("ca/signkey.pem"), "issuercert = " + path(IssuerFile), "certserial = " + path("ca/certserial")},
		"ca.options": {"--platform-manufacturer Foothold", "--platform-version 1", "--platform-model lab"},
	}
	for name, lines := range files {
		if err := os.WriteFile(path(name), []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
			return fmt.Errorf("make TPM: %w", err)
		}
	}
	cmd, err := command.New(ctx, "swtpm_setup", "--tpm2", "--tpmstate", path(stateDir), "--create-ek-cert",
		"--pcr-banks", "sha256", "--lock-nvram", "--config", path("setup.conf"), "--logfile", path("setup.log"))
	if err != nil {
		return err
	}
	// It starts a TPM of its own, which must not outlive it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	if _, err := command.Wait(cmd); err != nil {
		return fmt.Errorf("make TPM: %w", err)
	}
	return nil
}

// Chain is DER of the certificates between the endorsement key of the TPM in dir and its
// manufacturer's root.
func Chain(dir string) ([][]byte, error) {
	cert, err := readCertificate(filepath.Join(dir, IssuerFile))
	if err != nil {
		return nil, fmt.Errorf("read TPM's chain: %w", err)
	}
	return [][]byte{cert}, nil
}

func readCertificate(file string) ([]byte, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("%s is not a certificate", file)
	}
	return block.Bytes, nil
}

// Process is a running TPM.
type Process struct {
	Socket  string
	control string // empty for one that is not StartControlled's
	cmd     *exec.Cmd
	done    chan struct{}
}

// Start powers the TPM in dir on (TPM2_Startup with clear: registers and counters as
// after a host boot) and waits until it listens at socket. The TPM dies with the
// thread that started it.
func Start(ctx context.Context, dir, socket string) (*Process, error) {
	return start(ctx, dir, socket, "--server", "type=unixio,path="+socket+",mode=0600", "--flags", "not-need-init,startup-clear")
}

// StartControlled is Start of a TPM whose platform is driven by who starts it: swtpm's control
// channel listens at control.
func StartControlled(ctx context.Context, dir, socket, control string) (*Process, error) {
	p, err := start(ctx, dir, socket, "--server", "type=unixio,path="+socket+",mode=0600", "--ctrl", "type=unixio,path="+control+",mode=0600", "--flags", "not-need-init,startup-clear")
	if err != nil {
		return nil, err
	}
	p.control = control
	return p, nil
}

// StartFor gives the TPM in dir to a machine that QEMU emulates. The socket takes QEMU's
// control commands (-tpmdev emulator), which power the TPM on; the machine's firmware
// starts it up. The TPM dies with the thread that started it.
func StartFor(ctx context.Context, dir, socket string) (*Process, error) {
	return start(ctx, dir, socket, "--ctrl", "type=unixio,path="+socket+",mode=0600")
}

func start(ctx context.Context, dir, socket string, how ...string) (*Process, error) {
	if err := os.Remove(socket); err != nil && !os.IsNotExist(err) {
		return nil, fmt.Errorf("start TPM: %w", err)
	}
	path, err := command.Find("swtpm")
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(path, append([]string{"socket", "--tpm2", "--tpmstate", "dir=" + filepath.Join(dir, stateDir) + ",mode=0600",
		"--log", "file=" + filepath.Join(dir, logFile) + ",level=1"}, how...)...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start TPM: %w", err)
	}
	p := &Process{Socket: socket, cmd: cmd, done: make(chan struct{})}
	go func() { cmd.Wait(); close(p.done) }()
	if err := p.wait(ctx); err != nil {
		p.Stop()
		return nil, err
	}
	return p, nil
}

// wait returns once the socket accepts.
func (p *Process) wait(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		if conn, err := net.Dial("unix", p.Socket); err == nil {
			return conn.Close()
		}
		select {
		case <-p.done:
			return fmt.Errorf("start TPM: swtpm ended: %v", p.cmd.ProcessState)
		case <-ctx.Done():
			return fmt.Errorf("start TPM: %w", ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Launch is a dynamic launch by the processor: it resets registers 17 to 22 and extends 17 by
// the digest of code, at locality 4 (TPM 2.0 Library, part 1, "Dynamic Root of Trust Measurement").
func (p *Process) Launch(ctx context.Context, code string) error { return p.drive(ctx, "-h", code) }

// Locality is the one that commands come from, as of now: 0 is a program's, 2 that of what was
// launched dynamically.
func (p *Process) Locality(ctx context.Context, n int) error {
	return p.drive(ctx, "-l", strconv.Itoa(n))
}

func (p *Process) drive(ctx context.Context, args ...string) error {
	if p.control == "" {
		return errors.New("drive TPM: it was started without a control channel")
	}
	if err := command.Run(ctx, "swtpm_ioctl", append([]string{"--unix", p.control}, args...)...); err != nil {
		return fmt.Errorf("drive TPM: %w", err)
	}
	return nil
}

// PID is the process's number.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// Stop cuts the TPM's power.
func (p *Process) Stop() {
	p.cmd.Process.Kill()
	<-p.done
}
