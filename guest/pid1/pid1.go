// Package pid1 is what a first process in a VM does for itself: mounts, a static
// network, console lines with a clock, and the power switch.
package pid1

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Console writes milestones to the VM's console, which the provider keeps and the
// tenant may read: short, and never a secret.
type Console struct {
	Name string // of the program
}

// Say writes one line with the seconds since the kernel started.
func (c Console) Say(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	fmt.Fprintf(os.Stdout, "%s %.3f %s\n", c.Name, Uptime().Seconds(), strings.ReplaceAll(line, "\n", " "))
}

// Uptime is the time since the kernel started.
func Uptime() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// Mount makes /proc, /sys, /dev and /run, and files private to root.
func Mount() error {
	unix.Umask(0o077)
	for _, m := range []struct {
		source, target, kind string
		flags                uintptr
		data                 string
	}{
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755"},
		{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755"},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.data); err != nil && err != unix.EBUSY {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return nil
}

// PowerOff ends the machine. It returns only where it is not the machine's first process.
func PowerOff() error {
	unix.Sync()
	return unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// NoKexec makes this kernel the last of this start: whatever reboots from now on goes by
// way of the host (Linux, admin-guide/sysctl/kernel, kexec_load_disabled). Nothing takes
// it back.
func NoKexec() error {
	err := os.WriteFile("/proc/sys/kernel/kexec_load_disabled", []byte("1"), 0)
	if err != nil && !errors.Is(err, os.ErrNotExist) { // a kernel without kexec is fine
		return fmt.Errorf("refuse another kernel: %w", err)
	}
	return nil
}

// Link is the interface with the given MAC.
func Link(mac string) (netlink.Link, error) {
	want, err := net.ParseMAC(mac)
	if err != nil {
		return nil, fmt.Errorf("find network interface: %w", err)
	}
	links, err := netlink.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list network interfaces: %w", err)
	}
	for _, l := range links {
		if l.Attrs().HardwareAddr.String() == want.String() && l.Type() == "device" {
			return l, nil
		}
	}
	return nil, fmt.Errorf("no network interface has the address %s", mac)
}

// Network sets the interface with that MAC statically: address, MTU, default route.
// IPv6 is switched off first.
func Network(mac string, address netip.Prefix, gateway netip.Addr, mtu int) error {
	if err := disableIPv6(); err != nil {
		return err
	}
	link, err := Link(mac)
	if err != nil {
		return err
	}
	name := link.Attrs().Name
	if lo, err := netlink.LinkByName("lo"); err == nil {
		if err := netlink.LinkSetUp(lo); err != nil {
			return fmt.Errorf("bring up lo: %w", err)
		}
	}
	if err := netlink.LinkSetMTU(link, mtu); err != nil {
		return fmt.Errorf("set MTU of %s: %w", name, err)
	}
	addr, err := netlink.ParseAddr(address.String())
	if err != nil {
		return fmt.Errorf("set address of %s: %w", name, err)
	}
	if err := netlink.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("set address of %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring up %s: %w", name, err)
	}
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: gateway.AsSlice()}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("set default route: %w", err)
	}
	return nil
}

// disableIPv6 switches IPv6 off for every interface, now and later. A kernel
// without it is fine.
func disableIPv6() error {
	for _, which := range []string{"all", "default"} {
		err := os.WriteFile("/proc/sys/net/ipv6/conf/"+which+"/disable_ipv6", []byte("1"), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("switch IPv6 off: %w", err)
		}
	}
	return nil
}
