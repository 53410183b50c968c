package qemu

import (
	"bytes"
	"maps"
	"net"
	"os"
	"testing"
	"time"

	"foothold/protocol/hostapi"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// experimental is an EtherType that nobody uses (IEEE 802, local experimental).
const experimental = 0x88b5

// segment is a bridge with an uplink, behind which is whoever is no VM, and two VMs' taps.
type segment struct {
	t      *testing.T
	uplink int // packet socket
	taps   [2]*os.File
	macs   [2]net.HardwareAddr
}

func newSegment(t *testing.T) *segment {
	t.Helper()
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Fatalf("the preflight asks for it: %v", err)
	}
	s := &segment{t: t}
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br-seg"}}
	s.must(netlink.LinkAdd(br))
	t.Cleanup(func() { netlink.LinkDel(br) })
	s.must(netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "seg-up", MasterIndex: br.Index}, PeerName: "seg-far"}))
	for _, name := range []string{"br-seg", "seg-up", "seg-far"} {
		link, err := netlink.LinkByName(name)
		s.must(err)
		s.must(netlink.LinkSetUp(link))
	}
	far, err := netlink.LinkByName("seg-far")
	s.must(err)
	t.Cleanup(func() { netlink.LinkDel(far) })
	const network = experimental<<8&0xff00 | experimental>>8
	s.uplink, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, network)
	s.must(err)
	t.Cleanup(func() { unix.Close(s.uplink) })
	s.must(unix.Bind(s.uplink, &unix.SockaddrLinklayer{Protocol: network, Ifindex: far.Attrs().Index}))
	for i, mac := range []string{"02:f0:0a:52:00:0a", "02:f0:0a:52:00:0b"} {
		s.macs[i], err = net.ParseMAC(mac)
		s.must(err)
		s.taps[i], err = OpenTap(s.names()[i], "br-seg", mac, 1500)
		s.must(err)
		t.Cleanup(func() { s.taps[i].Close() })
	}
	return s
}

// names are those of the taps.
func (s *segment) names() []string { return []string{TapPrefix + "a", TapPrefix + "b"} }

// awaitForwarding returns when the first VM's frames arrive at the uplink: a bridge's port
// forwards a moment after it came up.
func (s *segment) awaitForwarding() {
	s.t.Helper()
	all := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	for end := time.Now().Add(10 * time.Second); ; {
		s.fromVM(0, frame(all, s.macs[0], "begin"))
		if arrives(s.uplink, "begin", 300*time.Millisecond) {
			return
		}
		if time.Now().After(end) {
			s.t.Fatal("nothing of the VM arrives at the uplink")
		}
	}
}

func (s *segment) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// frame is one that its text identifies.
func frame(to, from net.HardwareAddr, text string) []byte {
	f := append(append(append([]byte{}, to...), from...), experimental>>8, experimental&0xff)
	return append(append(f, text...), make([]byte, 46)...)
}

// virtio is the header before each frame at a tap: no offloads.
const virtio = 10 // bytes

func (s *segment) fromVM(i int, f []byte) {
	s.t.Helper()
	_, err := s.taps[i].Write(append(make([]byte, virtio), f...))
	s.must(err)
}

// arrives reports whether a frame with the text can be read soon.
func arrives(fd int, text string, patience time.Duration) bool {
	buf := make([]byte, 2048)
	for end := time.Now().Add(patience); time.Now().Before(end); {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if n, err := unix.Poll(fds, 50); n != 1 || err != nil {
			continue
		}
		if n, err := unix.Read(fd, buf); err == nil && bytes.Contains(buf[:n], []byte(text)) {
			return true
		}
	}
	return false
}

// TestNeighboursDoNotMeet: what a VM sends goes to the uplink and to no other VM on the
// segment, whatever address it is for; and what has another source than its own address
// goes nowhere.
func TestNeighboursDoNotMeet(t *testing.T) {
	s := newSegment(t)
	all := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	firewall := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	other := int(s.taps[1].Fd())
	const long, short = 10 * time.Second, 300 * time.Millisecond
	s.awaitForwarding()
	_, err := unix.Write(s.uplink, frame(s.macs[1], firewall, "from outside"))
	s.must(err)
	if !arrives(other, "from outside", long) {
		t.Fatal("nothing arrives at the other VM: the rest would show nothing")
	}
	s.fromVM(0, frame(s.macs[1], s.macs[0], "to the neighbour"))
	s.fromVM(0, frame(all, s.macs[0], "to everyone"))
	if arrives(other, "to ", short) {
		t.Error("a neighbour is reached")
	}
	if !arrives(s.uplink, "to everyone", long) {
		t.Error("the uplink is not reached")
	}
	s.fromVM(0, frame(all, s.macs[1], "as the neighbour"))
	s.fromVM(0, frame(all, firewall, "as the firewall"))
	if arrives(s.uplink, "as the ", short) || arrives(other, "as the ", short) {
		t.Error("a frame under another address passes")
	}
}

