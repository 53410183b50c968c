package broker

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"

	"foothold/internal/strictjson"
	"foothold/internal/tpm"
	"foothold/protocol/hostapi"

	"github.com/google/go-tpm/tpm2"
)

// ownKey is a tenant's migrated key, as this TPM has wrapped it under the session key.
type ownKey struct {
	Public  []byte `json:"public"`  // TPMT_PUBLIC
	Private []byte `json:"private"` // TPM2B_PRIVATE's buffer
}

// Import takes a tenant's own key, in place of one that it had. The sessions of that
// tenant's VMs, and of no other's, may be salted to it. It returns what [Broker.Restore]
// takes after a restart; only this TPM can open that.
func (b *Broker) Import(ctx context.Context, tenant string, m hostapi.MigratedKey) (wrapped []byte, err error) {
	public, err := tpm.ParsePublic(m.Public)
	if err != nil {
		return nil, fmt.Errorf("import session key: %w", err)
	}
	err = b.apart(ctx, tenant, func() error {
		private, err := tpm.Import(b.dev, b.session, public, m.Duplicate, m.Seed)
		if err != nil {
			return err
		}
		key := ownKey{m.Public, private}
		if wrapped, err = json.Marshal(key); err != nil {
			return fmt.Errorf("import session key: %w", err)
		}
		b.own[tenant] = key
		return nil
	})
	return wrapped, err
}

// Restore takes back what Import returned, of this TPM.
func (b *Broker) Restore(tenant string, wrapped []byte) error {
	var key ownKey
	if err := strictjson.Unmarshal(wrapped, &key); err != nil {
		return fmt.Errorf("restore session key of %s: %w", tenant, err)
	}
	return b.alone(func() error {
		loaded, err := b.loadOwn(key)
		if err != nil {
			return fmt.Errorf("restore session key of %s: %w", tenant, err)
		}
		if _, err := (tpm2.FlushContext{FlushHandle: loaded.Handle}).Execute(b.dev); err != nil {
			return fmt.Errorf("restore session key of %s: %w", tenant, err)
		}
		b.own[tenant] = key
		return nil
	})
}

// hasOwn reports whether the tenant has a key of its own here.
func (b *Broker) hasOwn(tenant string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, ok := b.own[tenant]
	return ok
}

// loadOwn must be called with mu held; the caller flushes the key.
func (b *Broker) loadOwn(key ownKey) (tpm.Key, error) {
	public, err := tpm.ParsePublic(key.Public)
	if err != nil {
		return tpm.Key{}, err
	}
	if err := tpm.CheckMigrated(public); err != nil {
		return tpm.Key{}, err
	}
	return tpm.Load(b.dev, b.session, public, key.Private)
}

// startOwn passes the start of a session that is salted to the tenant's own key, for the
// time of which the key is in the TPM. The command names it by inventory.TenantHandle. It
// must be called with mu held.
func (b *Broker) startOwn(tenant string, command []byte) (response []byte, err error) {
	key, err := b.loadOwn(b.own[tenant])
	if err != nil {
		return nil, err
	}
	defer func() {
		if _, ferr := (tpm2.FlushContext{FlushHandle: key.Handle}).Execute(b.dev); ferr != nil {
			b.fail()
			err = errors.Join(err, ferr)
		}
	}()
	named := append([]byte(nil), command...)
	binary.BigEndian.PutUint32(named[10:], uint32(key.Handle)) // tpmKey, the first handle
	if response, err = b.dev.Send(named); err != nil {
		return nil, fmt.Errorf("forward TPM command: %w", err)
	}
	return response, nil
}
