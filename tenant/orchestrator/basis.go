package orchestrator

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"strconv"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/tenant/hostclient"
	"foothold/tenant/ledger"
	"foothold/tenant/verify"
)

// byConfiguration stands in the ledger for who imported what the configuration names.
const byConfiguration = "configuration"

// basis is what hosts are judged by: the inventory, the reference values, and a client of
// each host. It is immutable; a document that is imported or withdrawn makes another.
// Every decision takes one basis, and what it stores it stores only while that basis is
// the current one (see keepVerdict): so no verdict outlives unseen what it rests on.
type basis struct {
	inventory *verify.Inventory
	platforms []*verify.Platform // that were not withdrawn
	verifier  *verify.Verifier
	now       func() time.Time
	hosts     map[string]*hostclient.Client // of the inventory
	former    map[string]*hostclient.Client // of earlier ones alone: to have VMs destroyed there
}

// trust is what the configuration names to check documents and hosts by.
type trust struct {
	provider ed25519.PublicKey // signs inventories
	platform ed25519.PublicKey // signs reference values
	makers   *verify.Manufacturers
	cert     tls.Certificate // towards hosts
	servers  *x509.CertPool  // the provider's authority
}

func (o *Orchestrator) readTrust() (err error) {
	if o.trust.provider, err = publicKey(o.conf.InventoryKey); err != nil {
		return fmt.Errorf("inventory_key: %w", err)
	}
	if o.trust.platform, err = publicKey(o.conf.PlatformKey); err != nil {
		return fmt.Errorf("platform_key: %w", err)
	}
	if o.trust.makers, err = verify.OpenManufacturers(o.conf.TPMRoots); err != nil {
		return fmt.Errorf("tpm_roots: %w", err)
	}
	o.trust.cert, o.trust.servers, err = loadTLS(o.conf.HostTLS, "host_tls")
	return err
}

// basis is the current one.
func (o *Orchestrator) basis() *basis { return o.current.Load() }

// host returns the client of an inventoried host.
func (b *basis) host(name string) (*hostclient.Client, error) {
	c, ok := b.hosts[name]
	if !ok {
		return nil, event.Refuse(event.NoHost, "host %q is not in the inventory", name)
	}
	return c, nil
}

// host returns the client of a host of the current inventory.
func (o *Orchestrator) host(name string) (*hostclient.Client, error) { return o.basis().host(name) }

// reach is host also for one that the inventory does not list any more: what runs there is
// still to be destroyed.
func (o *Orchestrator) reach(name string) (*hostclient.Client, error) {
	b := o.basis()
	if c, ok := b.former[name]; ok {
		return c, nil
	}
	return b.host(name)
}

// openBasis takes up the newest documents that were imported. Those that the configuration
// names are the first ones: they are imported unless the ledger knows them, or has a newer
// inventory.
func (o *Orchestrator) openBasis(ctx context.Context) error {
	o.rebasing.Lock()
	defer o.rebasing.Unlock()
	inv, firstInventory, err := o.openInventory(ctx)
	if err != nil {
		return err
	}
	platforms, firstPlatform, err := o.openPlatforms(ctx)
	if err != nil {
		return err
	}
	return o.rebase(ctx, inv, platforms, func(t *ledger.Tx) error {
		if err := t.Rise("inventory", int64(inv.Version())); err != nil {
			return fmt.Errorf("inventory %s: %w", o.conf.Inventory, err)
		}
		var errs []error
		if firstInventory != nil {
			errs = append(errs, o.storeInventory(t, inv, firstInventory, byConfiguration))
		}
		if firstPlatform != nil {
			errs = append(errs, o.storePlatform(t, platforms[0], firstPlatform, byConfiguration))
		}
		errs = append(errs, t.Journal(event.Event{Kind: "inventory.read", Detail: map[string]string{
			"version": strconv.Itoa(inv.Version()), "sha256": inv.Digest().String()}}))
		return errors.Join(errs...)
	})
}

// openInventory finds the inventory to begin with: the newest stored one, or the
// configuration's, whose bytes come back if they are to be stored.
func (o *Orchestrator) openInventory(ctx context.Context) (inv *verify.Inventory, first []byte, err error) {
	var newest ledger.Document
	err = o.ledger.Read(ctx, func(t *ledger.Tx) (err error) { newest, err = t.NewestInventory(); return err })
	if err != nil && !errors.Is(err, ledger.ErrNotFound) {
		return nil, nil, err
	}
	var stored *verify.Inventory
	if err == nil {
		if stored, err = verify.StoredInventory(newest.Envelope, o.trust.provider, o.trust.makers, o.now()); err != nil {
			slog.Warn("the newest imported inventory counts no more", "version", newest.Version, "error", err) // the configuration has another key
			stored = nil
		}
	}
	named := func(err error) error { return fmt.Errorf("open inventory %s: %w", o.conf.Inventory, err) }
	data, err := readDocument(o.conf.Inventory)
	if err == nil {
		inv, err = verify.ParseInventory(data, o.trust.provider, o.trust.makers, o.now())
	}
	switch {
	case err != nil && stored == nil:
		return nil, nil, named(err)
	case err != nil:
		slog.Warn("the configuration's inventory is not read; the newest imported one counts", "error", named(err))
		return stored, nil, nil
	case stored == nil || inv.Version() > stored.Version():
		return inv, data, nil
	case inv.Version() == stored.Version() && inv.Digest() != stored.Digest():
		return nil, nil, named(fmt.Errorf("its version %d has sha256 %s, and another one with sha256 %s was imported: the provider has to say which is its own", inv.Version(), inv.Digest(), stored.Digest()))
	}
	return stored, nil, nil
}

