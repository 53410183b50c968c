package orchestrator

import (
	"context"
	"errors"
	"fmt"

	"foothold/internal/secret"
	"foothold/internal/tpm"
	"foothold/protocol/event"
	"foothold/protocol/hostapi"
	"foothold/tenant/hostclient"
	"foothold/tenant/vault"

	"github.com/google/go-tpm/tpm2"
)

// sessionKeyName is the vault's name of our own session key.
const sessionKeyName = "session-key"

// ownKey is the key that boot sessions are salted to where the configuration asks for one
// of our own: known to this vault and to each TPM that it was encrypted to.
type ownKey struct {
	key    secret.Bytes
	public []byte // TPMT_PUBLIC
}

// readOwnKey makes the key at the first start that asks for it.
func (o *Orchestrator) readOwnKey() error {
	if !o.conf.OwnSessionKey {
		return nil
	}
	fresh, err := tpm.NewMigrated()
	if err != nil {
		return err
	}
	defer fresh.Wipe()
	if err := o.vault.Put(sessionKeyName, fresh); err != nil && !errors.Is(err, vault.ErrExists) {
		return fmt.Errorf("store session key: %w", err)
	}
	own := &ownKey{}
	if own.key, err = o.vault.Get(sessionKeyName); err != nil {
		return fmt.Errorf("read session key: %w", err)
	}
	public, err := tpm.MigratedPublic(own.key)
	if err != nil {
		return err
	}
	own.public, o.own = tpm2.Marshal(public), own
	return nil
}

// giveOwnKey has the host's TPM take our key, before each start of a VM there: it is
// encrypted to the session key that the host's AIK has certified, of our inventory. Whoever
// passes it on can neither read nor exchange it: a session that is salted to it works with
// that TPM alone.
func (o *Orchestrator) giveOwnKey(ctx context.Context, h *hostclient.Client, name string) error {
	if o.own == nil {
		return nil
	}
	standing, ok := o.basis().inventory.Host(name)
	if !ok || len(standing.Problems) > 0 {
		return event.Refuse(event.NoHost, "host %s is not in the inventory with its keys in order", name)
	}
	parent, err := tpm.ParsePublic(standing.Host.Session)
	if err != nil {
		return event.Refuse(event.NoHost, "host %s: its session key is malformed", name)
	}
	m := hostapi.MigratedKey{Public: o.own.public}
	if m.Duplicate, m.Seed, err = tpm.Duplicate(parent, o.own.key); err != nil {
		return err
	}
	if err := h.PutSessionKey(ctx, m); err != nil {
		return fmt.Errorf("give host %s our session key: %w", name, err)
	}
	return nil
}
