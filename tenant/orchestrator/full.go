package orchestrator

import (
	"context"
	"errors"
	"log/slog"
	"syscall"
	"time"

	"foothold/protocol/event"
	"foothold/tenant/ledger"
)

// A full disk of the orchestrator's own says nothing about any VM. Whatever finds no
// room has changed nothing - a write to the ledger is all or nothing, a file takes the
// place of the old one whole - so it is refused as disk-full, acts that are driven from
// here are tried again until their phase ends, and a VM with its tunnel stays for as
// long as its lease does.

// roomPause lies between tries of an act that found no room.
const roomPause = time.Second

// diskFull reports whether something failed for want of space in the state directory.
func diskFull(err error) bool {
	return errors.Is(err, ledger.ErrFull) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// shown is what a caller is told of a failed call. A fault of ours is logged and not shown.
func shown(err error) *event.Refusal {
	var why *event.Refusal
	switch {
	case diskFull(err):
		logFault(err)
		return event.Refuse(event.DiskFull, "the orchestrator's state directory has no room; nothing was done")
	case errors.As(err, &why):
		return why
	}
	logFault(err)
	return event.Refuse(event.InternalError, "the orchestrator's log says more")
}

// untilRoom carries an act out again while the disk is full, as a restart would take it
// up again. ctx ends with the reservation, which its phase's deadline sees to.
func untilRoom(ctx context.Context, id, what string, act func(context.Context) error) error {
	for {
		err := act(ctx)
		if !diskFull(err) {
			return err
		}
		slog.Error("no room on the disk: act is tried again", "reservation", id, "act", what, "error", err)
		if err := pause(ctx, roomPause); err != nil {
			return err
		}
	}
}
