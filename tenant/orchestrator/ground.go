package orchestrator

import (
	"context"
	"crypto/subtle"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"

	"foothold/internal/secret"
	"foothold/internal/tpm"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/hostapi"
	"foothold/protocol/inventory"
	"foothold/tenant/ledger"
)

// activateAll asks every inventoried host at the start, so that the first VM need not
// wait for it. A host that does not answer is asked again before it gets a VM.
func (o *Orchestrator) activateAll(ctx context.Context) {
	for name := range o.hosts {
		if err := o.ensureActivated(ctx, name); err != nil && ctx.Err() == nil {
			slog.Warn("host's attestation key not proved yet", "host", name, "error", err)
		}
	}
}

// ensureActivated is the tenant's part of act 0: it has the host's TPM prove, by
// credential activation, that the inventory's AIK lies in the TPM of the endorsement
// certificate beside it. It asks once for each AIK; the answer is in the ledger.
func (o *Orchestrator) ensureActivated(ctx context.Context, name string) error {
	standing, ok := o.inventory.Host(name)
	if !ok || len(standing.Problems) > 0 {
		return event.Refuse(event.NoHost, "host %s is not in the inventory with its keys in order", name)
	}
	aik := digest.Of(standing.Host.AIK)
	var state ledger.HostState
	if err := o.ledger.Read(ctx, func(t *ledger.Tx) (err error) { state, err = t.Host(name); return err }); err != nil {
		return err
	}
	if state.Activated == aik {
		return nil
	}
	if err := o.activate(ctx, standing.Host); err != nil {
		return err
	}
	err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		state, err := t.Host(name)
		if err != nil {
			return err
		}
		state.Activated = aik
		return errors.Join(t.PutHost(name, state), t.Journal(event.Event{Kind: "host.key-proved", Detail: map[string]string{"host": name, "aik": aik.String()}}))
	})
	o.zones.journalled()
	return err
}

func (o *Orchestrator) activate(ctx context.Context, h inventory.Host) error {
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
	client, err := o.host(h.Name)
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
