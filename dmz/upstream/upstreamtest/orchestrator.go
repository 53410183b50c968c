package upstreamtest

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"testing"
	"time"

	"foothold/dmz/upstream"
	"foothold/internal/mtls"
	"foothold/internal/serve"
	"foothold/internal/strictjson"
	"foothold/protocol/event"
	"foothold/protocol/signed"
	wire "foothold/protocol/upstream"
	"foothold/protocol/zone"
)

const serverName = "orchestrator.foothold.internal"

// Orchestrator answers the DMZ's calls. Set the functions before the first call; a
// call without one is refused.
type Orchestrator struct {
	DMZ     *CA // issues the orchestrator's and the daemons' certificates
	ZoneKey ed25519.PrivateKey
	Address netip.AddrPort

	Open    func(wire.OpenRequest) (wire.OpenResponse, error)
	Verdict func(wire.VerdictRequest) (wire.VerdictResponse, error)
	Done    func(wire.DoneRequest) error
	Ready   func(wire.ReadyRequest) error
	Admit   func(wire.AdmitRequest) (wire.AdmitResponse, error)
	Agent   func(wire.AgentRequest) (signed.Envelope, error)
	Take    func([]event.Event) error // nil takes all events

	mu      sync.Mutex
	line    []byte            // guarded by mu; newest line of the zone stream
	changed chan struct{}     // guarded by mu; closed and replaced with each line
	reports []zone.Report     // guarded by mu
	events  []event.Event     // guarded by mu
	t       testing.TB        //
	stop    func()            //
	conns   map[net.Conn]bool // guarded by mu
}

// New makes an orchestrator that does not listen yet.
func New(t testing.TB) *Orchestrator {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	return &Orchestrator{DMZ: NewCA(t, "dmz"), ZoneKey: key, t: t, changed: make(chan struct{}), conns: map[net.Conn]bool{}}
}

// Serve answers on l until the test ends or Stop.
func (o *Orchestrator) Serve(l net.Listener) {
	o.t.Helper()
	cert := o.DMZ.Issue(Leaf{ID: mtls.Identity{Role: mtls.Orchestrator, Name: "main"}, Server: true, DNS: serverName})
	ctx, cancel := context.WithCancel(context.Background())
	o.Address = netip.MustParseAddrPort(l.Addr().String())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		conf := mtls.ServerConfig(cert, o.DMZ.Pool(), mtls.BootServer, mtls.Gateway, mtls.Firewall, mtls.Store)
		_ = serve.HTTPS(ctx, l, conf, o.handler(), func(s *http.Server) { s.ErrorLog = nil; s.ConnState = o.track })
	}()
	o.stop = func() {
		cancel()
		o.cut()
		<-ended
	}
	o.t.Cleanup(o.stop)
}

// Stop ends the service and cuts its connections.
func (o *Orchestrator) Stop() { o.stop() }

func (o *Orchestrator) track(c net.Conn, s http.ConnState) {
	o.mu.Lock()
	defer o.mu.Unlock()
	switch s {
	case http.StateNew:
		o.conns[c] = true
	case http.StateClosed, http.StateHijacked:
		delete(o.conns, c)
	}
}

func (o *Orchestrator) cut() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for c := range o.conns {
		c.Close()
	}
}

// Config is how a daemon of the role and name reaches this orchestrator.
func (o *Orchestrator) Config(role, name string) upstream.Config {
	o.t.Helper()
	return upstream.Config{Address: o.Address, ServerName: serverName,
		TLS:     o.DMZ.Files(Leaf{ID: mtls.Identity{Role: role, Name: name}}, o.DMZ),
		ZoneKey: hex.EncodeToString(o.ZoneKey.Public().(ed25519.PublicKey))}
}