// openPlatforms lists the reference values that were not withdrawn. If the configuration's
// are to be stored, they are the first of the list and their bytes come back.
func (o *Orchestrator) openPlatforms(ctx context.Context) (list []*verify.Platform, first []byte, err error) {
	var docs []ledger.Document
	if err := o.ledger.Read(ctx, func(t *ledger.Tx) (err error) { docs, err = t.Documents(ledger.PlatformDocument); return err }); err != nil {
		return nil, nil, err
	}
	known := map[digest.SHA256]bool{}
	for _, d := range docs {
		known[d.SHA256] = true
		if !d.Withdrawn.IsZero() {
			continue
		}
		p, err := verify.StoredPlatform(d.Envelope, o.trust.platform, o.conf.Profile, o.now())
		if err != nil {
			slog.Warn("imported reference values count no more", "sha256", d.SHA256.String(), "error", err)
			continue
		}
		list = append(list, p)
	}
	data, err := readDocument(o.conf.Platform)
	var p *verify.Platform
	if err == nil {
		p, err = verify.StoredPlatform(data, o.trust.platform, o.conf.Profile, o.now())
	}
	if err == nil && known[p.Digest()] {
		return list, nil, nil
	}
	if err == nil {
		err = p.InForce(o.now())
	}
	switch {
	case err != nil && len(docs) == 0:
		return nil, nil, fmt.Errorf("open reference values %s: %w", o.conf.Platform, err)
	case err != nil:
		slog.Warn("the configuration's reference values are not read; the imported ones count", "file", o.conf.Platform, "error", err)
		return list, nil, nil
	}
	return append([]*verify.Platform{p}, list...), data, nil
}

// rebase makes a basis of these documents the current one, once store has recorded them. A
// crash in between is none: the next start reads what was recorded. The caller holds
// rebasing.
func (o *Orchestrator) rebase(ctx context.Context, inv *verify.Inventory, platforms []*verify.Platform, store func(*ledger.Tx) error) error {
	next := &basis{inventory: inv, platforms: platforms, now: o.now, hosts: map[string]*hostclient.Client{}, former: map[string]*hostclient.Client{}}
	var err error
	if next.verifier, err = verify.New(verify.Config{Inventory: inv, Platforms: append([]*verify.Platform{}, platforms...), Profile: o.conf.Profile, Policies: o.conf.HostPolicy, Now: o.now}); err != nil {
		return err
	}
	for _, s := range inv.Hosts() {
		next.hosts[s.Host.Name] = o.client(s.Host.Name, s.Host.API)
	}
	err = o.ledger.Write(ctx, func(t *ledger.Tx) error {
		clear(next.former)
		if err := store(t); err != nil {
			return err
		}
		seen, err := t.AllHostKeys()
		if err != nil {
			return err
		}
		for _, k := range seen {
			at, err := netip.ParseAddrPort(k.API)
			if err == nil && next.hosts[k.Host] == nil && next.former[k.Host] == nil {
				next.former[k.Host] = o.client(k.Host, at)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	o.current.Store(next)
	return nil
}

// client makes a client of one host, or takes the one that there is: its connections stand.
func (o *Orchestrator) client(name string, at netip.AddrPort) *hostclient.Client {
	if b := o.basis(); b != nil {
		for _, had := range []*hostclient.Client{b.hosts[name], b.former[name]} {
			if had != nil && had.Address() == at {
				return had
			}
		}
	}
	return hostclient.New(name, at, o.trust.cert, o.trust.servers)
}

// storeInventory records an inventory, and what its hosts' entries alone say of their keys.
func (o *Orchestrator) storeInventory(t *ledger.Tx, inv *verify.Inventory, data []byte, by string) error {
	errs := []error{
		t.AddDocument(ledger.Document{Kind: ledger.InventoryDocument, SHA256: inv.Digest(), Version: inv.Version(), Envelope: data, ImportedBy: by}),
		t.Journal(event.Event{Kind: "inventory.imported", Detail: map[string]string{"version": strconv.Itoa(inv.Version()), "sha256": inv.Digest().String(), "by": by}}),
	}
	for _, s := range inv.Hosts() {
		errs = append(errs, o.examined(t, inv, s))
	}
	return errors.Join(errs...)
}

// storePlatform records reference values.
func (o *Orchestrator) storePlatform(t *ledger.Tx, p *verify.Platform, data []byte, by string) error {
	return errors.Join(
		t.AddDocument(ledger.Document{Kind: ledger.PlatformDocument, SHA256: p.Digest(), Envelope: data, ImportedBy: by}),
		t.Journal(event.Event{Kind: "platform.imported", Detail: map[string]string{"release": p.Manifest().Name, "sha256": p.Digest().String(), "by": by,
			"from": p.Manifest().ValidFrom.UTC().Format(time.RFC3339), "until": p.Manifest().ValidUntil.UTC().Format(time.RFC3339)}}))
}

func readDocument(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxDocument+1))
	if err == nil && len(data) > maxDocument {
		err = fmt.Errorf("it has more than %d bytes", maxDocument)
	}
	return data, err
}
