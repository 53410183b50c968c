package orchestrator

import (
	"net/netip"
	"testing"
	"time"

	"foothold/protocol/api"
)

// TestClockOff: with the orchestrator's clock ten minutes off, everybody else's being
// right, VMs come up and stay up.
func TestClockOff(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	tunnel := netip.MustParseAddr("10.84.0.2")
	for name, off := range map[string]time.Duration{"behind": -10 * time.Minute, "ahead": 10 * time.Minute} {
		w.off = off
		w.restart()
		g := w.take(w.create(api.CreateVM{Name: name}).ID)
		g.tunnel = tunnel
		g.pass()
		if _, why := g.say(); why != "" {
			t.Errorf("%s: a heartbeat: %q", name, why)
		}
		w.fits(name)
		w.call("DELETE", "/v1/vms/"+name, nil, nil)
		w.waitGone(g.id)
		tunnel = tunnel.Next()
	}
}
