package bootserver

import (
	"sync"

	"foothold/internal/tpm"
	"foothold/protocol/event"
	"foothold/protocol/inventory"

	"github.com/google/go-tpm/tpm2"
)

// maxKeys bounds the hosts whose keys are remembered; a provider has fewer behind one boot
// server, and beyond it they are read anew.
const maxKeys = 4096

// keyring reads the keys of hosts, which come from the tenant and never from the bus. It remembers those that it found good, by all their bytes, because every VM of
// a host brings the same. Its zero value is empty.
type keyring struct {
	mu    sync.Mutex
	known map[rawKeys]*hostKeys // guarded by mu
}

// rawKeys are the encoded public areas.
type rawKeys struct {
	aik, session string
	own          bool
}

// hostKeys are never changed.
type hostKeys struct {
	name    tpm2.TPM2BName // of the attestation key
	session tpm2.TPMTPublic
	salt    tpm2.TPMHandle // by which the host knows session
}

// read decodes and checks both keys; the session key is the inventory's or the tenant's own.
func (k *keyring) read(aik, session []byte, own bool) (*hostKeys, error) {
	raw := rawKeys{string(aik), string(session), own}
	k.mu.Lock()
	keys, ok := k.known[raw]
	k.mu.Unlock()
	if ok {
		return keys, nil
	}
	keys, err := readKeys(aik, session, own)
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.known == nil || len(k.known) >= maxKeys {
		k.known = map[rawKeys]*hostKeys{}
	}
	k.known[raw] = keys
	return keys, nil
}

func readKeys(rawAIK, rawSession []byte, own bool) (*hostKeys, error) {
	aik, err := tpm.ParsePublic(rawAIK)
	if err == nil {
		err = tpm.CheckAIK(aik)
	}
	if err != nil {
		return nil, event.Refuse(event.BootServerFailed, "inventoried AIK: %v", err)
	}
	check, salt := tpm.CheckSession, tpm2.TPMHandle(inventory.SessionHandle)
	if own {
		check, salt = tpm.CheckMigrated, tpm2.TPMHandle(inventory.TenantHandle)
	}
	session, err := tpm.ParsePublic(rawSession)
	if err == nil {
		err = check(session)
	}
	if err != nil {
		return nil, event.Refuse(event.BootServerFailed, "session key: %v", err)
	}
	name, err := tpm2.ObjectName(aik)
	if err != nil {
		return nil, event.Refuse(event.BootServerFailed, "inventoried AIK: %v", err)
	}
	return &hostKeys{name: *name, session: *session, salt: salt}, nil
}
