package wg

import (
	"fmt"
	"net"
	"net/netip"
	"time"

	"foothold/internal/secret"

	"github.com/vishvananda/netlink"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// kernel is the kernel's own WireGuard, by generic netlink.
type kernel struct {
	name   string
	client *wgctrl.Client
}

func openKernel(name string, mtu int) (Backend, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = name, mtu
	if err := netlink.LinkAdd(&netlink.Wireguard{LinkAttrs: attrs}); err != nil {
		return nil, err
	}
	k := &kernel{name: name}
	var err error
	if k.client, err = wgctrl.New(); err != nil {
		k.Close()
		return nil, err
	}
	return k, nil
}

func (k *kernel) Configure(private secret.Bytes, listenPort int) error {
	key, err := wgtypes.NewKey(private.Reveal())
	if err != nil {
		return err
	}
	defer clear(key[:])
	conf := wgtypes.Config{PrivateKey: &key, ReplacePeers: true}
	if listenPort != 0 {
		conf.ListenPort = &listenPort
	}
	return k.client.ConfigureDevice(k.name, conf)
}

func (k *kernel) Change(remove [][KeyLen]byte, put []Peer) error {
	var conf wgtypes.Config
	for _, key := range remove {
		conf.Peers = append(conf.Peers, wgtypes.PeerConfig{PublicKey: key, Remove: true})
	}
	for _, p := range put {
		peer := wgtypes.PeerConfig{PublicKey: p.PublicKey, ReplaceAllowedIPs: true, PersistentKeepaliveInterval: &p.Keepalive}
		var psk wgtypes.Key // zero removes one
		copy(psk[:], p.PresharedKey.Reveal())
		peer.PresharedKey = &psk
		if p.Endpoint.IsValid() {
			peer.Endpoint = net.UDPAddrFromAddrPort(p.Endpoint)
		}
		for _, prefix := range p.AllowedIPs {
			peer.AllowedIPs = append(peer.AllowedIPs, net.IPNet{IP: prefix.Addr().AsSlice(), Mask: net.CIDRMask(prefix.Bits(), prefix.Addr().BitLen())})
		}
		conf.Peers = append(conf.Peers, peer)
	}
	return k.client.ConfigureDevice(k.name, conf)
}

func (k *kernel) Peers() ([]Status, error) {
	dev, err := k.client.Device(k.name)
	if err != nil {
		return nil, err
	}
	var out []Status
	for _, p := range dev.Peers {
		s := Status{PublicKey: p.PublicKey, LastHandshake: p.LastHandshakeTime, Received: p.ReceiveBytes, Sent: p.TransmitBytes}
		if p.LastHandshakeTime.Unix() <= 0 {
			s.LastHandshake = time.Time{}
		}
		if p.Endpoint != nil {
			at := p.Endpoint.AddrPort()
			s.Endpoint = netip.AddrPortFrom(at.Addr().Unmap(), at.Port())
		}
		for _, n := range p.AllowedIPs {
			addr, ok := netip.AddrFromSlice(n.IP)
			if !ok {
				return nil, fmt.Errorf("allowed address %s is malformed", n.IP)
			}
			bits, _ := n.Mask.Size()
			s.AllowedIPs = append(s.AllowedIPs, netip.PrefixFrom(addr.Unmap(), bits))
		}
		out = append(out, s)
	}
	return out, nil
}

func (k *kernel) Close() error {
	if k.client != nil {
		k.client.Close()
	}
	link, err := netlink.LinkByName(k.name)
	if err != nil {
		return nil // gone already
	}
	return netlink.LinkDel(link)
}
