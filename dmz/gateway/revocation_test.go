package gateway

import (
	"net"
	"testing"

	"foothold/dmz/upstream/upstreamtest"
	"foothold/protocol/agentmsg"
	"foothold/protocol/event"
)

// A VM's access is withdrawn under traffic through its tunnel, with a fresh admission each
// round.
func TestRevocationEndsTheTunnel(t *testing.T) {
	w := newWorld(t)
	w.tenant.Echo(t, "10.80.0.10:80")
	var a agentmsg.AdmitResponse
	upstreamtest.Revocations(t, func(revision int64) net.Conn {
		if w.leave != nil { // of the round before
			w.leave()
		}
		w.mu.Lock()
		w.serial = ""
		w.mu.Unlock()
		a = w.join(w.certificate())
		w.orch.Publish(w.document(revision, a, false, flow("dest", a.Address.String()+"/32", "10.80.0.10/32", 80)))
		w.orch.WaitReport("open tunnel", live(revision, reservation, "dest"))
		return w.vm.Passes(t, "10.80.0.10:80")
	}, func(revision int64) {
		gone := w.document(revision, a, false)
		gone.Peers = nil
		w.orch.Publish(gone)
		w.orch.WaitEvent("end", func(e event.Event) bool { return e.Kind == "tunnel.ended" && e.Reservation == reservation })
	})
}
