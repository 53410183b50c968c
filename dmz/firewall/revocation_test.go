package firewall

import (
	"net"
	"testing"
	"time"

	"foothold/dmz/upstream/upstreamtest"
)

// A flow is withdrawn under the traffic of a connection that it let begin.
func TestRevocationEndsConnections(t *testing.T) {
	w := newWorld(t)
	w.dmz.Echo(t, "10.81.0.10:443")
	upstreamtest.Revocations(t, func(revision int64) net.Conn {
		w.orch.Publish(document(revision, bootFlow(20*time.Second)))
		w.orch.WaitReport("flow", live(revision, "r1/boot"))
		return w.vm.Passes(t, "10.81.0.10:443")
	}, func(revision int64) {
		w.orch.Publish(document(revision))
		w.orch.WaitReport("withdrawn", live(revision))
	})
}
