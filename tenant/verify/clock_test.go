package verify

import (
	"encoding/json"
	"slices"
	"testing"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/inventory"
)

// TestClocksOfReplacedKeys: a host whose attestation key was replaced begins anew, and when
// the inventory names the first key again, that key's clock is known: nothing rolls back.
func TestClocksOfReplacedKeys(t *testing.T) {
	first := newSoft(t)
	a := Clock{AIK: digest.Of(first.host.AIK), Resets: 7, Restarts: 1, Millis: 1 << 30}
	second := newSoft(t) // another TPM under the same name
	b := Clock{AIK: digest.Of(second.host.AIK), Resets: 2, Millis: 5}
	if got := first.v.Last("host-1", nil); got != (Clock{}) {
		t.Errorf("never quoted: %+v", got)
	}
	clocks, err := ParseClocks(must(json.Marshal(a))) // as it was stored when a host had one
	first.must(err)
	if got := second.v.Last("host-1", clocks); got != (Clock{}) {
		t.Errorf("the new key is held against the old one's clock: %+v", got)
	}
	if got := second.v.Last("host-9", clocks); got != (Clock{}) {
		t.Errorf("a host that is not known: %+v", got)
	}
	clocks = clocks.Keep(b)
	if clocks, err = ParseClocks(must(json.Marshal(clocks))); err != nil || len(clocks) != 2 {
		t.Fatalf("%v %v", clocks, err)
	}
	if got := second.v.Last("host-1", clocks); got != b {
		t.Errorf("the new key's clock: %+v", got)
	}
	old := a
	old.Resets--
	last := first.v.Last("host-1", clocks)
	if _, err := last.follow(old, evidence.RoleBoot); err == nil {
		t.Error("the first key, named again, may roll back")
	}
	if got := first.v.Last("host-1", clocks.Keep(old)); got != a {
		t.Errorf("an older quote turned the clock back: %+v", got)
	}
	later := a
	later.Millis++
	if kept := clocks.Keep(later); first.v.Last("host-1", kept) != later || first.v.Last("host-1", clocks) != a || len(kept) != 2 {
		t.Errorf("after a later quote: %+v", kept)
	}
	if _, err := ParseClocks([]byte(`[{"aik":`)); err == nil {
		t.Error("half a clock is one")
	}
	// One whose key is malformed is known by none.
	broken := examineHost(inventory.Host{Name: "host-1"}, first.makers(), softTime)
	v := &Verifier{inventory: &Inventory{hosts: map[string]*hostKeys{"host-1": broken}}}
	if got := v.Last("host-1", slices.Concat(clocks, Clocks{{Resets: 1}})); got != (Clock{}) {
		t.Errorf("without a key: %+v", got)
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
