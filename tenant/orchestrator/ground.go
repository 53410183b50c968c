package orchestrator

import (
	"context"
	"crypto/subtle"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"foothold/internal/secret"
	"foothold/internal/tpm"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/hostapi"
	"foothold/protocol/inventory"
	"foothold/tenant/ledger"
	"foothold/tenant/verify"
)

// proveEvery lies between challenges of a host whose keys are not proved.
const proveEvery = time.Minute

// servedOnce is how many hosts are asked in one round which inventory they serve.
const servedOnce = 3

// keepProving asks every inventoried host whose keys are not proved, at the start and from
// then on, so that its first VM need not wait for it. One that did not answer, or failed,
// is asked again: its TPM may have been busy, or the provider has mended it. And it asks a
// few, others each time, which inventory they serve.
func (o *Orchestrator) keepProving(ctx context.Context) {
	told := newTold()
	for {
		o.activateAll(ctx)
		o.compareServed(ctx, told)
		if pause(ctx, proveEvery) != nil {
			return
		}
	}
}

func (o *Orchestrator) activateAll(ctx context.Context) {
	for name, h := range o.basis().hosts {
		if err := o.ensureActivated(ctx, name); err != nil && ctx.Err() == nil {
			slog.Warn("host's attestation key not proved yet", "host", name, "address", h.Address(), "error", err)
		}
	}
}

// told is what was told of inventories that hosts serve: each once, and of one host a few
// in this process, so that one that makes them up fills no journal.
type told struct {
	served map[hostapi.InventoryDigest]bool
	by     map[string]int
}

const toldByHost = 3

func newTold() *told { return &told{map[hostapi.InventoryDigest]bool{}, map[string]int{}} }

// before reports whether it was told, or is not to be, and notes it.
func (t *told) before(host string, d hostapi.InventoryDigest) bool {
	if t.served[d] || t.by[host] >= toldByHost {
		return true
	}
	t.served[d] = true
	t.by[host]++
	return false
}

// compareServed journals, once each, that hosts serve a newer inventory than counts here, or
// another of the same version: it was not imported yet, this state was put back from a copy,
// or the provider tells two stories. It is the hosts' word, and changes nothing.
func (o *Orchestrator) compareServed(ctx context.Context, told *told) {
	b, asked := o.basis(), 0
	for name, h := range b.hosts {
		if asked++; asked > servedOnce {
			return
		}
		served, err := h.InventoryDigest(ctx)
		if err != nil {
			slog.Debug("ask for the inventory's digest", "host", name, "error", err)
			continue
		}
		if served.Version < b.inventory.Version() || served.SHA256 == b.inventory.Digest() || told.before(name, served) {
			continue
		}
		kind := "inventory.newer-served"
		if served.Version == b.inventory.Version() {
			kind = "inventory.other-served"
		}
		o.journal(ctx, event.Event{Kind: kind, Detail: map[string]string{"host": name, "version": strconv.Itoa(served.Version), "sha256": served.SHA256.String(),
			"counts": strconv.Itoa(b.inventory.Version())}})
	}
}

