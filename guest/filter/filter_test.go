package filter

import (
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"foothold/internal/nstest"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wire joins this namespace (192.0.2.1 on eth0) to a new one (192.0.2.2 and .3 on
// eth0) and returns how to run something there.
func wire(t *testing.T) func(func()) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := netns.Get()
	check(t, err)
	away, err := netns.New()
	check(t, err)
	check(t, netns.Set(home))
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "eth0"
	check(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(away))}))
	up := func(addrs ...string) {
		link, err := netlink.LinkByName("eth0")
		check(t, err)
		for _, a := range addrs {
			addr, _ := netlink.ParseAddr(a)
			check(t, netlink.AddrAdd(link, addr))
		}
		check(t, netlink.LinkSetUp(link))
	}
	up("192.0.2.1/24")
	in := func(f func()) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			runtime.LockOSThread()
			if err := netns.Set(away); err != nil {
				t.Error(err)
				return
			}
			f()
		}()
		<-done
	}
	in(func() { up("192.0.2.2/24", "192.0.2.3/24") })
	return in
}

// listen answers "hello" at an address.
func listen(t *testing.T, at string) {
	t.Helper()
	l, err := net.Listen("tcp", at)
	check(t, err)
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, "hello")
			c.Close()
		}
	}()
}

// patience is how long something that may pass is tried for: the first packets on a new
// link wait for its neighbour, and TCP sends a lost one again after a second.
const patience = 5 * time.Second

// passes tells whether a connection gets its answer, if it should within patience.
func passes(from, to string, want bool) bool {
	for end := time.Now().Add(patience); ; {
		if ok := reaches(from, to); ok || !want || time.Now().After(end) {
			return ok
		}
	}
}

// reaches tells whether a connection gets its answer at once.
func reaches(from, to string) bool {
	d := net.Dialer{Timeout: 400 * time.Millisecond}
	if from != "" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
	}
	c, err := d.Dial("tcp", to)
	if err != nil {
		return false
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(400 * time.Millisecond))
	b, _ := io.ReadAll(c)
	return string(b) == "hello"
}

func TestOnlyStatedFlowsPass(t *testing.T) {
	in := clean(t)
	listen(t, "192.0.2.1:22")
	listen(t, "192.0.2.1:80")
	in(func() { listen(t, "192.0.2.2:443"); listen(t, "192.0.2.2:444"); listen(t, "192.0.2.3:443") })
	tries := map[string]struct{ from, to string }{
		"out 443": {"", "192.0.2.2:443"}, "out 444": {"", "192.0.2.2:444"}, "out other": {"", "192.0.2.3:443"},
		"in 22": {"192.0.2.2", "192.0.2.1:22"}, "in 22 other": {"192.0.2.3", "192.0.2.1:22"}, "in 80": {"192.0.2.2", "192.0.2.1:80"},
	}
	look := func(name string, want map[string]bool) {
		t.Helper()
		for k, c := range tries {
			var ok bool
			try := func() { ok = passes(c.from, c.to, want[k]) }
			if c.from == "" {
				try()
			} else {
				in(try)
			}
			if ok != want[k] {
				t.Errorf("%s: %s passes: %v, want %v", name, k, ok, want[k])
			}
		}
	}
	look("before", map[string]bool{"out 443": true, "out 444": true, "out other": true, "in 22": true, "in 22 other": true, "in 80": true})
	check(t, Apply())
	look("closed", nil)
	boot := Flow{Interface: "eth0", Proto: TCP, Peer: netip.MustParseAddrPort("192.0.2.2:443")}
	ssh := Flow{Interface: "eth0", Inbound: true, Proto: TCP, Peer: netip.MustParseAddrPort("192.0.2.2:0"), Port: 22}
	check(t, Apply(boot))
	look("boot", map[string]bool{"out 443": true})
	check(t, Apply(ssh))
	look("ssh", map[string]bool{"in 22": true})
	check(t, Apply(boot, ssh))
	look("both", map[string]bool{"out 443": true, "in 22": true})
	other := boot
	other.Interface = "wg0"
	check(t, Apply(other))
	look("another interface", nil)
	if err := Apply(Flow{Interface: "eth0", Inbound: true, Proto: TCP}); err == nil {
		t.Error("an inbound flow to every port is accepted")
	}
	look("after a refusal", nil)
}

// A phase's end ends connections that are open, too.
func TestOpenConnectionEndsWithItsFlow(t *testing.T) {
	in := clean(t)
	check(t, Apply(Flow{Interface: "eth0", Proto: TCP, Peer: netip.MustParseAddrPort("192.0.2.2:443")}))
	ln := make(chan net.Listener, 1)
	in(func() { l, err := net.Listen("tcp", "192.0.2.2:443"); check(t, err); ln <- l })
	l := <-ln
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			io.Copy(c, c)
		}
	}()
	c, err := net.Dial("tcp", "192.0.2.2:443")
	check(t, err)
	defer c.Close()
	echo := func() bool {
		c.SetDeadline(time.Now().Add(500 * time.Millisecond))
		if _, err := c.Write([]byte("x")); err != nil {
			return false
		}
		_, err := io.ReadFull(c, make([]byte, 1))
		return err == nil
	}
	if !echo() {
		t.Fatal("no echo while the flow stands")
	}
	check(t, Apply())
	if echo() {
		t.Error("the connection outlives its flow")
	}
}

// clean starts from a clean table and link.
func clean(t *testing.T) func(func()) {
	t.Helper()
	c, err := nftables.New()
	check(t, err)
	c.FlushRuleset()
	check(t, c.Flush())
	if link, err := netlink.LinkByName("eth0"); err == nil {
		check(t, netlink.LinkDel(link))
	}
	return wire(t)
}
