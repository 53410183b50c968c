package reservation

import (
	"testing"
	"time"
)

// TestMoves states the legal moves a second time, from the design's sentence.
func TestMoves(t *testing.T) {
	legal := map[[2]Phase]bool{
		{Reserved, Booting}: true, {Booting, Unlocking}: true, {Unlocking, Connecting}: true,
		{Connecting, Computing}: true, {Stopped, Booting}: true,
	}
	for _, p := range []Phase{Booting, Unlocking, Connecting, Computing} {
		legal[[2]Phase{p, Stopped}] = true
	}
	for _, p := range []Phase{Reserved, Booting, Unlocking, Connecting, Computing, Stopped} {
		legal[[2]Phase{p, Released}] = true
		legal[[2]Phase{p, Aborted}] = true
	}
	for _, from := range Phases() {
		for _, to := range Phases() {
			if got := CanMove(from, to); got != legal[[2]Phase{from, to}] {
				t.Errorf("%s → %s: %v", from, to, got)
			}
		}
	}
	if !Phase("nonsense").Terminal() || !Released.Terminal() || !Aborted.Terminal() || Computing.Terminal() {
		t.Error("terminal phases are wrong")
	}
}

func TestParse(t *testing.T) {
	for _, p := range Phases() {
		if got, err := Parse(string(p)); err != nil || got != p {
			t.Errorf("%s: %v %v", p, got, err)
		}
	}
	for _, bad := range []string{"", "Reserved", "create", "booting "} {
		if _, err := Parse(bad); err == nil {
			t.Errorf("%q was accepted", bad)
		}
	}
}

func TestLimits(t *testing.T) {
	if err := Default().Validate(); err != nil {
		t.Fatal(err)
	}
	for _, p := range Phases() {
		if (p.Terminal() || p == Stopped) != (Default().Of(p) == 0) {
			t.Errorf("%s: limit %v", p, Default().Of(p))
		}
		if p.Terminal() != (Awaited(p) == "") {
			t.Errorf("%s: awaited %q", p, Awaited(p))
		}
	}
	l := Default()
	l.Connecting = 0
	if l.Validate() == nil {
		t.Error("a missing limit was accepted")
	}
	l.Connecting = 2 * time.Hour
	if l.Validate() == nil {
		t.Error("an unreasonable limit was accepted")
	}
}
