package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"foothold/internal/strictjson"
	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/inventory"
	"foothold/protocol/platform"
	"foothold/protocol/signed"
	"foothold/tenant/ledger"
	"foothold/tenant/verify"

	"github.com/danielgtaylor/huma/v2"
)

// Limits of an import.
const (
	maxDocument     = api.MaxDocument
	maxImport       = maxDocument/3*4 + 4096 // bytes of the request, whose document is base64
	activationsOnce = 16                     // hosts that are challenged at once
	activationWait  = 45 * time.Second       // for all of them; whoever has not answered is asked before its first VM
)

func (o *Orchestrator) documentOperations(a huma.API) {
	huma.Register(a, operation("GET", "/v1/inventories", "list-inventories", "List the inventory's imported versions", http.StatusOK),
		func(ctx context.Context, _ *struct{}) (*body[[]api.Inventory], error) {
			return answer(o.inventories(ctx))
		})
	take := operation("POST", "/v1/inventories", "import-inventory", "Take a version of the provider's inventory into use", http.StatusOK)
	take.MaxBodyBytes = maxImport
	huma.Register(a, take, func(ctx context.Context, in *struct{ Body api.ImportDocument }) (*body[api.InventoryImport], error) {
		return answer(o.ImportInventory(ctx, in.Body, caller(ctx)))
	})
	huma.Register(a, operation("GET", "/v1/inventories/{version}", "show-inventory", "Show a version of the inventory", http.StatusOK),
		func(ctx context.Context, in *struct {
			Version int `path:"version" minimum:"0" doc:"0: the one that counts"`
		}) (*body[api.Inventory], error) {
			return answer(o.inventoryVersion(ctx, in.Version))
		})
	huma.Register(a, operation("GET", "/v1/platforms", "list-platforms", "List the imported reference values", http.StatusOK),
		func(ctx context.Context, _ *struct{}) (*body[[]api.Platform], error) { return answer(o.platforms(ctx)) })
	take = operation("POST", "/v1/platforms", "import-platform", "Take reference values into use", http.StatusOK)
	take.MaxBodyBytes = maxImport
	huma.Register(a, take, func(ctx context.Context, in *struct{ Body api.ImportDocument }) (*body[api.Platform], error) {
		return answer(o.ImportPlatform(ctx, in.Body, caller(ctx)))
	})
	huma.Register(a, operation("POST", "/v1/platforms/{sha256}/withdraw", "withdraw-platform", "Make reference values count no more", http.StatusOK),
		func(ctx context.Context, in *struct {
			SHA256 string `path:"sha256" maxLength:"64" doc:"of the signed payload"`
			Body   api.WithdrawPlatform
		}) (*body[api.Platform], error) {
			sum, err := digest.Parse(in.SHA256)
			if err != nil {
				return nil, problem(event.Refuse(event.BadRequest, "sha256: %v", err))
			}
			return answer(o.WithdrawPlatform(ctx, sum, in.Body.Why, caller(ctx)))
		})
}

// documentRefused is the refusal of a document that is not taken into use.
func documentRefused(format string, args ...any) error {
	return event.Refuse(event.DocumentRefused, format, args...)
}

// comparePublished refuses a document other than the one whose digest its signer published.
func comparePublished(got digest.SHA256, want *digest.SHA256) error {
	if want != nil && *want != got {
		return event.Refuse(event.DigestMismatch, "the document has sha256 %s, published is %s", got, *want)
	}
	return nil
}

// ImportInventory takes another version of the provider's inventory into use: all of it or
// nothing. What is wrong with the document refuses it; what is wrong with one host refuses
// that host. From the moment that it counts, hosts that are not in it or not in order get
// no VM; then new and changed hosts are challenged.
func (o *Orchestrator) ImportInventory(ctx context.Context, in api.ImportDocument, by string) (api.InventoryImport, error) {
	ctx = context.WithoutCancel(ctx) // what is begun here is ended, whether its caller waits or not
	next, out, err := o.takeInventory(ctx, in, by)
	if err != nil {
		return out, err
	}
	// A crash before the hosts' TPMs are challenged leaves keys unproved, which no VM gets past.
	o.activateSome(ctx)
	out.Inventory, err = o.inventoryVersion(ctx, next.Version())
	return out, err
}

