package ruleset

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"foothold/internal/nstest"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }

const (
	vmMAC    = "02:f0:00:00:00:10"
	otherMAC = "02:f0:00:00:00:11"
)

func boottime() time.Duration {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return time.Duration(ts.Nano())
}

// world is vm – firewall – dmz; the firewall forwards from the start, so that only
// the table stands between them.
type world struct {
	vm, fw, dmz *nstest.Place
	table       *Table
}

func newWorld(t *testing.T) *world {
	w := &world{nstest.New(t), nstest.New(t), nstest.New(t), nil}
	nstest.Link(t, nstest.End{Place: w.vm, Name: "eth0", Address: "10.82.0.10/24", MAC: vmMAC}, nstest.End{Place: w.fw, Name: "vpc0", Address: "10.82.0.1/24"})
	nstest.Link(t, nstest.End{Place: w.dmz, Name: "eth0", Address: "10.81.0.10/24"}, nstest.End{Place: w.fw, Name: "dmz0", Address: "10.81.0.2/24"})
	w.vm.Route(t, "", "10.82.0.1")
	w.dmz.Route(t, "", "10.81.0.2")
	w.table = New(Config{Adjacent: "vpc0", LogGroup: 7, Now: boottime})
	w.fw.Do(t, func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644) })
	return w
}

func (w *world) apply(t *testing.T, flows ...Flow) {
	t.Helper()
	w.fw.Do(t, func() error { return w.table.Apply(context.Background(), flows) })
}

func prefix(s string) netip.Prefix { return netip.MustParsePrefix(s) }

func mac(s string) net.HardwareAddr {
	m, err := net.ParseMAC(s)
	if err != nil {
		panic(err)
	}
	return m
}

// boot is VM → DMZ machine, tcp 443.
func boot(id string, until time.Duration) Flow {
	return Flow{ID: id, Reservation: "r", From: Endpoint{prefix("10.82.0.10/32"), mac(vmMAC)}, To: Endpoint{Prefix: prefix("10.81.0.10/32")}, Proto: "tcp", Port: 443, Until: until}
}

// ssh is DMZ machine → VM, tcp 22.
func ssh(until time.Duration) Flow {
	return Flow{ID: "ssh", Reservation: "r", From: Endpoint{Prefix: prefix("10.81.0.10/32")}, To: Endpoint{prefix("10.82.0.10/32"), mac(vmMAC)}, Proto: "tcp", Port: 22, Until: until}
}

func TestExactlyTheFlowPasses(t *testing.T) {
	w := newWorld(t)
	w.dmz.Echo(t, "10.81.0.10:443")
	w.dmz.Echo(t, "10.81.0.10:444")
	w.vm.Echo(t, "10.82.0.10:443")
	w.vm.Echo(t, "10.82.0.10:22")
	w.fw.Echo(t, "10.82.0.1:443")

	w.vm.Passes(t, "10.81.0.10:443") // the world works before any rule
	w.apply(t)
	w.vm.Blocked(t, "10.81.0.10:443")

	w.apply(t, boot("boot", boottime()+time.Minute))
	w.vm.Passes(t, "10.81.0.10:443")
	w.vm.Blocked(t, "10.81.0.10:444")  // other port
	w.dmz.Blocked(t, "10.82.0.10:443") // other direction
	w.dmz.Blocked(t, "10.82.0.10:22")
	w.vm.Blocked(t, "10.82.0.1:443") // the firewall itself

	w.apply(t, ssh(boottime()+time.Minute))
	w.vm.Blocked(t, "10.81.0.10:443")
	w.dmz.Passes(t, "10.82.0.10:22")
}

func TestOtherMACIsRefused(t *testing.T) {
	w := newWorld(t)
	w.dmz.Echo(t, "10.81.0.10:443")
	w.apply(t, boot("boot", boottime()+time.Minute))
	w.vm.Passes(t, "10.81.0.10:443")
	setMAC(t, w.vm, otherMAC)
	w.vm.Blocked(t, "10.81.0.10:443")
	moved := boot("boot", boottime()+time.Minute)
	moved.From.MAC = mac(otherMAC)
	w.apply(t, moved)
	w.vm.Passes(t, "10.81.0.10:443")
}

