// Package tunnel is act 9 from the VM's side: it asks the gateway for admission and
// turns the answer into the VM's only way out, a WireGuard interface.
//
// The tunnel's pre-shared key is never sent. Both ends derive it from the TLS session
// in which the VM was admitted, so whoever is not an end of that session - a relay, a
// gateway that was not asked - cannot be an end of the tunnel.
package tunnel

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"foothold/guest/pid1"
	"foothold/guest/pinned"
	"foothold/internal/mtls"
	"foothold/internal/secret"
	"foothold/internal/wg"
	"foothold/protocol/agentmsg"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/unlockmsg"

	"github.com/vishvananda/netlink"
)

// Interface is the tunnel's name.
const Interface = "wg0"

// Admission is what the VM asks with.
type Admission struct {
	Reservation string
	Handover    *unlockmsg.Handover // T3, user, password, certificate, gateway
	Key         ed25519.PrivateKey  // of the certificate
}

// Tunnel is what the gateway granted.
type Tunnel struct {
	agentmsg.AdmitResponse
	PSK secret.Bytes
}

// Certificate is the VM's client certificate.
func Certificate(der []byte, key ed25519.PrivateKey) tls.Certificate {
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// Admit presents everything to the gateway, once: T3 is spent by the asking.
func Admit(ctx context.Context, a Admission) (*Tunnel, error) {
	g := a.Handover.Gateway
	pins := pinned.Pins{URL: "https://" + g.Address.String(), ServerName: g.ServerName, CA: g.CA, Role: mtls.Gateway}
	link, err := pinned.Dial(ctx, pins, Certificate(a.Handover.Certificate, a.Key))
	if err != nil {
		return nil, event.Refuse(pinned.Reason(err, event.GatewayFailed), "%v", err)
	}
	defer link.Close()
	request := agentmsg.AdmitRequest{T3: a.Handover.T3, User: a.Handover.User, Password: a.Handover.Password}
	t := &Tunnel{}
	if err := link.Post(ctx, agentmsg.PathAdmit, request, &t.AdmitResponse, agentmsg.MaxMessage); err != nil {
		why := event.GatewayFailed
		if errors.Is(err, pinned.ErrRefused) {
			why = event.AdmissionRefused
		}
		return nil, event.Refuse(why, "%v", err)
	}
	psk, err := link.Exporter(evidence.PSKLabel, []byte(a.Reservation), evidence.PSKLen)
	if err != nil {
		return nil, err
	}
	t.PSK = secret.New(psk)
	if err := t.check(g.Address.Addr()); err != nil {
		return nil, event.Refuse(event.GatewayFailed, "%v", err)
	}
	return t, nil
}

// check bounds what the gateway may set up here.
func (t *Tunnel) check(gateway netip.Addr) error {
	switch {
	case !t.Address.Is4() || !t.Relay.Addr().Is4() || t.Relay.Port() == 0 || t.Address == t.Relay.Addr():
		return errors.New("the gateway grants no tunnel address")
	case len(t.GatewayKey) != wg.KeyLen:
		return errors.New("the gateway names no key")
	case t.Endpoint.Addr() != gateway || t.Endpoint.Port() == 0:
		return errors.New("the tunnel's endpoint is not the gateway")
	case t.MTU < 1280 || t.MTU > 9000 || t.Keepalive < 0 || t.Keepalive > 3600:
		return errors.New("the tunnel's MTU or keep-alive is out of bounds")
	}
	return nil
}

// Up makes the interface and the routes: to the gateway's endpoint on the cloud
// network, everywhere else through the tunnel. The kernel keeps both when the process
// that made them is gone.
func (t *Tunnel) Up(private secret.Bytes, mac string, cloudGateway netip.Addr) error {
	dev, err := wg.Open(wg.Config{Name: Interface, PrivateKey: private, ListenPort: agentmsg.TunnelPort, MTU: t.MTU, Address: []netip.Prefix{netip.PrefixFrom(t.Address, 32)}})
	if err != nil {
		return err
	}
	peer := wg.Peer{PresharedKey: t.PSK, AllowedIPs: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}, Endpoint: t.Endpoint, Keepalive: time.Duration(t.Keepalive) * time.Second}
	copy(peer.PublicKey[:], t.GatewayKey)
	if err := dev.AddPeer(peer); err != nil {
		return err
	}
	return routes(t.Endpoint.Addr(), mac, cloudGateway)
}

func routes(endpoint netip.Addr, mac string, via netip.Addr) error {
	outside, err := pid1.Link(mac)
	if err != nil {
		return err
	}
	inside, err := netlink.LinkByName(Interface)
	if err != nil {
		return fmt.Errorf("find %s: %w", Interface, err)
	}
	host := &net.IPNet{IP: endpoint.AsSlice(), Mask: net.CIDRMask(32, 32)}
	all := &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
	if err := netlink.RouteReplace(&netlink.Route{LinkIndex: outside.Attrs().Index, Dst: host, Gw: via.AsSlice()}); err != nil {
		return fmt.Errorf("route to the gateway: %w", err)
	}
	if err := netlink.RouteDel(&netlink.Route{LinkIndex: outside.Attrs().Index, Dst: all, Gw: via.AsSlice()}); err != nil {
		return fmt.Errorf("remove the default route of the cloud network: %w", err)
	}
	if err := netlink.RouteReplace(&netlink.Route{LinkIndex: inside.Attrs().Index, Dst: all, Scope: netlink.SCOPE_LINK}); err != nil {
		return fmt.Errorf("route into the tunnel: %w", err)
	}
	return nil
}
