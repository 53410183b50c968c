package host

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"foothold/internal/strictjson"
	"foothold/protocol/event"
	"foothold/protocol/hostapi"
	"foothold/protocol/token"
	"foothold/protocol/vmspec"
	"foothold/provider/qemu"
)

// vm is one start of one VM.
type vm struct {
	agent  *Agent
	tenant string
	spec   vmspec.Spec // never changed

	op sync.Mutex // one start or stop at a time; taken before mu

	mu      sync.Mutex
	token   token.Token // T1, until QEMU has it
	info    hostapi.VM
	changed chan struct{}           // closed and replaced at each change of info
	proc    *qemu.Process           // of the running VM, and of the stopped one for its console
	tap     string                  // name of the running VM's, whose dropped frames are counted
	end     context.CancelCauseFunc // ends the running VM
	done    chan struct{}           // closed when the running VM has ended and info says so
}

func (a *Agent) newVM(tenant string, spec vmspec.Spec, t1 token.Token) *vm {
	return &vm{agent: a, tenant: tenant, spec: spec, token: t1, changed: make(chan struct{}), info: hostapi.VM{
		ID: spec.Reservation, Start: spec.Start, Name: spec.Name, Host: a.conf.Name, State: hostapi.Created,
		Settings: spec.Digest(), Firmware: a.firmware, Created: time.Now().UTC(),
	}}
}

func (v *vm) logger() *slog.Logger {
	return slog.With("tenant", v.tenant, "vm", v.spec.Name, "reservation", v.spec.Reservation, "start", v.spec.Start)
}

// describe is what the host says of the VM now.
func (v *vm) describe() hostapi.VM {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.info
}

// update changes what the host says.
func (v *vm) update(change func(*hostapi.VM)) {
	v.mu.Lock()
	defer v.mu.Unlock()
	change(&v.info)
	close(v.changed)
	v.changed = make(chan struct{})
}

// The orders in which states and boot stages follow.
var (
	stateOrder = map[string]int{hostapi.Created: 1, hostapi.Running: 2, hostapi.Stopped: 3}
	stageOrder = map[string]int{hostapi.Waiting: 1, hostapi.Attesting: 2, hostapi.Quoted: 3, hostapi.Delivered: 4}
)

// reached reports whether the VM has come to a state or boot stage, or past it.
func reached(info hostapi.VM, want string) bool {
	if n, ok := stateOrder[want]; ok {
		return stateOrder[info.State] >= n
	}
	return stageOrder[info.Boot] >= stageOrder[want] || info.State == hostapi.Stopped
}

// await waits until the VM has reached want, or ctx ends.
func (v *vm) await(ctx context.Context, want string) hostapi.VM {
	for {
		v.mu.Lock()
		info, changed := v.info, v.changed
		v.mu.Unlock()
		if reached(info, want) {
			return info
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return info
		}
	}
}

// start runs the VM; it is idempotent. A VM that has stopped is not started again.
func (v *vm) start() error {
	v.op.Lock()
	defer v.op.Unlock()
	switch v.describe().State {
	case hostapi.Running:
		return nil
	case hostapi.Stopped:
		return event.Refuse(event.VMStopped, "this start of the VM has ended; another start needs another creation")
	}
	m, err := v.machine()
	if err != nil {
		return err
	}
	proc, err := qemu.Start(m)
	if err != nil {
		v.forgetTap()
		return err
	}
	ctx, end := context.WithCancelCause(context.Background())
	v.mu.Lock()
	v.proc, v.end, v.done, v.token = proc, end, make(chan struct{}), token.Token{}
	v.mu.Unlock()
	v.update(func(info *hostapi.VM) {
		info.State, info.Boot, info.Started = hostapi.Running, hostapi.Waiting, time.Now().UTC()
	})
	if err := v.write(v.describe()); err != nil { // a restart calls it stopped all the same
		v.logger().Error("vm not recorded", "error", err)
	}
	v.logger().Info("vm started", "pid", proc.PID())
	go v.supervise(ctx, end, proc)
	return nil
}

// machine opens what the VM consists of.
func (v *vm) machine() (m qemu.Machine, err error) {
	a := v.agent
	m = qemu.Machine{
		Program: a.program, Modules: a.modules, Accel: a.conf.Accel, VCPUs: v.spec.VCPUs, MemoryMiB: v.spec.MemoryMiB, MAC: v.spec.Network.MAC,
		BIOS: a.bios, Kernel: a.kernel, Initrd: a.initrd, Cmdline: a.conf.LoaderCmdline,
	}
	defer func() {
		if err != nil {
			m.Close()
		}
	}()
	if m.Settings, err = v.sealSettings(); err != nil {
		return m, err
	}
	if m.Token, err = v.sealToken(); err != nil {
		return m, err
	}
	if m.Template, err = a.openTemplate(v.tenant, v.spec.Template); err != nil {
		return m, err
	}
	if m.Volume, err = a.openVolume(v.tenant, v.spec.Volume); err != nil {
		return m, err
	}
	tap := tapName()
	if m.Tap, err = qemu.OpenTap(tap, a.conf.Bridge, v.spec.Network.MAC, v.spec.Network.MTU); err != nil {
		return m, err
	}
	v.watchTap(tap)
	return m, nil
}