// The kernel ends a flow on time, the connection established in it included, and in
// both directions, without this process's doing.
func TestTimeoutEndsEstablishedConnections(t *testing.T) {
	w := newWorld(t)
	w.dmz.Echo(t, "10.81.0.10:443")
	w.vm.Echo(t, "10.82.0.10:22")
	until := boottime() + 1500*time.Millisecond
	w.apply(t, boot("boot", until), ssh(until))
	out := w.vm.Passes(t, "10.81.0.10:443")
	in := w.dmz.Passes(t, "10.82.0.10:22")
	for boottime() < until {
		time.Sleep(until - boottime())
	}
	for name, c := range map[string]net.Conn{"vm to dmz": out, "dmz to vm": in} {
		if err := nstest.Ping(c, nstest.Refuse); err == nil {
			t.Errorf("%s: the connection outlived its flow", name)
		}
	}
	w.vm.Blocked(t, "10.81.0.10:443")
	w.dmz.Blocked(t, "10.82.0.10:22")
	w.fw.Do(t, func() error {
		live, err := w.table.Live()
		if len(live) != 0 {
			t.Errorf("after the deadline %v is live", live)
		}
		return err
	})
	// A renewed flow lets the same connection go on.
	w.apply(t, boot("boot", boottime()+time.Minute))
	if err := nstest.Ping(out, nstest.Soon); err != nil {
		t.Errorf("renewed flow: %v", err)
	}
}

func TestPrefixesAndStandingFlows(t *testing.T) {
	w := newWorld(t)
	w.dmz.Echo(t, "10.81.0.10:80")
	w.fw.Echo(t, "10.81.0.2:8443")
	all := Flow{ID: "dest", From: Endpoint{Prefix: prefix("10.81.0.0/24")}, To: Endpoint{prefix("10.82.0.10/32"), mac(vmMAC)}, Proto: "tcp", Port: 8080}
	self := Flow{ID: "self", From: Endpoint{Prefix: prefix("10.81.0.0/28")}, To: Endpoint{Prefix: prefix("10.81.0.2/32")}, Proto: "tcp", Port: 8443}
	wide := Flow{ID: "wide", From: Endpoint{prefix("10.82.0.10/32"), mac(vmMAC)}, To: Endpoint{Prefix: prefix("10.81.0.0/24")}, Proto: "tcp", Port: 80}
	exact := Flow{ID: "exact", From: Endpoint{prefix("10.82.0.10/32"), mac(vmMAC)}, To: Endpoint{Prefix: prefix("10.81.0.10/32")}, Proto: "tcp", Port: 80}
	w.vm.Echo(t, "10.82.0.10:8080")
	w.apply(t, all, self)
	w.dmz.Passes(t, "10.82.0.10:8080")
	w.dmz.Passes(t, "10.81.0.2:8443")
	w.vm.Blocked(t, "10.81.0.2:8443")
	w.vm.Blocked(t, "10.81.0.10:80")
	w.apply(t, all, self, wide, exact) // overlapping prefixes, new shapes
	c := w.vm.Passes(t, "10.81.0.10:80")
	w.apply(t, self, wide)
	if err := nstest.Ping(c, nstest.Soon); err != nil {
		t.Errorf("still permitted by the wider flow: %v", err)
	}
	w.apply(t, self)
	if err := nstest.Ping(c, nstest.Refuse); err == nil {
		t.Error("connection outlived its flow")
	}
}

func TestReadBackIsTheKernels(t *testing.T) {
	w := newWorld(t)
	until := boottime() + time.Minute
	w.apply(t, boot("boot", until), ssh(until), Flow{ID: "standing", From: Endpoint{Prefix: prefix("10.81.0.0/24")}, To: Endpoint{Prefix: prefix("10.83.0.10/32")}, Proto: "udp", Port: 53})
	w.fw.Do(t, func() error {
		live, err := w.table.Live()
		if err != nil || len(live) != 3 {
			return fmt.Errorf("live: %v, %v", live, err)
		}
		for _, l := range live {
			if (l.ID == "standing") != (l.Remaining == 0) || l.Remaining > time.Minute {
				t.Errorf("%+v", l)
			}
		}
		// Someone else's change of the kernel shows.
		others, err := openKernel(boottime)
		if err != nil {
			return err
		}
		defer others.close()
		tx := others.begin()
		el := ssh(until).elements(func(netip.Addr) bool { return false })[0]
		if err := tx.delete(w.table.sets, []element{el}); err != nil {
			return err
		}
		stray := boot("stray", until)
		stray.Port = 9999
		add := map[element]want{stray.elements(func(netip.Addr) bool { return false })[0]: {"stray", until}}
		if err := tx.add(w.table.sets, add, boottime()); err != nil {
			return err
		}
		if err := tx.flush(); err != nil {
			return err
		}
		if err := w.table.Reread(); err != nil {
			return err
		}
		live, err = w.table.Live()
		ids := map[string]bool{}
		for _, l := range live {
			ids[l.ID] = true
		}
		if len(ids) != 3 || !ids["boot"] || !ids["standing"] || !ids["unexpected/stray"] {
			t.Errorf("after a foreign change: %v", live)
		}
		return err
	})
	// and the next document mends it
	w.apply(t, boot("boot", until), ssh(until))
	w.fw.Do(t, func() error {
		live, err := w.table.Live()
		if len(live) != 2 {
			t.Errorf("after the mend: %v", live)
		}
		return err
	})
}

