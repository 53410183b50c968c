package orchestrator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/bootmsg"
	"foothold/protocol/event"
	"foothold/tenant/expect"
	"foothold/tenant/ledger"

	"github.com/danielgtaylor/huma/v2"
)

// templateKey begins the vault's names of templates' keys.
const templateKey = "template-"

func templateKeyName(tpl ledger.Template) string { return templateKey + tpl.Label() }

func (o *Orchestrator) templateOperations(a huma.API, mux *http.ServeMux) {
	huma.Register(a, operation("GET", "/v1/templates", "list-templates", "List templates", http.StatusOK),
		func(ctx context.Context, _ *struct{}) (*body[[]api.Template], error) { return answer(o.templates(ctx)) })
	register := operation("POST", "/v1/templates", "register-template", "Register a template", http.StatusCreated)
	register.MaxBodyBytes = maxRegister
	huma.Register(a, register, func(ctx context.Context, in *struct{ Body api.RegisterTemplate }) (*body[api.Template], error) {
		return answer(o.registerTemplate(ctx, in.Body, caller(ctx)))
	})
	huma.Register(a, operation("DELETE", "/v1/templates/{name}", "delete-template", "Delete a template and destroy its key", http.StatusOK),
		func(ctx context.Context, in *byName) (*body[struct{}], error) {
			return answer(struct{}{}, o.deleteTemplate(ctx, in.Name, caller(ctx)))
		})
	o.upload(a, mux, "/v1/templates/{name}/image", "put-image", "Upload a template's ciphertext", func(r *http.Request) error {
		return o.putImage(r.Context(), r.PathValue("name"), r.ContentLength, r.Body, caller(r.Context()))
	})
	o.upload(a, mux, "/v1/objects/{name}", "put-object", "Put an object into the DMZ's store", func(r *http.Request) error {
		return o.putObject(r.Context(), r.PathValue("name"), r.ContentLength, r.Body, caller(r.Context()))
	})
}

// upload registers a PUT of bytes that are streamed, beside huma, which would read them
// into memory.
func (o *Orchestrator) upload(a huma.API, mux *http.ServeMux, path, id, summary string, f func(*http.Request) error) {
	a.OpenAPI().AddOperation(&huma.Operation{OperationID: id, Method: http.MethodPut, Path: path, Summary: summary,
		Parameters:  []*huma.Param{{Name: "name", In: "path", Required: true, Schema: &huma.Schema{Type: huma.TypeString}}},
		RequestBody: &huma.RequestBody{Required: true, Content: map[string]*huma.MediaType{"application/octet-stream": {}}},
		Responses:   map[string]*huma.Response{"200": {Description: "stored"}}})
	mux.HandleFunc("PUT "+path, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		err := f(r)
		if err == nil {
			io.WriteString(w, "{}\n")
			return
		}
		var p *refused
		errors.As(problem(err), &p)
		o.journalRefused(r.Context(), requestRefused, caller(r.Context()), r.Pattern, "", err)
		w.WriteHeader(p.status)
		json.NewEncoder(w).Encode(p.Problem)
	})
}

func (o *Orchestrator) templates(ctx context.Context) ([]api.Template, error) {
	list := []api.Template{}
	err := o.ledger.Read(ctx, func(t *ledger.Tx) error {
		rows, err := t.Templates()
		if err != nil {
			return err
		}
		for _, tpl := range rows {
			if tpl.Gone {
				continue
			}
			view, err := o.templateView(t, tpl)
			if err != nil {
				return err
			}
			list = append(list, view)
		}
		return nil
	})
	return list, err
}

