package firewall

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"foothold/dmz/ruleset"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// fixNeighbours makes the permanent neighbour entries of the adjacent interface exactly
// those of the VMs with a live flow, so that nobody on the cloud network can draw a
// VM's packets to itself by ARP.
func fixNeighbours(adjacent string, flows []ruleset.Flow, now time.Duration) error {
	if adjacent == "" {
		return nil
	}
	link, err := netlink.LinkByName(adjacent)
	if err != nil {
		return fmt.Errorf("find adjacent interface %s: %w", adjacent, err)
	}
	index := link.Attrs().Index
	entries, err := netlink.NeighList(index, unix.AF_INET)
	if err != nil {
		return fmt.Errorf("list neighbours: %w", err)
	}
	want := neighboursOf(flows, now)
	for _, e := range entries {
		addr, ok := netip.AddrFromSlice(e.IP.To4())
		if !ok || e.State != netlink.NUD_PERMANENT {
			continue
		}
		if want[addr].String() == e.HardwareAddr.String() {
			delete(want, addr)
		} else if want[addr] == nil {
			if err := netlink.NeighDel(&netlink.Neigh{LinkIndex: index, IP: e.IP}); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("free neighbour %s: %w", addr, err)
			}
		}
	}
	for addr, mac := range want {
		n := &netlink.Neigh{LinkIndex: index, Family: unix.AF_INET, State: netlink.NUD_PERMANENT, IP: addr.AsSlice(), HardwareAddr: mac}
		if err := netlink.NeighSet(n); err != nil {
			return fmt.Errorf("fix neighbour %s: %w", addr, err)
		}
	}
	return nil
}

// neighboursOf is the MAC of each VM with a flow that is not over.
func neighboursOf(flows []ruleset.Flow, now time.Duration) map[netip.Addr]net.HardwareAddr {
	out := map[netip.Addr]net.HardwareAddr{}
	for _, f := range flows {
		if f.Until != ruleset.Forever && f.Until <= now {
			continue
		}
		for _, e := range []ruleset.Endpoint{f.From, f.To} {
			if e.MAC != nil {
				out[e.Prefix.Addr()] = e.MAC
			}
		}
	}
	return out
}
