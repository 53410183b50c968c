package main

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"foothold/internal/command"
	"foothold/protocol/api"
)

// TestMain measures in the place of main when phaseChanges runs this binary again.
func TestMain(m *testing.M) {
	if os.Getenv(insideNamespace) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

func TestMedian(t *testing.T) {
	for _, c := range []struct {
		in   []float64
		want float64
	}{{nil, 0}, {[]float64{3}, 3}, {[]float64{9, 1, 5}, 5}, {[]float64{4, 1, 3, 2}, 2.5}} {
		if got := median(c.in); got != c.want {
			t.Errorf("%v: %v, want %v", c.in, got, c.want)
		}
	}
}

func TestSummaryComparesWithThePlainBoot(t *testing.T) {
	began := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC)
	at := func(s int) time.Time { return began.Add(time.Duration(s) * time.Second) }
	vm := api.VM{TPMHeld: 0.5, Phases: []api.Phase{
		{Name: "reserved", Start: at(0), End: at(1), Seconds: 1},
		{Name: "booting", Start: at(1), End: at(15), Seconds: 14},
		{Name: "unlocking", Start: at(15), End: at(18), Seconds: 3},
		{Name: "connecting", Start: at(18), End: at(28), Seconds: 10},
		{Name: "computing", Start: at(28)},
		{Name: "ready", Start: at(28), End: at(30), Seconds: 2},
	}}
	by := map[string]Result{}
	for _, r := range summary([]api.VM{vm, vm, vm}, 10) {
		by[r.Name] = r
	}
	ready, ratio := by["create to ready, p50"], by["create to ready, times the plain boot"]
	if ready.Value != 30 || ready.Ratio != 3 || *ready.Met || ratio.Value != 3 || *ratio.Met {
		t.Errorf("ready %+v, ratio %+v", ready, ratio)
	}
	if by["create to computing, p50"].Value != 28 || by["phase booting, p50"].Value != 14 || !*by["TPM held for a VM, p50"].Met {
		t.Errorf("results %+v", by)
	}
}

func TestInProcessMeasuresRealWork(t *testing.T) {
	unique, err := uniquePart()
	if err != nil {
		t.Fatal(err)
	}
	spends, err := tokenSpends(t.Context(), filepath.Join(t.TempDir(), "ledger.db"))
	if err != nil {
		t.Fatal(err)
	}
	results := append(unique, spends...)
	for _, r := range results {
		t.Logf("%s: %v %s", r.Name, r.Value, r.Unit)
		if r.Value <= 0 {
			t.Errorf("%s is %v", r.Name, r.Value)
		}
	}
}

func TestPhaseChangesAreMeasuredBesideNft(t *testing.T) {
	if _, err := command.Find("nft"); err != nil {
		t.Fatal(err) // the preflight installs it
	}
	results, err := phaseChanges(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	if len(results) != 2 {
		t.Fatalf("results %+v", results)
	}
	for _, r := range results {
		t.Logf("%s: %v %s, nft %v", r.Name, r.Value, r.Unit, r.PeerValue)
		if r.Value <= 0 || r.PeerValue <= 0 {
			t.Errorf("%+v", r)
		}
	}
}
