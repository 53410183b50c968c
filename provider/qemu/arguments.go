package qemu

import (
	"fmt"
	"os"
	"strconv"

	"foothold/protocol/vmspec"
)

// Accelerators.
const (
	KVM = "kvm"
	TCG = "tcg"
)

// Modules of QEMU as Debian builds it.
const (
	ModuleDir = "/usr/lib/x86_64-linux-gnu/qemu" // of package qemu-system-common
	TCGModule = "accel-tcg-x86_64.so"            // the TCG accelerator
)

// Serial numbers of the VM's disks, under which the guest finds them.
const (
	TemplateSerial = "template" // vda, read-only
	VolumeSerial   = "volume"   // vdb
)

// Machine is what a VM consists of. Everything that becomes an argument is a number,
// a checked MAC address or the number of an open file; the one text is Cmdline, which
// is the platform's, not a tenant's.
type Machine struct {
	Program               *Sealed // QEMU itself
	Modules               string  // folder that QEMU loads its modules from
	Accel                 string  // KVM or TCG
	VCPUs                 int
	MemoryMiB             int
	MAC                   string
	BIOS, Kernel, Initrd  *Sealed
	Cmdline               string
	Settings, Token       *Sealed  // fw_cfg items
	Template, Volume, Tap *os.File // disks, read-only and read-write; the network
	channel, console, mon *os.File // set by Start: QEMU's ends
}

// EmulatedCPU is the processor that a VM sees under emulation: all that QEMU can do,
// without vector and AES instructions. It carries those out one lane at a time, but
// programs and kernel prefer them: without, ChaCha20-Poly1305 takes a third and a
// kernel's start four fifths of the time.
const EmulatedCPU = "max,-avx,-avx2,-aes,-pclmulqdq,-ssse3,-sse4.1,-sse4.2,-bmi1,-bmi2,-adx"

// files collects the open files that QEMU inherits. Its first one becomes number 3.
type files []*os.File

func (l *files) add(f *os.File) string {
	*l = append(*l, f)
	return strconv.Itoa(2 + len(*l))
}

func (l *files) path(f *os.File) string { return "/proc/self/fd/" + l.add(f) }

// arguments gives QEMU's arguments and the files that they refer to.
func (m *Machine) arguments() ([]string, []*os.File) {
	var l files
	cpu, accel := EmulatedCPU, "tcg,thread=multi"
	if m.Accel == KVM {
		cpu, accel = "host", "kvm"
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-machine", "q35,usb=off,vmport=off,smm=off,mem-merge=off,dump-guest-core=off", "-accel", accel,
		"-cpu", cpu, "-smp", strconv.Itoa(m.VCPUs), "-m", strconv.Itoa(m.MemoryMiB) + "M",
		"-action", "reboot=shutdown,shutdown=poweroff,panic=shutdown", // a VM that leaves its story by a reset or a panic has ended

		"-bios", l.path(m.BIOS.File), "-kernel", l.path(m.Kernel.File), "-initrd", l.path(m.Initrd.File), "-append", m.Cmdline,
		"-fw_cfg", "name=" + vmspec.FwCfgSettings + ",file=" + l.path(m.Settings.File),
		"-fw_cfg", "name=" + vmspec.FwCfgToken + ",file=" + l.path(m.Token.File),

		"-netdev", "tap,id=net,fd=" + l.add(m.Tap), "-device", "virtio-net-pci,netdev=net,romfile=,disable-legacy=on,mac=" + m.MAC,
		"-object", "rng-random,id=rng,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=rng,disable-legacy=on",

		"-add-fd", "set=1,fd=" + l.add(m.console), "-chardev", "file,id=console,path=/dev/fdset/1,append=on", "-serial", "chardev:console",
		"-chardev", "socket,id=channel,fd=" + l.add(m.channel), "-device", "virtio-serial-pci,disable-legacy=on,max_ports=2",
		"-device", "virtserialport,chardev=channel,nr=1,name=" + vmspec.ChannelPort,
		"-chardev", "socket,id=mon,fd=" + l.add(m.mon), "-mon", "chardev=mon,mode=control",
	}
	args = append(args, disk(&l, 2, m.Template, TemplateSerial, "on")...)
	args = append(args, disk(&l, 3, m.Volume, VolumeSerial, "off")...)
	// Where the guest's kernel says that it panics (QEMU, docs/specs/pvpanic). Without it a
	// panic looks like a reboot. It comes last: no other device changes its place.
	args = append(args, "-device", "pvpanic-pci,events=1")
	return args, l
}

// disk attaches an open file as a virtio disk.
func disk(l *files, set int, f *os.File, serial, readOnly string) []string {
	return []string{
		"-add-fd", fmt.Sprintf("set=%d,fd=%s", set, l.add(f)),
		"-blockdev", fmt.Sprintf("driver=file,node-name=%s,filename=/dev/fdset/%d,read-only=%s,auto-read-only=off,discard=unmap", serial, set, readOnly),
		"-device", fmt.Sprintf("virtio-blk-pci,drive=%s,serial=%s,disable-legacy=on", serial, serial),
	}
}
