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

// Phases that end a VM.
const (
	PhaseAborted  = "aborted"
	PhaseReleased = "released"
)

// Ended is returned by [Client.Wait] for a VM that will not become ready: it was
// aborted or released, or its workload has ended.
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
			if vm.Ready {
				return vm, nil
			}
			if vm.Phase == PhaseAborted || vm.Phase == PhaseReleased || vm.Reason != "" {
				return vm, &Ended{vm}
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
