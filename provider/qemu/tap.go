package qemu

import (
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// OpenTap makes the tap device name with the given MTU and adds it to the bridge as an
// isolated port: it reaches the bridge's other ports that are not isolated, and no
// neighbour. The device lives as long as the file, here or in QEMU, is open.
func OpenTap(name, bridge string, mtu int) (*os.File, error) {
	f, err := openTun(name)
	if err != nil {
		return nil, fmt.Errorf("make tap %s: %w", name, err)
	}
	if err := attach(name, bridge, mtu); err != nil {
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

func attach(name, bridge string, mtu int) error {
	tap, err := netlink.LinkByName(name)
	if err != nil {
		return err
	}
	br, err := netlink.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", bridge, err)
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
	if err := netlink.LinkSetUp(tap); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	return nil
}