func (o *Orchestrator) handler() http.Handler {
	mux := http.NewServeMux()
	handle(mux, wire.PathBootOpen, func(r wire.OpenRequest) (wire.OpenResponse, error) { return answer(o.Open, r) })
	handle(mux, wire.PathBootVerdict, func(r wire.VerdictRequest) (wire.VerdictResponse, error) { return answer(o.Verdict, r) })
	handle(mux, wire.PathBootDone, func(r wire.DoneRequest) (struct{}, error) { return struct{}{}, effect(o.Done, r) })
	handle(mux, wire.PathBootReady, func(r wire.ReadyRequest) (struct{}, error) { return struct{}{}, effect(o.Ready, r) })
	handle(mux, wire.PathGatewayAdmit, func(r wire.AdmitRequest) (wire.AdmitResponse, error) { return answer(o.Admit, r) })
	handle(mux, wire.PathGatewayAgent, func(r wire.AgentRequest) (signed.Envelope, error) { return answer(o.Agent, r) })
	handle(mux, wire.PathZoneReport, func(r zone.Report) (struct{}, error) {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.reports = append(o.reports, r)
		return struct{}{}, nil
	})
	handle(mux, wire.PathEvents, func(batch []event.Event) (struct{}, error) {
		if o.Take != nil {
			if err := o.Take(batch); err != nil {
				return struct{}{}, err
			}
		}
		o.mu.Lock()
		defer o.mu.Unlock()
		o.events = append(o.events, batch...)
		return struct{}{}, nil
	})
	mux.HandleFunc("GET "+wire.PathZone, o.stream)
	return mux
}

var errUnset = errors.New("the test gives no answer")

func answer[In, Out any](f func(In) (Out, error), in In) (Out, error) {
	if f == nil {
		var none Out
		return none, errUnset
	}
	return f(in)
}

func effect[In any](f func(In) error, in In) error {
	if f == nil {
		return errUnset
	}
	return f(in)
}

func handle[In, Out any](mux *http.ServeMux, path string, f func(In) (Out, error)) {
	mux.HandleFunc("POST "+path, func(w http.ResponseWriter, r *http.Request) {
		var in In
		err := strictjson.Read(r.Body, wire.MaxMessage, &in)
		var out Out
		if err == nil {
			out, err = f(in)
		}
		w.Header().Set("Content-Type", "application/json")
		if err != nil {
			w.WriteHeader(http.StatusForbidden)
			_ = json.NewEncoder(w).Encode(wire.Problem{Reason: event.ReasonOf(err), Detail: err.Error()})
			return
		}
		_ = json.NewEncoder(w).Encode(out)
	})
}

func (o *Orchestrator) stream(w http.ResponseWriter, r *http.Request) {
	flusher := w.(http.Flusher)
	w.WriteHeader(http.StatusOK)
	flusher.Flush()
	var sent []byte
	for {
		o.mu.Lock()
		line, changed := o.line, o.changed
		o.mu.Unlock()
		if line != nil && &line[0] != firstByte(sent) {
			if _, err := w.Write(line); err != nil {
				return
			}
			flusher.Flush()
			sent = line
		}
		select {
		case <-r.Context().Done():
			return
		case <-changed:
		}
	}
}

func firstByte(b []byte) *byte {
	if b == nil {
		return nil
	}
	return &b[0]
}

// Publish signs a document and sends it to whoever watches.
func (o *Orchestrator) Publish(d zone.Document) {
	o.t.Helper()
	payload, err := json.Marshal(d)
	must(o.t, err)
	o.PublishEnvelope(signed.Seal(o.ZoneKey, signed.Zone, payload))
}

// PublishEnvelope sends an envelope as it is.
func (o *Orchestrator) PublishEnvelope(env signed.Envelope) {
	o.t.Helper()
	line, err := json.Marshal(env)
	must(o.t, err)
	o.mu.Lock()
	defer o.mu.Unlock()
	o.line = append(line, '\n')
	close(o.changed)
	o.changed = make(chan struct{})
}

// wait for what the daemon does on its own.
const patience = 20 * time.Second

// WaitReport waits until a report passes ok, and returns it.
func (o *Orchestrator) WaitReport(what string, ok func(zone.Report) bool) zone.Report {
	o.t.Helper()
	return waitFor(o, what, func() []zone.Report { return o.reports }, ok)
}

// WaitEvent waits until an event passes ok, and returns it.
func (o *Orchestrator) WaitEvent(what string, ok func(event.Event) bool) event.Event {
	o.t.Helper()
	return waitFor(o, what, func() []event.Event { return o.events }, ok)
}

// Events are those that came so far.
func (o *Orchestrator) Events() []event.Event {
	o.mu.Lock()
	defer o.mu.Unlock()
	return append([]event.Event(nil), o.events...)
}

// waitFor polls a list that only grows.
func waitFor[T any](o *Orchestrator, what string, list func() []T, ok func(T) bool) T {
	o.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		o.mu.Lock()
		all := append([]T(nil), list()...)
		o.mu.Unlock()
		for _, v := range all {
			if ok(v) {
				return v
			}
		}
		if time.Now().After(deadline) {
			o.t.Fatalf("%s did not come; there are %+v", what, all)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
