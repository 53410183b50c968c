package host

import (
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"time"

	"foothold/internal/mtls"
	"foothold/internal/strictjson"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/hostapi"
	"foothold/protocol/inventory"
	"foothold/protocol/signed"
	"foothold/protocol/vmspec"
	"foothold/provider/broker"
)

// Limits of calls.
const (
	waitLimit    = 30 * time.Second // of a GET with ?wait
	uploadLimit  = 30 * time.Minute // of a template
	requestLimit = 2 * time.Minute  // of any other call; longer than waitLimit
	maxInventory = 16 << 20         // bytes
)

// call is one authorised call: what it answers is written as JSON.
type call func(r *http.Request, tenant string) (any, error)

// raw is an answer that is written as it is.
type raw struct {
	kind string // media type
	data []byte
}

// handler is the API of package hostapi, for the tenants of the configuration.
func (a *Agent) handler() http.Handler {
	mux := http.NewServeMux()
	for pattern, c := range map[string]call{
		"POST /v1/vms":               a.callCreate,
		"GET /v1/vms":                a.callList,
		"POST /v1/vms/{id}/start":    a.callStart,
		"GET /v1/vms/{id}":           a.callGet,
		"GET /v1/vms/{id}/console":   a.callConsole,
		"DELETE /v1/vms/{id}":        a.callDestroy,
		"GET /v1/volumes":            a.callVolumes,
		"DELETE /v1/volumes/{id}":    a.callDeleteVolume,
		"POST /v1/quote":             a.callQuote,
		"POST /v1/activate":          a.callActivate,
		"PUT /v1/session-key":        a.callPutSessionKey,
		"GET /v1/platform":           a.callPlatform,
		"GET /v1/inventory":          a.callInventory,
		"GET /v1/inventory/digest":   a.callInventoryDigest,
		"PUT /v1/templates/{sha}":    a.callPutTemplate,
		"GET /v1/templates":          a.callTemplates,
		"DELETE /v1/templates/{sha}": a.callDeleteTemplate,
	} {
		mux.Handle(pattern, a.authorise(pattern, c))
	}
	return mtls.Allow(mux, mtls.Orchestrator)
}

// authorise finds the tenant of the caller's certificate, carries the call out and
// records it.
func (a *Agent) authorise(pattern string, c call) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer, err := a.carryOut(w, r, c)
		id, _ := mtls.Caller(r.Context())
		if err != nil {
			slog.Warn("call refused", "call", pattern, "caller", id.String(), "reason", event.ReasonOf(err), "error", err)
			refuse(w, err)
			return
		}
		if r.Method != http.MethodGet {
			slog.Info("call", "call", pattern, "caller", id.String())
		}
		if bytes, ok := answer.(raw); ok {
			w.Header().Set("Content-Type", bytes.kind)
			w.Write(bytes.data)
			return
		}
		write(w, r, answer)
	})
}

// largeAnswer is from how many bytes on an answer is compressed: those with logs are, to
// about half of what they have in JSON.
const largeAnswer = 8 << 10

