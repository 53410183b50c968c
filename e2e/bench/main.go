// Command bench measures Foothold on this machine: it prints a table and writes
// bench.json, an array of [Result].
//
// It brings a lab of its own up, creates VMs one after the other, and boots the same
// kernel and root plainly in between - unencrypted, unattested, without a tunnel, under
// the same QEMU settings, to the same workload's first answer - so that both see the
// same noise. In the same lab it kills the daemons. What needs no VM is measured in this
// process, rules in namespaces of their own. -only takes a part of it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"runtime/pprof"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"foothold/internal/durable"
)

// Result is one measurement.
type Result struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
	// Aim is what we want at most (at least, for a rate); absent where it is only recorded.
	Aim *float64 `json:"aim"`
	Met *bool    `json:"met"`
	// Peer is what else was measured in the same run, Ratio is Value over PeerValue.
	Peer      string  `json:"peer,omitempty"`
	PeerValue float64 `json:"peer_value,omitempty"`
	Ratio     float64 `json:"ratio,omitempty"`
}

// Aims, and where they come from.
const (
	aimRatio     = 2.75  // times the plain boot, under emulation on two processors
	aimCreate    = 25.0  // seconds from create to ready, on an idle machine
	aimUnique    = 10.0  // ms: it is made while a VM waits
	aimSpends    = 1000  // a second, durable; a boot storm of 10,000 VMs in half a minute
	aimLoader    = 8.0   // MiB; it is sent nowhere but measured and unpacked at each start
	aimTPMHeld   = 2000. // ms; VMs that boot at once queue for it
	aimRestart   = 1000. // ms; half of what a VM on its way waits for one answer before it tries again
	aimPhase     = 1.0   // ms; a VM waits for it at each phase, whatever their number
	aimBoots     = 300.  // a second, on two processors with clients and TPMs; 10,000 VMs in half a minute
	aimDeliver   = 0.8   // times what nginx delivers of the same bytes
	aimVerdicts  = 2500. // a second, on two processors with their clients
	aimVerdict50 = 1.    // ms
	aimVerdict99 = 5.    // ms
	aimFar       = 0.9   // times the rate near by: distance costs time, not work
	aimRevoked   = 1000. // ms, p99; what a revoked VM sends so long after is no longer asked for, nor one whose host was refused
)

// measure is what can be measured by itself.
type measure struct {
	name string
	run  func(context.Context, options) ([]Result, error)
}

// measures are taken in this order, after those in the lab.
var measures = []measure{
	{"unique", func(context.Context, options) ([]Result, error) { return uniquePart() }},
	{"spends", func(ctx context.Context, o options) ([]Result, error) {
		return tokenSpends(ctx, filepath.Join(o.work, "ledger.db"))
	}},
	{"phases", func(ctx context.Context, _ options) ([]Result, error) { return phaseChanges(ctx, phaseRounds) }},
	{"documents", documents},
	{"requests", bootRequests},
	{"delivery", delivery},
	{"verifications", verifications},
	{"loader", func(_ context.Context, o options) ([]Result, error) { return loaderSize(o.bin) }},
}

// options are what the command line says, and the run's own folder.
type options struct {
	bin, build, work string
	vms, patience    int
	only             *regexp.Regexp
}

func (o options) wants(name string) bool { return o.only.MatchString(name) }

