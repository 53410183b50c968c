package main

import (
	"context"
	"fmt"
	"net/url"
	"time"

	"foothold/lab"
	"foothold/protocol/api"
)

const (
	cleanUpPoll = 100 * time.Millisecond // between two looks at a VM that is being cleaned up
	flowing     = time.Second            // of traffic before a VM's access is revoked
)

// revoke deletes a VM that is being connected to, over and over, through its tunnel and
// returns how many ms after the operator's call the VM's last packet came. One connection
// follows the other, so the value is exact to the time of one, milliseconds under emulation:
// 0 says that the packet on its way at the call was the first that did not pass.
func (l *labState) revoke(ctx context.Context, a *asker, vm api.VM) (float64, error) {
	page, err := url.Parse(vm.WorkloadURL)
	if err != nil {
		return 0, fmt.Errorf("VM %s: %w", vm.Name, err)
	}
	if err := a.ask("last", "tcp://"+page.Host); err != nil {
		return 0, err
	}
	if _, err := a.answer(); err != nil {
		return 0, err
	}
	if err := sleep(ctx, flowing); err != nil {
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
	if began.Sub(last) > askLimit { // then the revocation did not end the traffic
		return 0, fmt.Errorf("VM %s: its last packet came %s before its access was revoked", vm.Name, began.Sub(last))
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
	name := fmt.Sprintf("from `vm delete` to the last packet through the tunnel, worst of %d VMs", len(times))
	return atMost(name, p99(times), "ms", aimRevoked)
}

// revoker starts the process that connects to VMs.
func (l *labState) revoker(ctx context.Context) (*asker, error) {
	return startAsker(ctx, l, lab.Tenant)
}