func TestAThousandFlows(t *testing.T) {
	w := newWorld(t)
	var flows []Flow
	until := boottime() + time.Minute
	for i := range 1000 {
		addr := netip.AddrFrom4([4]byte{10, 82, byte(1 + i/250), byte(1 + i%250)})
		flows = append(flows, Flow{ID: fmt.Sprintf("flow/%d", i), Reservation: fmt.Sprint(i), From: Endpoint{netip.PrefixFrom(addr, 32), mac(fmt.Sprintf("02:f0:00:00:%02x:%02x", i/250, i%250))},
			To: Endpoint{Prefix: prefix("10.81.0.10/32")}, Proto: "udp", Port: 51820, Until: until})
	}
	start := time.Now()
	w.apply(t, flows...)
	t.Logf("1000 flows: %s", time.Since(start))
	start = time.Now()
	w.apply(t, flows[1:]...)
	t.Logf("one fewer: %s", time.Since(start))
	w.fw.Do(t, func() error {
		live, err := w.table.Live()
		if len(live) != 999 {
			t.Errorf("%d live", len(live))
		}
		return err
	})
	w.apply(t)
	w.fw.Do(t, func() error {
		live, err := w.table.Live()
		if len(live) != 0 {
			t.Errorf("%d live", len(live))
		}
		return err
	})
}

func TestRestartReplacesTheTable(t *testing.T) {
	w := newWorld(t)
	w.dmz.Echo(t, "10.81.0.10:443")
	until := boottime() + time.Minute
	w.apply(t, boot("boot", until))
	c := w.vm.Passes(t, "10.81.0.10:443")
	w.table = New(Config{Adjacent: "vpc0", Now: boottime})
	w.apply(t, boot("boot", until))
	if err := nstest.Ping(c, nstest.Soon); err != nil {
		t.Errorf("established connection after a restart: %v", err)
	}
	w.table = New(Config{Adjacent: "vpc0", Now: boottime})
	w.apply(t)
	if err := nstest.Ping(c, nstest.Refuse); err == nil {
		t.Error("connection passes after a restart without its flow")
	}
}

func TestBadFlowsAreRefusedWhole(t *testing.T) {
	w := newWorld(t)
	good := boot("boot", Forever)
	for name, change := range map[string]func(*Flow){
		"protocol": func(f *Flow) { f.Proto = "icmp" },
		"port":     func(f *Flow) { f.Port = 0 },
		"prefix":   func(f *Flow) { f.To.Prefix = netip.MustParsePrefix("10.81.0.10/24") },
		"ipv6":     func(f *Flow) { f.To.Prefix = prefix("fd00::1/128") },
		"none":     func(f *Flow) { f.To.Prefix = netip.Prefix{} },
		"mac":      func(f *Flow) { f.From.Prefix = prefix("10.82.0.0/24") },
		"id":       func(f *Flow) { f.ID = "" },
	} {
		bad := good
		change(&bad)
		w.fw.Do(t, func() error {
			if err := w.table.Apply(context.Background(), []Flow{good, bad}); err == nil {
				t.Errorf("%s: accepted", name)
			}
			live, err := w.table.Live()
			if len(live) != 0 {
				t.Errorf("%s: half applied: %v", name, live)
			}
			return err
		})
	}
}

func setMAC(t *testing.T, p *nstest.Place, addr string) {
	t.Helper()
	p.Do(t, func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return netlink.LinkSetHardwareAddr(l, mac(addr))
	})
}

// Whatever else is permitted to the machine itself, from the tunnel its inside address
// alone is reached.
func TestTunnelReachesTheInsideAlone(t *testing.T) {
	w := newWorld(t)
	w.table = New(Config{Tunnel: "vpc0", Inside: netip.MustParseAddr("10.82.0.1"), Now: boottime})
	w.fw.Echo(t, "10.81.0.2:8443")
	w.fw.Echo(t, "10.82.0.1:8443")
	any4 := Endpoint{Prefix: prefix("0.0.0.0/0")}
	w.apply(t, Flow{ID: "outside", From: any4, To: Endpoint{Prefix: prefix("10.81.0.2/32")}, Proto: "tcp", Port: 8443},
		Flow{ID: "inside", From: Endpoint{Prefix: prefix("10.82.0.10/32")}, To: Endpoint{Prefix: prefix("10.82.0.1/32")}, Proto: "tcp", Port: 8443})
	w.dmz.Passes(t, "10.81.0.2:8443")
	w.vm.Passes(t, "10.82.0.1:8443")
	w.vm.Blocked(t, "10.81.0.2:8443")
}
