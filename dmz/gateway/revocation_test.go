package gateway

import (
	"encoding/json"
	"net"
	"os"
	"strconv"
	"testing"
	"time"

	"foothold/protocol/event"
)

// Variables by which e2e/bench asks for more rounds, and for their times.
const (
	revocationRounds = "FOOTHOLD_BENCH_ROUNDS"
	revocationOut    = "FOOTHOLD_BENCH_OUT" // file: JSON list of ms
)

// revokedWithin is the most that may pass between a document without a peer and the
// last packet through its tunnel, also on a busy machine: the gateway stores the document
// durably first, and disks can be busy too.
const revokedWithin = 3 * time.Second

// still is how long an echo is waited for: one that has not come by then will not come.
const still = 250 * time.Millisecond

// TestRevocationEndsTheTunnel withdraws a VM's access under traffic, with a fresh
// admission each round, and looks when the last packet came back through the tunnel.
func TestRevocationEndsTheTunnel(t *testing.T) {
	rounds := 3
	if text := os.Getenv(revocationRounds); text != "" {
		var err error
		if rounds, err = strconv.Atoi(text); err != nil || rounds < 1 {
			t.Fatalf("%s=%s: a number of rounds", revocationRounds, text)
		}
	}
	w := newWorld(t)
	w.echo(w.tenant, "10.80.0.10:80")
	var times []float64
	for i := range rounds {
		took := w.revoke(int64(2*i + 1))
		if took > revokedWithin {
			t.Errorf("round %d: packets passed for %s", i+1, took)
		}
		times = append(times, float64(took.Microseconds())/1000)
	}
	t.Logf("ms: %v", times)
	if file := os.Getenv(revocationOut); file != "" {
		data, err := json.Marshal(times)
		if err == nil {
			err = os.WriteFile(file, data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// revoke admits the VM, lets traffic flow, and publishes a document without the peer.
func (w *world) revoke(revision int64) time.Duration {
	w.t.Helper()
	w.mu.Lock()
	w.serial = ""
	w.mu.Unlock()
	a := w.join(w.certificate())
	defer w.leave()
	w.orch.Publish(w.document(revision, a, false, flow("dest", a.Address.String()+"/32", "10.80.0.10/32", 80)))
	w.orch.WaitReport("open tunnel", live(revision, reservation, "dest"))
	c := w.passes(w.vm, "10.80.0.10:80")
	defer c.Close()
	for range 10 {
		if err := ping(c, still); err != nil {
			w.t.Fatalf("before the revocation: %v", err)
		}
	}
	last := make(chan time.Time)
	go func() { last <- lastEcho(c) }()
	gone := w.document(revision+1, a, false)
	gone.Peers = nil
	revoked := time.Now()
	w.orch.Publish(gone)
	took := max(0, (<-last).Sub(revoked))
	w.orch.WaitEvent("end", func(e event.Event) bool { return e.Kind == "tunnel.ended" && e.Reservation == reservation })
	return took
}

// lastEcho sends one byte after the other until none comes back, or it is clear that they
// come back for too long.
func lastEcho(c net.Conn) time.Time {
	last := time.Now()
	for limit := last.Add(2 * revokedWithin); ping(c, still) == nil && last.Before(limit); {
		last = time.Now()
	}
	return last
}
