package firewall

import (
	"encoding/json"
	"net"
	"os"
	"strconv"
	"testing"
	"time"
)

// Variables by which e2e/bench asks for more rounds, and for their times.
const (
	revocationRounds = "FOOTHOLD_BENCH_ROUNDS"
	revocationOut    = "FOOTHOLD_BENCH_OUT" // file: JSON list of ms
)

// revokedWithin is the most that may pass between a document without a flow and the last
// packet of its connection, also on a busy machine: the firewall stores the document
// durably first, and disks can be busy too.
const revokedWithin = 3 * time.Second

// still is how long an echo is waited for: one that has not come by then will not come.
const still = 250 * time.Millisecond

// TestRevocationEndsConnections withdraws a flow under the traffic of a connection that
// it let begin, over and over, and looks when the last packet came back.
func TestRevocationEndsConnections(t *testing.T) {
	rounds := 3
	if text := os.Getenv(revocationRounds); text != "" {
		var err error
		if rounds, err = strconv.Atoi(text); err != nil || rounds < 1 {
			t.Fatalf("%s=%s: a number of rounds", revocationRounds, text)
		}
	}
	w := newWorld(t)
	w.echo(w.dmz, "10.81.0.10:443")
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

// revoke lets a connection begin and publishes a document without its flow.
func (w *world) revoke(revision int64) time.Duration {
	w.t.Helper()
	w.orch.Publish(document(revision, bootFlow(20*time.Second)))
	w.orch.WaitReport("flow", live(revision, "r1/boot"))
	c := w.passes(w.vm, "10.81.0.10:443")
	defer c.Close()
	for range 10 {
		if err := ping(c, still); err != nil {
			w.t.Fatalf("before the revocation: %v", err)
		}
	}
	last := make(chan time.Time)
	go func() { last <- lastEcho(c) }()
	revoked := time.Now()
	w.orch.Publish(document(revision + 1))
	took := max(0, (<-last).Sub(revoked))
	w.orch.WaitReport("withdrawn", live(revision+1))
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
