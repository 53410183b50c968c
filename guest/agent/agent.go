// Package agent is the first process of the delivered initramfs: acts 7 to 9 of the
// boot story, from the report that the system runs to the start of the decrypted OS.
//
// It holds the VM's keys and takes the VM's secrets, in memory alone. Nothing comes in
// but one login of one key from one address; nothing goes out but to the servers that
// its own signed unique part and the handover name. Each failure ends the VM.
//
// The steps, in [Run]:
//
//  1. mounts, modules, the instance's files (read and erased), packet filter, network
//  2. report with T2 to the boot server                                        (act 7)
//  3. let the orchestrator in once; audit; take the handover; open the disks    (act 8)
//  4. admission, tunnel; the cloud network now carries the tunnel alone         (act 9)
//  5. erase; the OS's network files; switch root
//  6. start the resident agent from memory, and become the OS's service manager
package agent

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"time"

	"foothold/guest/facts"
	"foothold/guest/filter"
	"foothold/guest/opener"
	"foothold/guest/pid1"
	"foothold/guest/pinned"
	"foothold/guest/resident"
	"foothold/guest/tunnel"
	"foothold/internal/kmod"
	"foothold/protocol/audit"
	"foothold/protocol/event"
	"foothold/protocol/unlockmsg"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"
)

// Limits of the steps. The orchestrator's deadlines are shorter; these need nobody.
const (
	reportLimit  = 2 * time.Minute
	unlockLimit  = 4 * time.Minute
	connectLimit = 2 * time.Minute
)

// sshPort is where the one login is awaited.
const sshPort = 22

// earlyModules are what the report needs; the others load while it is on its way.
var earlyModules = []string{"virtio_pci", "virtio_net", "nf_tables", "nft_ct"}

// Agent is the running first stage.
type Agent struct {
	Console  pid1.Console
	instance *instance
	keys     *keys
	gatherer facts.Gatherer
	outside  string // interface on the cloud network
	kernel   *kmod.Set
	modules  chan error // says once that all modules but the port's are loaded
}

// Run does not return unless a step fails; the caller then powers the VM off.
func (a *Agent) Run(ctx context.Context) error {
	if err := a.prepare(); err != nil {
		return err
	}
	door, err := net.Listen("tcp4", fmt.Sprintf(":%d", sshPort))
	if err != nil {
		return fmt.Errorf("listen for the orchestrator: %w", err)
	}
	sent, err := a.ready(ctx)
	if err != nil {
		return err
	}
	handover, err := a.unlock(ctx, door, sent)
	if err != nil {
		return err
	}
	state, err := a.connect(ctx, handover)
	if err != nil {
		return err
	}
	return a.becomeOS(state)
}

// prepare is step 1.
func (a *Agent) prepare() error {
	if err := pid1.Mount(); err != nil {
		return err
	}
	a.Console.Say("started")
	if err := pid1.NoKexec(); err != nil {
		return err
	}
	var err error
	if a.kernel, err = kmod.Open(); err != nil {
		return err
	}
	if err := a.kernel.Load(earlyModules...); err != nil {
		return err
	}
	if a.instance, err = readInstance("/"); err != nil {
		return err
	}
	if a.keys, err = newKeys(); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(a.instance.Name)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	if err := filter.Apply(); err != nil {
		return err
	}
	n := a.instance.Network
	if err := pid1.Network(n.MAC, n.Address, n.Gateway, n.MTU); err != nil {
		return err
	}
	link, err := pid1.Link(n.MAC)
	if err != nil {
		return err
	}
	a.outside = link.Attrs().Name
	a.modules = make(chan error, 1)
	go func() {
		err := a.kernel.LoadAll()
		a.gatherer.Warm(facts.Initramfs()) // the audit would read the same files
		a.modules <- err
	}()
	a.Console.Say("reservation %s start %d", a.instance.Reservation, a.instance.Start)
	return nil
}

