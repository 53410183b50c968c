package orchestrator

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"foothold/internal/luks"
	"foothold/internal/secret"
	"foothold/protocol/api"
	"foothold/protocol/bootmsg"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/signed"
	"foothold/protocol/vmspec"
	"foothold/tenant/expect"
	"foothold/tenant/ledger"
	"foothold/tenant/vault"

	"github.com/danielgtaylor/huma/v2"
)

// maxImage bounds a template's ciphertext in bytes.
const maxImage = 64 << 30

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

// components opens a signed release of shared components. The organisation signs it
// off line; nobody here can.
func (o *Orchestrator) components(e signed.Envelope) (bootmsg.Components, error) {
	if c, ok := o.releases.get(e); ok {
		return c, nil
	}
	var c bootmsg.Components
	if err := e.Open(o.ground.componentKey, signed.Components, &c); err != nil {
		return c, event.Refuse(event.SignatureInvalid, "components: %v", err)
	}
	switch {
	case c.Kernel.Name != "kernel" || c.Initramfs.Name != "initramfs" || c.Kernel.SHA256.IsZero() || c.Initramfs.SHA256.IsZero():
		return c, event.Refuse(event.BadRequest, "components: want a kernel and an initramfs with their digests")
	case c.Kernel.Size <= 0 || c.Kernel.Size > bootmsg.MaxKernel || c.Initramfs.Size <= 0 || c.Initramfs.Size > bootmsg.MaxInitramfs:
		return c, event.Refuse(event.BadRequest, "components: kernel or initramfs is too large")
	}
	o.releases.put(e, c)
	return c, nil
}

// maxReleases bounds the releases that are remembered; there is one for each version of a
// template in use, and beyond it they are opened anew.
const maxReleases = 256

// releases are those that were found good, by all their bytes, because every VM of a
// template's brings the same. The key that signs them does not change while we run. Its zero
// value is empty.
type releases struct {
	mu    sync.Mutex
	known map[release]bootmsg.Components // guarded by mu
}

// release is a signed envelope's content.
type release struct{ payload, signature string }

func (k *releases) get(e signed.Envelope) (bootmsg.Components, bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	c, ok := k.known[release{string(e.Payload), string(e.Signature)}]
	return c, ok
}

func (k *releases) put(e signed.Envelope, c bootmsg.Components) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.known == nil || len(k.known) >= maxReleases {
		k.known = map[release]bootmsg.Components{}
	}
	k.known[release{string(e.Payload), string(e.Signature)}] = c
}

// registerTemplate checks a template's description and stores it, its key first: a
// crash in between leaves a key that the repeated call finds and replaces.
func (o *Orchestrator) registerTemplate(ctx context.Context, in api.RegisterTemplate, by string) (api.Template, error) {
	defer in.VolumeKey.Wipe()
	switch {
	case !vmspec.ValidName(in.Name):
		return api.Template{}, event.Refuse(event.BadRequest, "name: want a lower-case DNS label")
	case in.SHA256.IsZero() || in.RootHash.IsZero():
		return api.Template{}, event.Refuse(event.BadRequest, "sha256, root_hash: want both")
	case in.Size <= 0 || in.Size > maxImage || in.Size%luks.SectorSize != 0:
		return api.Template{}, event.Refuse(event.BadRequest, "size: want a multiple of %d up to 64 GiB", luks.SectorSize)
	case in.HashOffset <= 0 || in.HashOffset >= in.Size:
		return api.Template{}, event.Refuse(event.BadRequest, "hash_offset: want a place inside the image")
	case in.VolumeKey.Len() != luks.KeySize:
		return api.Template{}, event.Refuse(event.BadRequest, "volume_key: want %d bytes", luks.KeySize)
	}
	c, err := o.components(in.Components)
	if err != nil {
		return api.Template{}, err
	}
	if _, err := expect.Parse(in.Audit); err != nil {
		return api.Template{}, event.Refuse(event.BadRequest, "audit: %v", err)
	}
	if in.Created.IsZero() {
		in.Created = o.now()
	}
	tpl := ledger.Template{Name: in.Name, SHA256: in.SHA256, Size: in.Size, RootHash: in.RootHash, HashOffset: in.HashOffset,
		Release: c.Release, Components: in.Components, Audit: in.Audit, Created: in.Created}
	o.registering.Lock()
	defer o.registering.Unlock()
	exists := false
	if tpl.Version, exists, err = o.checkNewTemplate(ctx, tpl, c, in.Rotate); err != nil {
		return api.Template{}, err
	}
	if err := o.putTemplateKey(tpl, in.VolumeKey, exists); err != nil {
		return api.Template{}, err
	}
	var view api.Template
	err = o.ledger.Write(ctx, func(t *ledger.Tx) error {
		kind, err := o.putTemplate(t, tpl, exists)
		if err != nil {
			return err
		}
		stored, err := t.Template(in.Name)
		if err != nil {
			return err
		}
		if view, err = o.templateView(t, stored); err != nil || kind == "" {
			return err
		}
		return t.Journal(event.Event{Kind: kind, Detail: map[string]string{"name": in.Name, "version": strconv.Itoa(tpl.Version), "sha256": in.SHA256.String(), "release": c.Release,
			"authenticated-volume": strconv.FormatBool(view.AuthenticatedVolume), "by": by}})
	})
	o.zones.journalled()
	return view, err
}

