package ruleset

import (
	"bytes"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"
)

// applied is what the table should hold: the flows, and for each element the flows
// that need it.
type applied struct {
	flows  []Flow
	owners map[element][]want
	self   map[netip.Addr]bool // own addresses
}

// want is what an element should be for one flow.
type want struct {
	id    string
	until time.Duration
}

// become takes new flows in the place of the old ones. It returns the elements that this
// may change, and what takes it back. With an error nothing is changed.
//
// Documents name what stays in the same order, so what the two lists share at both
// ends is passed over. That is the one part whose cost grows with the number of flows,
// by some 20 ns each.
func (a *applied) become(flows []Flow) (touched []element, undo func(), err error) {
	old := a.flows
	begin := 0
	for begin < min(len(old), len(flows)) && old[begin].same(&flows[begin]) {
		begin++
	}
	tail := 0
	for tail < min(len(old), len(flows))-begin && old[len(old)-1-tail].same(&flows[len(flows)-1-tail]) {
		tail++
	}
	middle, come, gone := merge(old[begin:len(old)-tail], flows[begin:len(flows)-tail])
	for _, f := range come {
		if err := f.check(); err != nil {
			return nil, nil, fmt.Errorf("flow %q: %w", f.ID, err)
		}
	}
	seen := map[element]bool{}
	for _, f := range gone {
		for _, e := range f.elements(a.isSelf) {
			a.disown(e, want{f.ID, f.Until})
			seen[e] = true
		}
	}
	for _, f := range come {
		for _, e := range f.elements(a.isSelf) {
			a.owners[e] = append(a.owners[e], want{f.ID, f.Until})
			seen[e] = true
		}
	}
	before := slices.Clone(old[begin : len(old)-tail])
	a.flows = slices.Replace(old, begin, len(old)-tail, middle...)
	undo = func() {
		_, _, _ = a.become(slices.Replace(slices.Clone(a.flows), begin, begin+len(middle), before...)) // they were good before
	}
	return slices.Collect(maps.Keys(seen)), undo, nil
}

// merge sorts out which flows come and which are gone. One that stays is taken from
// old, so that ends which move by less than slack each time cannot run away from the
// kernel's.
func merge(old, flows []Flow) (merged, come, gone []Flow) {
	was := make(map[string][]Flow, len(old))
	for _, f := range old {
		was[f.ID] = append(was[f.ID], f)
	}
	for _, f := range flows {
		i := slices.IndexFunc(was[f.ID], func(o Flow) bool { return o.same(&f) })
		if i < 0 {
			come = append(come, f)
		} else {
			f = was[f.ID][i]
			was[f.ID] = slices.Delete(was[f.ID], i, i+1)
		}
		merged = append(merged, f)
	}
	for _, list := range was {
		gone = append(gone, list...)
	}
	return merged, come, gone
}

// same: the kernel need not be told of the difference.
func (f *Flow) same(g *Flow) bool {
	return f.ID == g.ID && sameEnd(f.Until, g.Until) && f.Port == g.Port && f.Proto == g.Proto && f.Reservation == g.Reservation &&
		f.From.Prefix == g.From.Prefix && f.To.Prefix == g.To.Prefix && bytes.Equal(f.From.MAC, g.From.MAC) && bytes.Equal(f.To.MAC, g.To.MAC)
}

func sameEnd(a, b time.Duration) bool {
	return (a == Forever) == (b == Forever) && (a-b).Abs() < slack
}

func (a *applied) isSelf(addr netip.Addr) bool { return a.self[addr] }

func (a *applied) disown(e element, w want) {
	left := a.owners[e]
	if i := slices.Index(left, w); i >= 0 {
		left = slices.Delete(left, i, i+1)
	}
	if len(left) == 0 {
		delete(a.owners, e)
		return
	}
	a.owners[e] = left
}

// want is the latest end of all flows that share an element; those that are over at
// now do not count.
func (a *applied) want(e element, now time.Duration) (best want, ok bool) {
	for _, w := range a.owners[e] {
		if w.until != Forever && w.until-now < minLife {
			continue
		}
		if !ok || best.until != Forever && (w.until == Forever || w.until > best.until) {
			best, ok = w, true
		}
	}
	return best, ok
}

// all lists every element that a flow needs.
func (a *applied) all() []element {
	return slices.Collect(maps.Keys(a.owners))
}

// wants is what all elements should be.
func (a *applied) wants(now time.Duration) map[element]want {
	out := make(map[element]want, len(a.owners))
	for e := range a.owners {
		if w, ok := a.want(e, now); ok {
			out[e] = w
		}
	}
	return out
}