func (a *Agent) sshFlow() filter.Flow {
	return filter.Flow{Interface: a.outside, Inbound: true, Proto: filter.TCP, Peer: netip.AddrPortFrom(a.instance.Orchestrator, 0), Port: sshPort}
}

// ready is step 2. SSH is open before the report is sent, so that the orchestrator
// never comes too early.
func (a *Agent) ready(ctx context.Context) (*sending, error) {
	boot, err := pinned.Pins{URL: a.instance.BootURL}.Address()
	if err != nil {
		return nil, err
	}
	if err := filter.Apply(filter.Flow{Interface: a.outside, Proto: filter.TCP, Peer: boot}, a.sshFlow()); err != nil {
		return nil, err
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return nil, fmt.Errorf("ask for the kernel's release: %w", err)
	}
	return send(ctx, reportLimit, func(ctx context.Context) error {
		if err := a.instance.report(ctx, unix.ByteSliceToString(name.Release[:])); err != nil {
			return err
		}
		a.Console.Say("reported ready")
		return filter.Apply(a.sshFlow())
	}), nil
}

// unlock is step 3.
func (a *Agent) unlock(ctx context.Context, door net.Listener, sent *sending) (*unlockmsg.Handover, error) {
	ctx, cancel := context.WithTimeout(ctx, unlockLimit)
	defer cancel()
	ctx, unheard := sent.beside(ctx)
	defer unheard()
	d := &Door{HostKey: a.instance.key, Account: a.instance.Account, Key: a.instance.AuthorizedKey, From: a.instance.Orchestrator, Say: a.Console.Say}
	u := &unlock{keys: a.keys, vm: a.instance.Reservation, start: a.instance.Start, gather: a.audit, failed: d.Failed,
		open: func(ctx context.Context, h *unlockmsg.Handover) error {
			a.Console.Say("handover received")
			return opener.Open(ctx, h, a.Console.Say)
		}}
	var handover *unlockmsg.Handover
	err := d.Serve(ctx, door, func(ctx context.Context, c ssh.Channel) (err error) {
		sent.answered()
		if err := filter.Apply(a.sshFlow()); err != nil {
			return err
		}
		handover, err = u.converse(ctx, c)
		return err
	})
	if err != nil {
		return nil, err
	}
	return handover, nil
}

// audit is the first audit. All modules are loaded by then, so that the machine does
// not change after it.
func (a *Agent) audit(nonce []byte) (audit.Report, error) {
	if err := <-a.modules; err != nil {
		return audit.Report{}, err
	}
	a.modules <- nil
	report, err := a.gatherer.Gather(audit.Initramfs, nonce, facts.Initramfs())
	if err == nil {
		a.Console.Say("audited")
	}
	return report, err
}

// connect is step 4.
func (a *Agent) connect(ctx context.Context, h *unlockmsg.Handover) (*resident.State, error) {
	defer wipeHandover(h)
	defer a.keys.wipe()
	ctx, cancel := context.WithTimeout(ctx, connectLimit)
	defer cancel()
	admission := filter.Flow{Interface: a.outside, Proto: filter.TCP, Peer: h.Gateway.Address}
	if err := filter.Apply(admission); err != nil {
		return nil, err
	}
	t, err := tunnel.Admit(ctx, tunnel.Admission{Reservation: a.instance.Reservation, Handover: h, Key: a.keys.tls})
	if err != nil {
		return nil, err
	}
	defer t.PSK.Wipe()
	a.Console.Say("admitted by the gateway, tunnel address %s", t.Address)
	n := a.instance.Network
	if err := t.Up(a.keys.wireguard, n.MAC, n.Gateway); err != nil {
		return nil, event.Refuse(event.GatewayFailed, "set the tunnel up: %v", err)
	}
	state := resident.NewState(a.instance.Unique, a.instance.key, a.keys.tls, h, t.AdmitResponse, a.outside)
	if err := filter.Apply(state.Flows(nil)...); err != nil {
		return nil, err
	}
	a.Console.Say("tunnel up")
	return state, nil
}
