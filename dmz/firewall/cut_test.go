package firewall

import (
	"context"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"foothold/dmz/ruleset"
	"foothold/internal/nstest"
	"foothold/protocol/event"
	"foothold/protocol/zone"

	"github.com/vishvananda/netlink"
)

// probeEvery is the pause between two packets of one kind: shorter than the daemon takes
// for any two of its steps.
const probeEvery = 100 * time.Microsecond

// prober sends packets of several kinds all the time and counts those that arrive.
type prober struct {
	sent, passed, refused atomic.Int64 // passed: of the permitted kind; refused: of all others, at their receivers
}

// probe begins. Until it is stopped, packets go from the VM to port 443, which a document
// may permit; and, which none does, to another port, from another address, and from the
// DMZ to the VM.
func (w *world) probe() (p *prober, stop func()) {
	w.t.Helper()
	w.vm.Do(w.t, func() error {
		link, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		addr, err := netlink.ParseAddr("10.82.0.11/24")
		if err != nil {
			return err
		}
		return netlink.AddrReplace(link, addr)
	})
	p = &prober{}
	good := netip.MustParseAddr("10.82.0.10")
	w.receive(w.dmz, "10.81.0.10:443", func(from netip.Addr) {
		if from == good {
			p.passed.Add(1)
		} else {
			p.refused.Add(1)
		}
	})
	w.receive(w.dmz, "10.81.0.10:444", func(netip.Addr) { p.refused.Add(1) })
	w.receive(w.vm, "10.82.0.10:445", func(netip.Addr) { p.refused.Add(1) })
	ctx, cancel := context.WithCancel(context.Background())
	w.t.Cleanup(cancel)
	for _, kind := range []struct {
		place    *nstest.Place
		from, to string
	}{
		{w.vm, "10.82.0.10:0", "10.81.0.10:443"},
		{w.vm, "10.82.0.10:0", "10.81.0.10:444"},
		{w.vm, "10.82.0.11:0", "10.81.0.10:443"},
		{w.dmz, "10.81.0.10:0", "10.82.0.10:445"},
	} {
		var c *net.UDPConn
		kind.place.Do(w.t, func() (err error) {
			c, err = net.DialUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(kind.from)), net.UDPAddrFromAddrPort(netip.MustParseAddrPort(kind.to)))
			return err
		})
		go func() {
			defer c.Close()
			for tick := time.NewTicker(probeEvery); ctx.Err() == nil; <-tick.C {
				c.Write([]byte("probe")) // refused by a kernel without a route back: the count at the receiver decides
				p.sent.Add(1)
			}
		}()
	}
	return p, cancel
}

func (w *world) receive(p *nstest.Place, addr string, got func(netip.Addr)) {
	w.t.Helper()
	var c *net.UDPConn
	p.Do(w.t, func() (err error) {
		c, err = net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr)))
		return err
	})
	w.t.Cleanup(func() { c.Close() })
	go func() {
		for buf := make([]byte, 64); ; {
			_, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				return
			}
			got(from.Addr())
		}
	}()
}

// passesOn waits until more packets of the permitted kind have arrived.
func (p *prober) passesOn(t *testing.T, when string) {
	t.Helper()
	before := p.passed.Load()
	for end := time.Now().Add(5 * time.Second); p.passed.Load() < before+20; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: permitted packets do not pass", when)
		}
	}
}

func (p *prober) noneTooMany(t *testing.T, when string) {
	t.Helper()
	if n := p.refused.Load(); n != 0 {
		t.Fatalf("%s: %d packets passed that must not", when, n)
	}
}

// cease waits until of hundreds of packets none arrives any more. What passed before may
// stand in the receivers' queues for a while.
func (p *prober) cease(t *testing.T, when string) {
	t.Helper()
	arrived := func() int64 { return p.refused.Load() + p.passed.Load() }
	for end := time.Now().Add(10 * time.Second); ; {
		sent, before := p.sent.Load(), arrived()
		for quiet := time.Now().Add(100 * time.Millisecond); p.sent.Load() < sent+400 || time.Now().Before(quiet); {
			time.Sleep(time.Millisecond)
		}
		n := arrived() - before
		if n == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: packets pass still, %d of the last %d", when, n, p.sent.Load()-sent)
		}
	}
}

func (w *world) forwarding(on string) {
	w.t.Helper()
	w.fw.Do(w.t, func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte(on), 0o644) })
}

// started waits for the daemon's start of that number to be told.
func (w *world) started(n int) {
	w.t.Helper()
	w.orch.WaitEvent("start", func(e event.Event) bool { return e.Kind == "daemon.started" && countStarts(w.orch) >= n })
}

func udpFlow() zone.Flow {
	f := bootFlow(30 * time.Second)
	f.Proto = "udp"
	return f
}

// No packet too many passes while the daemon starts in a namespace without rules, is
// killed, starts again, is stopped and starts again. What was permitted passes on while it
// is away.
func TestNoPacketTooManyPassesARestart(t *testing.T) {
	w := newGround(t)
	w.forwarding("0") // as a machine starts
	p, stop := w.probe()
	w.daemon.Start()
	w.started(1)
	p.noneTooMany(t, "at the first start")
	if n := p.passed.Load(); n != 0 {
		t.Fatalf("%d packets passed before any document permitted them", n)
	}
	w.orch.Publish(document(1, udpFlow()))
	p.passesOn(t, "with a document")
	for i, signal := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM, syscall.SIGKILL, syscall.SIGTERM, syscall.SIGKILL} {
		w.daemon.Stop(signal)
		p.passesOn(t, "after "+signal.String())
		p.noneTooMany(t, "after "+signal.String())
		w.daemon.Start()
		w.started(i + 2)
		p.passesOn(t, "started again")
		p.noneTooMany(t, "started again after "+signal.String())
	}
	w.orch.Publish(document(2))
	w.orch.WaitReport("withdrawn", live(2))
	before := p.passed.Load()
	stop()
	p.noneTooMany(t, "at the end")
	if p.sent.Load() < 1000 || before == 0 {
		t.Errorf("%d packets were sent, %d passed: that shows nothing", p.sent.Load(), before)
	}
	w.daemon.Stop(syscall.SIGTERM)
}

// A machine that forwards by its own settings, and has no rules, is closed by a daemon that
// begins, also by one that then fails to start.
func TestNothingIsForwardedWithoutRules(t *testing.T) {
	w := newGround(t)
	w.forwarding("1")
	p, _ := w.probe()
	p.passesOn(t, "without a firewall") // else what follows would show nothing
	zoneFile := filepath.Join(w.state, "zone.json")
	if err := os.WriteFile(zoneFile, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	w.daemon.Start()
	if err := w.daemon.Wait(); err == nil {
		t.Fatal("the daemon ran with a state that is none")
	}
	p.cease(t, "after a daemon that failed to start")
	if err := os.Remove(zoneFile); err != nil {
		t.Fatal(err)
	}
	p.refused.Store(0)
	w.daemon.Start()
	w.started(1)
	w.orch.Publish(document(1, udpFlow()))
	p.passesOn(t, "with rules")
	p.noneTooMany(t, "with rules")
	// A second daemon finds the table and stops nothing.
	w.daemon.Stop(syscall.SIGKILL)
	w.fw.Do(t, ruleset.Shut)
	p.passesOn(t, "with the table of a daemon that was killed")
}
