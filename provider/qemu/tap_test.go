package qemu

import (
	"net"
	"os"
	"strings"
	"testing"

	"foothold/internal/nstest"
	"foothold/protocol/event"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }

// TestTapTakesNobodysAddress: a tenant that asks for the firewall's MAC address would
// get, by the tap's fixed entry, what all others send there.
func TestTapTakesNobodysAddress(t *testing.T) {
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		t.Fatal("no /dev/net/tun: modprobe tun")
	}
	const bridge, firewall, vm = "br-test", "02:00:00:00:00:01", "02:f0:0a:52:00:0a"
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	br := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridge}}
	must(netlink.LinkAdd(br))
	t.Cleanup(func() { netlink.LinkDel(br) })
	uplink := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "uplink", MasterIndex: br.Index}, PeerName: "peer"}
	must(netlink.LinkAdd(uplink))
	t.Cleanup(func() { netlink.LinkDel(uplink) })
	for _, name := range []string{bridge, "uplink", "peer"} {
		link, err := netlink.LinkByName(name)
		must(err)
		must(netlink.LinkSetUp(link))
	}
	learned, err := net.ParseMAC(firewall)
	must(err)
	must(netlink.NeighSet(&netlink.Neigh{LinkIndex: uplink.Index, Family: unix.AF_BRIDGE, State: netlink.NUD_NOARP, Flags: netlink.NTF_MASTER, HardwareAddr: learned}))

	own, err := netlink.LinkByName(bridge)
	must(err)
	for what, mac := range map[string]string{"at the uplink": firewall, "the bridge's own": own.Attrs().HardwareAddr.String()} {
		if f, err := OpenTap("fh-bad", bridge, mac, 1500); event.ReasonOf(err) != event.InUse {
			t.Errorf("an address that is known %s: %v", what, err)
			if err == nil {
				f.Close()
			}
		}
	}
	f, err := OpenTap("fh-good", bridge, vm, 1500)
	must(err)
	if second, err := OpenTap("fh-second", bridge, vm, 1500); event.ReasonOf(err) != event.InUse {
		t.Errorf("the address of another VM: %v", err)
		if err == nil {
			second.Close()
		}
	}
	must(f.Close())
	again, err := OpenTap("fh-again", bridge, vm, 1500)
	must(err)
	defer again.Close()
	for path, want := range map[string]string{"ipv4/conf/" + bridge + "/rp_filter": "1", "ipv4/conf/" + bridge + "/arp_ignore": "8"} {
		if got, err := os.ReadFile("/proc/sys/net/" + path); err != nil || strings.TrimSpace(string(got)) != want {
			t.Errorf("%s is %q, want %q (%v)", path, got, want, err)
		}
	}
}
