package main

import (
	"errors"
	"fmt"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Sizes of the ring in bytes. A socket's own queue would be too short for bursts, and
// only root of the machine may make it longer.
const (
	blockSize = 1 << 20
	ringSize  = 64 << 20
	frameSize = 2 << 10 // of no meaning in this version, but checked
)

// retire is how long the kernel keeps a block that is not full.
const retire = 50 * time.Millisecond

// ring is a packet socket that sees every interface's packets, in and out, without their
// link headers, by memory shared with the kernel (packet(7), TPACKET_V3).
type ring struct {
	fd   int
	mem  []byte
	next int // offset of the block to be filled next
	cut  int // packets that were not kept whole
}

func openRing() (*ring, error) {
	const every = unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8 // network byte order
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, every)
	if err != nil {
		return nil, fmt.Errorf("open packet socket: %w", err)
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_VERSION, unix.TPACKET_V3); err != nil {
		return nil, fmt.Errorf("choose ring: %w", err)
	}
	req := unix.TpacketReq3{Block_size: blockSize, Block_nr: ringSize / blockSize, Frame_size: frameSize, Frame_nr: ringSize / frameSize,
		Retire_blk_tov: uint32(retire.Milliseconds())}
	if err := unix.SetsockoptTpacketReq3(fd, unix.SOL_PACKET, unix.PACKET_RX_RING, &req); err != nil {
		return nil, fmt.Errorf("make ring: %w", err)
	}
	mem, err := unix.Mmap(fd, 0, ringSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map ring: %w", err)
	}
	return &ring{fd: fd, mem: mem}, nil
}

// wait returns when there are packets, or after a moment.
func (r *ring) wait() error {
	_, err := unix.Poll([]unix.PollFd{{Fd: int32(r.fd), Events: unix.POLLIN}}, 4*int(retire.Milliseconds()))
	if errors.Is(err, unix.EINTR) {
		return nil
	}
	return err
}

// each calls f for the packets of the blocks that are full or old.
func (r *ring) each(f func(link int, packet []byte) error) error {
	for {
		block := r.mem[r.next : r.next+blockSize]
		desc := (*unix.TpacketBlockDesc)(unsafe.Pointer(&block[0]))
		head := (*unix.TpacketHdrV1)(unsafe.Pointer(&desc.Hdr[0]))
		if atomic.LoadUint32(&head.Block_status)&unix.TP_STATUS_USER == 0 {
			return nil
		}
		at := head.Offset_to_first_pkt
		for range head.Num_pkts {
			packet := (*unix.Tpacket3Hdr)(unsafe.Pointer(&block[at]))
			link := (*unix.RawSockaddrLinklayer)(unsafe.Pointer(&block[at+uint32(unsafe.Sizeof(*packet))]))
			if packet.Snaplen < packet.Len {
				r.cut++
			}
			begin := at + uint32(packet.Net)
			if err := f(int(link.Ifindex), block[begin:begin+packet.Snaplen]); err != nil {
				return err
			}
			at += packet.Next_offset
		}
		atomic.StoreUint32(&head.Block_status, unix.TP_STATUS_KERNEL)
		r.next = (r.next + blockSize) % len(r.mem)
	}
}

// lost counts the packets that were seen in part or not at all.
func (r *ring) lost() (int, error) {
	stats, err := unix.GetsockoptTpacketStatsV3(r.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
	if err != nil {
		return 0, err
	}
	return int(stats.Drops) + r.cut, nil
}
