package orchestrator

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"regexp"
	"time"

	"foothold/internal/mtls"
	"foothold/internal/strictjson"
	"foothold/protocol/event"
	"foothold/protocol/upstream"
	"foothold/protocol/vmspec"
	"foothold/protocol/zone"
	"foothold/tenant/ledger"
)

// streamWrite bounds one write to a daemon that does not read.
const streamWrite = 10 * time.Second

// upstreamAPI is protocol/upstream: each call states which role may make it.
func (o *Orchestrator) upstreamAPI() http.Handler {
	mux := http.NewServeMux()
	all := []string{mtls.BootServer, mtls.Gateway, mtls.Firewall}
	mux.Handle("GET "+upstream.PathZone, o.allow(callRefused, http.HandlerFunc(o.zoneStream), all...))
	mux.Handle("POST "+upstream.PathZoneReport, o.allow(callRefused, handle(o, o.zoneReport), all...))
	mux.Handle("POST "+upstream.PathEvents, o.allow(callRefused, handle(o, o.takeEvents), append(all, mtls.Store)...))
	for path, h := range map[string]http.Handler{
		upstream.PathBootOpen:    handle(o, o.bootOpen),
		upstream.PathBootVerdict: handle(o, o.bootVerdict),
		upstream.PathBootDone:    handle(o, o.bootDone),
		upstream.PathBootReady:   handle(o, o.bootReady),
	} {
		mux.Handle("POST "+path, o.allow(callRefused, h, mtls.BootServer))
	}
	mux.Handle("POST "+upstream.PathGatewayAdmit, o.allow(callRefused, handle(o, o.gatewayAdmit), mtls.Gateway))
	mux.Handle("POST "+upstream.PathGatewayAgent, o.allow(callRefused, handle(o, o.gatewayAgent), mtls.Gateway))
	return mux
}

// handle decodes a request strictly, calls f, and answers with its result or Problem.
func handle[In, Out any](o *Orchestrator, f func(context.Context, mtls.Identity, In) (Out, error)) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		who, ok := mtls.Caller(r.Context())
		if !ok {
			refuse(w, event.Refuse(event.NotPermitted, "no identity"))
			return
		}
		var in In
		if err := strictjson.Read(r.Body, upstream.MaxMessage, &in); err != nil {
			slog.Warn("malformed call", "from", who, "path", r.URL.Path, "error", err)
			refuse(w, o.refusedCall(r.Context(), who, r.Pattern, "", event.Refuse(event.BadRequest, "%v", err)))
			return
		}
		out, err := f(r.Context(), who, in)
		if err != nil {
			refuse(w, err)
			return
		}
		if err := json.NewEncoder(w).Encode(out); err != nil {
			slog.Warn("answer", "to", who, "path", r.URL.Path, "error", err)
		}
	})
}

// refuse answers a daemon. Only reason and detail go out; findings stay here.
func refuse(w http.ResponseWriter, err error) {
	why := shown(err)
	w.WriteHeader(statusOf(why.Reason))
	json.NewEncoder(w).Encode(upstream.Problem{Reason: why.Reason, Detail: why.Detail})
}

type empty struct{}

// zoneOf is the zone that a daemon may see: its own.
func zoneOf(who mtls.Identity) (string, bool) {
	switch who.Role {
	case mtls.BootServer:
		return zone.Boot, true
	case mtls.Gateway:
		return zone.Gateway, true
	case mtls.Firewall:
		return who.Name, who.Name == zone.External || who.Name == zone.Internal
	}
	return "", false
}

