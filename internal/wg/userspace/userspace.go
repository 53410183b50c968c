// Package userspace is WireGuard inside this process (wireguard-go), for kernels that
// have none. It opens no control socket: nobody but package wg changes the device.
package userspace

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"foothold/internal/secret"
	"foothold/internal/wg"

	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/tun"
)

type backend struct{ dev *device.Device }

// Start makes a TUN interface and a device behind it. It is a wg.Starter.
func Start(name string, mtu int) (wg.Backend, error) {
	t, err := tun.CreateTUN(name, mtu)
	if err != nil {
		return nil, err
	}
	quiet := &device.Logger{Verbosef: device.DiscardLogf, Errorf: device.DiscardLogf}
	return &backend{device.NewDevice(steady(t), conn.NewDefaultBind(), quiet)}, nil
}

// ours is a TUN interface whose device goes up and down by this package alone.
type ours struct {
	tun.Device
	events chan tun.Event
}

// steady keeps the interface's own ups and downs from the device. It would answer a
// late "down" of the interface's making by closing its UDP socket, and the "up" behind
// it by opening another on whichever thread reads the event, which may be in another
// network namespace.
func steady(t tun.Device) tun.Device {
	o := ours{t, make(chan tun.Event, 1)}
	go func() { // ends with the interface
		defer close(o.events)
		for e := range t.Events() {
			if e &^= tun.EventUp | tun.EventDown; e != 0 {
				o.events <- e
			}
		}
	}()
	return o
}

func (o ours) Events() <-chan tun.Event { return o.events }

// Configure speaks the text form of wireguard.com/xplatform.
func (b *backend) Configure(private secret.Bytes, listenPort int) error {
	text := "private_key=" + hex.EncodeToString(private.Reveal()) + "\nreplace_peers=true\n"
	if listenPort != 0 {
		text += "listen_port=" + strconv.Itoa(listenPort) + "\n"
	}
	if err := b.set(text); err != nil {
		return err
	}
	return b.dev.Up()
}

func (b *backend) Change(remove [][wg.KeyLen]byte, put []wg.Peer) error {
	var text strings.Builder
	for _, key := range remove { // the device does not wipe what it drops
		fmt.Fprintf(&text, "public_key=%x\npreshared_key=%x\nremove=true\n", key, [wg.KeyLen]byte{})
	}
	for _, p := range put {
		var psk [wg.KeyLen]byte // zero removes one
		copy(psk[:], p.PresharedKey.Reveal())
		fmt.Fprintf(&text, "public_key=%x\npreshared_key=%x\nreplace_allowed_ips=true\npersistent_keepalive_interval=%d\n",
			p.PublicKey, psk, int(p.Keepalive.Seconds()))
		if p.Endpoint.IsValid() {
			fmt.Fprintf(&text, "endpoint=%s\n", p.Endpoint)
		}
		for _, prefix := range p.AllowedIPs {
			fmt.Fprintf(&text, "allowed_ip=%s\n", prefix)
		}
	}
	return b.set(text.String())
}

// set hides the device's error text, which may quote a value.
func (b *backend) set(text string) error {
	err := b.dev.IpcSet(text)
	var ipc *device.IPCError
	if errors.As(err, &ipc) {
		return fmt.Errorf("device refuses the change, errno %d", ipc.ErrorCode())
	}
	if err != nil {
		return errors.New("device refuses the change")
	}
	return nil
}

// Peers wipes the device's answer, which holds every key.
func (b *backend) Peers() ([]wg.Status, error) {
	var text bytes.Buffer
	if err := b.dev.IpcGetOperation(&text); err != nil {
		return nil, errors.New("device does not answer")
	}
	defer clear(text.Bytes())
	return parse(text.Bytes())
}

func (b *backend) Close() error {
	b.dev.Close() // closes the TUN, and with it the interface goes
	return nil
}

// parse reads the answer to "get=1"; keys that are no status are skipped.
func parse(text []byte) ([]wg.Status, error) {
	var out []wg.Status
	for line := range bytes.Lines(text) {
		key, value, _ := bytes.Cut(bytes.TrimSuffix(line, []byte("\n")), []byte("="))
		if string(key) == "public_key" {
			var s wg.Status
			if len(value) != hex.EncodedLen(wg.KeyLen) {
				return nil, errors.New("device status: malformed key")
			}
			if _, err := hex.Decode(s.PublicKey[:], value); err != nil {
				return nil, errors.New("device status: malformed key")
			}
			out = append(out, s)
			continue
		}
		if len(out) == 0 {
			continue
		}
		if err := field(&out[len(out)-1], string(key), value); err != nil {
			return nil, fmt.Errorf("device status: %s: %w", key, err)
		}
	}
	return out, nil
}

func field(s *wg.Status, key string, value []byte) (err error) {
	switch key {
	case "endpoint":
		s.Endpoint, err = netip.ParseAddrPort(string(value))
	case "allowed_ip":
		var p netip.Prefix
		p, err = netip.ParsePrefix(string(value))
		s.AllowedIPs = append(s.AllowedIPs, p)
	case "rx_bytes":
		s.Received, err = strconv.ParseInt(string(value), 10, 64)
	case "tx_bytes":
		s.Sent, err = strconv.ParseInt(string(value), 10, 64)
	case "last_handshake_time_sec":
		var sec int64
		if sec, err = strconv.ParseInt(string(value), 10, 64); sec > 0 {
			s.LastHandshake = time.Unix(sec, 0)
		}
	}
	return err
}
