package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
)

// Variables of the tests that measure for us: how often, and the file that takes the
// values, a JSON document.
const (
	packageRounds = "FOOTHOLD_BENCH_ROUNDS"
	packageOut    = "FOOTHOLD_BENCH_OUT"
)

// byTest lets a package's test measure, where what is around a daemon - an orchestrator
// that the measurement steers, networks of its own - is that test's.
func byTest(ctx context.Context, o options, pkg, test string, rounds int, values any) error {
	out := filepath.Join(o.work, test+".json")
	cmd := exec.CommandContext(ctx, "go", "test", "-count=1", "-run", "^"+test+"$", pkg)
	cmd.Env = append(os.Environ(), packageRounds+"="+strconv.Itoa(rounds), packageOut+"="+out)
	if said, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("measure by %s of %s: %w\n%s", test, pkg, err, strings.TrimSpace(string(said)))
	}
	data, err := os.ReadFile(out)
	if err != nil {
		return fmt.Errorf("measure by %s of %s: %w", test, pkg, err)
	}
	if err := json.Unmarshal(data, values); err != nil {
		return fmt.Errorf("measure by %s of %s: %w", test, pkg, err)
	}
	return nil
}

// tunnelRounds are enough for a p99.
const tunnelRounds = 100

// tunnels is the gateway's part of a revocation, without VMs: from the signed document
// without the peer to the last byte that comes back through the tunnel.
func tunnels(ctx context.Context, o options) ([]Result, error) {
	var times []float64
	if err := byTest(ctx, o, "foothold/dmz/gateway", "TestRevocationEndsTheTunnel", tunnelRounds, &times); err != nil {
		return nil, err
	}
	name := fmt.Sprintf("from a document without the peer to the last byte through the tunnel, p99 of %d", len(times))
	return []Result{atMost(name, p99(times), "ms", aimRevoked)}, nil
}
