package host

import (
	"log/slog"

	"foothold/protocol/hostapi"
)

// Of each VM the host counts the frames that its bridge drops (package qemu, Frames), and
// says so with all else that it says of the VM. What it came to is said with the VM's end.

// watchTap begins the count of the VM's tap.
func (v *vm) watchTap(tap string) error {
	if err := v.agent.frames.Watch(tap, v.spec.Network.MAC); err != nil {
		return err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.tap = tap
	return nil
}

// forgetTap ends the count, when nothing is sent any more.
func (v *vm) forgetTap() {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.tap == "" {
		return
	}
	d, err := v.agent.frames.Forget(v.tap)
	if err != nil {
		v.logger().Error("dropped frames are not known to the end", "error", err)
	}
	v.tap = ""
	if d != (hostapi.Dropped{}) { // else what was read last stands
		v.info.Dropped = d
	}
}

// readDropped brings the counts of all running VMs up to date.
func (a *Agent) readDropped() {
	all, err := a.frames.Dropped()
	if err != nil {
		slog.Error("dropped frames are not known", "error", err)
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, v := range a.vms {
		v.mu.Lock()
		if v.tap != "" {
			v.info.Dropped = all[v.tap]
		}
		v.mu.Unlock()
	}
}
