package host

import (
	"log/slog"

	"foothold/protocol/hostapi"
	"foothold/provider/qemu"
)

// Of each VM the host counts the frames that its bridge drops (package qemu, Frames), and
// says so with all else that it says of the VM. What it came to is said with the VM's end.

// countFrames begins to count, and returns what ends that. The bridge drops what it drops
// whether somebody counts or not: a kernel that cannot count keeps no agent from its work.
func (a *Agent) countFrames() func() {
	frames, err := qemu.CountFrames()
	if err != nil {
		slog.Error("dropped frames are not counted", "error", err)
		return func() {}
	}
	a.frames = frames
	return func() {
		if err := frames.Close(); err != nil {
			slog.Error("the count of dropped frames is left in the kernel", "error", err)
		}
	}
}

// watchTap begins the count of the VM's tap.
func (v *vm) watchTap(tap string) {
	if v.agent.frames == nil {
		return
	}
	if err := v.agent.frames.Watch(tap, v.spec.Network.MAC); err != nil {
		v.logger().Error("dropped frames of the VM are not counted", "error", err)
		return
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	v.tap = tap
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
	if a.frames == nil {
		return
	}
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
