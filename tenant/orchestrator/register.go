package orchestrator

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"foothold/internal/luks"
	"foothold/internal/secret"
	"foothold/protocol/api"
	"foothold/protocol/bootmsg"
	"foothold/protocol/event"
	"foothold/protocol/vmspec"
	"foothold/tenant/expect"
	"foothold/tenant/ledger"
	"foothold/tenant/vault"
)

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