// TestDroppedFramesAreCounted: what the bridge drops of a VM is counted as that VM's, by
// kind, and nothing else is; the count ends with the VM, and the next begins at none.
func TestDroppedFramesAreCounted(t *testing.T) {
	frames, err := CountFrames()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { frames.Close() }) // if the test ends early
	s := newSegment(t)
	for i, tap := range s.names() {
		s.must(frames.Watch(tap, s.macs[i].String()))
	}
	expect := func(when string, want map[string]hostapi.Dropped) {
		t.Helper()
		got, err := frames.Dropped()
		s.must(err)
		if !maps.Equal(got, want) {
			t.Errorf("%s: %+v, want %+v", when, got, want)
		}
	}
	all := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	firewall := net.HardwareAddr{2, 0, 0, 0, 0, 1}
	s.awaitForwarding()
	for range 3 { // what passes
		s.fromVM(0, frame(all, s.macs[0], "to everyone"))
		s.fromVM(1, frame(firewall, s.macs[1], "to the firewall"))
		_, err := unix.Write(s.uplink, frame(s.macs[1], firewall, "from outside"))
		s.must(err)
	}
	expect("nothing was dropped", map[string]hostapi.Dropped{})
	for range 3 {
		s.fromVM(0, frame(s.macs[1], s.macs[0], "to the neighbour"))
	}
	for range 2 {
		s.fromVM(0, frame(all, s.macs[1], "as the neighbour"))
	}
	s.fromVM(0, frame(s.macs[1], firewall, "as the firewall, to the neighbour"))
	s.fromVM(1, frame(firewall, firewall, "as the firewall"))
	a, b := s.names()[0], s.names()[1]
	expect("frames of both", map[string]hostapi.Dropped{a: {OtherSource: 3, Neighbour: 3}, b: {OtherSource: 1}})

	s.must(s.taps[0].Close())
	d, err := frames.Forget(a)
	if want := (hostapi.Dropped{OtherSource: 3, Neighbour: 3}); err != nil || d != want {
		t.Errorf("at its end %+v (%v), want %+v", d, err, want)
	}
	if d, err := frames.Forget(a); err != nil || d != (hostapi.Dropped{}) {
		t.Errorf("a second end: %+v, %v", d, err)
	}
	s.taps[0], err = OpenTap(a, "br-seg", s.macs[0].String(), 1500)
	s.must(err)
	s.must(frames.Watch(a, s.macs[0].String()))
	expect("a new VM", map[string]hostapi.Dropped{b: {OtherSource: 1}})

	again, err := CountFrames() // as an agent does that follows one that was killed
	s.must(err)
	s.must(again.Watch(b, s.macs[1].String()))
	if got, err := again.Dropped(); err != nil || len(got) != 0 {
		t.Errorf("a table made anew has %+v (%v)", got, err)
	}
	s.must(again.Close())
	if again.Watch(a, s.macs[0].String()) == nil {
		t.Error("what the kernel refuses is taken for done")
	}
	if got, err := again.Dropped(); err == nil {
		t.Errorf("without a table nothing was dropped: %+v", got)
	}
}

// TestCountOutlivesAFlush: whoever flushes a host's rules ends no VM and hinders none: the next
// VM makes the table again, with the VMs that run, and a VM that ends before is forgotten.
func TestCountOutlivesAFlush(t *testing.T) {
	frames, err := CountFrames()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { frames.Close() })
	s := newSegment(t)
	a, b := s.names()[0], s.names()[1]
	all := net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}
	s.awaitForwarding()
	const gone = TapPrefix + "gone"
	s.must(frames.Watch(a, s.macs[0].String()))
	s.must(frames.Watch(gone, "02:f0:0a:52:00:0c"))
	s.must(remove())
	if _, err := frames.Forget(gone); err == nil {
		t.Error("a count that is lost is told as known")
	}
	s.must(frames.Watch(b, s.macs[1].String()))
	s.fromVM(0, frame(all, s.macs[0], "to everyone"))
	s.fromVM(0, frame(s.macs[1], s.macs[0], "to the neighbour"))
	s.fromVM(1, frame(all, s.macs[0], "as the neighbour"))
	s.fromVM(1, frame(net.HardwareAddr{2, 0xf0, 0x0a, 0x52, 0, 0x0c}, s.macs[1], "to a VM that is gone"))
	got, err := frames.Dropped()
	if want := map[string]hostapi.Dropped{a: {Neighbour: 1}, b: {OtherSource: 1}}; err != nil || !maps.Equal(got, want) {
		t.Errorf("%+v (%v), want %+v", got, err, want)
	}
}