// zoneStream sends the newest document of the caller's zone, and each newer one.
func (o *Orchestrator) zoneStream(w http.ResponseWriter, r *http.Request) {
	who, _ := mtls.Caller(r.Context())
	name, ok := zoneOf(who)
	if !ok {
		refuse(w, o.refusedCall(r.Context(), who, r.Pattern, "", event.Refuse(event.NotPermitted, "%s has no zone", who)))
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	c := http.NewResponseController(w)
	for sent := int64(0); ; {
		line, revision, changed := o.zones.next(name, sent)
		if line == nil {
			select {
			case <-changed:
				continue
			case <-r.Context().Done():
				return
			}
		}
		if err := c.SetWriteDeadline(time.Now().Add(streamWrite)); err != nil {
			return
		}
		if _, err := w.Write(line); err != nil {
			return
		}
		if err := c.Flush(); err != nil {
			return
		}
		sent = revision
	}
}

func (o *Orchestrator) zoneReport(ctx context.Context, who mtls.Identity, r zone.Report) (empty, error) {
	if name, ok := zoneOf(who); !ok || name != r.Zone {
		return empty{}, o.refusedCall(ctx, who, upstream.PathZoneReport, "", event.Refuse(event.NotPermitted, "%s does not keep zone %.64q", who, r.Zone))
	}
	if len(r.Error) > 1024 {
		r.Error = r.Error[:1024]
	}
	if err := o.zones.report(r, o.now()); err != nil {
		return empty{}, o.refusedCall(ctx, who, upstream.PathZoneReport, "", err)
	}
	if r.Error != "" && o.journalled.take(who.String(), len(r.Error), o.now()) {
		o.zoneFault(ctx, r)
	}
	return empty{}, nil
}

// Bounds of an event from outside.
const (
	maxDetails = 32
	maxText    = 512
)

// takeEvents enters a daemon's events into the journal. Their source is what the
// certificate says, whatever they claim.
func (o *Orchestrator) takeEvents(ctx context.Context, who mtls.Identity, list []event.Event) (empty, error) {
	if len(list) > event.MaxBatch {
		return empty{}, o.refusedCall(ctx, who, upstream.PathEvents, "", event.Refuse(event.BadRequest, "%d events, at most %d", len(list), event.MaxBatch))
	}
	for _, e := range list {
		if err := checkEvent(e); err != nil {
			return empty{}, o.refusedCall(ctx, who, upstream.PathEvents, "", err)
		}
	}
	if !o.journalled.take(who.String(), size(list), o.now()) {
		return empty{}, event.Refuse(event.QuotaExceeded, "too many events; come again later")
	}
	err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		for _, e := range list {
			e.Source = who.String()
			if err := t.JournalFrom(e); err != nil {
				return err
			}
		}
		return nil
	})
	o.zones.journalled()
	return empty{}, err
}

// size is about what events take in the journal, in bytes.
func size(list []event.Event) int {
	const entry = 256 // number, hash, times, source
	n := 0
	for _, e := range list {
		n += entry + len(e.Kind) + len(e.Reason)
		for k, v := range e.Detail {
			n += len(k) + len(v)
		}
	}
	return n
}

// eventName is the form of kinds, reasons and names of details. Only the values of
// details are free text.
var eventName = regexp.MustCompile(`^[a-z][a-z0-9._-]{0,63}$`)

func checkEvent(e event.Event) error {
	bad := !eventName.MatchString(e.Kind) || e.Reason != "" && !eventName.MatchString(string(e.Reason)) ||
		e.Reservation != "" && !vmspec.ValidID(e.Reservation) || len(e.Detail) > maxDetails
	for k, v := range e.Detail {
		bad = bad || !eventName.MatchString(k) || len(v) > maxText
	}
	if bad {
		return event.Refuse(event.BadRequest, "event %d is malformed or too large", e.Seq)
	}
	return nil
}

// callLimit bounds what one daemon's call may have us do; phases' deadlines hold besides.
const callLimit = time.Minute

// seenThrough is the context of a call that burns a token or a nonce: what it has begun
// is ended, whether its caller waits or not. A daemon that is killed meanwhile must not
// end a VM as if the orchestrator had failed.
func seenThrough(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), callLimit)
}