// sealSettings seals the settings as the loader will read them, and makes sure that
// what was sealed is what will be measured.
func (v *vm) sealSettings() (*qemu.Sealed, error) {
	data, err := json.Marshal(v.spec)
	if err != nil {
		return nil, fmt.Errorf("encode settings: %w", err)
	}
	var back vmspec.Spec
	if err := strictjson.Unmarshal(data, &back); err != nil {
		return nil, fmt.Errorf("encode settings: %w", err)
	}
	if back.Digest() != v.describe().Settings {
		return nil, errors.New("encode settings: they do not survive their encoding")
	}
	return qemu.Seal("settings", bytes.NewReader(data), hostapi.MaxMessage)
}

func (v *vm) sealToken() (*qemu.Sealed, error) {
	v.mu.Lock()
	text := v.token.Reveal()
	v.mu.Unlock()
	s, err := qemu.Seal("token", strings.NewReader(text), 128)
	if err != nil {
		return nil, err
	}
	if s.SHA256 != v.spec.TokenDigest {
		s.File.Close()
		return nil, errors.New("T1 is gone: the VM was started already")
	}
	return s, nil
}

// tapName is a new name, of 15 characters, the most that an interface's name has.
func tapName() string {
	var b [6]byte
	rand.Read(b[:])
	return qemu.TapPrefix + hex.EncodeToString(b[:])
}

// supervise waits for the running VM's end - its own, its channel's, its boot timer's
// or the one asked for - and makes it complete.
func (v *vm) supervise(ctx context.Context, end context.CancelCauseFunc, proc *qemu.Process) {
	defer end(nil)
	timer := time.AfterFunc(v.agent.limits.boot, func() {
		end(event.Refuse(event.DeadlinePassed, "the VM was not handed its components within %s", v.agent.limits.boot))
	})
	defer timer.Stop()
	talk := make(chan error, 1)
	go func() { talk <- v.converse(ctx, proc.Channel, timer) }()
	var cause error
	select {
	case <-proc.Done():
		cause = <-talk // the channel's end, or what came before it
	case cause = <-talk:
		if errors.Is(cause, errGone) {
			<-proc.Done()
		}
	case <-ctx.Done():
		proc.Channel.Close()
		<-talk
	}
	if ctx.Err() != nil { // whatever came with it
		cause = context.Cause(ctx)
	}
	proc.Quit()
	proc.Channel.Close()
	guest, exit := proc.Ending()
	v.forgetTap()
	reason, detail := v.endedAs(guest), guest
	if !errors.Is(cause, errGone) {
		reason, detail = event.ReasonOf(cause), cause.Error()
	}
	v.finish(reason, detail)
	v.logger().Info("vm stopped", "reason", reason, "detail", detail, "qemu", exit.Error(), "complaints", proc.Complaints())
	close(v.done)
}

// endedAs is what a VM's own end means: of one that runs the delivered system, what that
// system did, as far as QEMU saw it (QAPI, ShutdownCause). A kernel that fails without
// saying so, as by a triple fault, resets.
func (v *vm) endedAs(guest string) event.Reason {
	if v.describe().Boot == hostapi.Delivered {
		switch guest {
		case "guest-reset":
			return event.GuestReset
		case "guest-shutdown":
			return event.GuestPoweredOff
		case "guest-panic":
			return event.GuestCrashed
		}
	}
	return event.VMStopped
}

// finish records the end, on disk before anybody is told: whoever knows that the VM has
// stopped may put the next start in its place.
func (v *vm) finish(reason event.Reason, detail string) {
	v.mu.Lock()
	v.token = token.Token{}
	v.mu.Unlock()
	info := v.describe()
	if info.State == hostapi.Stopped {
		return
	}
	info.State, info.Reason, info.Detail, info.Ended = hostapi.Stopped, reason, detail[:min(len(detail), hostapi.MaxDetail)], time.Now().UTC()
	if err := v.write(info); err != nil {
		v.logger().Error("vm not recorded", "error", err) // a restart calls it stopped all the same
	}
	v.update(func(now *hostapi.VM) { *now = info })
}

// stop ends the VM and waits for its end.
func (v *vm) stop(reason event.Reason, detail string) {
	v.op.Lock()
	defer v.op.Unlock()
	v.mu.Lock()
	end, done := v.end, v.done
	v.mu.Unlock()
	if done == nil {
		v.finish(reason, detail)
		return
	}
	end(event.Refuse(reason, "%s", detail))
	<-done
}

// console is the last of the VM's output.
func (v *vm) console() []byte {
	v.mu.Lock()
	proc := v.proc
	v.mu.Unlock()
	if proc == nil {
		return nil
	}
	return proc.Console()
}
