package nstest

import (
	"fmt"
	"net"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// Place is a network namespace.
type Place struct{ ns netns.NsHandle }

// New makes an empty namespace with loopback up; it ends with the test.
func New(t testing.TB) *Place {
	t.Helper()
	p := &Place{}
	onThread(t, func() error {
		home, err := netns.Get()
		if err != nil {
			return err
		}
		defer home.Close()
		defer netns.Set(home)
		if p.ns, err = netns.New(); err != nil {
			return err
		}
		return upLoopback()
	})
	t.Cleanup(func() { p.ns.Close() })
	return p
}

// Here is the namespace that the test itself runs in.
func Here(t testing.TB) *Place {
	t.Helper()
	p := &Place{}
	onThread(t, func() (err error) {
		p.ns, err = netns.Get()
		return err
	})
	t.Cleanup(func() { p.ns.Close() })
	return p
}

// Do runs f inside the place. Sockets that f opens on its own goroutine stay there.
func (p *Place) Do(t testing.TB, f func() error) {
	t.Helper()
	onThread(t, func() error {
		home, err := netns.Get()
		if err != nil {
			return err
		}
		defer home.Close()
		defer netns.Set(home)
		if err := netns.Set(p.ns); err != nil {
			return err
		}
		return f()
	})
}

// End is one end of a link.
type End struct {
	Place   *Place
	Name    string
	Address string // with prefix length; empty: none
	MAC     string // empty: the kernel's choice
}

// Link joins two places by a pair of virtual Ethernet interfaces.
func Link(t testing.TB, a, b End) {
	t.Helper()
	a.Place.Do(t, func() error {
		la := netlink.NewLinkAttrs()
		la.Name = a.Name
		v := &netlink.Veth{LinkAttrs: la, PeerName: b.Name, PeerNamespace: netlink.NsFd(b.Place.ns)}
		if err := netlink.LinkAdd(v); err != nil {
			return fmt.Errorf("add link %s: %w", a.Name, err)
		}
		return a.configure()
	})
	b.Place.Do(t, b.configure)
}

func (e End) configure() error {
	l, err := netlink.LinkByName(e.Name)
	if err != nil {
		return fmt.Errorf("find %s: %w", e.Name, err)
	}
	if e.MAC != "" {
		mac, err := net.ParseMAC(e.MAC)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetHardwareAddr(l, mac); err != nil {
			return fmt.Errorf("set address of %s: %w", e.Name, err)
		}
	}
	if e.Address != "" {
		addr, err := netlink.ParseAddr(e.Address)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(l, addr); err != nil {
			return fmt.Errorf("address of %s: %w", e.Name, err)
		}
	}
	return netlink.LinkSetUp(l)
}

// Route adds a route; an empty to is the default one.
func (p *Place) Route(t testing.TB, to, via string) {
	t.Helper()
	p.Do(t, func() error {
		r := &netlink.Route{Gw: net.ParseIP(via)}
		if to == "" {
			to = "0.0.0.0/0"
		}
		_, dst, err := net.ParseCIDR(to)
		if err != nil {
			return err
		}
		r.Dst = dst
		return netlink.RouteAdd(r)
	})
}

// onThread runs f on a thread of its own, so that no other goroutine sees its namespace.
func onThread(t testing.TB, f func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		err := f()
		if err == nil {
			runtime.UnlockOSThread()
		}
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func upLoopback() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find loopback: %w", err)
	}
	return netlink.LinkSetUp(lo)
}
