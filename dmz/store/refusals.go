package store

import (
	"context"
	"log/slog"
	"strconv"
	"time"

	"foothold/internal/mtls"
	"foothold/internal/tally"
	"foothold/protocol/event"
	"foothold/protocol/vmspec"
)

// Bounds of what a flood of refused calls may become.
const (
	tellEvery = 2 * time.Second
	maxKinds  = 64 // that are told apart between two tellings
)

// refusal is what makes two refused calls the same for the journal. Nothing in it is the
// caller's own text, so that one caller makes but a few kinds.
type refusal struct {
	by          string // caller's role and name
	reservation string // of a VM that calls
	call        string // pattern of the path
	reason      event.Reason
	why         string
}

// refusals counts refused calls until they are told.
type refusals struct{ *tally.Tally[refusal] }

func newRefusals() refusals {
	return refusals{tally.New(maxKinds, func(k refusal) refusal { return refusal{reason: k.reason, by: "others"} })}
}

// count counts one call of who that was refused.
func (r refusals) count(who mtls.Identity, k refusal) {
	k.by = who.String()
	if who.Role == mtls.VM && vmspec.ValidID(who.Name) {
		k.reservation = who.Name
	}
	r.Count(k)
}

// tell has what was refused told, until ctx ends.
func (r refusals) tell(ctx context.Context, emit func(event.Event)) {
	r.Run(ctx, tellEvery, func(k refusal, n int) {
		slog.Warn("calls refused", "by", k.by, "call", k.call, "reason", string(k.reason), "why", k.why, "count", n)
		emit(k.event(n))
	})
}

// event is the journal's entry of so many.
func (k refusal) event(n int) event.Event {
	return event.Event{Kind: "store.refused", Reservation: k.reservation, Reason: k.reason,
		Detail: map[string]string{"by": k.by, "call": k.call, "detail": k.why, "count": strconv.Itoa(n)}}
}
