package api

import (
	"encoding/json"
	"testing"
	"time"
)

// TestPhaseAlwaysHasItsFields: tools read end of every phase, one under way included.
func TestPhaseAlwaysHasItsFields(t *testing.T) {
	start := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	for _, p := range []Phase{
		{Name: "booting", Start: start, End: start.Add(2 * time.Second), Seconds: 2},
		{Name: "computing", Start: start, Seconds: 7.5},
	} {
		data, err := json.Marshal(VM{Phases: []Phase{p}})
		if err != nil {
			t.Fatal(err)
		}
		var raw struct{ Phases []map[string]any }
		var back VM
		if err := json.Unmarshal(data, &raw); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(data, &back); err != nil {
			t.Fatal(err)
		}
		end, ok := raw.Phases[0]["end"]
		if len(raw.Phases[0]) != 4 || !ok || (end == nil) != p.End.IsZero() {
			t.Errorf("%s", data)
		}
		if back.Phases[0] != p {
			t.Errorf("%+v came back as %+v", p, back.Phases[0])
		}
	}
}
