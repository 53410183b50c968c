package firewall

import (
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"foothold/dmz/upstream/upstreamtest"
	"foothold/internal/mtls"
	"foothold/internal/nstest"
	"foothold/protocol/event"
	"foothold/protocol/zone"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestMain runs the daemon itself when a test starts it as a process.
func TestMain(m *testing.M) {
	os.Exit(upstreamtest.Main(Run, func() int { return nstest.Main(m) }))
}

const vmMAC = "02:f0:0a:52:00:0a"

// world is vm, neighbour – external firewall – DMZ with the orchestrator.
type world struct {
	t           *testing.T
	vm, fw, dmz *nstest.Place
	orch        *upstreamtest.Orchestrator
	state       string
	daemon      *upstreamtest.Daemon
}

func newWorld(t *testing.T) *world {
	w := newGround(t)
	w.daemon.Start()
	return w
}

// newGround is a world whose daemon has never run.
func newGround(t *testing.T) *world {
	w := &world{t: t, vm: nstest.New(t), fw: nstest.New(t), dmz: nstest.New(t), orch: upstreamtest.New(t), state: t.TempDir()}
	nstest.Link(t, nstest.End{Place: w.vm, Name: "eth0", Address: "10.82.0.10/24", MAC: vmMAC}, nstest.End{Place: w.fw, Name: "vpc0", Address: "10.82.0.1/24"})
	nstest.Link(t, nstest.End{Place: w.dmz, Name: "eth0", Address: "10.81.0.10/24"}, nstest.End{Place: w.fw, Name: "dmz0", Address: "10.81.0.2/24"})
	w.vm.Route(t, "", "10.82.0.1")
	w.dmz.Route(t, "", "10.81.0.2")
	w.orch.Serve(w.dmz.Listen(w.t, "10.81.0.10:8443"))
	c := Config{State: w.state, Zone: zone.External, Adjacent: "vpc0", Upstream: w.orch.Config(mtls.Firewall, zone.External),
		Bootstrap: []Bootstrap{{From: "10.81.0.2/32", To: "10.81.0.10/32", Proto: "tcp", Port: 8443}}}
	w.daemon = upstreamtest.NewDaemon(t, w.fw, c)
	return w
}

func (w *world) neighbours() (out []string) {
	w.t.Helper()
	w.fw.Do(w.t, func() error {
		l, err := netlink.LinkByName("vpc0")
		if err != nil {
			return err
		}
		list, err := netlink.NeighList(l.Attrs().Index, unix.AF_INET)
		for _, n := range list {
			if n.State == netlink.NUD_PERMANENT {
				out = append(out, n.IP.String()+" "+n.HardwareAddr.String())
			}
		}
		return err
	})
	return out
}

func document(revision int64, flows ...zone.Flow) zone.Document {
	return zone.Document{Zone: zone.External, Epoch: 1, Revision: revision, Lease: 30 * time.Second, Flows: flows}
}

func bootFlow(ttl time.Duration) zone.Flow {
	return zone.Flow{ID: "r1/boot", Reservation: "r1", Phase: "booting", Proto: "tcp", Port: 443, TTL: ttl,
		From: zone.Endpoint{Prefix: netip.MustParsePrefix("10.82.0.10/32"), MAC: vmMAC}, To: zone.Endpoint{Prefix: netip.MustParsePrefix("10.81.0.10/32")}}
}

func live(revision int64, ids ...string) func(zone.Report) bool {
	return func(r zone.Report) bool {
		have := map[string]bool{}
		for _, l := range r.Live {
			if !strings.HasPrefix(l.ID, "bootstrap/") {
				have[l.ID] = true
			}
		}
		for _, id := range ids {
			if !have[id] {
				return false
			}
		}
		return r.Revision == revision && r.Error == "" && len(have) == len(ids)
	}
}

func TestFirewallCarriesOutDocuments(t *testing.T) {
	w := newWorld(t)
	w.dmz.Echo(w.t, "10.81.0.10:443")
	w.dmz.Echo(w.t, "10.81.0.10:444")
	w.orch.Publish(document(1))
	w.orch.WaitReport("empty document", live(1))
	w.vm.Blocked(w.t, "10.81.0.10:443")
	drop := w.orch.WaitEvent("drop", func(e event.Event) bool { return e.Kind == "firewall.dropped" && e.Detail["port"] == "443" })
	if d := drop.Detail; d["from"] != "10.82.0.10" || d["to"] != "10.81.0.10" || d["protocol"] != "tcp" || d["interface"] != "vpc0" || d["mac"] != vmMAC || d["packets"] == "" {
		t.Errorf("drop: %v", d)
	}

	w.orch.Publish(document(2, bootFlow(20*time.Second)))
	w.orch.WaitReport("boot flow", live(2, "r1/boot"))
	c := w.vm.Passes(w.t, "10.81.0.10:443")
	w.vm.Blocked(w.t, "10.81.0.10:444")
	w.vm.Blocked(w.t, "10.81.0.10:8443") // the daemon's own way is not the VM's
	w.dmz.Blocked(w.t, "10.82.0.10:22")
	if got := w.neighbours(); len(got) != 1 || got[0] != "10.82.0.10 "+vmMAC {
		t.Errorf("neighbours: %v", got)
	}

	// Killed, the rules stay; started again, the same document is live with what is left of its time.
	w.daemon.Stop(syscall.SIGKILL)
	if err := nstest.Ping(c, 3*time.Second); err != nil {
		t.Errorf("while the daemon is down: %v", err)
	}
	w.daemon.Start()
	w.orch.WaitEvent("second start", func(e event.Event) bool { return e.Kind == "daemon.started" && e.Seq == 1 && countStarts(w.orch) == 2 })
	if err := nstest.Ping(c, 3*time.Second); err != nil {
		t.Errorf("after a restart: %v", err)
	}

	w.orch.Publish(document(3))
	w.orch.WaitReport("withdrawn", live(3))
	if err := nstest.Ping(c, 400*time.Millisecond); err == nil {
		t.Error("connection outlived its flow")
	}
	if got := w.neighbours(); len(got) != 0 {
		t.Errorf("neighbours after the flow: %v", got)
	}
	w.daemon.Stop(syscall.SIGTERM)
}

func countStarts(o *upstreamtest.Orchestrator) (n int) {
	for _, e := range o.Events() {
		if e.Kind == "daemon.started" {
			n++
		}
	}
	return n
}

// Cut off from the orchestrator, what is open closes in time by itself.
func TestFirewallAloneClosesOnTime(t *testing.T) {
	w := newWorld(t)
	w.dmz.Echo(w.t, "10.81.0.10:443")
	start := time.Now()
	w.orch.Publish(document(1, bootFlow(3*time.Second)))
	w.orch.WaitReport("boot flow", live(1, "r1/boot"))
	c := w.vm.Passes(w.t, "10.81.0.10:443")
	w.orch.Stop()
	time.Sleep(time.Until(start.Add(3500 * time.Millisecond)))
	if err := nstest.Ping(c, 400*time.Millisecond); err == nil {
		t.Error("connection outlived its flow")
	}
	w.vm.Blocked(w.t, "10.81.0.10:443")
	deadline := time.Now().Add(3 * sweepEvery)
	for len(w.neighbours()) != 0 {
		if time.Now().After(deadline) {
			t.Fatalf("neighbours stay: %v", w.neighbours())
		}
		time.Sleep(50 * time.Millisecond)
	}
	w.daemon.Stop(syscall.SIGTERM)
}
