package wiring

import (
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"

	"foothold/lab"
)

// Network is the lab's network with its places.
type Network struct {
	places map[string]Namespace
}

// Place returns the namespace of a place.
func (n *Network) Place(name string) (Namespace, bool) {
	ns, ok := n.places[name]
	return ns, ok
}

// Build makes everything. The caller's own network namespace becomes the switch, and
// its mount namespace must have a file system of its own on /run.
func Build(places []lab.Place) (*Network, error) {
	if err := os.MkdirAll(namesDir, 0o755); err != nil {
		return nil, fmt.Errorf("make %s: %w", namesDir, err)
	}
	if err := quiet(); err != nil {
		return nil, fmt.Errorf("prepare switch: %w", err)
	}
	n := &Network{places: map[string]Namespace{}}
	for _, p := range places {
		ns, err := create(p.Name)
		if err != nil {
			return nil, err
		}
		n.places[p.Name] = ns
		if err := ns.Do(func() error { return up("lo") }); err != nil {
			return nil, fmt.Errorf("prepare %s: %w", p.Name, err)
		}
	}
	host := n.places[lab.Host]
	if err := host.Do(func() error { return bridge(lab.CloudBridge) }); err != nil {
		return nil, fmt.Errorf("make cloud network: %w", err)
	}
	for _, name := range []string{lab.TenantLAN, lab.DMZLAN, lab.MgmtLAN} {
		if err := bridge("br-" + name); err != nil {
			return nil, fmt.Errorf("make network %s: %w", name, err)
		}
	}
	for _, p := range places {
		if err := n.connect(p); err != nil {
			return nil, fmt.Errorf("connect %s: %w", p.Name, err)
		}
	}
	return n, nil
}

// connect makes a place's interfaces, then its routes.
func (n *Network) connect(p lab.Place) error {
	place := n.places[p.Name]
	for _, port := range p.Ports {
		var err error
		if port.LAN == lab.CloudLAN {
			err = n.places[lab.Host].Do(func() error {
				return cable(port, lab.CloudBridge, cloudPort(p.Name), place)
			})
		} else {
			err = cable(port, "br-"+port.LAN, p.Name+"."+port.LAN[:1], place)
		}
		if err != nil {
			return err
		}
		if err := place.Do(func() error { return configure(port) }); err != nil {
			return err
		}
	}
	return place.Do(func() error {
		for _, r := range p.Routes {
			if err := netlink.RouteAdd(&netlink.Route{Dst: ipNet(r.To), Gw: r.Via.AsSlice()}); err != nil {
				return fmt.Errorf("add route to %s: %w", r.To, err)
			}
		}
		return nil
	})
}

// cloudPort names the host's end of a cable to the cloud network.
func cloudPort(place string) string {
	if place == lab.External {
		return "uplink0"
	}
	return "port-" + place
}

// cable makes a veth pair from the bridge, which is in the caller's namespace, to the
// place, and makes the bridge's end an isolated port where the table says so.
func cable(port lab.Port, bridgeName, near string, place Namespace) error {
	if len(near) > 15 { // IFNAMSIZ - 1
		near = near[:15]
	}
	master, err := netlink.LinkByName(bridgeName)
	if err != nil {
		return fmt.Errorf("find bridge %s: %w", bridgeName, err)
	}
	link := &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: near, MasterIndex: master.Attrs().Index, TxQLen: 1000, MTU: lab.MTU},
		PeerName:      port.Name,
		PeerNamespace: netlink.NsFd(place.handle),
	}
	if err := netlink.LinkAdd(link); err != nil {
		return fmt.Errorf("add interface %s: %w", near, err)
	}
	if port.Isolated {
		if err := netlink.LinkSetIsolated(link, true); err != nil {
			return fmt.Errorf("isolate %s: %w", near, err)
		}
	}
	return up(near)
}

func bridge(name string) error {
	link := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: name, MTU: lab.MTU}}
	if err := netlink.LinkAdd(link); err != nil {
		return fmt.Errorf("add bridge %s: %w", name, err)
	}
	return up(name)
}

func configure(port lab.Port) error {
	link, err := netlink.LinkByName(port.Name)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", port.Name, err)
	}
	address := &netlink.Addr{IPNet: &net.IPNet{
		IP:   port.Address.Addr().AsSlice(),
		Mask: net.CIDRMask(port.Address.Bits(), 32),
	}}
	if err := netlink.AddrAdd(link, address); err != nil {
		return fmt.Errorf("add address %s: %w", port.Address, err)
	}
	return up(port.Name)
}

func up(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find interface %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Masked().Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}
}
