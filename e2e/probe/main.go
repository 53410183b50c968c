// Command probe sends marked packets from a place of the lab and reports every marked
// packet that arrives there. Firewalls are judged by what arrives behind them, not by
// what a sender thinks, so UDP counts like TCP, and forged senders like real ones.
//
// It runs until its standard input ends:
//
//	in   {"round":7,"probes":[{"id":3,"proto":"tcp","src":...},...]}
//	out  {"ready":{"interfaces":{"dmz0":"02:..",...}}}        once, when it sees packets
//	out  {"sent":7,"failed":{"3":"network is unreachable"}}   after each round
//	out  {"seen":{"round":7,"probe":3,"interface":"dmz0","outgoing":false}}
//
// A TCP probe is a SYN without a socket behind it: the kernel answers a SYN-ACK with a
// reset, so no server ever accepts a connection.
package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Round is a command: probes to send at once.
type Round struct {
	Round  uint16  `json:"round"`
	Probes []Probe `json:"probes"`
}

// Seen is a probe's packet that passed an interface of this place.
type Seen struct {
	Round     int    `json:"round"`
	Probe     int    `json:"probe"`
	Interface string `json:"interface"`
	Outgoing  bool   `json:"outgoing"`
}

// Message is one line of output.
type Message struct {
	Ready  *Ready            `json:"ready,omitempty"`
	Sent   int               `json:"sent,omitempty"`
	Failed map[string]string `json:"failed,omitempty"`
	Seen   *Seen             `json:"seen,omitempty"`
}

// Ready says which interfaces there are, with their addresses on the link.
type Ready struct {
	Interfaces map[string]string `json:"interfaces"`
}

// maxRound bounds a command line in bytes.
const maxRound = 4 << 20

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "probe:", err)
		os.Exit(1)
	}
}

func run() error {
	out := &output{enc: json.NewEncoder(os.Stdout)}
	watcher, err := openWatcher()
	if err != nil {
		return err
	}
	sender, err := openSender()
	if err != nil {
		return err
	}
	failed := make(chan error, 2)
	go func() { failed <- watcher.watch(out) }()
	if err := out.write(Message{Ready: &Ready{Interfaces: interfaces()}}); err != nil {
		return err
	}
	go func() { failed <- commands(sender, out) }()
	return <-failed
}

// commands sends each round that standard input asks for, until it ends.
func commands(sender *sender, out *output) error {
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, maxRound)
	for in.Scan() {
		var r Round
		if err := json.Unmarshal(in.Bytes(), &r); err != nil {
			return fmt.Errorf("read command: %w", err)
		}
		m := Message{Sent: int(r.Round), Failed: map[string]string{}}
		for _, p := range r.Probes {
			if err := sender.send(p, uint32(r.Round)<<16|uint32(p.ID)); err != nil {
				m.Failed[fmt.Sprint(p.ID)] = err.Error()
			}
		}
		if err := out.write(m); err != nil {
			return err
		}
	}
	return in.Err()
}

func interfaces() map[string]string {
	found := map[string]string{}
	list, err := net.Interfaces()
	if err != nil {
		return found
	}
	for _, i := range list {
		found[i.Name] = i.HardwareAddr.String()
	}
	return found
}

// output writes lines from two goroutines.
type output struct {
	mu  sync.Mutex
	enc *json.Encoder // mu
}

func (o *output) write(m Message) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.enc.Encode(m)
}

// sender sends packets by the place's routes, or as frames.
type sender struct{ raw, link int }

func openSender() (*sender, error) {
	raw, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.IPPROTO_RAW)
	if err != nil {
		return nil, fmt.Errorf("open raw socket: %w", err)
	}
	link, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open packet socket: %w", err)
	}
	return &sender{raw, link}, nil
}

func (s *sender) send(p Probe, mark uint32) error {
	packet, err := p.packet(mark)
	if err != nil {
		return err
	}
	if p.Interface == "" {
		return unix.Sendto(s.raw, packet, 0, &unix.SockaddrInet4{Addr: p.Dst.As4()})
	}
	f, err := frame(p.SrcMAC, p.DstMAC, packet)
	if err != nil {
		return err
	}
	i, err := net.InterfaceByName(p.Interface)
	if err != nil {
		return err
	}
	return unix.Sendto(s.link, f, 0, &unix.SockaddrLinklayer{Ifindex: i.Index})
}

// watcher sees every IPv4 packet of every interface, in and out.
type watcher struct{ fd int }

func openWatcher() (*watcher, error) {
	all := unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // network byte order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, all)
	if err != nil {
		return nil, fmt.Errorf("open packet socket: %w", err)
	}
	// A burst of the VM's own traffic must not push our packets out.
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, 8<<20); err != nil {
		return nil, fmt.Errorf("enlarge packet socket: %w", err)
	}
	return &watcher{fd}, nil
}

func (w *watcher) watch(out *output) error {
	buf := make([]byte, 256)
	for {
		n, from, err := unix.Recvfrom(w.fd, buf, 0)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("watch packets: %w", err)
		}
		link, ok := from.(*unix.SockaddrLinklayer)
		if !ok {
			continue
		}
		mark, err := identify(buf[:n])
		if err != nil {
			continue
		}
		name := fmt.Sprint(link.Ifindex)
		if i, err := net.InterfaceByIndex(link.Ifindex); err == nil {
			name = i.Name
		}
		m := Message{Seen: &Seen{int(mark >> 16), int(mark & 0xffff), name, link.Pkttype == unix.PACKET_OUTGOING}}
		if err := out.write(m); err != nil {
			return err
		}
	}
}
