package orchestrator

import (
	"context"

	"foothold/protocol/event"
	"foothold/tenant/reservation"
)

// An end that the ledger had no room for, or could not take for another fault, is owed: the
// act that found it is over and finds it no more. It is kept in memory, and the sweep stores
// it as soon as that works. Until then nothing is released to that start, and its lease is
// not renewed. A crash forgets it; what it rested on is judged again after a restart: a
// refused verdict that was stored by recovery, the rest by the next look or deadline.

// ending names a start whose end is owed; start 0: whichever it is now.
type ending struct {
	id    string
	start int
}

// fate is why something ends, with the evidence of a refusal that was no judgement, if it
// rests on one.
type fate struct {
	event.Refusal
	early *unjudged
}

// owe remembers an end, and reports whether that is new. The first reason stays, unless a
// later one is a judgement of the machine and it is not. The host's logs are not remembered:
// they may be large.
func (o *Orchestrator) owe(e ending, why fate) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	old, known := o.owed[e]
	if !known || reservation.Damning(why.Refusal) && !reservation.Damning(old.Refusal) {
		if why.early != nil {
			why.early = &unjudged{err: why.early.err, facts: why.early.facts}
		}
		o.owed[e] = why
	}
	return !known
}

// firstReason is why something ends: what is owed goes before why, as in owe.
func (o *Orchestrator) firstReason(e ending, why fate) fate {
	o.mu.Lock()
	defer o.mu.Unlock()
	if old, known := o.owed[e]; known && (reservation.Damning(old.Refusal) || !reservation.Damning(why.Refusal)) {
		return old
	}
	return why
}

func (o *Orchestrator) settled(e ending) {
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.owed, e)
}

// owesEnd refuses what a start must not get any more because its end is owed. It is asked
// in the transaction that would give it.
func (o *Orchestrator) owesEnd(id string, start int) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, e := range []ending{{id, start}, {id, 0}} {
		if why, known := o.owed[e]; known {
			return &why.Refusal
		}
	}
	return nil
}

// endOwed tries to store the ends that are owed.
func (o *Orchestrator) endOwed(ctx context.Context) {
	o.mu.Lock()
	list := make(map[ending]fate, len(o.owed))
	for e, why := range o.owed {
		list[e] = why
	}
	o.mu.Unlock()
	for e, why := range list {
		o.abort(ctx, e.id, e.start, &why.Refusal)
	}
}
