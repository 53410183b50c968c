package orchestrator

import (
	"context"
	"encoding/json"
	"net/http"
	"reflect"

	"foothold/internal/mtls"
	"foothold/internal/secret"
	"foothold/internal/strictjson"
	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/protocol/zone"
	"foothold/tenant/ledger"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"
)

// maxRegister bounds a template's registration in bytes: its expectations are large.
const maxRegister = 8 << 20

// operatorAPI is protocol/api over HTTP. Bodies are decoded strictly (no unknown
// field, no duplicate key, nothing behind the document), refusals are api.Problem and
// never repeat what was submitted.
func (o *Orchestrator) operatorAPI() http.Handler {
	mux := http.NewServeMux()
	conf := huma.DefaultConfig("Foothold orchestrator", "1")
	conf.CreateHooks = nil // adds $schema
	conf.DocsPath, conf.SchemasPath = "", ""
	conf.RejectUnknownQueryParameters = true
	strict := huma.Format{Marshal: huma.DefaultJSONFormat.Marshal, Unmarshal: strictjson.Unmarshal}
	conf.Formats = map[string]huma.Format{"application/json": strict, "json": strict} // "json": application/problem+json
	conf.Transformers = []huma.Transformer{o.plainProblem}
	conf.Components.Schemas.RegisterTypeAlias(reflect.TypeFor[secret.Bytes](), reflect.TypeFor[[]byte]())
	a := humago.New(mux, conf)
	o.vmOperations(a)
	o.evidenceOperations(a)
	o.otherOperations(a)
	o.documentOperations(a)
	o.templateOperations(a, mux)
	o.hostAuditOperations(a)
	o.platformOperations(a)
	return o.allow(requestRefused, mux, mtls.Operator)
}

// body is an answer.
type body[T any] struct{ Body T }

// byName is a request for one VM or template.
type byName struct {
	Name string `path:"name" maxLength:"64" doc:"name or id"`
}

func operation(method, path, id, summary string, status int) huma.Operation {
	return huma.Operation{OperationID: id, Method: method, Path: path, Summary: summary, DefaultStatus: status, SkipValidateBody: true,
		Errors: []int{http.StatusBadRequest, http.StatusConflict, http.StatusNotFound}}
}

func (o *Orchestrator) vmOperations(a huma.API) {
	huma.Register(a, operation("POST", "/v1/vms", "create-vm", "Reserve a VM and start it", http.StatusCreated),
		func(ctx context.Context, in *struct{ Body api.CreateVM }) (*body[api.VM], error) {
			r, err := o.Reserve(ctx, in.Body, caller(ctx))
			if err != nil {
				return nil, problem(err)
			}
			return answer(o.vm(ctx, r.ID))
		})
	huma.Register(a, operation("GET", "/v1/vms", "list-vms", "List VMs", http.StatusOK),
		func(ctx context.Context, _ *struct{}) (*body[[]api.VM], error) { return answer(o.vms(ctx, "")) })
	huma.Register(a, operation("GET", "/v1/vms/{name}", "show-vm", "Show a VM", http.StatusOK),
		func(ctx context.Context, in *byName) (*body[api.VM], error) {
			r, err := o.find(ctx, in.Name)
			if err != nil {
				return nil, problem(err)
			}
			return answer(o.vm(ctx, r.ID))
		})
	huma.Register(a, operation("DELETE", "/v1/vms/{name}", "delete-vm", "End a VM and destroy its volume's key", http.StatusOK),
		func(ctx context.Context, in *byName) (*body[api.VM], error) {
			r, err := o.Release(ctx, in.Name, caller(ctx))
			if err != nil {
				return nil, problem(err)
			}
			return answer(o.vm(ctx, r.ID))
		})
	for _, ask := range []struct {
		path, id, summary string
		do                func(context.Context, string, string) (ledger.Reservation, error)
	}{
		{"stop", "stop-vm", "Stop a VM and keep its volume", o.Stop},
		{"start", "start-vm", "Start a stopped VM again", o.StartAgain},
		{"restart", "restart-vm", "Stop a VM and start it again", o.Restart},
	} {
		huma.Register(a, operation("POST", "/v1/vms/{name}/"+ask.path, ask.id, ask.summary, http.StatusOK),
			func(ctx context.Context, in *byName) (*body[api.VM], error) {
				r, err := ask.do(ctx, in.Name, caller(ctx))
				if err != nil {
					return nil, problem(err)
				}
				return answer(o.vm(ctx, r.ID))
			})
	}
	huma.Register(a, operation("PUT", "/v1/vms/{name}/workload", "set-workload", "Give a VM another workload", http.StatusOK),
		func(ctx context.Context, in *struct {
			Name string `path:"name" maxLength:"64" doc:"name or id"`
			Body api.Workload
		}) (*body[api.VM], error) {
			r, err := o.SetWorkload(ctx, in.Name, in.Body, caller(ctx))
			if err != nil {
				return nil, problem(err)
			}
			return answer(o.vm(ctx, r.ID))
		})
	huma.Register(a, operation("GET", "/v1/vms/{name}/explain", "explain-vm", "Say where a VM stands", http.StatusOK),
		func(ctx context.Context, in *byName) (*body[api.Explanation], error) {
			r, err := o.find(ctx, in.Name)
			if err != nil {
				return nil, problem(err)
			}
			return answer(o.explain(ctx, r))
		})
	huma.Register(a, operation("GET", "/v1/vms/{name}/rules", "vm-rules", "A VM's rules as read back from the kernels", http.StatusOK),
		func(ctx context.Context, in *byName) (*body[[]zone.Live], error) {
			r, err := o.find(ctx, in.Name)
			if err != nil {
				return nil, problem(err)
			}
			return answer(o.zones.rules(r.ID), nil)
		})
	huma.Register(a, operation("GET", "/v1/vms/{name}/console", "vm-console", "What a VM wrote to its console", http.StatusOK), o.console)
}