// takeInventory checks the document and makes it count.
func (o *Orchestrator) takeInventory(ctx context.Context, in api.ImportDocument, by string) (*verify.Inventory, api.InventoryImport, error) {
	o.rebasing.Lock()
	defer o.rebasing.Unlock()
	var out api.InventoryImport
	// 1. The document as such.
	next, err := verify.ParseInventory(in.Document, o.trust.provider, o.trust.makers, o.now())
	if err != nil {
		return nil, out, documentRefused("inventory: %v", err)
	}
	if err := comparePublished(next.Digest(), in.SHA256); err != nil {
		return nil, out, err
	}
	// 2. Against the one that counts. The ledger holds the version too, in the same
	// transaction that stores the document.
	b := o.basis()
	switch now := b.inventory; {
	case next.Provider() != now.Provider():
		return nil, out, documentRefused("it is the inventory of provider %q, this installation's is %q", next.Provider(), now.Provider())
	case next.Version() < now.Version():
		return nil, out, documentRefused("version %d is older than %d, which counts: a host that was struck out since would stand in it", next.Version(), now.Version())
	case next.Version() == now.Version() && next.Digest() != now.Digest():
		return nil, out, documentRefused("version %d has sha256 %s here and %s there: the provider has signed two documents of one version, and has to say which is its own",
			next.Version(), now.Digest(), next.Digest())
	}
	out.Before, out.Changes, out.Alerts = b.inventory.Version(), compareHosts(b.inventory, next), []api.Alert{}
	if next.Digest() == b.inventory.Digest() {
		return next, out, nil
	}
	err = o.rebase(ctx, next, b.platforms, func(t *ledger.Tx) error {
		if err := t.Rise("inventory", int64(next.Version())); err != nil {
			return documentRefused("%v", err)
		}
		return errors.Join(o.forgetProofs(t, out.Changes), o.storeInventory(t, next, in.Document, by))
	})
	o.zones.journalled()
	if err != nil {
		return nil, out, err
	}
	// 3. Whoever runs on what it dropped.
	out.Alerts, err = o.review(ctx, "")
	return next, out, err
}

// compareHosts lists in what two inventories differ, in the order of the documents.
func compareHosts(before, after *verify.Inventory) []api.HostChange {
	changes := []api.HostChange{}
	for _, s := range after.Hosts() {
		old, ok := before.Host(s.Host.Name)
		switch {
		case !ok:
			changes = append(changes, api.HostChange{Host: s.Host.Name, What: "new"})
		case old.Keys() != s.Keys():
			changes = append(changes, api.HostChange{Host: s.Host.Name, What: "keys"})
		case old.Host.API != s.Host.API || old.Host.Software != s.Host.Software || old.Host.Location != s.Host.Location || old.Host.Asset != s.Host.Asset ||
			len(old.Problems) != len(s.Problems):
			changes = append(changes, api.HostChange{Host: s.Host.Name, What: "facts"})
		}
	}
	for _, s := range before.Hosts() {
		if _, ok := after.Host(s.Host.Name); !ok {
			changes = append(changes, api.HostChange{Host: s.Host.Name, What: "gone"})
		}
	}
	return changes
}

// forgetProofs has hosts that are new, changed or gone prove their keys again.
func (o *Orchestrator) forgetProofs(t *ledger.Tx, changes []api.HostChange) error {
	for _, c := range changes {
		state, err := t.Host(c.Host)
		if err != nil {
			return err
		}
		if state.Activated.IsZero() {
			continue
		}
		state.Activated = digest.SHA256{}
		if err := t.PutHost(c.Host, state); err != nil {
			return err
		}
	}
	return nil
}

// activateSome challenges the hosts whose keys are not proved, those that failed before as
// well: an import of the same version again is how an operator has them tried again.
func (o *Orchestrator) activateSome(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, activationWait)
	defer cancel()
	turns := make(chan struct{}, activationsOnce)
	var asked sync.WaitGroup
	for name := range o.basis().hosts {
		turns <- struct{}{}
		asked.Go(func() {
			defer func() { <-turns }()
			_ = o.ensureActivated(ctx, name) // the ledger has the answer
		})
	}
	asked.Wait()
}

