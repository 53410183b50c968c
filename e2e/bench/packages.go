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

// revocationRounds are enough for a p99.
const revocationRounds = 100

// documents is the gateway's and the firewall's part of a revocation, without VMs: from the
// signed document that does not name the VM to the last byte that comes back.
func documents(ctx context.Context, o options) (results []Result, err error) {
	for _, c := range []struct{ pkg, test, what string }{
		{"foothold/dmz/gateway", "TestRevocationEndsTheTunnel", "through the gateway's tunnel"},
		{"foothold/dmz/firewall", "TestRevocationEndsConnections", "through the firewall"},
	} {
		var times []float64
		if err := byTest(ctx, o, c.pkg, c.test, revocationRounds, &times); err != nil {
			return nil, err
		}
		name := fmt.Sprintf("from a document without the VM to the last byte %s, p99 of %d", c.what, len(times))
		results = append(results, atMost(name, p99(times), "ms", aimRevoked))
	}
	return results, nil
}
