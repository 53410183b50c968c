package policy

import (
	"fmt"
	"net/netip"
	"time"

	"foothold/protocol/zone"
	"foothold/tenant/reservation"
)

// VM is what the documents need to know of one live VM.
type VM struct {
	Reservation string
	Start       int
	Phase       reservation.Phase
	Deadline    time.Time
	Address     netip.Addr
	MAC         string
	Running     bool // the host reported it started and not stopped
	Port        int  // of its workload; 0: none
	Peer        *Peer
}

// Peer is a VM's admitted tunnel.
type Peer struct {
	Serial    string
	PublicKey []byte
	Address   netip.Addr
}

// Network is where the fixed parts stand.
type Network struct {
	Orchestrator netip.Addr
	BootServer   netip.AddrPort
	Admission    netip.AddrPort // gateway, HTTPS
	WireGuard    netip.AddrPort // gateway, UDP
	Store        netip.AddrPort
	Lease        time.Duration // of documents
	Standing     []Standing
	Destinations []Destination
	Clients      []netip.Prefix
}

// Standing is a flow between daemons that has no end.
type Standing struct {
	Zone     string
	From, To netip.Prefix
	Proto    string
	Port     int
}

// Destination is what a computing VM may reach from its tunnel address.
type Destination struct {
	Prefix netip.Prefix
	Proto  string
	Port   int
}

// Documents states the desired traffic, one document a zone, without epoch and
// revision. A VM without a running instance, or past its deadline, is not in them.
//
//	phase       external                          internal                    gateway
//	booting     VM → boot server                  -                           -
//	unlocking   orchestrator → VM:22              orchestrator → VM:22        -
//	connecting  VM → gateway, HTTPS and WireGuard -                           peer, quarantined
//	computing   VM → gateway, WireGuard           tunnel → destinations,      peer; tunnel → store and
//	                                              clients → tunnel:workload   destinations, clients → tunnel:workload
func (n Network) Documents(vms []VM, now time.Time) map[string]zone.Document {
	docs := map[string]zone.Document{}
	for _, name := range []string{zone.External, zone.Internal, zone.Gateway, zone.Boot} {
		docs[name] = zone.Document{Zone: name, Issued: now.UTC(), Lease: n.Lease, Flows: n.standing(name)}
	}
	for _, vm := range vms {
		if !vm.Running || !vm.Deadline.After(now) {
			continue
		}
		left := vm.Deadline.Sub(now)
		add := func(name string, flows ...zone.Flow) {
			d := docs[name]
			d.Flows = append(d.Flows, flows...)
			docs[name] = d
		}
		f := flows{vm: vm, ttl: left}
		switch vm.Phase {
		case reservation.Booting:
			add(zone.External, f.fromVM("boot", "tcp", n.BootServer))
			d := docs[zone.Boot]
			d.Boots = append(d.Boots, zone.Boots{Reservation: vm.Reservation, Start: vm.Start, Address: vm.Address, TTL: left})
			docs[zone.Boot] = d
		case reservation.Unlocking:
			add(zone.External, f.ssh(n.Orchestrator, vm.MAC))
			add(zone.Internal, f.ssh(n.Orchestrator, ""))
		case reservation.Connecting:
			add(zone.External, f.fromVM("admission", "tcp", n.Admission), f.fromVM("wireguard", "udp", n.WireGuard))
		case reservation.Computing:
			add(zone.External, f.fromVM("wireguard", "udp", n.WireGuard))
		}
		if vm.Peer == nil {
			continue
		}
		switch vm.Phase {
		case reservation.Computing:
			inside := n.inside(f)
			add(zone.Internal, inside...)
			add(zone.Gateway, append(inside, f.make("store", zone.Endpoint{Prefix: host(vm.Peer.Address)}, hostOf(n.Store), "tcp", int(n.Store.Port())))...)
			fallthrough
		case reservation.Connecting:
			d := docs[zone.Gateway]
			d.Peers = append(d.Peers, zone.Peer{Reservation: vm.Reservation, Start: vm.Start, Serial: vm.Peer.Serial, PublicKey: vm.Peer.PublicKey,
				Address: vm.Peer.Address, Source: vm.Address, Quarantined: vm.Phase != reservation.Computing, TTL: left})
			docs[zone.Gateway] = d
		}
	}
	return docs
}

func (n Network) standing(name string) []zone.Flow {
	var list []zone.Flow
	for _, s := range n.Standing {
		if s.Zone == name {
			list = append(list, zone.Flow{ID: fmt.Sprintf("standing/%s-%s/%s-%d", s.From, s.To, s.Proto, s.Port),
				From: zone.Endpoint{Prefix: s.From}, To: zone.Endpoint{Prefix: s.To}, Proto: s.Proto, Port: s.Port})
		}
	}
	return list
}

// inside lists what passes through the tunnel of a computing VM.
func (n Network) inside(f flows) []zone.Flow {
	tunnel := zone.Endpoint{Prefix: host(f.vm.Peer.Address)}
	var list []zone.Flow
	for _, d := range n.Destinations {
		list = append(list, f.make(fmt.Sprintf("to-%s-%s-%d", d.Prefix, d.Proto, d.Port), tunnel, zone.Endpoint{Prefix: d.Prefix}, d.Proto, d.Port))
	}
	if f.vm.Port == 0 {
		return list
	}
	for _, c := range n.Clients {
		list = append(list, f.make(fmt.Sprintf("from-%s", c), zone.Endpoint{Prefix: c}, tunnel, "tcp", f.vm.Port))
	}
	return list
}

// flows makes one VM's flows.
type flows struct {
	vm  VM
	ttl time.Duration
}

func (f flows) make(name string, from, to zone.Endpoint, proto string, port int) zone.Flow {
	return zone.Flow{ID: fmt.Sprintf("%s/%d/%s", f.vm.Reservation, f.vm.Start, name), Reservation: f.vm.Reservation, Phase: string(f.vm.Phase),
		From: from, To: to, Proto: proto, Port: port, TTL: f.ttl}
}

func (f flows) fromVM(name, proto string, to netip.AddrPort) zone.Flow {
	return f.make(name, zone.Endpoint{Prefix: host(f.vm.Address), MAC: f.vm.MAC}, hostOf(to), proto, int(to.Port()))
}

func (f flows) ssh(from netip.Addr, mac string) zone.Flow {
	return f.make("ssh", zone.Endpoint{Prefix: host(from)}, zone.Endpoint{Prefix: host(f.vm.Address), MAC: mac}, "tcp", 22)
}

func host(a netip.Addr) netip.Prefix { return netip.PrefixFrom(a, a.BitLen()) }

func hostOf(a netip.AddrPort) zone.Endpoint { return zone.Endpoint{Prefix: host(a.Addr())} }
