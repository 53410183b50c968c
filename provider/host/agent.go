// Package host is the agent on a hypervisor: VMs, their disks, the TPM.
//
// It serves package hostapi to the tenants' orchestrators. A VM is created with its
// settings, disks and T1, then started once; another start is another creation, with
// a higher start number, new settings and a new T1. While it boots the agent answers
// for it on its local channel (package channel): it measures the VM and its tunnel
// into the TPM for as long as the boot server's quote takes. A VM that was not handed
// its components in time, or that sends on its channel what nobody asked for, is
// destroyed.
//
// The agent is trusted with nothing until a quote proves which one it is. What it runs
// for VMs - QEMU, firmware, loader - it copies into sealed memory at its start, and
// refuses to serve if the measurement log, which the quotes prove, lacks one of them. In a
// lab that is its launcher's log; in production the kernel's list, which it sends with
// each quote, and the firmware's log.
//
// QEMU dies with the agent. An agent that starts again finds its VMs stopped.
//
// An agent whose TPM does not answer ends its VMs, with that reason, and then itself: what
// starts it again has it take the TPM over anew. Where the TPM has lost its registers, only
// a boot of the host mends that, which measures it anew; until then its quotes are refused.
package host

import (
	"context"
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"foothold/internal/durable"
	"foothold/internal/mtls"
	"foothold/internal/serve"
	"foothold/internal/strictjson"
	"foothold/internal/tpm"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/inventory"
	"foothold/protocol/pcr"
	"foothold/protocol/signed"
	"foothold/protocol/vmspec"
	"foothold/provider/broker"
	"foothold/provider/measure"
	"foothold/provider/qemu"
)

// Limits of the platform's files in bytes.
const (
	maxProgram   = 256 << 20
	maxBIOS      = 16 << 20
	maxKernel    = 64 << 20
	maxInitramfs = 256 << 20
)

// lockWait is how long a predecessor may take to leave the state directory.
const lockWait = 10 * time.Second

// probeTPM is how often the TPM is asked for a sign of life.
const probeTPM = 5 * time.Second

// Agent is the running host agent.
type Agent struct {
	conf   Config
	limits limits
	broker *broker.Broker
	log    []pcr.Event // what a lab's launcher measured; nil in production

	program, bios, kernel, initrd *qemu.Sealed
	modules                       string // folder of QEMU's modules
	firmware                      vmspec.Firmware

	frames *qemu.Frames // counts what the bridge drops of VMs; nil: nothing is counted

	admin sync.Mutex // one creation or removal at a time; taken before mu

	mu  sync.Mutex
	vms map[string]*vm // by id
}

// Run serves until ctx ends, then destroys all VMs. configuration is the digest of the
// file that conf was read from.
func Run(ctx context.Context, conf Config, configuration digest.SHA256) error {
	lim, err := conf.check()
	if err != nil {
		return err
	}
	a := &Agent{conf: conf, limits: lim, vms: map[string]*vm{}}
	for _, dir := range []string{"vms", "volumes", "templates"} {
		if err := os.MkdirAll(filepath.Join(conf.State, dir), 0o700); err != nil {
			return fmt.Errorf("make state directory: %w", err)
		}
	}
	wait, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	unlock, err := durable.Lock(wait, filepath.Join(conf.State, "lock"))
	if err != nil {
		return err
	}
	defer unlock()
	if conf.Log != "" {
		if a.log, err = measure.ReadLog(conf.Log); err != nil {
			return err
		}
	}
	if ok, err := a.measured(configuration); err != nil {
		return err
	} else if !ok {
		return errors.New("the configuration is not in the measurement log: this host was not measured with it" + a.unmeasured())
	}
	if err := a.load(); err != nil {
		return err
	}
	dev, err := tpm.Open(conf.TPM)
	if err != nil {
		return err
	}
	defer dev.Close()
	keys, err := a.keys()
	if err != nil {
		return err
	}
	if a.broker, err = broker.New(dev, keys, lim.hold); err != nil {
		return err
	}
	a.restoreSessionKeys()
	if err := a.recover(); err != nil {
		return err
	}
	defer a.countFrames()()
	defer a.stopAll(event.VMStopped, "the host agent ends")
	serving, end := context.WithCancelCause(ctx)
	var watching sync.WaitGroup
	watching.Go(func() { a.watchTPM(serving, end) })
	err = a.serve(serving)
	end(nil)
	watching.Wait()
	if lost := context.Cause(serving); errors.Is(lost, broker.ErrFailed) {
		return lost
	}
	return err
}

// keys are this host's TPM keys, from its entry in the provider's inventory. Whether that
// is the current one, the tenants judge.
func (a *Agent) keys() (keys broker.Keys, err error) {
	provider, err := hex.DecodeString(a.conf.InventoryKey)
	if err != nil || len(provider) != ed25519.PublicKeySize {
		return keys, errors.New("configuration: inventory_key: want 64 hexadecimal digits")
	}
	data, err := a.readInventory()
	if err != nil {
		return keys, err
	}
	var env signed.Envelope
	var inv inventory.Inventory
	if err := strictjson.Unmarshal(data, &env); err != nil {
		return keys, fmt.Errorf("read inventory %s: %w", a.conf.Inventory, err)
	}
	if err := env.Open(ed25519.PublicKey(provider), signed.Inventory, &inv); err != nil {
		return keys, fmt.Errorf("read inventory %s: %w", a.conf.Inventory, err)
	}
	entry, ok := inv.Find(a.conf.Name)
	if !ok {
		return keys, fmt.Errorf("read inventory %s: it has no host %s: publish it with this host's entry", a.conf.Inventory, a.conf.Name)
	}
	return broker.KeysOf(entry)
}

