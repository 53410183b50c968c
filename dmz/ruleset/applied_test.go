package ruleset

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// drawFlows makes flows of which many share elements, ids or both.
func drawFlows(t *rapid.T) []Flow {
	one := rapid.Custom(func(t *rapid.T) Flow {
		f := Flow{ID: fmt.Sprint(rapid.IntRange(0, 9).Draw(t, "id")), Proto: "tcp", Port: rapid.IntRange(1, 2).Draw(t, "port"),
			From: Endpoint{Prefix: prefix("10.82.0.10/32")}, To: Endpoint{Prefix: prefix("10.81.0.0/24")},
			Until: time.Duration(rapid.IntRange(0, 4).Draw(t, "until")) * time.Minute}
		if rapid.Bool().Draw(t, "vm") {
			f.From.MAC = mac(vmMAC)
		}
		return f
	})
	return rapid.SliceOfN(one, 0, 12).Draw(t, "flows")
}

// TestStepsComeToTheSame: however many documents came before, each element is wanted as
// if the last one were the first, and what was touched is all that differs.
func TestStepsComeToTheSame(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		now := 90 * time.Second
		stepwise := applied{owners: map[element][]want{}}
		for range rapid.IntRange(1, 6).Draw(t, "documents") {
			flows := drawFlows(t)
			if rapid.Bool().Draw(t, "akin") { // as most documents are
				flows = slices.Clone(stepwise.flows)
				flows = slices.Insert(flows, rapid.IntRange(0, len(flows)).Draw(t, "at"), drawFlows(t)...)
			}
			before := ends(&stepwise, now)
			touched, undo, err := stepwise.become(flows)
			if err != nil {
				t.Fatal(err)
			}
			if rapid.Bool().Draw(t, "fails") {
				if undo(); !maps.Equal(ends(&stepwise, now), before) {
					t.Fatal("not taken back")
				}
				continue
			}
			atOnce := applied{owners: map[element][]want{}}
			if _, _, err := atOnce.become(flows); err != nil {
				t.Fatal(err)
			}
			got, want := ends(&stepwise, now), ends(&atOnce, now)
			for e := range both(got, want) {
				if got[e] != want[e] {
					t.Fatalf("%s %x is wanted until %s, not %s", e.shape.name(), e.key, got[e], want[e])
				}
			}
			for e := range both(got, before) {
				if got[e] != before[e] && !slices.Contains(touched, e) {
					t.Fatalf("%s %x changed untouched", e.shape.name(), e.key)
				}
			}
		}
	})
}

// ends is when each element ends; -1 for never.
func ends(a *applied, now time.Duration) map[element]time.Duration {
	out := map[element]time.Duration{}
	for e, w := range a.wants(now) {
		out[e] = w.until
		if w.until == Forever {
			out[e] = -1
		}
	}
	return out
}

func both(a, b map[element]time.Duration) map[element]bool {
	out := map[element]bool{}
	for _, m := range []map[element]time.Duration{a, b} {
		for e := range m {
			out[e] = true
		}
	}
	return out
}

// Ends that creep on by less than the slack reach the kernel in the end.
func TestEndsDoNotCreepAway(t *testing.T) {
	a := applied{owners: map[element][]want{}}
	f := boot("boot", time.Minute)
	told := time.Duration(0)
	for range 10 {
		touched, _, err := a.become([]Flow{f})
		if err != nil {
			t.Fatal(err)
		}
		if len(touched) > 0 {
			told = f.Until
		}
		if f.Until-told >= slack {
			t.Fatalf("the kernel was told %s, wanted is %s", told, f.Until)
		}
		f.Until += slack / 2
	}
}

func TestRefusedFlowsChangeNothing(t *testing.T) {
	a := applied{owners: map[element][]want{}}
	if _, _, err := a.become([]Flow{boot("boot", Forever)}); err != nil {
		t.Fatal(err)
	}
	bad := ssh(Forever)
	bad.Port = 0
	if _, _, err := a.become([]Flow{bad}); err == nil {
		t.Fatal("accepted")
	}
	if len(a.flows) != 1 || len(a.owners) != 2 {
		t.Errorf("half taken: %v", a.flows)
	}
}

// What the kernel holds otherwise is an error, unless it ends just now.
func TestDeviation(t *testing.T) {
	now := time.Minute
	table := New(Config{Now: func() time.Duration { return now }})
	touched, _, err := table.applied.become([]Flow{boot("boot", 2*time.Minute)})
	if err != nil {
		t.Fatal(err)
	}
	good := func() map[element]held {
		return map[element]held{touched[0]: {id: "boot", until: 2 * time.Minute}, touched[1]: {id: "boot", until: 2 * time.Minute}}
	}
	other := boot("other", Forever).elements(func(netip.Addr) bool { return false })[0]
	other.key += "x"
	for name, c := range map[string]struct {
		change func(map[element]held)
		ok     bool
		late   time.Duration
	}{
		"nothing":     {func(map[element]held) {}, true, 0},
		"missing":     {func(h map[element]held) { delete(h, touched[0]) }, false, 0},
		"other end":   {func(h map[element]held) { h[touched[0]] = held{id: "boot", until: 3 * time.Minute} }, false, 0},
		"no end":      {func(h map[element]held) { h[touched[0]] = held{id: "boot"} }, false, 0},
		"other id":    {func(h map[element]held) { h[touched[0]] = held{id: "x", until: 2 * time.Minute} }, false, 0},
		"one more":    {func(h map[element]held) { h[other] = held{id: "x", until: 2 * time.Minute} }, false, 0},
		"ending more": {func(h map[element]held) { h[other] = held{id: "x", until: now + slack/2} }, true, 0},
		"late":        {func(h map[element]held) { h[touched[0]] = held{id: "boot", until: 2*time.Minute + 3*slack} }, true, 4 * slack},
		"too late":    {func(h map[element]held) { h[touched[0]] = held{id: "boot", until: 2*time.Minute + 3*slack} }, false, slack},
	} {
		have := good()
		c.change(have)
		if err := table.deviation(touched, have, c.late); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}
