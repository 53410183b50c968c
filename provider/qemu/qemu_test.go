package qemu

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"foothold/protocol/digest"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

func TestSealedCannotChange(t *testing.T) {
	s, err := Seal("test", strings.NewReader("content"), 100)
	if err != nil {
		t.Fatal(err)
	}
	defer s.File.Close()
	if s.SHA256 != digest.Of([]byte("content")) || s.Size != 7 {
		t.Errorf("sealed %s, %d bytes", s.SHA256, s.Size)
	}
	again, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", s.File.Fd()), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	for name, f := range map[string]*os.File{"maker's file": s.File, "opened anew": again} {
		if _, err := f.WriteAt([]byte("x"), 0); err == nil {
			t.Errorf("%s: written", name)
		}
		if err := f.Truncate(1); err == nil {
			t.Errorf("%s: shortened", name)
		}
		if err := f.Truncate(100); err == nil {
			t.Errorf("%s: grown", name)
		}
		if _, err := unix.Mmap(int(f.Fd()), 0, 7, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err == nil {
			t.Errorf("%s: mapped writable", name)
		}
	}
	back, err := io.ReadAll(io.NewSectionReader(s.File, 0, 100))
	if err != nil || string(back) != "content" {
		t.Errorf("holds %q, %v", back, err)
	}
	if _, err := Seal("test", strings.NewReader("content"), 6); err == nil {
		t.Error("sealed more than its limit")
	}
}

func machine(t *testing.T) Machine {
	t.Helper()
	sealed := func(name string) *Sealed {
		s, err := Seal(name, strings.NewReader(name), 100)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.File.Close() })
		return s
	}
	open := func() *os.File {
		f, err := os.Open("/dev/null")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	return Machine{
		Program: sealed("qemu"), Accel: TCG, VCPUs: 2, MemoryMiB: 512, MAC: "02:f0:00:00:00:01",
		BIOS: sealed("bios"), Kernel: sealed("kernel"), Initrd: sealed("initrd"), Cmdline: "quiet",
		Settings: sealed("settings"), Token: sealed("a secret token"), Template: open(), Volume: open(), Tap: open(),
		channel: open(), console: open(), mon: open(),
	}
}

func TestArguments(t *testing.T) {
	m := machine(t)
	args, inherited := m.arguments()
	line := strings.Join(args, " ")
	for _, want := range []string{
		"-nodefaults -no-user-config -display none",
		"-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-accel tcg,thread=multi -cpu " + EmulatedCPU + " -smp 2 -m 512M", "-action reboot=shutdown,shutdown=poweroff,panic=shutdown",
		"-bios /proc/self/fd/3 -kernel /proc/self/fd/4 -initrd /proc/self/fd/5 -append quiet",
		"name=opt/foothold/settings,file=/proc/self/fd/6", "name=opt/foothold/token,file=/proc/self/fd/7",
		"mac=02:f0:00:00:00:01", "name=foothold.channel.0",
		"node-name=template,filename=/dev/fdset/2,read-only=on", "node-name=volume,filename=/dev/fdset/3,read-only=off",
		"-device pvpanic-pci",
	} {
		if !strings.Contains(line, want) {
			t.Errorf("arguments lack %q:\n%s", want, line)
		}
	}
	for _, bad := range []string{"tpm", "secret", "-vga", "-usb ", "-monitor"} {
		if strings.Contains(line, bad) {
			t.Errorf("arguments hold %q", bad)
		}
	}
	want := []*os.File{m.BIOS.File, m.Kernel.File, m.Initrd.File, m.Settings.File, m.Token.File, m.Tap, m.console, m.channel, m.mon, m.Template, m.Volume}
	if !slices.Equal(inherited, want) {
		t.Error("QEMU inherits other files, or in another order than its arguments say")
	}
	m.Accel = KVM
	if args, _ := m.arguments(); !slices.Contains(args, "kvm") || !slices.Contains(args, "host") {
		t.Error("KVM is not used")
	}
}

func TestStartRefusesAnAccelerator(t *testing.T) {
	m := machine(t)
	m.Accel = "tcg,thread=single"
	if _, err := Start(m); err == nil {
		t.Error("started")
	}
}

