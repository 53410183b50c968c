package tally

import (
	"context"
	"maps"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// TestAFloodStaysSmall: kinds beyond the most are counted together, none is lost, and what is
// told is counted anew.
func TestAFloodStaysSmall(t *testing.T) {
	tally := New(3, func(k int) int { return -(k % 2) })
	var all sync.WaitGroup
	for k := range 100 {
		all.Go(func() {
			for range 10 {
				tally.Count(k + 2)
			}
		})
	}
	all.Wait()
	counts, sum := tally.Take(), 0
	for _, n := range counts {
		sum += n
	}
	if len(counts) > 5 || sum != 1000 {
		t.Errorf("%d in %d kinds", sum, len(counts))
	}
	if again := tally.Take(); len(again) != 0 {
		t.Errorf("taken twice: %v", again)
	}
}

func TestRunTellsUntilItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, end := context.WithCancel(t.Context())
		tally := New(2, func(string) string { return "others" })
		told := map[string]int{}
		var running sync.WaitGroup
		running.Go(func() { tally.Run(ctx, time.Second, func(kind string, n int) { told[kind] += n }) })
		for _, kind := range []string{"a", "b", "a", "c"} {
			tally.Count(kind)
		}
		time.Sleep(1500 * time.Millisecond)
		tally.Count("d")
		time.Sleep(time.Second)
		end()
		running.Wait()
		if want := map[string]int{"a": 2, "b": 1, "others": 1, "d": 1}; !maps.Equal(told, want) {
			t.Errorf("told %v, want %v", told, want)
		}
	})
}