// putTemplate adds a template, or gives one with the same image the components and
// expectations that it was built with anew, and returns the kind of event that this is,
// "" for none. Other content is refused while a VM has the template, which would fail its
// next audit; the same under another signature is not.
func (o *Orchestrator) putTemplate(t *ledger.Tx, tpl ledger.Template, exists bool) (string, error) {
	switch {
	case !exists && tpl.Version > 1:
		return "template.rotated", t.AddTemplate(tpl)
	case !exists:
		return "template.registered", t.AddTemplate(tpl)
	}
	old, err := t.Template(tpl.Name)
	if err != nil {
		return "", err
	}
	if o.sameContent(old, tpl) {
		if bytes.Equal(old.Components.Payload, tpl.Components.Payload) && bytes.Equal(old.Components.Signature, tpl.Components.Signature) {
			return "", nil
		}
		return "template.renewed", t.RenewTemplate(tpl)
	}
	rows, err := t.Reservations()
	if err != nil {
		return "", err
	}
	var users []string
	for _, r := range rows {
		if r.Template == tpl.Name && (r.Version == 0 || r.Version == tpl.Version) {
			users = append(users, r.Name)
		}
	}
	if len(users) > 0 {
		return "", event.Refuse(event.TemplateTaken, "template %s is registered with other boot components or expectations, and these VMs have it: %s", tpl.Name, nameSome(users))
	}
	return "template.renewed", t.RenewTemplate(tpl)
}

// nameSome lists a few names and counts the rest.
func nameSome(names []string) string {
	const most = 5
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}

// sameContent reports whether VMs of both get and are held to the same. An envelope that
// does not open any more is told by its release.
func (o *Orchestrator) sameContent(a, b ledger.Template) bool {
	if a.Release != b.Release || !bytes.Equal(a.Audit, b.Audit) {
		return false
	}
	was, err := o.components(a.Components)
	if err != nil {
		return true
	}
	is, err := o.components(b.Components)
	return err == nil && was.Kernel == is.Kernel && was.Initramfs == is.Initramfs
}

