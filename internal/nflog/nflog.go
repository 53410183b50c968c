// Package nflog reads the packets that nftables' log statement sends to a group
// (nfnetlink_log; include/uapi/linux/netfilter/nfnetlink_log.h). It reads the head of
// each and keeps nothing; a flood that the socket cannot hold is counted by [Reader.Lost].
package nflog

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Messages, commands and attributes of nfnetlink_log.
const (
	msgPacket = unix.NFNL_SUBSYS_ULOG << 8
	msgConfig = unix.NFNL_SUBSYS_ULOG<<8 + 1

	cfgCmd     = 1 // struct nfulnl_msg_config_cmd
	cfgMode    = 2 // struct nfulnl_msg_config_mode
	cmdBind    = 1
	copyPacket = 2

	attrInDev   = 4
	attrOutDev  = 5
	attrHWAddr  = 8
	attrPayload = 9
	attrPrefix  = 10
)

const (
	copyRange  = 64      // bytes: the longest IPv4 header, and ports; as little as can be of what a packet carries
	readBuffer = 1 << 20 // asked for
	nfgenLen   = 4       // struct nfgenmsg
)

// Packet is the head of one logged packet. Fields that the packet lacks are zero.
type Packet struct {
	Prefix   string // of the log statement
	In, Out  int    // interface indices
	MAC      net.HardwareAddr
	Src, Dst netip.Addr
	Proto    uint8
	SrcPort  uint16
	DstPort  uint16
}

// Reader receives one group's packets in the namespace that it was opened in.
type Reader struct {
	conn *netlink.Conn
	lost atomic.Int64
}

// Open binds the group.
func Open(group uint16) (*Reader, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("open log group %d: %w", group, err)
	}
	// The kernel's own default is kept when it refuses more.
	_ = conn.SetReadBuffer(readBuffer)
	bind := []netlink.Attribute{{Type: cfgCmd, Data: []byte{cmdBind}}}
	mode := binary.BigEndian.AppendUint32(nil, copyRange)
	mode = append(mode, copyPacket, 0)
	for _, attrs := range [][]netlink.Attribute{bind, {{Type: cfgMode, Data: mode}}} {
		if err := configure(conn, group, attrs); err != nil {
			conn.Close()
			return nil, fmt.Errorf("open log group %d: %w", group, err)
		}
	}
	return &Reader{conn: conn}, nil
}

func configure(conn *netlink.Conn, group uint16, attrs []netlink.Attribute) error {
	data, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		return err
	}
	head := binary.BigEndian.AppendUint16([]byte{unix.AF_UNSPEC, 0}, group)
	_, err = conn.Execute(netlink.Message{
		Header: netlink.Header{Type: msgConfig, Flags: netlink.Request | netlink.Acknowledge},
		Data:   append(head, data...),
	})
	return err
}

// Lost counts how often the socket overflowed; each time an unknown number of packets
// was lost.
func (r *Reader) Lost() int64 { return r.lost.Load() }

// Run hands each packet to f until ctx ends; then it closes the reader.
func (r *Reader) Run(ctx context.Context, f func(Packet)) error {
	stop := context.AfterFunc(ctx, func() { r.conn.Close() })
	defer stop()
	defer r.conn.Close()
	for {
		msgs, err := r.conn.Receive()
		if ctx.Err() != nil {
			return nil
		}
		if errors.Is(err, unix.ENOBUFS) {
			r.lost.Add(1)
			continue
		}
		if err != nil {
			return fmt.Errorf("read log group: %w", err)
		}
		for _, m := range msgs {
			if m.Header.Type != msgPacket {
				continue
			}
			if p, err := parse(m.Data); err == nil {
				f(p)
			}
		}
	}
}

// parse reads one message behind its netlink header.
func parse(data []byte) (Packet, error) {
	var p Packet
	if len(data) < nfgenLen {
		return p, errors.New("log message is too short")
	}
	ad, err := netlink.NewAttributeDecoder(data[nfgenLen:])
	if err != nil {
		return p, fmt.Errorf("log message: %w", err)
	}
	ad.ByteOrder = binary.BigEndian
	for ad.Next() {
		switch ad.Type() {
		case attrInDev:
			p.In = int(ad.Uint32())
		case attrOutDev:
			p.Out = int(ad.Uint32())
		case attrHWAddr: // struct nfulnl_msg_packet_hw: length, padding, 8 bytes
			if b := ad.Bytes(); len(b) >= 12 && binary.BigEndian.Uint16(b) == 6 {
				p.MAC = net.HardwareAddr(b[4:10])
			}
		case attrPrefix:
			p.Prefix = strings.TrimRight(ad.String(), "\x00")
		case attrPayload:
			p.network(ad.Bytes())
		}
	}
	if err := ad.Err(); err != nil {
		return p, fmt.Errorf("log message: %w", err)
	}
	return p, nil
}

// network reads an IPv4 packet's addresses and ports (RFC 791); others are left out.
func (p *Packet) network(b []byte) {
	if len(b) < 20 || b[0]>>4 != 4 {
		return
	}
	size := int(b[0]&15) * 4
	p.Src, p.Dst, p.Proto = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20])), b[9]
	first := binary.BigEndian.Uint16(b[6:])&0x1fff == 0
	if (p.Proto == unix.IPPROTO_TCP || p.Proto == unix.IPPROTO_UDP) && first && size >= 20 && len(b) >= size+4 {
		p.SrcPort, p.DstPort = binary.BigEndian.Uint16(b[size:]), binary.BigEndian.Uint16(b[size+2:])
	}
}