func main() {
	act := run
	switch {
	case os.Getenv(insideNamespace) != "":
		act = func() error { return measureInside(context.Background()) }
	case os.Getenv(insidePlace) != "":
		act = func() error { return askFromPlace(os.Stdin, os.Stdout) }
	}
	if err := act(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run() error {
	bin := flag.String("bin", "bin", "folder of the binaries")
	build := flag.String("build", "build", "folder of what is slow to make")
	out := flag.String("out", "bench.json", "file of the results")
	patience := flag.Int("patience", 1, "multiply the time limit of each phase in the lab by `N`, on a busy machine")
	vms := flag.Int("vms", 5, "number of VMs, and of plain boots")
	only := flag.String("only", "", "regular `expression`: measure only what it matches, of "+strings.Join(names(), ", "))
	profile := flag.String("cpuprofile", "", "`file` for a processor profile of this process, in which the boot server runs for requests and delivery")
	flag.Parse()
	if *vms < 1 {
		return fmt.Errorf("-vms %d: at least one", *vms)
	}
	o := options{bin: *bin, build: *build, vms: *vms, patience: *patience}
	var err error
	if o.only, err = regexp.Compile(*only); err != nil {
		return fmt.Errorf("-only: %w", err)
	}
	if !slices.ContainsFunc(names(), o.wants) {
		return fmt.Errorf("-only %s matches none of %s", *only, strings.Join(names(), ", "))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if o.work, err = os.MkdirTemp("", "foothold-bench-"); err != nil {
		return err
	}
	defer os.RemoveAll(o.work)
	stopped, err := observe(o.work, *profile)
	if err != nil {
		return err
	}
	defer stopped()
	results, failed := take(ctx, o)
	data, err := json.MarshalIndent(results, "", "  ")
	if err == nil && len(results) > 0 {
		print(results)
		err = durable.WriteFile(*out, append(data, '\n'), 0o644)
	}
	return errors.Join(failed, err)
}

// observe has the daemons that run in this process log as they do in their own, JSON to a
// file, and the processor's time written down where that is asked for.
func observe(work, profile string) (stop func(), err error) {
	logs, err := os.Create(filepath.Join(work, "log"))
	if err != nil {
		return nil, err
	}
	slog.SetDefault(slog.New(slog.NewJSONHandler(logs, nil)))
	if profile == "" {
		return func() { logs.Close() }, nil
	}
	f, err := os.Create(profile)
	if err != nil {
		return nil, err
	}
	return func() { pprof.StopCPUProfile(); f.Close(); logs.Close() }, pprof.StartCPUProfile(f)
}

// names lists everything that can be measured.
func names() []string {
	list := slices.Clone(labMeasures)
	for _, m := range measures {
		list = append(list, m.name)
	}
	return list
}

// take takes the wanted measurements, those outside the lab when it is down. One that fails
// costs none of the others.
func take(ctx context.Context, o options) (results []Result, err error) {
	if slices.ContainsFunc(labMeasures, o.wants) {
		results, err = measureInLab(ctx, o)
	}
	for _, m := range measures {
		if !o.wants(m.name) || ctx.Err() != nil {
			continue
		}
		say("measuring %s", m.name)
		more, failed := m.run(ctx, o)
		if failed != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", m.name, failed))
			continue
		}
		results = append(results, more...)
	}
	return results, err
}

// atMost and atLeast make results with an aim.
func atMost(name string, value float64, unit string, aim float64) Result {
	met := value <= aim
	return Result{Name: name, Value: value, Unit: unit, Aim: &aim, Met: &met}
}

func atLeast(name string, value float64, unit string, aim float64) Result {
	met := value >= aim
	return Result{Name: name, Value: value, Unit: unit, Aim: &aim, Met: &met}
}

// against adds the peer of the same run.
func (r Result) against(peer string, value float64) Result {
	r.Peer, r.PeerValue = peer, value
	if value > 0 {
		r.Ratio = round(r.Value / value)
	}
	return r
}

func print(results []Result) {
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "MEASURE\tVALUE\tUNIT\tAIM\tMET\tPEER\tRATIO")
	for _, r := range results {
		aim, met, peer, ratio := "-", "-", "-", "-"
		if r.Aim != nil {
			aim, met = number(*r.Aim), map[bool]string{true: "yes", false: "no"}[*r.Met]
		}
		if r.Peer != "" {
			peer, ratio = fmt.Sprintf("%s %s", r.Peer, number(r.PeerValue)), number(r.Ratio)
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", r.Name, number(r.Value), r.Unit, aim, met, peer, ratio)
	}
	w.Flush()
}

func number(v float64) string { return strconv.FormatFloat(round(v), 'f', -1, 64) }

// round keeps three decimals.
func round(v float64) float64 { return float64(int64(v*1000+0.5)) / 1000 }

// median of the values; the mean of the middle two for an even number.
func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	v := slices.Sorted(slices.Values(values))
	return round((v[(len(v)-1)/2] + v[len(v)/2]) / 2)
}

func loaderSize(bin string) ([]Result, error) {
	info, err := os.Stat(filepath.Join(bin, "foothold-loader"))
	if err != nil {
		return nil, fmt.Errorf("measure loader: %w", err)
	}
	return []Result{atMost("loader size", float64(info.Size())/(1<<20), "MiB", aimLoader)}, nil
}

func since(t time.Time) float64 { return time.Since(t).Seconds() }
