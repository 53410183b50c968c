package main

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Capture says what to record.
type Capture struct {
	Interfaces []string `json:"interfaces"`
	Folder     string   `json:"folder"`
}

// Captured is what was recorded.
type Captured struct {
	Packets int   `json:"packets"`
	Bytes   int64 `json:"bytes"`
	Lost    int   `json:"lost"`
}

// recorder writes what packets carry, one file a direction of a flow, so that a secret
// which is cut by packets is whole again.
type recorder struct {
	folder string
	names  map[int]string // of interfaces, by index
	flows  map[string]*bufio.Writer
	files  []*os.File
	got    Captured
}

func capturePackets(in *input) error {
	var c Capture
	if err := in.read(&c); err != nil {
		return err
	}
	r := &recorder{folder: c.Folder, names: map[int]string{}, flows: map[string]*bufio.Writer{}}
	for _, name := range c.Interfaces {
		i, err := net.InterfaceByName(name)
		if err != nil {
			return fmt.Errorf("capture %s: %w", name, err)
		}
		r.names[i.Index] = name
	}
	ring, err := openRing()
	if err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	if err := say("capturing"); err != nil {
		return err
	}
	for ctx := in.untilDone(); ctx.Err() == nil; {
		if err := ring.wait(); err != nil {
			return fmt.Errorf("capture: %w", err)
		}
		if err := ring.each(r.record); err != nil {
			return err
		}
	}
	time.Sleep(2 * retire) // the last block
	if err := ring.each(r.record); err != nil {
		return err
	}
	if r.got.Lost, err = ring.lost(); err != nil {
		return fmt.Errorf("capture: %w", err)
	}
	if err := r.close(); err != nil {
		return err
	}
	return say(r.got)
}

// record appends a packet's content to its flow.
func (r *recorder) record(link int, packet []byte) error {
	name, ok := r.names[link]
	if !ok {
		return nil
	}
	r.got.Packets++
	r.got.Bytes += int64(len(packet))
	flow, payload := parse(packet)
	flow = name + " " + flow
	w := r.flows[flow]
	if w == nil {
		f, err := os.Create(filepath.Join(r.folder, flow))
		if err != nil {
			return fmt.Errorf("capture: %w", err)
		}
		r.files = append(r.files, f)
		w = bufio.NewWriter(f)
		r.flows[flow] = w
	}
	_, err := w.Write(payload)
	return err
}

func (r *recorder) close() error {
	var errs []error
	for _, w := range r.flows {
		errs = append(errs, w.Flush())
	}
	for _, f := range r.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(errs...)
}

// parse finds a packet's flow and what it carries. What it does not know is kept whole.
func parse(p []byte) (flow string, payload []byte) {
	const ip, tcp, udp = 20, 20, 8 // bytes of the shortest headers
	if len(p) < ip+udp || p[0]>>4 != 4 {
		return "other", p
	}
	head := int(p[0]&15) * 4
	src, dst := netip.AddrFrom4([4]byte(p[12:16])), netip.AddrFrom4([4]byte(p[16:20]))
	if head < ip || len(p) < head+udp {
		return "other", p
	}
	body := p[head:]
	ports := fmt.Sprintf("%s.%d to %s.%d", src, int(body[0])<<8|int(body[1]), dst, int(body[2])<<8|int(body[3]))
	switch p[9] {
	case unix.IPPROTO_TCP:
		if len(body) >= tcp && int(body[12]>>4)*4 <= len(body) {
			return "tcp " + ports, body[int(body[12]>>4)*4:]
		}
	case unix.IPPROTO_UDP:
		return "udp " + ports, body[udp:]
	}
	return "other", p
}