// write answers with JSON.
func write(w http.ResponseWriter, r *http.Request, answer any) {
	data, err := json.Marshal(answer)
	if err != nil {
		refuse(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	if len(data) < largeAnswer || !strings.Contains(r.Header.Get("Accept-Encoding"), "gzip") {
		w.Write(data)
		return
	}
	w.Header().Set("Content-Encoding", "gzip")
	z := gzip.NewWriter(w)
	defer z.Close()
	z.Write(data)
}

func (a *Agent) carryOut(w http.ResponseWriter, r *http.Request, c call) (any, error) {
	id, ok := mtls.Caller(r.Context())
	if !ok {
		return nil, event.Refuse(event.NotPermitted, "the caller is unknown")
	}
	tenant, ok := a.conf.tenant(id.Name)
	if !ok {
		return nil, event.Refuse(event.NotPermitted, "%s is no tenant of this host", id)
	}
	limit := requestLimit
	if r.PathValue("sha") != "" && r.Method == http.MethodPut { // a template
		limit = uploadLimit
	} else {
		r.Body = http.MaxBytesReader(w, r.Body, hostapi.MaxMessage)
	}
	if err := http.NewResponseController(w).SetReadDeadline(time.Now().Add(limit)); err != nil {
		return nil, fmt.Errorf("limit the call: %w", err)
	}
	return c(r, tenant)
}

// statuses are the HTTP statuses of the reasons that calls are refused for.
var statuses = map[event.Reason]int{
	event.BadRequest: http.StatusBadRequest, event.DigestMismatch: http.StatusBadRequest, event.NotPermitted: http.StatusForbidden,
	event.UnknownVM: http.StatusNotFound, event.UnknownTemplate: http.StatusNotFound, event.InUse: http.StatusConflict,
	event.VMStopped: http.StatusConflict, event.QuotaExceeded: http.StatusConflict, event.TPMBusy: http.StatusServiceUnavailable,
	event.TPMLost: http.StatusServiceUnavailable, event.LogsUnreadable: http.StatusServiceUnavailable, event.DiskFull: http.StatusInsufficientStorage,
}

// refuse answers with a Problem. What went wrong inside stays in the log.
func refuse(w http.ResponseWriter, err error) {
	p := hostapi.Problem{Reason: event.InternalError, Detail: "the host failed; its log says more"}
	var refusal *event.Refusal
	if errors.As(err, &refusal) {
		p = hostapi.Problem{Reason: refusal.Reason, Detail: refusal.Detail}
	}
	status, ok := statuses[p.Reason]
	if !ok {
		status = http.StatusInternalServerError
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(p)
}

func read(r *http.Request, v any) error {
	if err := strictjson.Read(r.Body, hostapi.MaxMessage, v); err != nil {
		return event.Refuse(event.BadRequest, "%v", err)
	}
	return nil
}

// vm is the VM that the path names.
func (a *Agent) vm(r *http.Request, tenant string) (*vm, error) {
	id := r.PathValue("id")
	if v := a.find(tenant, id); v != nil {
		return v, nil
	}
	return nil, event.Refuse(event.UnknownVM, "this host has no such VM of this tenant")
}

func (a *Agent) callCreate(r *http.Request, tenant string) (any, error) {
	var req hostapi.CreateRequest
	if err := read(r, &req); err != nil {
		return nil, err
	}
	v, err := a.create(tenant, req)
	if err != nil {
		return nil, err
	}
	return v.describe(), nil
}

func (a *Agent) callList(_ *http.Request, tenant string) (any, error) {
	a.readDropped()
	list := []hostapi.VM{}
	for _, v := range a.list(tenant) {
		list = append(list, v.describe())
	}
	return list, nil
}

func (a *Agent) callStart(r *http.Request, tenant string) (any, error) {
	v, err := a.vm(r, tenant)
	if err != nil {
		return nil, err
	}
	if err := v.start(); err != nil {
		return nil, err
	}
	return v.describe(), nil
}

func (a *Agent) callGet(r *http.Request, tenant string) (any, error) {
	v, err := a.vm(r, tenant)
	if err != nil {
		return nil, err
	}
	want := r.URL.Query().Get("wait")
	if want == "" {
		a.readDropped()
		return v.describe(), nil
	}
	if stateOrder[want] == 0 && stageOrder[want] == 0 {
		return nil, event.Refuse(event.BadRequest, "wait: want a state or a boot stage")
	}
	ctx, cancel := context.WithTimeout(r.Context(), waitLimit)
	defer cancel()
	return v.await(ctx, want), nil
}

func (a *Agent) callConsole(r *http.Request, tenant string) (any, error) {
	v, err := a.vm(r, tenant)
	if err != nil {
		return nil, err
	}
	return raw{"text/plain; charset=utf-8", v.console()}, nil
}

func (a *Agent) callDestroy(r *http.Request, tenant string) (any, error) {
	v := a.find(tenant, r.PathValue("id"))
	if v == nil {
		return struct{}{}, nil
	}
	if err := a.destroy(v); err != nil {
		return nil, err
	}
	return v.describe(), nil
}

func (a *Agent) callVolumes(_ *http.Request, tenant string) (any, error) {
	return a.listVolumes(tenant)
}

func (a *Agent) callDeleteVolume(r *http.Request, tenant string) (any, error) {
	id := r.PathValue("id")
	if !vmspec.ValidID(id) {
		return nil, event.Refuse(event.BadRequest, "volume: want a UUID")
	}
	a.admin.Lock()
	defer a.admin.Unlock()
	return struct{}{}, a.deleteVolume(tenant, id)
}

func (a *Agent) callQuote(r *http.Request, tenant string) (any, error) {
	var req hostapi.QuoteRequest
	if err := read(r, &req); err != nil {
		return nil, err
	}
	if req.QualifyingData.IsZero() {
		return nil, event.Refuse(event.BadRequest, "qualifying_data: want a SHA-256")
	}
	quote, err := a.broker.StaticQuote(r.Context(), tenant, req.QualifyingData)
	if err != nil {
		return nil, tpmError(err)
	}
	platform, err := a.platform()
	if err != nil {
		return nil, err
	}
	return hostapi.QuoteResponse{Quote: quote, Platform: platform}, nil
}

func (a *Agent) callActivate(r *http.Request, tenant string) (any, error) {
	var req hostapi.ActivateRequest
	if err := read(r, &req); err != nil {
		return nil, err
	}
	credential, err := a.broker.Activate(r.Context(), tenant, req.Blob, req.Secret)
	if errors.Is(err, broker.ErrFailed) || errors.Is(err, broker.ErrBusy) {
		return nil, tpmError(err)
	}
	if err != nil {
		return nil, event.Refuse(event.BadRequest, "%v", err)
	}
	return hostapi.ActivateResponse{Credential: credential}, nil
}

func (a *Agent) callPlatform(*http.Request, string) (any, error) {
	return a.platform()
}

func (a *Agent) callInventory(*http.Request, string) (any, error) {
	data, err := a.readInventory()
	return raw{"application/json", data}, err
}

func (a *Agent) callInventoryDigest(*http.Request, string) (any, error) {
	data, err := a.readInventory()
	if err != nil {
		return nil, err
	}
	var env signed.Envelope
	var doc inventory.Inventory
	if err := strictjson.Unmarshal(data, &env); err != nil {
		return nil, fmt.Errorf("read inventory: %w", err)
	}
	if err := strictjson.Unmarshal(env.Payload, &doc); err != nil {
		return nil, fmt.Errorf("read inventory: %w", err)
	}
	return hostapi.InventoryDigest{Version: doc.Version, SHA256: digest.Of(env.Payload)}, nil
}

// readInventory reads the file anew, since the provider replaces it with each version.
func (a *Agent) readInventory() ([]byte, error) {
	data, err := readUpTo(a.conf.Inventory, maxInventory)
	if err != nil {
		return nil, fmt.Errorf("read inventory: %w", err)
	}
	return data, nil
}

// readUpTo reads a file that has no more bytes than most.
func readUpTo(path string, most int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && int64(len(data)) > most {
		err = strictjson.ErrTooLarge
	}
	return data, err
}

// template is the digest that the path names.
func template(r *http.Request) (digest.SHA256, error) {
	sum, err := digest.Parse(r.PathValue("sha"))
	if err != nil {
		return sum, event.Refuse(event.BadRequest, "template: %v", err)
	}
	return sum, nil
}

func (a *Agent) callPutTemplate(r *http.Request, tenant string) (any, error) {
	sum, err := template(r)
	if err != nil {
		return nil, err
	}
	return struct{}{}, a.putTemplate(tenant, sum, r.Body)
}

func (a *Agent) callTemplates(_ *http.Request, tenant string) (any, error) {
	return a.listTemplates(tenant)
}

func (a *Agent) callDeleteTemplate(r *http.Request, tenant string) (any, error) {
	sum, err := template(r)
	if err != nil {
		return nil, err
	}
	a.admin.Lock()
	defer a.admin.Unlock()
	return struct{}{}, a.deleteTemplate(tenant, sum)
}
