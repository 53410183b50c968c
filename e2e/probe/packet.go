package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
)

// Probe is one packet to send.
type Probe struct {
	ID    uint16     `json:"id"`    // unique among the probes of a round, of all places
	Proto string     `json:"proto"` // tcp (a SYN), udp, icmp (an echo request)
	Src   netip.Addr `json:"src"`
	Dst   netip.Addr `json:"dst"`
	Sport uint16     `json:"sport"`
	Dport uint16     `json:"dport"`
	// Frame sends the packet as an Ethernet frame of this sender and receiver on this
	// interface; else the place's own routes carry it.
	Interface string `json:"interface,omitempty"`
	SrcMAC    string `json:"src_mac,omitempty"`
	DstMAC    string `json:"dst_mac,omitempty"`
}

// magic marks our packets: TCP by window and acknowledgement number, others by the
// first bytes of their payload.
const (
	magicWindow = 0xf007
	magicAck    = 0xf007401d
	magicText   = "foothold-probe:"
)

const (
	protoICMP = 1
	protoTCP  = 6
	protoUDP  = 17
)

var protoNumbers = map[string]byte{"icmp": protoICMP, "tcp": protoTCP, "udp": protoUDP}

// packet is the IPv4 packet of a probe. mark is its identity.
func (p Probe) packet(mark uint32) ([]byte, error) {
	number, ok := protoNumbers[p.Proto]
	if !ok || !p.Src.Is4() || !p.Dst.Is4() {
		return nil, fmt.Errorf("probe %s %s → %s cannot be made", p.Proto, p.Src, p.Dst)
	}
	body := p.body(mark)
	ip := make([]byte, 20, 20+len(body))
	ip[0], ip[8], ip[9] = 0x45, 64, number
	binary.BigEndian.PutUint16(ip[2:], uint16(20+len(body)))
	binary.BigEndian.PutUint16(ip[6:], 0x4000) // do not fragment
	src, dst := p.Src.As4(), p.Dst.As4()
	copy(ip[12:], src[:])
	copy(ip[16:], dst[:])
	binary.BigEndian.PutUint16(ip[10:], checksum(ip, 0))
	switch p.Proto {
	case "tcp":
		binary.BigEndian.PutUint16(body[16:], checksum(body, pseudo(src, dst, number, len(body))))
	case "udp":
		binary.BigEndian.PutUint16(body[6:], checksum(body, pseudo(src, dst, number, len(body))))
	default:
		binary.BigEndian.PutUint16(body[2:], checksum(body, 0))
	}
	return append(ip, body...), nil
}

// body is the transport's part with a zero checksum.
func (p Probe) body(mark uint32) []byte {
	switch p.Proto {
	case "tcp": // RFC 9293, 3.1: a SYN whose acknowledgement number, unused without ACK, is ours
		b := make([]byte, 20)
		binary.BigEndian.PutUint16(b[0:], p.Sport)
		binary.BigEndian.PutUint16(b[2:], p.Dport)
		binary.BigEndian.PutUint32(b[4:], mark)
		binary.BigEndian.PutUint32(b[8:], magicAck)
		b[12], b[13] = 5<<4, 0x02
		binary.BigEndian.PutUint16(b[14:], magicWindow)
		return b
	case "udp":
		b := make([]byte, 8, 32)
		b = binary.BigEndian.AppendUint32(append(b, magicText...), mark)
		binary.BigEndian.PutUint16(b[0:], p.Sport)
		binary.BigEndian.PutUint16(b[2:], p.Dport)
		binary.BigEndian.PutUint16(b[4:], uint16(len(b)))
		return b
	}
	b := make([]byte, 8, 32)
	b[0] = 8 // echo request
	return binary.BigEndian.AppendUint32(append(b, magicText...), mark)
}

// errNotOurs is returned for packets that no probe sent.
var errNotOurs = errors.New("not a probe's packet")

// identify reads the mark of a probe's packet.
func identify(ip []byte) (uint32, error) {
	if len(ip) < 20 || ip[0]>>4 != 4 {
		return 0, errNotOurs
	}
	head := int(ip[0]&15) * 4
	if head < 20 || len(ip) < head+8 {
		return 0, errNotOurs
	}
	body := ip[head:]
	switch ip[9] {
	case protoTCP:
		if len(body) < 20 || body[13] != 0x02 || binary.BigEndian.Uint32(body[8:]) != magicAck ||
			binary.BigEndian.Uint16(body[14:]) != magicWindow {
			return 0, errNotOurs
		}
		return binary.BigEndian.Uint32(body[4:]), nil
	case protoUDP, protoICMP:
		rest := body[8:]
		if len(rest) < len(magicText)+4 || string(rest[:len(magicText)]) != magicText {
			return 0, errNotOurs
		}
		if ip[9] == protoICMP && body[0] != 8 {
			return 0, errNotOurs // an echo of ours
		}
		return binary.BigEndian.Uint32(rest[len(magicText):]), nil
	}
	return 0, errNotOurs
}

// frame puts an Ethernet header before a packet.
func frame(src, dst string, packet []byte) ([]byte, error) {
	from, err := net.ParseMAC(src)
	if err != nil {
		return nil, err
	}
	to, err := net.ParseMAC(dst)
	if err != nil {
		return nil, err
	}
	if len(from) != 6 || len(to) != 6 {
		return nil, fmt.Errorf("%s or %s is no Ethernet address", src, dst)
	}
	f := make([]byte, 0, 14+len(packet))
	f = append(append(append(f, to...), from...), 0x08, 0x00)
	return append(f, packet...), nil
}

// pseudo is the sum of the pseudo header (RFC 9293, 3.1; RFC 768).
func pseudo(src, dst [4]byte, proto byte, length int) uint32 {
	var sum uint32
	for i := 0; i < 4; i += 2 {
		sum += uint32(src[i])<<8 | uint32(src[i+1])
		sum += uint32(dst[i])<<8 | uint32(dst[i+1])
	}
	return sum + uint32(proto) + uint32(length)
}

// checksum is the internet checksum (RFC 1071) of data, going on from sum.
func checksum(data []byte, sum uint32) uint16 {
	for i := 0; i+1 < len(data); i += 2 {
		sum += uint32(data[i])<<8 | uint32(data[i+1])
	}
	if len(data)%2 == 1 {
		sum += uint32(data[len(data)-1]) << 8
	}
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}
