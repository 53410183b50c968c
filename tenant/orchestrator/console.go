package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"foothold/internal/durable"
	"foothold/protocol/event"
	"foothold/tenant/hostclient"
	"foothold/tenant/ledger"
)

// consoles is the folder of what VMs wrote before their end, one file a reservation.
// A host forgets a VM's console with the VM, and a VM that failed is looked at later.
const consoles = "consoles"

// consoleLimit bounds the wait for a console before a VM is destroyed: destroying
// matters more.
const consoleLimit = 3 * time.Second

func (o *Orchestrator) consoleFile(id string) string {
	return filepath.Join(o.conf.State, consoles, id)
}

// keepConsole keeps a VM's last words before its host is asked to destroy it. That it
// fails stops nothing: the VM may be gone already, or the host.
func (o *Orchestrator) keepConsole(ctx context.Context, h *hostclient.Client, r ledger.Reservation) {
	if r.Erase {
		return // its user wants nothing of it kept
	}
	ctx, cancel := context.WithTimeout(ctx, consoleLimit)
	defer cancel()
	text, err := h.Console(ctx, r.ID)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(o.consoleFile(r.ID)), 0o700)
	}
	if err == nil {
		err = durable.WriteFile(o.consoleFile(r.ID), text, 0o600)
	}
	if err != nil {
		slog.Info("the VM's console is lost", "reservation", r.ID, "error", err)
	}
}

// forgetConsole removes what keepConsole kept.
func (o *Orchestrator) forgetConsole(id string) error {
	if err := os.Remove(o.consoleFile(id)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget console: %w", err)
	}
	return nil
}

// consoleText is what the VM wrote: from its host, or what was kept of it.
func (o *Orchestrator) consoleText(ctx context.Context, r ledger.Reservation) ([]byte, error) {
	if r.Host == "" {
		return nil, event.Refuse(event.NoHost, "the VM is at no host yet")
	}
	if !r.Phase.Running() { // a running one has a console of its own, and an older start may have left one
		if text, err := os.ReadFile(o.consoleFile(r.ID)); err == nil {
			return text, nil
		}
	}
	h, err := o.reach(r.Host)
	if err != nil {
		return nil, err
	}
	return h.Console(ctx, r.ID)
}
