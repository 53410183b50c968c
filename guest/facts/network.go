package facts

import (
	"fmt"
	"net"
	"slices"
	"strings"

	"foothold/protocol/audit"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// network lists interfaces and the routes of every table but the local one.
func network(r *audit.Report) error {
	links, err := netlink.LinkList()
	if err != nil {
		return err
	}
	names := map[int]string{}
	for _, l := range links {
		a := l.Attrs()
		names[a.Index] = a.Name
		i := audit.Interface{Name: a.Name, MAC: a.HardwareAddr.String(), Up: a.Flags&net.FlagUp != 0, Addresses: []string{}}
		addrs, err := netlink.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return fmt.Errorf("addresses of %s: %w", a.Name, err)
		}
		for _, addr := range addrs {
			i.Addresses = append(i.Addresses, addr.IPNet.String())
		}
		slices.Sort(i.Addresses)
		r.Interfaces = append(r.Interfaces, i)
	}
	slices.SortFunc(r.Interfaces, func(a, b audit.Interface) int { return strings.Compare(a.Name, b.Name) })
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		routes, err := netlink.RouteListFiltered(family, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
		if err == unix.EAFNOSUPPORT || err == unix.EOPNOTSUPP { // a kernel without IPv6
			continue
		}
		if err != nil {
			return fmt.Errorf("routes: %w", err)
		}
		for _, route := range routes {
			if route.Table != unix.RT_TABLE_LOCAL {
				r.Routes = append(r.Routes, routeText(route, names))
			}
		}
	}
	slices.Sort(r.Routes)
	return nil
}

// routeText is "DST [via GATEWAY] dev NAME"; whatever is unusual of a route is added,
// so that it is not what anyone expects.
func routeText(r netlink.Route, names map[int]string) string {
	dst := "default"
	if r.Dst != nil {
		ones, bits := r.Dst.Mask.Size()
		switch {
		case ones == bits:
			dst = r.Dst.IP.String()
		case ones != 0:
			dst = r.Dst.String()
		}
	}
	text := dst
	if r.Gw != nil {
		text += " via " + r.Gw.String()
	}
	if r.MultiPath != nil {
		text += " multipath"
	}
	text += " dev " + names[r.LinkIndex]
	if r.Table != unix.RT_TABLE_MAIN {
		text += fmt.Sprintf(" table %d", r.Table)
	}
	if r.Type != unix.RTN_UNICAST {
		text += fmt.Sprintf(" type %d", r.Type)
	}
	return text
}