func (o *Orchestrator) console(ctx context.Context, in *byName) (*huma.StreamResponse, error) {
	r, err := o.find(ctx, in.Name)
	if err != nil {
		return nil, problem(err)
	}
	text, err := o.consoleText(ctx, r)
	if err != nil {
		return nil, problem(err)
	}
	return &huma.StreamResponse{Body: func(c huma.Context) {
		c.SetHeader("Content-Type", "text/plain; charset=utf-8")
		c.SetHeader("X-Content-Type-Options", "nosniff")
		c.BodyWriter().Write(text)
	}}, nil
}

func (o *Orchestrator) otherOperations(a huma.API) {
	huma.Register(a, operation("GET", "/v1/hosts", "list-hosts", "List inventoried hosts", http.StatusOK),
		func(ctx context.Context, _ *struct{}) (*body[[]api.Host], error) { return answer(o.hostList(ctx)) })
	huma.Register(a, operation("POST", "/v1/hosts/{name}/readmit", "readmit-host", "Let a host get VMs again after its quote was refused", http.StatusOK),
		func(ctx context.Context, in *byName) (*body[api.Host], error) {
			return answer(o.Readmit(ctx, in.Name, caller(ctx)))
		})
	huma.Register(a, operation("GET", "/v1/status", "status", "The installation at a glance", http.StatusOK),
		func(ctx context.Context, _ *struct{}) (*body[api.Status], error) { return answer(o.status(ctx)) })
	huma.Register(a, operation("GET", "/v1/fsck", "fsck", "Hold everything against everything", http.StatusOK),
		func(ctx context.Context, _ *struct{}) (*body[api.Fsck], error) { return answer(o.fsck(ctx)) })
	huma.Register(a, operation("GET", "/v1/events", "list-events", "Read or follow the journal", http.StatusOK), o.events)
}

// eventQuery selects entries of the journal.
type eventQuery struct {
	VM     string `query:"vm" maxLength:"64" doc:"name or id of a VM"`
	After  int64  `query:"after" minimum:"0" doc:"only entries behind this number"`
	Limit  int    `query:"limit" minimum:"0" maximum:"10000" doc:"at most so many; 0: 1000"`
	Follow bool   `query:"follow" doc:"stream further entries, one JSON object a line"`
}

