package main

import (
	"context"
	"fmt"
	"time"

	"foothold/lab"
	"foothold/protocol/api"
)

// cleanUpPoll lies between two looks at a VM that is being cleaned up.
const cleanUpPoll = 100 * time.Millisecond

// revoke deletes a VM whose page is being fetched, over and over, through its tunnel and
// returns how many ms after the operator's call the last page came.
func (l *labState) revoke(ctx context.Context, a *asker, vm api.VM) (float64, error) {
	if err := a.ask("last", vm.WorkloadURL); err != nil {
		return 0, err
	}
	if _, err := a.answer(); err != nil {
		return 0, err
	}
	began := time.Now()
	if _, err := l.api.DeleteVM(ctx, vm.Name); err != nil {
		return 0, err
	}
	last, err := a.answer()
	if err != nil {
		return 0, err
	}
	for {
		now, err := l.api.VM(ctx, vm.ID)
		if err != nil {
			return 0, err
		}
		if now.Cleanup == api.CleanupDone {
			return max(0, last.Sub(began).Seconds()*1000), nil
		}
		if err := sleep(ctx, cleanUpPoll); err != nil {
			return 0, fmt.Errorf("VM %s is not cleaned up: %w", vm.Name, err)
		}
	}
}

// revocations is the result of the VMs that were deleted.
func revocations(times []float64) Result {
	name := fmt.Sprintf("from `vm delete` to the last page through the tunnel, worst of %d VMs", len(times))
	return atMost(name, p99(times), "ms", aimRevoked)
}

// revoker starts the process that fetches pages.
func (l *labState) revoker(ctx context.Context) (*asker, error) {
	return startAsker(ctx, l, lab.Tenant)
}
