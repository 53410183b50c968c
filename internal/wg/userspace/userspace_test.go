package userspace

import (
	"io"
	"net"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"foothold/internal/nstest"
	"foothold/internal/secret"
	"foothold/internal/wg"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }

// far runs f in a network namespace that a veth pair joins to ours: we are
// 192.0.2.1, it is 192.0.2.2.
func far(t *testing.T) func(f func()) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	home, err := netns.Get()
	if err != nil {
		t.Fatal(err)
	}
	away, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	check(t, netns.Set(home))
	attrs := netlink.NewLinkAttrs()
	attrs.Name = "near"
	check(t, netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "far", PeerNamespace: netlink.NsFd(int(away))}))
	address(t, "near", "192.0.2.1/24")
	in := func(f func()) {
		done := make(chan struct{})
		go func() { // its thread ends with it, since it is never unlocked
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
	in(func() { address(t, "far", "192.0.2.2/24") })
	return in
}

func address(t *testing.T, name, addr string) {
	t.Helper()
	link, err := netlink.LinkByName(name)
	check(t, err)
	a, _ := netlink.ParseAddr(addr)
	check(t, netlink.AddrAdd(link, a))
	check(t, netlink.LinkSetUp(link))
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, name string, port int, addr string) *wg.Device {
	t.Helper()
	key, public := wg.GenerateKey()
	d, err := wg.Open(wg.Config{Name: name, PrivateKey: key, ListenPort: port, MTU: 1420, Address: []netip.Prefix{netip.MustParsePrefix(addr)}, Fallback: Start})
	check(t, err)
	if d.PublicKey() != public {
		t.Error("the device has another public key")
	}
	return d
}

// Bytes pass with the same pre-shared key on both ends, and only then.
func TestTunnelCarriesOnlyWithThePreSharedKey(t *testing.T) {
	in := far(t)
	near := open(t, "wg0", 51820, "10.84.0.1/16")
	defer near.Close()
	psk := secret.Random(32)
	check(t, near.AddPeer(wg.Peer{PublicKey: [32]byte{9}, AllowedIPs: []netip.Prefix{netip.MustParsePrefix("10.84.0.9/32")}}))
	check(t, near.RemovePeer([32]byte{9}))
	listener, err := net.Listen("tcp", "10.84.0.1:80")
	check(t, err)
	go func() {
		c, err := listener.Accept()
		if err == nil {
			io.WriteString(c, "hello")
			c.Close()
		}
	}()
	in(func() {
		d := open(t, "wg1", 0, "10.84.0.2/16")
		check(t, near.AddPeer(wg.Peer{PublicKey: d.PublicKey(), PresharedKey: psk, AllowedIPs: []netip.Prefix{netip.MustParsePrefix("10.84.0.2/32")}}))
		peer := wg.Peer{PublicKey: near.PublicKey(), PresharedKey: secret.Random(32), Endpoint: netip.MustParseAddrPort("192.0.2.1:51820"),
			AllowedIPs: []netip.Prefix{netip.MustParsePrefix("10.84.0.1/32")}, Keepalive: time.Second}
		check(t, d.AddPeer(peer))
		if c, err := net.DialTimeout("tcp", "10.84.0.1:80", time.Second); err == nil {
			c.Close()
			t.Error("another pre-shared key passes")
		}
		check(t, d.RemovePeer(peer.PublicKey))
		peer.PresharedKey = psk
		check(t, d.AddPeer(peer))
		c, err := net.DialTimeout("tcp", "10.84.0.1:80", 20*time.Second)
		if err != nil {
			t.Error(err)
			return
		}
		if got, _ := io.ReadAll(c); string(got) != "hello" {
			t.Errorf("got %q", got)
		}
		check(t, d.Close())
	})
	peers, err := near.Peers()
	check(t, err)
	if len(peers) != 1 || peers[0].LastHandshake.IsZero() || peers[0].Received == 0 || peers[0].Endpoint.Addr() != netip.MustParseAddr("192.0.2.2") ||
		len(peers[0].AllowedIPs) != 1 || peers[0].AllowedIPs[0] != netip.MustParsePrefix("10.84.0.2/32") {
		t.Errorf("read back: %+v", peers)
	}
	check(t, near.RemovePeer(peers[0].PublicKey))
	if peers, err := near.Peers(); err != nil || len(peers) != 0 {
		t.Errorf("after removal: %+v, %v", peers, err)
	}
}

func TestOpenReplacesWhatWasLeft(t *testing.T) {
	first := open(t, "wg9", 0, "10.85.0.1/24")
	check(t, first.Close())
	second := open(t, "wg9", 0, "10.85.0.1/24")
	check(t, second.Close())
	if _, err := netlink.LinkByName("wg9"); err == nil {
		t.Error("the interface stays after Close")
	}
}

func FuzzParse(f *testing.F) {
	f.Add("public_key=00\nrx_bytes=1\n")
	f.Add("public_key=" + "0000000000000000000000000000000000000000000000000000000000000000\nallowed_ip=10.0.0.0/8\nendpoint=1.2.3.4:5\n")
	f.Fuzz(func(t *testing.T, text string) { _, _ = parse([]byte(text)) })
}
