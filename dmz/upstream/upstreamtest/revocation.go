package upstreamtest

import (
	"encoding/json"
	"net"
	"os"
	"strconv"
	"testing"
	"time"

	"foothold/internal/nstest"
)

// Variables by which e2e/bench asks for more rounds, and for their times.
const (
	revocationRounds = "FOOTHOLD_BENCH_ROUNDS"
	revocationOut    = "FOOTHOLD_BENCH_OUT" // file: JSON list of ms
)

// revokedWithin is the most that may pass between a document that permits a connection no
// more and its last packet, also on a busy machine: a daemon stores the document durably
// first, and disks can be busy too.
const revokedWithin = 3 * time.Second

// still is how long an echo is waited for: one that has not come by then will not come.
const still = 250 * time.Millisecond

// Revocations ends connections to an echo under traffic, over and over, and looks when the
// last packet came back. Each round, permit publishes documents up to the revision that it
// is given, and connects; then revoke publishes the one after it, and waits until it holds.
func Revocations(t *testing.T, permit func(revision int64) net.Conn, revoke func(revision int64)) {
	t.Helper()
	rounds := 3
	if text := os.Getenv(revocationRounds); text != "" {
		var err error
		if rounds, err = strconv.Atoi(text); err != nil || rounds < 1 {
			t.Fatalf("%s=%s: a number of rounds", revocationRounds, text)
		}
	}
	var times []float64
	for i := range rounds {
		revision := int64(2*i + 1)
		took := passedOn(t, permit(revision), func() { revoke(revision + 1) })
		if took > revokedWithin {
			t.Errorf("round %d: packets passed for %s", i+1, took)
		}
		times = append(times, float64(took.Microseconds())/1000)
	}
	t.Logf("ms: %v", times)
	if file := os.Getenv(revocationOut); file != "" {
		data, err := json.Marshal(times)
		must(t, err)
		must(t, os.WriteFile(file, data, 0o600))
	}
}

// passedOn is how long traffic of a connection passes on when it is revoked.
func passedOn(t *testing.T, c net.Conn, revoke func()) time.Duration {
	t.Helper()
	defer c.Close()
	for range 10 {
		if err := nstest.Ping(c, still); err != nil {
			t.Fatalf("before the revocation: %v", err)
		}
	}
	last := make(chan time.Time)
	go func() { last <- lastEcho(c) }()
	revoked := time.Now()
	revoke()
	return max(0, (<-last).Sub(revoked))
}

// lastEcho sends one byte after the other until none comes back, or it is clear that they
// come back for too long.
func lastEcho(c net.Conn) time.Time {
	last := time.Now()
	for limit := last.Add(2 * revokedWithin); nstest.Ping(c, still) == nil && last.Before(limit); {
		last = time.Now()
	}
	return last
}
