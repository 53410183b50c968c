// Package wg makes a WireGuard interface in the process's network namespace and keeps
// its peers.
//
// The kernel's implementation serves where there is one. Where there is none, Open
// starts the one of package userspace, if the caller names it in Config.Fallback; it
// lives and dies with the process, so a first process that will hand its place on
// must not name it. Both are changed through this package alone, and Peers always
// reads back what the device itself says.
package wg

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"foothold/internal/secret"

	"github.com/vishvananda/netlink"
	"golang.org/x/crypto/curve25519"
	"golang.org/x/sys/unix"
)

// KeyLen is the length of every WireGuard key in bytes.
const KeyLen = 32

// Config describes an interface.
type Config struct {
	Name       string         // of the interface
	PrivateKey secret.Bytes   // Curve25519, KeyLen bytes; the caller may wipe it after Open
	ListenPort int            // UDP; 0 lets the system choose
	MTU        int            // bytes
	Address    []netip.Prefix // of the interface
	Fallback   Starter        // for a kernel without WireGuard; nil: that is an error
}

// Starter makes a device that is not the kernel's. The interface exists when it returns.
type Starter func(name string, mtu int) (Backend, error)

// Backend is one implementation of WireGuard behind an interface. Calls may come from
// several goroutines; each is one atomic change or one consistent reading.
type Backend interface {
	// Configure sets key and port, and removes every peer.
	Configure(private secret.Bytes, listenPort int) error
	// Change removes, then adds or replaces peers.
	Change(remove [][KeyLen]byte, put []Peer) error
	// Peers reads the device.
	Peers() ([]Status, error)
	// Close ends the device and removes its interface.
	Close() error
}

// Peer is the other end of a tunnel.
type Peer struct {
	PublicKey    [KeyLen]byte
	PresharedKey secret.Bytes   // KeyLen bytes, or empty for none
	AllowedIPs   []netip.Prefix // what may come from and goes to this peer
	Endpoint     netip.AddrPort // zero: learnt from the peer
	Keepalive    time.Duration  // 0: none
}

// Status is what the device says of a peer.
type Status struct {
	PublicKey     [KeyLen]byte
	AllowedIPs    []netip.Prefix
	Endpoint      netip.AddrPort
	LastHandshake time.Time // zero: never
	Received      int64     // bytes
	Sent          int64     // bytes
}

// Device is a WireGuard interface that is up.
type Device struct {
	name    string
	public  [KeyLen]byte
	backend Backend
	kernel  bool
}

// GenerateKey makes a key pair.
func GenerateKey() (private secret.Bytes, public [KeyLen]byte) {
	private = secret.Random(KeyLen)
	b := private.Reveal()
	b[0] &= 248 // RFC 7748, section 5: clamped here, so that every implementation shows the same key
	b[31] = b[31]&127 | 64
	public, err := PublicKey(private)
	if err != nil { // a clamped scalar of the right length on the base point has a public key
		panic(err)
	}
	return private, public
}

// PublicKey is the public half of a private key.
func PublicKey(private secret.Bytes) (public [KeyLen]byte, err error) {
	p, err := curve25519.X25519(private.Reveal(), curve25519.Basepoint)
	if err != nil {
		return public, errors.New("WireGuard private key is malformed")
	}
	copy(public[:], p)
	return public, nil
}

// Open makes the interface, without peers, and brings it up. An interface of that
// name which an earlier process left is replaced.
func Open(conf Config) (*Device, error) {
	public, err := PublicKey(conf.PrivateKey)
	if err != nil {
		return nil, err
	}
	if old, err := netlink.LinkByName(conf.Name); err == nil {
		if err := netlink.LinkDel(old); err != nil {
			return nil, fmt.Errorf("remove old interface %s: %w", conf.Name, err)
		}
	}
	d := &Device{name: conf.Name, public: public}
	d.backend, err = openKernel(conf.Name, conf.MTU)
	d.kernel = err == nil
	if errors.Is(err, unix.EOPNOTSUPP) && conf.Fallback != nil {
		d.backend, err = conf.Fallback(conf.Name, conf.MTU)
	}
	if err != nil {
		return nil, fmt.Errorf("make WireGuard interface %s: %w", conf.Name, err)
	}
	if err := d.setUp(conf); err != nil {
		d.backend.Close()
		return nil, fmt.Errorf("set up WireGuard interface %s: %w", conf.Name, err)
	}
	return d, nil
}

func (d *Device) setUp(conf Config) error {
	if err := d.backend.Configure(conf.PrivateKey, conf.ListenPort); err != nil {
		return err
	}
	link, err := netlink.LinkByName(conf.Name)
	if err != nil {
		return err
	}
	for _, prefix := range conf.Address {
		addr, err := netlink.ParseAddr(prefix.String())
		if err != nil {
			return err
		}
		if err := netlink.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("add address %s: %w", prefix, err)
		}
	}
	return netlink.LinkSetUp(link)
}

// Name is the interface's name.
func (d *Device) Name() string { return d.name }

// PublicKey is the device's own.
func (d *Device) PublicKey() [KeyLen]byte { return d.public }

// Kernel reports whether the kernel carries the tunnel.
func (d *Device) Kernel() bool { return d.kernel }

// AddPeer adds a peer, or replaces the one with its key.
func (d *Device) AddPeer(p Peer) error { return d.change(nil, []Peer{p}) }

// RemovePeer removes a peer; an unknown one is no error.
func (d *Device) RemovePeer(key [KeyLen]byte) error { return d.change([][KeyLen]byte{key}, nil) }

func (d *Device) change(remove [][KeyLen]byte, put []Peer) error {
	for _, p := range put {
		if n := p.PresharedKey.Len(); n != 0 && n != KeyLen {
			return fmt.Errorf("change peers of %s: pre-shared key has %d bytes", d.name, n)
		}
	}
	if err := d.backend.Change(remove, put); err != nil {
		return fmt.Errorf("change peers of %s: %w", d.name, err)
	}
	return nil
}

// Peers reads the peers from the device.
func (d *Device) Peers() ([]Status, error) {
	s, err := d.backend.Peers()
	if err != nil {
		return nil, fmt.Errorf("read peers of %s: %w", d.name, err)
	}
	return s, nil
}

// Close removes the interface.
func (d *Device) Close() error { return d.backend.Close() }
