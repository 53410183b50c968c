package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strconv"
	"time"

	"foothold/internal/durable"
	"foothold/protocol/event"
	"foothold/tenant/hostclient"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// stateLock is the file in the state directory that its one user has locked.
const stateLock = "lock"

// lockWait is how long a predecessor may take to leave the state directory.
const lockWait = 10 * time.Second

// strangersPause lies between looks at hosts that did not answer.
const strangersPause = 10 * time.Second

// lockState keeps every other orchestrator, and Restore, out of a state directory.
func lockState(ctx context.Context, dir string) (unlock func(), err error) {
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	unlock, err = durable.Lock(ctx, filepath.Join(dir, stateLock))
	if err != nil {
		return nil, fmt.Errorf("another orchestrator uses this state: %w", err)
	}
	return unlock, nil
}

// Restored says what Restore did.
type Restored struct {
	Epoch   int64 `json:"epoch"`
	Stopped int   `json:"stopped"` // VMs that had computed: they stay stopped until somebody starts them
	Aborted int   `json:"aborted"` // VMs that were on their way for the first time
}

// Restore takes a state directory into use that was put back from a copy. What happened
// after the copy is not in it: a token that is open here may be spent, a VM that computes
// here may be gone, another may run that is not here. So a new epoch begins: every token
// void, every certificate revoked, every VM under way ended; and the orchestrator that
// runs next has the hosts destroy what it does not know. All of it is one transaction.
func Restore(ctx context.Context, dir string) (Restored, error) {
	var out Restored
	unlock, err := lockState(ctx, dir)
	if err != nil {
		return out, err
	}
	defer unlock()
	l, err := ledger.Open(ctx, filepath.Join(dir, ledgerFile), time.Now)
	if err != nil {
		return out, err
	}
	why := *event.Refuse(event.EpochBegun, "the orchestrator's state was put back from a copy")
	err = l.Write(ctx, func(t *ledger.Tx) error {
		out = Restored{}
		if err := t.VerifyJournal(); err != nil {
			return err
		}
		live, err := t.Live()
		if err != nil {
			return err
		}
		if out.Epoch, err = t.NewEpoch(); err != nil {
			return err
		}
		for _, r := range live {
			if err := endForEpoch(t, r, why, &out); err != nil {
				return err
			}
		}
		return t.Journal(event.Event{Kind: "epoch.begun", Detail: map[string]string{"epoch": strconv.FormatInt(out.Epoch, 10),
			"stopped": strconv.Itoa(out.Stopped), "aborted": strconv.Itoa(out.Aborted)}})
	})
	return out, errors.Join(err, l.Close())
}

func endForEpoch(t *ledger.Tx, r ledger.Reservation, why event.Refusal, out *Restored) error {
	switch {
	case r.Phase == reservation.Stopped:
		return t.SetDue(r.ID, r.Start, why, time.Time{}, 0)
	case reservation.EndsStart(why.Reason, r.Phase, r.Start):
		out.Stopped++
		_, err := halt(t, r, why)
		return errors.Join(err, t.SetDue(r.ID, r.Start, why, time.Time{}, 0)) // it may have been ended for good since
	}
	out.Aborted++
	_, err := end(t, r, reservation.Aborted, why)
	return err
}

// removeStrangers has every host destroy the VMs that the ledger does not know to run
// there, once after a new epoch began.
func (o *Orchestrator) removeStrangers(ctx context.Context) {
	var expected bool
	if err := o.ledger.Read(ctx, func(t *ledger.Tx) (err error) { expected, err = t.Strangers(); return err }); err != nil || !expected {
		if err != nil {
			slog.Error("look for strangers", "error", err)
		}
		return
	}
	looked := map[string]bool{}
	for left := true; left; {
		left = false
		for name, h := range o.basis().hosts {
			if looked[name] {
				continue
			}
			if err := o.removeStrangersAt(ctx, name, h); err != nil {
				slog.Warn("look for strangers", "host", name, "error", err)
				left = true
				continue
			}
			looked[name] = true
		}
		if left && pause(ctx, strangersPause) != nil {
			return
		}
	}
	if err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		return errors.Join(t.NoStrangers(), t.Journal(event.Event{Kind: "epoch.hosts-looked-at"}))
	}); err != nil {
		slog.Error("look for strangers", "error", err)
	}
	o.zones.journalled()
}

func (o *Orchestrator) removeStrangersAt(ctx context.Context, name string, h *hostclient.Client) error {
	vms, err := h.VMs(ctx)
	if err != nil {
		return err
	}
	for _, vm := range vms {
		stranger, err := o.stranger(ctx, vm.ID)
		if err != nil {
			return err
		}
		if !stranger {
			continue
		}
		if _, err := h.Destroy(ctx, vm.ID); err != nil {
			return err
		}
		o.journal(ctx, event.Event{Kind: "vm.stranger-destroyed", Detail: map[string]string{"host": name, "id": vm.ID, "name": clip(vm.Name, maxText), "start": strconv.Itoa(vm.Start)}})
	}
	return nil
}

// stranger reports whether the ledger does not know a VM that a host has, or knows it to
// be gone. Every other is started, or cleaned up, as its row says.
func (o *Orchestrator) stranger(ctx context.Context, id string) (bool, error) {
	r, err := o.findAny(ctx, id)
	if errors.Is(err, ledger.ErrNotFound) {
		return true, nil
	}
	return err == nil && r.Cleanup == ledger.CleanupDone, err
}