// watchTPM ends the agent when its TPM is lost; the VMs first, while their tenants still
// hear why.
func (a *Agent) watchTPM(ctx context.Context, end context.CancelCauseFunc) {
	tick := time.NewTicker(probeTPM)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := a.broker.Probe(); err != nil {
				slog.Error("TPM lost", "error", err)
			}
			continue
		case <-a.broker.Failed():
		}
		slog.Error("the TPM is lost: VMs and agent end", "next", "start the agent again; if its TPM was reset, boot the host, so that it is measured anew")
		a.stopAll(event.TPMLost, "the host's TPM does not answer")
		end(broker.ErrFailed)
		return
	}
}

// measured reports whether the platform's log has a file of that digest. The file is open
// already, which is when a kernel measures it.
func (a *Agent) measured(sum digest.SHA256) (bool, error) {
	if a.conf.Log == "" {
		return a.kernelLogs().Measured(sum)
	}
	return slices.ContainsFunc(a.log, func(e pcr.Event) bool { return e.PCR == pcr.Platform && e.Digest == sum }), nil
}

// unmeasured says what helps where the kernel measures.
func (a *Agent) unmeasured() string {
	if a.conf.Log != "" {
		return ""
	}
	return "; does the kernel's policy measure what this user reads, with sha256?"
}

func (a *Agent) kernelLogs() measure.Logs {
	return measure.Logs{Firmware: a.conf.FirmwareLog, Kernel: a.conf.KernelList, Userspace: a.conf.UserspaceLog}
}

// platform gives the host's logs, as they are now. What answers with a quote calls it after
// the quote: a kernel's list must not be behind it.
func (a *Agent) platform() (evidence.Platform, error) {
	if a.conf.Log != "" {
		return evidence.Platform{Log: a.log}, nil
	}
	p, err := a.kernelLogs().Read()
	if err != nil {
		return p, event.Refuse(event.LogsUnreadable, "%v", err)
	}
	return p, nil
}

// load copies the platform's files into sealed memory.
func (a *Agent) load() (err error) {
	for _, f := range []struct {
		to    **qemu.Sealed
		path  string
		limit int64
	}{
		{&a.program, a.conf.QEMU, maxProgram},
		{&a.bios, a.conf.BIOS, maxBIOS},
		{&a.kernel, a.conf.LoaderKernel, maxKernel},
		{&a.initrd, a.conf.LoaderInitramfs, maxInitramfs},
	} {
		if *f.to, err = a.seal(f.path, f.limit); err != nil {
			return err
		}
	}
	// A program that its own process may not read is not dumpable: nobody but root reads
	// the memory of VMs, no core file has it.
	if err := a.program.File.Chmod(0o100); err != nil {
		return fmt.Errorf("close QEMU: %w", err)
	}
	if err := a.loadModule(); err != nil {
		return err
	}
	a.firmware = vmspec.Firmware{BIOS: a.bios.SHA256, LoaderKernel: a.kernel.SHA256, LoaderInitramfs: a.initrd.SHA256, LoaderCmdline: a.conf.LoaderCmdline}
	return nil
}

// seal copies a measured file into sealed memory.
func (a *Agent) seal(path string, limit int64) (*qemu.Sealed, error) {
	s, err := qemu.SealFile(path, limit)
	if err != nil {
		return nil, err
	}
	ok, err := a.measured(s.SHA256)
	if err == nil && !ok {
		err = fmt.Errorf("%s, SHA-256 %s, is not in the measurement log: it changed after it was measured%s", path, s.SHA256, a.unmeasured())
	}
	if err != nil {
		s.File.Close()
		return nil, err
	}
	return s, nil
}

// loadModule makes the one folder that QEMU loads modules from. It holds the measured
// module alone: QEMU finds modules by their names.
func (a *Agent) loadModule() error {
	a.modules = filepath.Join(a.conf.State, "modules")
	if err := os.RemoveAll(a.modules); err != nil {
		return fmt.Errorf("make module folder: %w", err)
	}
	if err := os.Mkdir(a.modules, 0o700); err != nil {
		return fmt.Errorf("make module folder: %w", err)
	}
	if a.conf.QEMUModule == "" {
		return nil
	}
	m, err := a.seal(a.conf.QEMUModule, maxProgram)
	if err != nil {
		return err
	}
	defer m.File.Close()
	return durable.Write(filepath.Join(a.modules, qemu.TCGModule), 0o500, func(f *os.File) error {
		_, err := io.Copy(f, io.NewSectionReader(m.File, 0, m.Size))
		return err
	})
}

func (a *Agent) serve(ctx context.Context) error {
	cert, clients, err := a.conf.TLS.Load()
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", a.conf.Listen.String())
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	slog.Info("serving", "listening", l.Addr().String(), "host", a.conf.Name, "firmware", a.bios.SHA256, "loader", a.initrd.SHA256)
	return serve.HTTPS(ctx, l, mtls.ServerConfig(cert, clients, mtls.Orchestrator), a.handler())
}

// stopAll destroys every VM at the agent's end.
func (a *Agent) stopAll(reason event.Reason, detail string) {
	a.mu.Lock()
	list := make([]*vm, 0, len(a.vms))
	for _, v := range a.vms {
		list = append(list, v)
	}
	a.mu.Unlock()
	var wg sync.WaitGroup
	for _, v := range list {
		wg.Go(func() { v.stop(reason, detail) })
	}
	wg.Wait()
}