// inventories lists the versions without their hosts.
func (o *Orchestrator) inventories(ctx context.Context) ([]api.Inventory, error) {
	list := []api.Inventory{}
	err := o.ledger.Read(ctx, func(t *ledger.Tx) error {
		docs, err := t.Documents(ledger.InventoryDocument)
		if err != nil {
			return err
		}
		for _, d := range docs {
			inv, _, err := o.inventoryView(d)
			if err != nil {
				return err
			}
			list = append(list, inv)
		}
		return nil
	})
	return list, err
}

// inventoryVersion is one version with its hosts; 0 is the one that counts.
func (o *Orchestrator) inventoryVersion(ctx context.Context, version int) (out api.Inventory, err error) {
	if version == 0 {
		version = o.basis().inventory.Version()
	}
	err = o.ledger.Read(ctx, func(t *ledger.Tx) error {
		d, err := t.Inventory(version)
		if errors.Is(err, ledger.ErrNotFound) {
			return event.Refuse(event.UnknownDocument, "inventory version %d was not imported", version)
		}
		if err != nil {
			return err
		}
		var doc inventory.Inventory
		if out, doc, err = o.inventoryView(d); err != nil {
			return err
		}
		out.Hosts = []api.HostEntry{}
		for _, h := range doc.Hosts {
			entry := api.HostEntry{Name: h.Name, API: h.API, Location: h.Location, Asset: h.Asset, Software: h.Software,
				EK: digest.Of(h.EK), AIK: digest.Of(h.AIK), Session: digest.Of(h.Session)}
			found, err := t.HostKeys(h.Name, verify.Standing{Host: h}.Keys())
			if err == nil {
				entry.Keys, entry.Reason, entry.Checked = found.State, found.Reason, found.Checked
			} else if !errors.Is(err, ledger.ErrNotFound) {
				return err
			}
			out.Hosts = append(out.Hosts, entry)
		}
		return nil
	})
	return out, err
}

// inventoryView decodes a stored inventory, whose signature was verified when it came.
func (o *Orchestrator) inventoryView(d ledger.Document) (api.Inventory, inventory.Inventory, error) {
	var env signed.Envelope
	var doc inventory.Inventory
	err := strictjson.Unmarshal(d.Envelope, &env)
	if err == nil {
		err = strictjson.Unmarshal(env.Payload, &doc)
	}
	if err != nil {
		return api.Inventory{}, doc, fmt.Errorf("stored inventory %s: %w", strconv.Itoa(d.Version), err)
	}
	return api.Inventory{Version: doc.Version, SHA256: d.SHA256, Provider: doc.Provider, Issued: doc.Issued, Expires: doc.Expires, Imported: d.Imported,
		ImportedBy: d.ImportedBy, Current: d.SHA256 == o.basis().inventory.Digest(), HostCount: len(doc.Hosts)}, doc, nil
}

// ImportPlatform takes reference values into use beside those that count, from their own
// beginning to their own end.
func (o *Orchestrator) ImportPlatform(ctx context.Context, in api.ImportDocument, by string) (api.Platform, error) {
	ctx = context.WithoutCancel(ctx)
	o.rebasing.Lock()
	defer o.rebasing.Unlock()
	p, err := verify.StoredPlatform(in.Document, o.trust.platform, o.conf.Profile, o.now())
	if err != nil {
		return api.Platform{}, documentRefused("reference values: %v", err)
	}
	if err := comparePublished(p.Digest(), in.SHA256); err != nil {
		return api.Platform{}, err
	}
	if until := p.Manifest().ValidUntil; !until.After(o.now()) || !until.After(p.Manifest().ValidFrom) {
		return api.Platform{}, documentRefused("reference values: they ended at %s", until.UTC().Format(time.RFC3339))
	}
	var known ledger.Document
	err = o.ledger.Read(ctx, func(t *ledger.Tx) (err error) {
		known, err = t.Document(ledger.PlatformDocument, p.Digest())
		return err
	})
	switch {
	case err == nil && !known.Withdrawn.IsZero():
		return api.Platform{}, documentRefused("these reference values were withdrawn at %s by %s: %s; if they shall count again, have them signed with another beginning",
			known.Withdrawn.Format(time.RFC3339), known.WithdrawnBy, known.Why)
	case err == nil:
		return o.platform(ctx, p.Digest())
	case !errors.Is(err, ledger.ErrNotFound):
		return api.Platform{}, err
	}
	b := o.basis()
	err = o.rebase(ctx, b.inventory, append([]*verify.Platform{p}, b.platforms...), func(t *ledger.Tx) error {
		return o.storePlatform(t, p, in.Document, by)
	})
	o.zones.journalled()
	if err != nil {
		return api.Platform{}, err
	}
	return o.platform(ctx, p.Digest())
}