// checkNewTemplate gives the version that an image is, and whether it is registered
// already. It refuses a name that means another image unless that is to be rotated, and
// components that are not in the store.
func (o *Orchestrator) checkNewTemplate(ctx context.Context, tpl ledger.Template, c bootmsg.Components, rotate bool) (version int, exists bool, err error) {
	err = o.ledger.Read(ctx, func(t *ledger.Tx) error {
		old, err := t.Template(tpl.Name)
		switch {
		case errors.Is(err, ledger.ErrNotFound) && rotate:
			return event.Refuse(event.UnknownTemplate, "there is no template %s to rotate", tpl.Name)
		case errors.Is(err, ledger.ErrNotFound):
			version = 1
		case err != nil:
			return err
		case old.SHA256 == tpl.SHA256:
			version, exists = old.Version, true
		case !rotate:
			return event.Refuse(event.TemplateTaken, "template %s is registered with another image", tpl.Name)
		default:
			version = old.Version + 1
			if err := o.checkRotation(t, old, tpl); err != nil {
				return err
			}
		}
		for _, part := range []bootmsg.Component{c.Kernel, c.Initramfs} {
			size, err := t.Object(part.SHA256)
			if errors.Is(err, ledger.ErrNotFound) {
				return event.Refuse(event.BadRequest, "the %s %s is not in the store; put it there first", part.Name, part.SHA256.Short())
			}
			if err == nil && size != part.Size {
				return event.Refuse(event.BadRequest, "the %s in the store has %d bytes, the signed one %d", part.Name, size, part.Size)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
	return version, exists, err
}

// checkRotation refuses an image that an older version had - whoever has that one's key
// could read it - and another kind of volume than VMs of this template have already.
func (o *Orchestrator) checkRotation(t *ledger.Tx, old, tpl ledger.Template) error {
	all, err := t.Templates()
	if err != nil {
		return err
	}
	for _, v := range all {
		if v.Name == tpl.Name && v.SHA256 == tpl.SHA256 {
			return event.Refuse(event.TemplateTaken, "that image is version %d of %s, and version %d came after it; build the template again to rotate it from here", v.Version, tpl.Name, old.Version)
		}
	}
	users, err := t.TemplateUsers(tpl.Name)
	if err != nil || users == 0 {
		return err
	}
	was, err := expect.Parse(old.Audit)
	if err != nil {
		return fmt.Errorf("template %s: %w", old.Label(), err)
	}
	is, err := expect.Parse(tpl.Audit)
	if err != nil {
		return event.Refuse(event.BadRequest, "audit: %v", err)
	}
	if was.AuthenticatedVolume != is.AuthenticatedVolume {
		return event.Refuse(event.TemplateTaken, "%d VMs of template %s have volumes of the other kind, which does not change after they were made", users, tpl.Name)
	}
	return nil
}

// putTemplateKey stores the key. One that a registered template has is never replaced:
// its image would open no more.
func (o *Orchestrator) putTemplateKey(tpl ledger.Template, key secret.Bytes, exists bool) error {
	name := templateKeyName(tpl)
	err := o.vault.Put(name, key)
	if !errors.Is(err, vault.ErrExists) {
		return err
	}
	old, err := o.vault.Get(name)
	if err != nil {
		return fmt.Errorf("read template key: %w", err)
	}
	defer old.Wipe()
	if old.Equal(key) {
		return nil
	}
	if exists {
		return event.Refuse(event.TemplateTaken, "template %s is registered with another key", tpl.Label())
	}
	// A registration that did not come to its end left it: checkNewTemplate has seen that
	// no other image has this name and version.
	if err := o.vault.Destroy(name); err != nil {
		return fmt.Errorf("replace template key: %w", err)
	}
	return o.vault.Put(name, key)
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

// putImage takes the ciphertext of a template's newest version, checks it against its digest, and passes it
// on to every host. It succeeds if at least one host has it then; the others are
// tried again with the next upload.
func (o *Orchestrator) putImage(ctx context.Context, name string, size int64, r io.Reader, by string) error {
	tpl, err := o.template(ctx, name)
	if err != nil {
		return err
	}
	if size != tpl.Size {
		return event.Refuse(event.BadRequest, "image: want a Content-Length of %d", tpl.Size)
	}
	file, err := o.receive(r, tpl)
	if err != nil {
		return err
	}
	defer os.Remove(file.Name())
	defer file.Close()
	var failed error
	for host := range o.basis().hosts {
		if err := o.pushImage(ctx, host, tpl, file, by); err != nil {
			slog.Warn("send template to host", "template", name, "host", host, "error", err)
			failed = err
		}
	}
	tpl, err = o.template(ctx, name)
	if err == nil && len(tpl.Hosts) == 0 {
		err = failed
		if err == nil {
			err = event.Refuse(event.NoHost, "there is no host to send it to")
		}
	}
	return err
}

// receive streams an image to a file and compares its digest.
func (o *Orchestrator) receive(r io.Reader, tpl ledger.Template) (_ *os.File, err error) {
	file, err := os.CreateTemp(filepath.Join(o.conf.State, uploads), "image-")
	if err != nil {
		return nil, fmt.Errorf("receive image: %w", err)
	}
	defer func() {
		if err != nil {
			file.Close()
			os.Remove(file.Name())
		}
	}()
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(file, h), io.LimitReader(r, tpl.Size+1))
	if err != nil {
		return nil, event.Refuse(event.BadRequest, "image: it broke off after %d bytes", n)
	}
	if got := digest.SHA256(h.Sum(nil)); n != tpl.Size || got != tpl.SHA256 {
		return nil, event.Refuse(event.DigestMismatch, "image: %d bytes hash to %s, registered is %s", n, got.Short(), tpl.SHA256.Short())
	}
	return file, nil
}

func (o *Orchestrator) pushImage(ctx context.Context, host string, tpl ledger.Template, file *os.File, by string) error {
	h, err := o.host(host)
	if err != nil {
		return err
	}
	if err := h.PutTemplate(ctx, tpl.SHA256, tpl.Size, io.NewSectionReader(file, 0, tpl.Size)); err != nil {
		return err
	}
	err = o.ledger.Write(ctx, func(t *ledger.Tx) error {
		return errors.Join(t.AddTemplateHost(tpl, host), t.Journal(event.Event{Kind: "template.sent",
			Detail: map[string]string{"name": tpl.Name, "version": strconv.Itoa(tpl.Version), "host": host, "sha256": tpl.SHA256.String(), "by": by}}))
	})
	o.zones.journalled()
	return err
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
