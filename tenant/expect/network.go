package expect

import (
	"net/netip"
	"slices"
	"strings"

	"foothold/protocol/audit"
)

// The interfaces' names in the guest.
const (
	loopback = "lo"
	tunnel   = "wg0"
)

// sshPort is where the agent waits for the orchestrator in act 8.
const sshPort = 22

func (j *judge) initramfsListeners() {
	ssh := false
	for _, l := range j.r.Listeners {
		if (l.Proto == "tcp" || l.Proto == "tcp6") && l.Port == sshPort && j.isAgent(l.Exe) {
			ssh = true
			continue
		}
		j.find("listener", "%s %s:%d of %q is not expected", l.Proto, l.Address, l.Port, l.Exe)
	}
	if !ssh {
		j.find("listener", "the agent's SSH port is not reported, though the audit came through it")
	}
}

// osListeners: WireGuard's one UDP port, which the kernel or the agent holds, and the
// workload's.
func (j *judge) osListeners() {
	wireguard := 0
	for _, l := range j.r.Listeners {
		udp := l.Proto == "udp" || l.Proto == "udp6"
		if udp && (l.Exe == "" || j.isAgent(l.Exe)) && (wireguard == 0 || wireguard == l.Port) {
			wireguard = l.Port
			continue
		}
		tcp := l.Proto == "tcp" || l.Proto == "tcp6"
		if tcp && slices.ContainsFunc(j.workloads(), func(w *Workload) bool { return l.Port == w.Port }) {
			continue
		}
		j.find("listener", "%s %s:%d of %q is not expected", l.Proto, l.Address, l.Port, l.Exe)
	}
}

// isAgent reports whether a path is the executable of a process that is the agent.
func (j *judge) isAgent(exe string) bool {
	return exe != "" && slices.ContainsFunc(j.r.Processes, func(p audit.Process) bool { return p.Exe == exe && p.SHA256 == j.t.Agent })
}

func (j *judge) initramfsNetwork() {
	outside := j.interfaces(false)
	j.routes(func(r route) bool {
		return r.dev == outside && (j.connected(r) ||
			r.via == j.i.Network.Gateway && (r.all() || r.to(j.i.BootServer) || r.to(j.i.Orchestrator) || r.to(j.i.Gateway)))
	})
}

// osNetwork: the only way out is the tunnel; the cloud network carries the tunnel's
// packets to the gateway and nothing else.
func (j *judge) osNetwork() {
	outside := j.interfaces(true)
	all := false
	j.routes(func(r route) bool {
		if r.dev == tunnel {
			all = all || r.all()
			return !r.via.IsValid() && (r.all() || r.dst == j.i.TunnelPrefix.Masked() && j.i.TunnelPrefix.IsValid())
		}
		return r.dev == outside && (j.connected(r) || r.via == j.i.Network.Gateway && r.to(j.i.Gateway))
	})
	if !all {
		j.find("route", "no default route goes into the tunnel")
	}
}

// interfaces judges what there is and returns the name of the one on the cloud network.
func (j *judge) interfaces(withTunnel bool) string {
	outside, inside := "", false
	for _, i := range j.r.Interfaces {
		switch {
		case i.Name == loopback:
			j.addresses(i, "127.0.0.1/8", "::1/128")
		case i.MAC == j.i.Network.MAC && outside == "":
			outside = i.Name
			j.addresses(i, j.i.Network.Address.String())
		case withTunnel && i.Name == tunnel && j.i.Tunnel.IsValid():
			inside = true
			for _, a := range i.Addresses {
				if p, err := netip.ParsePrefix(a); err != nil || p.Addr() != j.i.Tunnel {
					j.find("interface", "%s has address %s, want %s", i.Name, a, j.i.Tunnel)
				}
			}
		default:
			j.find("interface", "%s (%s) is not expected", i.Name, i.MAC)
		}
	}
	if outside == "" {
		j.find("interface", "none has the assigned MAC %s", j.i.Network.MAC)
	}
	if withTunnel && !inside {
		j.find("interface", "%s is missing", tunnel)
	}
	return outside
}

func (j *judge) addresses(i audit.Interface, want ...string) {
	for _, a := range i.Addresses {
		if !slices.Contains(want, a) {
			j.find("interface", "%s has address %s, want %s", i.Name, a, want[0])
		}
	}
	if i.Name != loopback && !slices.Contains(i.Addresses, want[0]) {
		j.find("interface", "%s lacks its address %s", i.Name, want[0])
	}
}

func (j *judge) routes(allowed func(route) bool) {
	for _, text := range j.r.Routes {
		if r, ok := parseRoute(text); !ok || !allowed(r) {
			j.find("route", "%q is not expected", text)
		}
	}
}

func (j *judge) connected(r route) bool {
	return !r.via.IsValid() && r.dst == j.i.Network.Address.Masked()
}

// route is an entry of the IPv4 main table.
type route struct {
	dst netip.Prefix
	via netip.Addr
	dev string
}

func (r route) all() bool { return r.dst.Bits() == 0 }

func (r route) to(a netip.Addr) bool {
	return a.IsValid() && r.dst == netip.PrefixFrom(a, a.BitLen())
}

// parseRoute reads "DST [via GATEWAY] dev NAME", where DST is "default", an address or
// a prefix. Anything else about a route is more than expected.
func parseRoute(text string) (route, bool) {
	var r route
	f := strings.Fields(text)
	if len(f) != 3 && len(f) != 5 {
		return r, false
	}
	switch {
	case f[0] == "default":
		r.dst = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	case strings.Contains(f[0], "/"):
		r.dst, _ = netip.ParsePrefix(f[0])
	default:
		a, _ := netip.ParseAddr(f[0])
		r.dst = netip.PrefixFrom(a, a.BitLen())
	}
	if len(f) == 5 {
		if f[1] != "via" {
			return r, false
		}
		r.via, _ = netip.ParseAddr(f[2])
		if !r.via.IsValid() {
			return r, false
		}
	}
	r.dev = f[len(f)-1]
	return r, f[len(f)-2] == "dev" && r.dst.IsValid()
}
