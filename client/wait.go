package client

import (
	"context"
	"errors"
	"fmt"
	"time"

	"foothold/protocol/api"
)

// pollInterval is how often a waiting command asks. A phase lasts seconds.
const pollInterval = 400 * time.Millisecond

// patience is how long the orchestrator may be away while a command waits: it may be
// restarted without harm to the VM.
const patience = 30 * time.Second

// Phases in which a VM does not run.
const (
	PhaseReserved = "reserved"
	PhaseStopped  = "stopped"
	PhaseAborted  = "aborted"
	PhaseReleased = "released"
)

// Ended is returned by [Client.Wait] for a VM that will not become ready by itself: it
// was stopped, aborted or released, or its workload has ended.
type Ended struct{ VM api.VM }

func (e *Ended) Error() string {
	text := fmt.Sprintf("VM %s is %s", e.VM.Name, e.VM.Phase)
	if e.VM.Reason != "" {
		text += ": " + string(e.VM.Reason)
	}
	if e.VM.Explanation != "" {
		text += ": " + e.VM.Explanation
	}
	return text + "; next: foothold vm explain " + e.VM.Name
}

// Wait watches a VM by id or name until it is ready or ended. It hands every
// observation to seen, which may be nil, and returns the last one.
func (c *Client) Wait(ctx context.Context, name string, seen func(api.VM)) (api.VM, error) {
	return c.WaitStart(ctx, name, 0, seen)
}

// WaitStart is Wait for a start of that number or a later one: that an earlier one is
// ready, or stops, does not count.
func (c *Client) WaitStart(ctx context.Context, name string, start int, seen func(api.VM)) (api.VM, error) {
	return c.watch(ctx, name, seen, func(vm api.VM) (bool, error) {
		switch {
		case vm.Phase == PhaseAborted || vm.Phase == PhaseReleased:
			return true, &Ended{vm}
		case vm.Phase == PhaseStopped && vm.NextStart.IsZero():
			return true, &Ended{vm}
		case vm.Phase == PhaseStopped || vm.Start < start:
			return false, nil
		case vm.Ready:
			return true, nil
		case vm.Reason != "":
			return true, &Ended{vm}
		}
		return false, nil
	})
}

// WaitStopped watches a VM until it is stopped and its host has confirmed that.
func (c *Client) WaitStopped(ctx context.Context, name string, seen func(api.VM)) (api.VM, error) {
	return c.watch(ctx, name, seen, func(vm api.VM) (bool, error) {
		if vm.Phase == PhaseAborted || vm.Phase == PhaseReleased {
			return true, &Ended{vm}
		}
		return vm.Phase == PhaseStopped && vm.Cleanup == "", nil
	})
}

// watch asks for a VM until done says so.
func (c *Client) watch(ctx context.Context, name string, seen func(api.VM), done func(api.VM) (bool, error)) (api.VM, error) {
	var last api.VM
	answered := time.Now()
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		vm, err := c.VM(ctx, name)
		switch {
		case err == nil:
			last, answered = vm, time.Now()
			if seen != nil {
				seen(vm)
			}
			if over, err := done(vm); over {
				return vm, err
			}
		case errors.Is(err, ErrUnreachable) && time.Since(answered) < patience:
		default:
			return last, err
		}
		select {
		case <-ctx.Done():
			return last, ctx.Err()
		case <-tick.C:
		}
	}
}