// WithdrawPlatform makes reference values count no more, from the next decision on. VMs
// whose last verdict rests on them are told of; their hosts' next quotes decide.
func (o *Orchestrator) WithdrawPlatform(ctx context.Context, sum digest.SHA256, why, by string) (api.Platform, error) {
	ctx = context.WithoutCancel(ctx)
	if why == "" || len(why) > maxText {
		return api.Platform{}, event.Refuse(event.BadRequest, "why: want 1 to %d bytes", maxText)
	}
	o.rebasing.Lock()
	defer o.rebasing.Unlock()
	b := o.basis()
	left := slices.DeleteFunc(slices.Clone(b.platforms), func(p *verify.Platform) bool { return p.Digest() == sum })
	done := false
	err := o.rebase(ctx, b.inventory, left, func(t *ledger.Tx) error {
		if _, err := t.Document(ledger.PlatformDocument, sum); errors.Is(err, ledger.ErrNotFound) {
			return event.Refuse(event.UnknownDocument, "reference values with sha256 %s were not imported", sum)
		} else if err != nil {
			return err
		}
		var err error
		if done, err = t.WithdrawDocument(ledger.PlatformDocument, sum, by, why); err != nil || !done {
			return err
		}
		return t.Journal(event.Event{Kind: "platform.withdrawn", Detail: map[string]string{"sha256": sum.String(), "by": by, "why": why}})
	})
	o.zones.journalled()
	if err != nil {
		return api.Platform{}, err
	}
	var alerts []api.Alert
	if done {
		if alerts, err = o.review(ctx, ""); err != nil {
			return api.Platform{}, err
		}
	}
	p, err := o.platform(ctx, sum)
	p.Alerts = alerts
	return p, err
}

// platforms lists the reference values that were imported, newest first.
func (o *Orchestrator) platforms(ctx context.Context) ([]api.Platform, error) {
	list, b := []api.Platform{}, o.basis()
	err := o.ledger.Read(ctx, func(t *ledger.Tx) error {
		docs, err := t.Documents(ledger.PlatformDocument)
		if err != nil {
			return err
		}
		rest := map[digest.SHA256]int{}
		err = eachRunning(t, func(_ ledger.Reservation, s ledger.Start) error { rest[s.Manifest]++; return nil })
		if err != nil {
			return err
		}
		for _, d := range docs {
			var env signed.Envelope
			var doc platform.Manifest
			err := strictjson.Unmarshal(d.Envelope, &env)
			if err == nil {
				err = strictjson.Unmarshal(env.Payload, &doc)
			}
			if err != nil {
				return fmt.Errorf("stored reference values %s: %w", d.SHA256, err)
			}
			list = append(list, api.Platform{SHA256: d.SHA256, Release: doc.Name, Profile: doc.Profile, ValidFrom: doc.ValidFrom, ValidUntil: doc.ValidUntil,
				Imported: d.Imported, ImportedBy: d.ImportedBy, Withdrawn: d.Withdrawn, WithdrawnBy: d.WithdrawnBy, Why: d.Why, Counts: b.counts(d.SHA256), VMs: rest[d.SHA256]})
		}
		return nil
	})
	return list, err
}

func (o *Orchestrator) platform(ctx context.Context, sum digest.SHA256) (api.Platform, error) {
	list, err := o.platforms(ctx)
	for _, p := range list {
		if p.SHA256 == sum {
			return p, err
		}
	}
	return api.Platform{}, errors.Join(err, event.Refuse(event.UnknownDocument, "reference values with sha256 %s were not imported", sum))
}
