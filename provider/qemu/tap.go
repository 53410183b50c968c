package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"

	"foothold/protocol/event"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// OpenTap makes the tap device name and adds it to the bridge as an isolated port: it
// reaches the bridge's other ports that are not isolated, and no neighbour. The bridge
// takes frames from it with that one source address alone, so that no VM passes for
// another at a firewall that knows MAC addresses. An address that the bridge knows
// elsewhere, the firewall's own above all, is refused: its frames would come here. The
// bridge is a wire: through it nobody reaches the host itself. The device lives as long
// as the file, here or in QEMU, is open.
func OpenTap(name, bridge, mac string, mtu int) (*os.File, error) {
	addr, err := net.ParseMAC(mac)
	if err != nil {
		return nil, fmt.Errorf("make tap %s: %w", name, err)
	}
	f, err := openTun(name)
	if err != nil {
		return nil, fmt.Errorf("make tap %s: %w", name, err)
	}
	if err := attach(name, bridge, addr, mtu); err != nil {
		f.Close()
		return nil, fmt.Errorf("make tap %s: %w", name, err)
	}
	return f, nil
}

func openTun(name string) (*os.File, error) {
	// The file must not be one that Go polls: it is QEMU's, by number.
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/net/tun: %w", err)
	}
	req, err := unix.NewIfreq(name)
	if err == nil {
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_TUN_EXCL)
		err = unix.IoctlIfreq(fd, unix.TUNSETIFF, req)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return os.NewFile(uintptr(fd), name), nil
}

func attach(name, bridge string, mac net.HardwareAddr, mtu int) error {
	tap, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	br, err := netlink.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", bridge, err)
	}
	if err := shield(bridge); err != nil {
		return err
	}
	if err := free(br, mac); err != nil {
		return err
	}
	if err := netlink.LinkSetMTU(tap, mtu); err != nil {
		return fmt.Errorf("set MTU %d: %w", mtu, err)
	}
	if err := netlink.LinkSetMaster(tap, br); err != nil {
		return fmt.Errorf("add to bridge %s: %w", bridge, err)
	}
	if err := netlink.LinkSetIsolated(tap, true); err != nil { // before it is up
		return fmt.Errorf("isolate: %w", err)
	}
	if err := lockPort(tap, mac); err != nil {
		return err
	}
	if err := netlink.LinkSetUp(tap); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	return nil
}

// shield makes the bridge no interface of the host's: no IPv6, no answer to ARP, and no
// IPv4 packet is taken, since by its routes none can come from there (Linux kernel
// documentation, networking/ip-sysctl).
func shield(bridge string) error {
	for _, s := range []struct{ path, value string }{
		{"ipv6/conf/" + bridge + "/disable_ipv6", "1"},
		{"ipv4/conf/" + bridge + "/arp_ignore", "8"},
		{"ipv4/conf/" + bridge + "/rp_filter", "1"},
	} {
		err := os.WriteFile(filepath.Join("/proc/sys/net", s.path), []byte(s.value), 0)
		if err != nil && !(s.path[:4] == "ipv6" && errors.Is(err, fs.ErrNotExist)) {
			return fmt.Errorf("shield the host: %w", err)
		}
	}
	return nil
}

// free refuses an address that is the bridge's own or that it knows at a port.
func free(br netlink.Link, mac net.HardwareAddr) error {
	entries, err := netlink.NeighList(0, unix.AF_BRIDGE)
	if err != nil {
		return fmt.Errorf("list the bridge's addresses: %w", err)
	}
	known := bytes.Equal(br.Attrs().HardwareAddr, mac)
	for _, e := range entries {
		known = known || e.MasterIndex == br.Attrs().Index && bytes.Equal(e.HardwareAddr, mac)
	}
	if known {
		return event.Refuse(event.InUse, "the network has the MAC address %s already", mac)
	}
	return nil
}

// lockPort lets the bridge take frames from the port only with the source address mac:
// it learns none there, has one static entry, and drops what has no entry for this port
// (Linux 5.18, BR_PORT_LOCKED; bridge(8), "locked").
func lockPort(tap netlink.Link, mac net.HardwareAddr) error {
	if err := netlink.LinkSetLearning(tap, false); err != nil {
		return fmt.Errorf("stop learning: %w", err)
	}
	err := netlink.NeighSet(&netlink.Neigh{
		LinkIndex: tap.Attrs().Index, Family: unix.AF_BRIDGE, State: netlink.NUD_NOARP, Flags: netlink.NTF_MASTER, HardwareAddr: mac,
	})
	if err != nil {
		return fmt.Errorf("name its address: %w", err)
	}
	req := nl.NewNetlinkRequest(unix.RTM_SETLINK, unix.NLM_F_ACK)
	msg := nl.NewIfInfomsg(unix.AF_BRIDGE)
	msg.Index = int32(tap.Attrs().Index)
	req.AddData(msg)
	port := nl.NewRtAttr(unix.IFLA_PROTINFO|unix.NLA_F_NESTED, nil)
	port.AddRtAttr(unix.IFLA_BRPORT_LOCKED, []byte{1})
	req.AddData(port)
	if _, err := req.Execute(unix.NETLINK_ROUTE, 0); err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	return nil
}