// ensureActivated is the tenant's part of act 0: it has the host's TPM prove, by
// credential activation, that the inventory's AIK lies in the TPM of the endorsement
// certificate beside it. It asks once for the keys of each host; the answer is in the
// ledger, a failure as well.
func (o *Orchestrator) ensureActivated(ctx context.Context, name string) error {
	b := o.basis()
	standing, ok := b.inventory.Host(name)
	if !ok || len(standing.Problems) > 0 {
		return event.Refuse(event.NoHost, "host %s is not in the inventory with its keys in order", name)
	}
	var state ledger.HostState
	if err := o.ledger.Read(ctx, func(t *ledger.Tx) (err error) { state, err = t.Host(name); return err }); err != nil {
		return err
	}
	if state.Activated == standing.Keys() {
		return nil
	}
	asked := o.activate(ctx, b, standing.Host)
	if ctx.Err() != nil {
		return ctx.Err() // it says nothing of the host
	}
	err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		found := keysOf(b.inventory, standing)
		kind, reason := "host.key-proved", event.Reason("")
		found.State = ledger.KeysValidated
		if asked != nil {
			kind, reason, found.Reason = "host.key-not-proved", event.ReasonOf(asked), detailOf(asked)
			if found.State = ledger.KeysFailed; reason != event.NoHost && reason != event.HostRefused { // it did not answer
				found.State = ledger.KeysUnproved
			}
		}
		if now, ok := o.basis().inventory.Host(name); !ok || now.Keys() != standing.Keys() {
			return event.Refuse(event.NoHost, "the keys of host %s have changed", name)
		}
		state, err := t.Host(name)
		if err != nil {
			return err
		}
		if asked != nil && state.Activated == standing.Keys() {
			asked = nil // another challenge at the same time was answered
			return nil
		}
		if state.Activated = (digest.SHA256{}); asked == nil {
			state.Activated = standing.Keys()
		}
		was, err := t.HostKeys(name, found.Keys)
		if err != nil && !errors.Is(err, ledger.ErrNotFound) {
			return err
		}
		stored := errors.Join(t.PutHost(name, state), t.PutHostKeys(found))
		if asked != nil && was.State == found.State && was.Reason == found.Reason {
			return stored // that is in the journal
		}
		return errors.Join(stored, t.Journal(event.Event{Kind: kind, Reason: reason, Detail: map[string]string{"host": name, "aik": found.AIK.String(), "detail": found.Reason}}))
	})
	o.zones.journalled()
	return errors.Join(asked, err)
}

// keysOf is a host's keys as an inventory names them, not proved yet.
func keysOf(inv *verify.Inventory, s verify.Standing) ledger.HostKeys {
	return ledger.HostKeys{Host: s.Host.Name, Keys: s.Keys(), AIK: digest.Of(s.Host.AIK), API: s.Host.API.String(), Inventory: inv.Version(), State: ledger.KeysUnproved}
}

// examined records what a host's entry alone says of its keys. What its TPM has proved
// before it need not prove again.
func (o *Orchestrator) examined(t *ledger.Tx, inv *verify.Inventory, s verify.Standing) error {
	found := keysOf(inv, s)
	state, err := t.Host(s.Host.Name)
	if err != nil {
		return err
	}
	switch {
	case len(s.Problems) > 0:
		found.State, found.Reason = ledger.KeysFailed, strings.Join(s.Problems, "; ")
	case state.Activated == found.Keys:
		found.State = ledger.KeysValidated
	}
	return t.PutHostKeys(found)
}

// detailOf is what a refusal says, or the error.
func detailOf(err error) string {
	var why *event.Refusal
	if errors.As(err, &why) {
		return why.Detail
	}
	return err.Error()
}

func (o *Orchestrator) activate(ctx context.Context, b *basis, h inventory.Host) error {
	ek, err := x509.ParseCertificate(h.EK)
	if err != nil {
		return event.Refuse(event.NoHost, "host %s: its endorsement certificate is malformed", h.Name)
	}
	key, err := tpm.ParsePublic(h.AIK)
	if err != nil {
		return event.Refuse(event.NoHost, "host %s: its attestation key is malformed", h.Name)
	}
	want := secret.Random(tpm.SecretLen)
	defer want.Wipe()
	blob, encrypted, err := tpm.Challenge(ek, key, want.Reveal())
	if err != nil {
		return event.Refuse(event.NoHost, "host %s: %v", h.Name, err)
	}
	client, err := b.host(h.Name)
	if err != nil {
		return err
	}
	got, err := client.Activate(ctx, hostapi.ActivateRequest{Blob: blob, Secret: encrypted})
	if err != nil {
		return fmt.Errorf("prove the attestation key of host %s: %w", h.Name, err)
	}
	if subtle.ConstantTimeCompare(got.Credential, want.Reveal()) != 1 {
		return event.Refuse(event.NoHost, "host %s: its TPM does not hold the inventory's attestation key", h.Name)
	}
	return nil
}
