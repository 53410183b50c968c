package host

import (
	"errors"
	"io/fs"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"

	"foothold/internal/durable"
	"foothold/protocol/event"
	"foothold/protocol/hostapi"
	"foothold/provider/broker"
)

// maxSessionKey bounds a tenant's wrapped session key in bytes.
const maxSessionKey = 4 << 10

func (a *Agent) sessionKeyPath(tenant string) string {
	return filepath.Join(a.conf.State, "sessionkeys", tenant+".json")
}

// restoreSessionKeys takes back what tenants gave a predecessor. A key that the TPM does
// not take is no loss: its tenant gives it before each start of a VM.
func (a *Agent) restoreSessionKeys() {
	for _, t := range a.conf.Tenants {
		wrapped, err := readUpTo(a.sessionKeyPath(t.Tenant), maxSessionKey)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = a.broker.Restore(t.Tenant, wrapped)
		}
		if err != nil {
			slog.Warn("a tenant's session key was not taken back", "tenant", t.Tenant, "error", err)
		}
	}
}

func (a *Agent) callPutSessionKey(r *http.Request, tenant string) (any, error) {
	var req hostapi.MigratedKey
	if err := read(r, &req); err != nil {
		return nil, err
	}
	wrapped, err := a.broker.Import(r.Context(), tenant, req)
	if errors.Is(err, broker.ErrFailed) || errors.Is(err, broker.ErrBusy) {
		return nil, tpmError(err)
	}
	if err != nil {
		return nil, event.Refuse(event.BadRequest, "%v", err)
	}
	path := a.sessionKeyPath(tenant)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, diskFull("store session key", err)
	}
	// A crash before this loses the key with the process; the tenant gives it again.
	return struct{}{}, diskFull("store session key", durable.WriteFile(path, wrapped, 0o600))
}