func (o *Orchestrator) events(ctx context.Context, in *eventQuery) (*huma.StreamResponse, error) {
	id := ""
	if in.VM != "" {
		r, err := o.find(ctx, in.VM)
		if err != nil {
			return nil, problem(err)
		}
		id = r.ID
	}
	if in.Limit == 0 {
		in.Limit = 1000
	}
	read := func(after int64) (list []api.JournalEntry, err error) {
		err = o.ledger.Read(ctx, func(t *ledger.Tx) (err error) {
			list, err = t.JournalAfter(after, id, in.Limit)
			return err
		})
		return list, err
	}
	if !in.Follow {
		list, err := read(in.After)
		if err != nil {
			return nil, problem(err)
		}
		return &huma.StreamResponse{Body: func(c huma.Context) {
			c.SetHeader("Content-Type", "application/json")
			json.NewEncoder(c.BodyWriter()).Encode(list)
		}}, nil
	}
	return &huma.StreamResponse{Body: func(c huma.Context) { o.follow(c, in.After, read) }}, nil
}

// follow streams entries until the caller leaves or the orchestrator stops.
func (o *Orchestrator) follow(c huma.Context, after int64, read func(int64) ([]api.JournalEntry, error)) {
	c.SetHeader("Content-Type", "application/x-ndjson")
	out := json.NewEncoder(c.BodyWriter())
	flusher, _ := c.BodyWriter().(http.Flusher)
	for {
		grown := o.zones.journalGrown()
		list, err := read(after)
		if err != nil {
			return
		}
		for _, e := range list {
			if out.Encode(e) != nil {
				return
			}
			after = e.Seq
		}
		if flusher != nil {
			flusher.Flush()
		}
		if len(list) > 0 {
			continue
		}
		select {
		case <-grown:
		case <-c.Context().Done():
			return
		}
	}
}

// answer turns a result into huma's form.
func answer[T any](v T, err error) (*body[T], error) {
	if err != nil {
		return nil, problem(err)
	}
	return &body[T]{v}, nil
}

// caller is who makes a call, for the journal.
func caller(ctx context.Context) string {
	id, ok := mtls.Caller(ctx)
	if !ok {
		return "unknown"
	}
	return id.String()
}

// refused is an api.Problem with its status.
type refused struct {
	status int
	api.Problem
}

func (r *refused) Error() string  { return string(r.Reason) + ": " + r.Detail }
func (r *refused) GetStatus() int { return r.status }

// problem makes the answer to a failed call. What is not a refusal is a fault of ours:
// it is not shown.
func problem(err error) error {
	why := shown(err)
	return &refused{statusOf(why.Reason), api.Problem{Reason: why.Reason, Detail: why.Detail, Findings: why.Findings, Next: event.Explain(why.Reason).Next}}
}

func statusOf(r event.Reason) int {
	switch r {
	case event.BadRequest, event.UnknownSize:
		return http.StatusBadRequest
	case event.UnknownVM, event.UnknownEvidence, event.UnknownTemplate, event.UnknownWorkload, event.UnknownDocument:
		return http.StatusNotFound
	case event.NameTaken, event.TemplateTaken, event.PoolEmpty, event.QuotaExceeded, event.InUse, event.NoHost, event.WrongPhase, event.DocumentRefused:
		return http.StatusConflict
	case event.NotPermitted:
		return http.StatusForbidden
	case event.HostRefused, event.HostUnreachable:
		return http.StatusBadGateway
	case event.InternalError:
		return http.StatusInternalServerError
	case event.DiskFull:
		return http.StatusInsufficientStorage
	}
	return http.StatusForbidden
}

// plainProblem replaces huma's own errors, which repeat submitted values, by ours, and
// journals what it answers.
func (o *Orchestrator) plainProblem(c huma.Context, _ string, v any) (any, error) {
	var p api.Problem
	switch e := v.(type) {
	case *refused:
		p = e.Problem
	case *huma.ErrorModel:
		detail := e.Detail
		for _, d := range e.Errors {
			if d != nil {
				detail += ": " + d.Location + ": " + d.Message
			}
		}
		p = api.Problem{Reason: event.BadRequest, Detail: detail, Next: event.Explain(event.BadRequest).Next}
	default:
		return v, nil
	}
	o.journalRefused(c.Context(), requestRefused, caller(c.Context()), c.Operation().OperationID, "", event.Refuse(p.Reason, "%s", p.Detail))
	return p, nil
}