func TestStartThatFailsSaysWhy(t *testing.T) {
	m := machine(t)
	script, err := Seal("program", strings.NewReader("#!/bin/sh\necho no such machine >&2; exit 1\n"), 100)
	if err != nil {
		t.Fatal(err)
	}
	m.Program = script
	if _, err := Start(m); err == nil || !strings.Contains(err.Error(), "no such machine") {
		t.Errorf("%v", err)
	}
}

func TestRingKeepsTheEnd(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.IntRange(1, 20).Draw(t, "size")
		r := newRing(size)
		var all []byte
		for _, chunk := range rapid.SliceOf(rapid.SliceOfN(rapid.Byte(), 0, 50)).Draw(t, "writes") {
			if n, err := r.Write(chunk); n != len(chunk) || err != nil {
				t.Fatalf("wrote %d, %v", n, err)
			}
			all = append(all, chunk...)
			if got, want := r.Bytes(), all[max(0, len(all)-size):]; !bytes.Equal(got, want) {
				t.Fatalf("keeps %v of %v", got, all)
			}
		}
	})
}

// fakeMonitor plays QEMU's side with prepared lines: one before each command, one after
// its last.
func fakeMonitor(t *testing.T, lines ...string) net.Conn {
	t.Helper()
	ours, theirs := net.Pipe()
	t.Cleanup(func() { theirs.Close() })
	go func() {
		defer theirs.Close()
		buf := make([]byte, 1024)
		for i, line := range lines {
			if i > 0 {
				if _, err := theirs.Read(buf); err != nil {
					return
				}
			}
			io.WriteString(theirs, line)
		}
	}()
	return ours
}

const greeting = `{"QMP": {"version": {}, "capabilities": []}}` + "\n"

func TestMonitor(t *testing.T) {
	m, err := newMonitor(fakeMonitor(t, greeting, `{"event":"RESUME"}`+"\n"+`{"return": {}}`+"\n",
		`{"return": {"status":"running"}}`+"\n", `{"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-reset"}}`+"\n"))
	if err != nil {
		t.Fatal(err)
	}
	if status, err := m.status(); err != nil || status != "running" {
		t.Errorf("%q, %v", status, err)
	}
	if _, err := m.command("quit"); err == nil {
		t.Error("an ended monitor answered")
	}
	if reason := m.reason(); reason != "guest-reset" {
		t.Errorf("ended by %q", reason)
	}
}

func TestMonitorRefusesNonsense(t *testing.T) {
	for name, lines := range map[string][]string{
		"nothing":            {},
		"no greeting":        {`{"return": {}}` + "\n"},
		"no JSON":            {"hello\n"},
		"endless line":       {strings.Repeat("x", maxLine+1)},
		"error":              {greeting, `{"error": {"class":"GenericError","desc":"no"}}` + "\n"},
		"replies unasked":    {greeting + strings.Repeat(`{"return": {}}`+"\n", 10)},
		"ends in the middle": {greeting, `{"return"`},
		"crashes on and on":  {greeting, strings.Repeat(`{"event":"GUEST_CRASHLOADED"}`+"\n", maxCrashLoads+1) + `{"return": {}}` + "\n"},
	} {
		m, err := newMonitor(fakeMonitor(t, lines...))
		if err == nil {
			_, err = m.status()
		}
		if err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// TestNoVMWithoutAMonitor: a VM whose monitor ends is ended.
func TestNoVMWithoutAMonitor(t *testing.T) {
	m, err := newMonitor(fakeMonitor(t, greeting, `{"event":"SHUTDOWN","data":{"guest":true,"reason":"guest-panic"}}`+"\n"+`{"return": {}}`+"\n"+"nonsense\n"))
	if err != nil {
		t.Fatal(err)
	}
	p := &Process{cmd: exec.Command("sleep", "1000"), mon: m, done: make(chan struct{})}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	go p.leash()
	<-p.Done()
	if guest, err := p.Ending(); guest != "guest-panic" || err == nil {
		t.Errorf("ended by %q, %v", guest, err)
	}
}
