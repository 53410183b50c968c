package orchestrator

import (
	"context"
	"errors"
	"net/http"
	"net/netip"
	"strconv"

	"foothold/internal/mtls"
	"foothold/protocol/event"
	"foothold/protocol/vmspec"
)

// A refusal enters the journal once, where it is decided. Acts that burn a token or end
// a VM write it with what they change; what is refused before anything changed - a wish,
// a malformed call, a message that was not accepted, a certificate - enters here. A
// caller that makes itself refused over and over uses up its own allowance.

// Kinds of entries that tell of a refused call.
const (
	requestRefused = "request.refused" // of an operator
	callRefused    = "call.refused"    // of a daemon
	tlsRefused     = "tls.refused"     // before there was a caller
)

// journalRefused enters a call that was refused. A fault of ours is no refusal.
func (o *Orchestrator) journalRefused(ctx context.Context, kind, who, call, reservation string, err error) {
	var why *event.Refusal
	if !errors.As(err, &why) || why.Reason == event.InternalError {
		return
	}
	e := event.Event{Kind: kind, Reservation: reservation, Reason: why.Reason,
		Detail: map[string]string{"by": clip(who, maxText), "call": clip(call, maxText), "detail": clip(why.Detail, maxText)}}
	if o.journalled.take(who, size([]event.Event{e}), o.now()) {
		o.journal(context.WithoutCancel(ctx), e)
	}
}

// refusedCall enters a daemon's refused call, and returns why.
func (o *Orchestrator) refusedCall(ctx context.Context, who mtls.Identity, call, reservation string, err error) error {
	o.journalRefused(ctx, callRefused, who.String(), call, reservation, err)
	return err
}

// allow passes calls of the listed roles to h and journals those of others.
func (o *Orchestrator) allow(kind string, h http.Handler, roles ...string) http.Handler {
	return mtls.AllowTold(h, func(r *http.Request, who mtls.Identity) {
		call := r.Pattern
		if call == "" { // no call was chosen yet
			call = r.Method
		}
		o.journalRefused(r.Context(), kind, who.String(), call, "", event.Refuse(event.NotPermitted, "its role may not make this call"))
	}, roles...)
}

// tellTLS enters connections that did not become one: of a wrong authority, name, usage
// or version.
func (o *Orchestrator) tellTLS(ctx context.Context, listener string) func(netip.Addr, string, int) {
	return func(from netip.Addr, why string, count int) {
		e := event.Event{Kind: tlsRefused, Reason: event.NotPermitted,
			Detail: map[string]string{"listener": listener, "from": from.String(), "why": clip(why, maxText), "count": strconv.Itoa(count)}}
		if o.journalled.take("tls of "+listener, size([]event.Event{e}), o.now()) {
			o.journal(context.WithoutCancel(ctx), e)
		}
	}
}

// named is a thing as a refusal may name it: by its name, if what was submitted has the
// form of one. Anything else - a token in the wrong field - is not sent back.
func named(thing, name string) string {
	if vmspec.ValidName(name) || vmspec.ValidID(name) {
		return thing + " " + name
	}
	return thing + " of that name"
}
