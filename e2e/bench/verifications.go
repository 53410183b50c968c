package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"foothold/e2e/bench/verdicts"
)

// Sizes of the measurement of verdicts.
const (
	verdictRuns  = 3    // of each rate; the median counts
	verdictCalls = 1200 // of a run
	// verdictClients keep both processors busy.
	verdictClients = 16
	// farClients have as many calls under way as the rate fills the longer way with, and
	// more; farCalls are some for each. The software TPM takes some 6 ms to make a quote.
	farClients = 1200
	farCalls   = 4000
	keptRuns   = 500
)

const (
	nearTrip = 4 * time.Millisecond
	farTrip  = 150 * time.Millisecond
)

// verifications is how many quotes a second are judged (package verdicts), with what the
// judging alone costs, and how long the host's TPM is held for each. Clients share this
// machine's processors with the server; the processor's time for each is theirs too.
func verifications(ctx context.Context, o options) (results []Result, err error) {
	dir := filepath.Join(o.work, "verdicts")
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	e, err := verdicts.Make(ctx, dir, farCalls)
	if err != nil {
		return nil, err
	}
	theirs, err := e.GoAttestation()
	if err != nil {
		return nil, err
	}
	bare, err := e.Bare()
	if err != nil {
		return nil, err
	}
	rates, cpu, alone := map[string][]float64{}, map[string][]float64{}, map[string][]float64{}
	judges := map[string]verdicts.Judge{"ours": e.Ours(), "go-attestation": theirs, "bare": bare}
	for range verdictRuns { // in turn, so that all see the same noise
		for name, judge := range judges {
			out, err := e.Run(ctx, judge, verdicts.Load{Calls: verdictCalls, Clients: verdictClients})
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			each, err := e.Alone(judge, verdictCalls)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			rates[name], cpu[name], alone[name] = append(rates[name], out.Rate), append(cpu[name], micros(out.CPU)), append(alone[name], micros(each))
		}
	}
	rate := median(rates["ours"])
	results = []Result{
		atLeast("verifications, over mutual TLS, nonce spent", rate, "per second", aimVerdicts).against("go-attestation", median(rates["go-attestation"])),
		Result{Name: "verifications, processor time of server and clients", Value: median(cpu["ours"]), Unit: "µs"}.against("go-attestation", median(cpu["go-attestation"])),
		Result{Name: "verifications, of the limit", Value: rate, Unit: "per second"}.against("bare signature and hashing", median(rates["bare"])),
		Result{Name: "a verdict alone, processor time", Value: median(alone["ours"]), Unit: "µs"}.against("go-attestation", median(alone["go-attestation"])),
		Result{Name: "a verdict alone, of the limit", Value: median(alone["ours"]), Unit: "µs"}.against("bare signature and hashing", median(alone["bare"])),
	}
	var p50, p99 []float64
	for range verdictRuns {
		paced, err := e.Run(ctx, judges["ours"], verdicts.Load{Clients: 4 * verdictClients, Rate: rate / 2})
		if err != nil {
			return nil, err
		}
		p50, p99 = append(p50, micros(paced.Percentile(50))/1000), append(p99, micros(paced.Percentile(99))/1000)
	}
	results = append(results,
		atMost("verification at half that rate, p50", median(p50), "ms", aimVerdict50),
		atMost("verification at half that rate, p99", median(p99), "ms", aimVerdict99))
	far, err := distances(ctx, e, judges["ours"])
	if err != nil {
		return nil, err
	}
	kept, err := e.Kept(ctx, keptRuns)
	if err != nil {
		return nil, err
	}
	return append(results, far, Result{Name: "a verdict's evidence, stored", Value: micros(kept) / 1000, Unit: "ms"},
		Result{Name: "TPM held for a boot quote", Value: millis(e.Held), Unit: "ms"}.against("TPM2_Quote alone", millis(e.Own))), nil
}

// distances compares the rates near and far.
func distances(ctx context.Context, e *verdicts.Evidence, judge verdicts.Judge) (Result, error) {
	var near, far []float64
	for range verdictRuns {
		for trip, rates := range map[time.Duration]*[]float64{nearTrip: &near, farTrip: &far} {
			out, err := e.Run(ctx, judge, verdicts.Load{Clients: farClients, RoundTrip: trip})
			if err != nil {
				return Result{}, err
			}
			*rates = append(*rates, out.Rate)
		}
	}
	return atLeast("verifications at 150 ms round trip, of those at 4 ms", round(median(far)/median(near)), "times", aimFar).against("at 4 ms, per second", median(near)), nil
}

func micros(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1000 }

func millis(list []time.Duration) float64 {
	var values []float64
	for _, d := range list {
		values = append(values, micros(d)/1000)
	}
	return median(values)
}