// templateView is a template for operators. One that this orchestrator cannot use, say
// after a change of the component key, says so; it is mended by building it again.
func (o *Orchestrator) templateView(t *ledger.Tx, tpl ledger.Template) (api.Template, error) {
	users, err := t.VersionUsers(tpl)
	view := api.Template{Name: tpl.Name, Version: tpl.Version, State: api.TemplateCurrent, SHA256: tpl.SHA256, Size: tpl.Size, Created: tpl.Created, Release: tpl.Release,
		Boot: []bootmsg.Component{}, Hosts: append([]string{}, tpl.Hosts...), VMs: users}
	if err != nil {
		return view, err
	}
	switch newest, err := t.Template(tpl.Name); {
	case !tpl.Withdrawn.IsZero():
		view.State = api.TemplateWithdrawn
	case err != nil:
		return view, err
	case newest.Version != tpl.Version:
		view.State = api.TemplateSuperseded
	}
	if c, err := o.components(tpl.Components); err != nil {
		view.Problem = err.Error()
	} else {
		view.Boot = append(view.Boot, c.Kernel, c.Initramfs)
	}
	if expected, err := expect.Parse(tpl.Audit); err != nil {
		view.Problem = err.Error()
	} else {
		view.AuthenticatedVolume = expected.AuthenticatedVolume
	}
	return view, nil
}

func (o *Orchestrator) template(ctx context.Context, name string) (tpl ledger.Template, err error) {
	if name == "" {
		return tpl, event.Refuse(event.UnknownTemplate, "no name")
	}
	err = o.ledger.Read(ctx, func(t *ledger.Tx) (err error) { tpl, err = t.Template(name); return err })
	if errors.Is(err, ledger.ErrNotFound) {
		err = event.Refuse(event.UnknownTemplate, "%s is not registered", named("template", name))
	}
	return tpl, err
}

// templateOf is the version that a VM's latest start is of.
func (o *Orchestrator) templateOf(ctx context.Context, r ledger.Reservation) (tpl ledger.Template, err error) {
	err = o.ledger.Read(ctx, func(t *ledger.Tx) (err error) { tpl, err = t.TemplateOf(r); return err })
	if errors.Is(err, ledger.ErrNotFound) {
		err = event.Refuse(event.UnknownTemplate, "version %d of template %s is not registered", r.Version, r.Template)
	}
	return tpl, err
}

// deleteTemplate forgets a template that no VM uses, with all its versions. Its keys are
// destroyed first: what then still lies at a host is noise.
func (o *Orchestrator) deleteTemplate(ctx context.Context, name, by string) error {
	versions, err := o.forgetTemplate(ctx, name, by)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for _, tpl := range versions {
		for _, host := range tpl.Hosts {
			if h, err := o.host(host); err == nil {
				if err := h.DeleteTemplate(ctx, tpl.SHA256); err != nil {
					slog.Warn("delete template at host", "host", host, "error", err)
				}
			}
		}
	}
	return nil
}

// forgetTemplate removes the rows and destroys the keys before another template can have
// the name.
func (o *Orchestrator) forgetTemplate(ctx context.Context, name, by string) (versions []ledger.Template, err error) {
	o.registering.Lock()
	defer o.registering.Unlock()
	err = o.ledger.Write(ctx, func(t *ledger.Tx) error {
		all, err := t.Templates()
		if err != nil {
			return err
		}
		for _, tpl := range all {
			if tpl.Name == name {
				versions = append(versions, tpl)
			}
		}
		if len(versions) == 0 {
			return event.Refuse(event.UnknownTemplate, "%s is not registered", named("template", name))
		}
		users, err := t.TemplateUsers(name)
		if err != nil {
			return err
		}
		if users > 0 {
			return event.Refuse(event.InUse, "%d VMs are of template %s", users, name)
		}
		return errors.Join(t.DeleteTemplate(name), t.Journal(event.Event{Kind: "template.deleted", Detail: map[string]string{"name": name, "by": by}}))
	})
	if err != nil {
		return nil, err
	}
	o.zones.journalled()
	for _, tpl := range versions {
		if err := o.vault.Destroy(templateKeyName(tpl)); err != nil {
			return nil, fmt.Errorf("destroy template key: %w", err)
		}
	}
	return versions, nil
}
