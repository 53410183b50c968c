// Package qemu runs one QEMU process for one VM.
//
// QEMU is started from typed settings alone ([Machine]): sandboxed, without default
// devices, without a TPM, firmware, kernel, initramfs and fw_cfg items as sealed
// memory files, disks, network and all sockets as open files. It has no path to open
// but /dev/urandom and its own data folder, and no user-given text among its
// arguments. Its console is a pipe that it can only write to.
package qemu

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"foothold/internal/harden"

	"golang.org/x/sys/unix"
)

const (
	consoleSize   = 1 << 20           // bytes of console output that are kept
	complaintSize = 4 << 10           // bytes of QEMU's own messages that are kept
	dataDir       = "/usr/share/qemu" // QEMU's option ROMs, which a sealed program cannot find beside itself
	killGrace     = 2 * time.Second   // from asking QEMU to quit to killing it
)

// Process is a running VM.
type Process struct {
	Channel net.Conn // local channel to the VM; the user closes it

	cmd        *exec.Cmd
	mon        *monitor
	console    *ring
	complaints *ring
	done       chan struct{} // closed at the end
	err        error         // why it ended; set before done is closed
}

// Start starts QEMU and returns once its monitor answers that the VM runs. It takes
// over Token, Settings, Template, Volume and Tap, and closes them in this process.
func Start(m Machine) (*Process, error) {
	defer m.Close()
	if m.Accel != KVM && m.Accel != TCG {
		return nil, fmt.Errorf("start QEMU: no accelerator %q", m.Accel)
	}
	channel, mon, consoleEnd, err := m.connect()
	if err != nil {
		return nil, fmt.Errorf("start QEMU: %w", err)
	}
	p := &Process{Channel: channel, console: newRing(consoleSize), complaints: newRing(complaintSize), done: make(chan struct{})}
	go func() { // ends when QEMU's end closes
		io.Copy(p.console, consoleEnd)
		consoleEnd.Close()
	}()
	err = p.run(&m)
	closeAll(m.channel, m.mon, m.console) // QEMU has its own; what QEMU closes must end here
	if err != nil {
		channel.Close()
		mon.Close()
		return nil, fmt.Errorf("start QEMU: %w", err)
	}
	if err := p.greet(mon); err != nil {
		p.Kill()
		mon.Close()
		channel.Close()
		return nil, fmt.Errorf("start QEMU: %w: %s", err, p.complaints.Bytes())
	}
	go p.leash()
	return p, nil
}

// leash ends a VM whose monitor has ended: nobody would know how it fares, nor reach it.
func (p *Process) leash() {
	<-p.mon.ended // of a VM that ends, a moment before it
	select {
	case <-p.done:
	case <-time.After(killGrace):
		p.Kill()
	}
}

// Close closes what belongs to this one VM; what is absent is passed over.
func (m *Machine) Close() {
	for _, s := range []*Sealed{m.Settings, m.Token} {
		if s != nil {
			s.File.Close()
		}
	}
	for _, f := range []*os.File{m.Template, m.Volume, m.Tap} {
		if f != nil {
			f.Close()
		}
	}
}

func closeAll(list ...*os.File) {
	for _, f := range list {
		f.Close()
	}
}

// connect makes channel, monitor and console; m gets QEMU's ends.
func (m *Machine) connect() (channel, mon net.Conn, console *os.File, err error) {
	if channel, m.channel, err = socketPair("channel"); err != nil {
		return nil, nil, nil, err
	}
	if mon, m.mon, err = socketPair("monitor"); err != nil {
		channel.Close()
		m.channel.Close()
		return nil, nil, nil, err
	}
	if console, m.console, err = os.Pipe(); err != nil {
		channel.Close()
		mon.Close()
		closeAll(m.channel, m.mon)
		return nil, nil, nil, err
	}
	return channel, mon, console, nil
}

func socketPair(name string) (net.Conn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make %s: %w", name, err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), name), os.NewFile(uintptr(fds[1]), name)
	defer ours.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		theirs.Close()
		return nil, nil, fmt.Errorf("make %s: %w", name, err)
	}
	return conn, theirs, nil
}

// run starts the process from a thread of its own, which stays until the process
// ends: the kernel kills QEMU when the thread that started it ends, and thus with
// this agent, however that dies. The thread has no capability, so QEMU has none, and
// ends with the process.
func (p *Process) run(m *Machine) error {
	args, inherited := m.arguments()
	inherited = append(inherited, m.Program.File)
	p.cmd = &exec.Cmd{
		Path:        fmt.Sprintf("/proc/self/fd/%d", 2+len(inherited)),
		Args:        append([]string{"qemu-system-x86_64", "-L", dataDir}, args...),
		Env:         []string{"LC_ALL=C", "QEMU_MODULE_DIR=" + m.Modules},
		Dir:         "/",
		Stderr:      p.complaints,
		ExtraFiles:  inherited,
		SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setsid: true},
	}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime ends the thread with the goroutine
		err := harden.ThreadDropsCapabilities()
		if err == nil {
			err = p.cmd.Start()
		}
		started <- err
		if err != nil {
			return
		}
		p.err = p.cmd.Wait()
		if p.err == nil {
			p.err = errors.New("QEMU exited")
		}
		close(p.done)
	}()
	return <-started
}

// greet waits until QEMU says that the VM runs.
func (p *Process) greet(conn net.Conn) (err error) {
	if p.mon, err = newMonitor(conn); err != nil {
		return err
	}
	status, err := p.mon.status()
	if err != nil {
		return err
	}
	if status != "running" {
		return fmt.Errorf("the VM is %s", status)
	}
	return nil
}

// PID is QEMU's process number.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Console is the last of the VM's output.
func (p *Process) Console() []byte { return p.console.Bytes() }

// Complaints is the last of QEMU's own messages.
func (p *Process) Complaints() string { return string(p.complaints.Bytes()) }

// Done is closed when QEMU has ended, however it did.
func (p *Process) Done() <-chan struct{} { return p.done }

// Ending says why QEMU ended: the guest's part, such as "guest-shutdown",
// "guest-reset", "guest-panic", or "" if it was killed; and how the process ended. Only valid once Done is closed.
func (p *Process) Ending() (guest string, err error) { return p.mon.reason(), p.err }

// Kill ends QEMU at once and waits for its end.
func (p *Process) Kill() {
	p.cmd.Process.Kill()
	<-p.done
}

// Quit asks QEMU to end, so that it writes the volume out, then kills it.
func (p *Process) Quit() {
	go p.mon.command("quit")
	select {
	case <-p.done:
	case <-time.After(killGrace):
		p.Kill()
	}
}
