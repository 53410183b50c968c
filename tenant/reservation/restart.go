package reservation

import (
	"fmt"
	"time"

	"foothold/protocol/event"
)

// Restart is what follows when a VM's instance ends and nobody asked it to.
type Restart string

// The policies.
const (
	Always    Restart = "always"     // another start, whatever ended it
	OnFailure Restart = "on-failure" // another start, unless the VM's own system powered it off; a reboot wishes for one
	Never     Restart = "never"      // it stays stopped, also after a reboot
)

// Pauses before a restart: doubling with each in a row, which is over once a start has
// computed for long.
const (
	firstBackoff = time.Second
	mostBackoff  = 5 * time.Minute
	StableAfter  = 10 * time.Minute
)

// ParseRestart accepts the name of a policy; "" is OnFailure.
func ParseRestart(name string) (Restart, error) {
	switch p := Restart(name); p {
	case "":
		return OnFailure, nil
	case Always, OnFailure, Never:
		return p, nil
	}
	return "", fmt.Errorf("no restart policy is called %q: want always, on-failure or never", name)
}

// Backoff is how long to wait before a restart that so many in a row came before.
func Backoff(restarts int) time.Duration {
	d := firstBackoff
	for range restarts {
		if d *= 2; d >= mostBackoff {
			return mostBackoff
		}
	}
	return d
}

// Next is when a VM whose instance ended for that reason starts again, by its policy and
// the restarts in a row before; zero: not by itself.
func (p Restart) Next(why event.Reason, restarts int, now time.Time) time.Time {
	again := Outage(why) && (p == Always || p == OnFailure && why != event.GuestPoweredOff)
	if !again {
		return time.Time{}
	}
	return now.Add(Backoff(restarts))
}

// outages are the reasons that say no more than that an instance does not run, or could
// not be brought to run. Every other one says that something was not as it must be:
// nobody starts such a VM again unseen.
var outages = map[event.Reason]bool{
	event.VMStopped: true, event.GuestReset: true, event.GuestCrashed: true, event.GuestPoweredOff: true, event.StopAsked: true, event.RestartAsked: true, event.EpochBegun: true,
	event.HostRefused: true, event.HostUnreachable: true, event.NoHost: true, event.DeadlinePassed: true, event.HeartbeatMissed: true,
	event.AttestationLate: true,
	event.TPMBusy:         true, event.TPMLost: true, event.LoaderFailed: true, event.BootServerFailed: true, event.SSHFailed: true, event.ZoneNotApplied: true,
	event.WorkloadFailed: true, event.InternalError: true, event.DiskFull: true,
	// A token of an earlier start, or a guess, that somebody presents from the VM's address
	// ends the instance that boots there, and so does a server that poses as ours. Anybody
	// on the cloud network can do either, so it must not end a VM that has a volume.
	event.TokenSpent: true, event.TokenUnknown: true, event.TokenExpired: true, event.ServerUntrusted: true,
	event.GatewayFailed: true, // the VM's word for it, which comes through its host
}

// Outage reports whether a reason says no more than that an instance does not run.
func Outage(why event.Reason) bool { return outages[why] }

// Damning reports whether a reason is a judgement of the machine that ran: it ends a VM
// also when that start of it is over by now, so that nobody gets past it by ending first.
func Damning(why event.Refusal) bool {
	switch why.Reason {
	case event.AuditFailed, event.ProbeAccepted, event.HostKeyMismatch:
		return true
	case event.QuoteRefused:
		return len(why.Findings) > 0 // else the quote was late, and says nothing
	}
	return false
}

// EndsStart reports whether an outage ends that start of a VM only. Before a VM has ever
// computed it ends the reservation: who created it is told at once, and there is nothing
// on its volume to keep.
func EndsStart(why event.Reason, from Phase, start int) bool {
	if why == event.WorkloadFailed && start == 1 { // it would never be what was asked for
		return false
	}
	return Outage(why) && MayStop(from, start)
}

// MayStop reports whether a VM that runs can be stopped and keep anything: it computes, or
// did so in an earlier start.
func MayStop(from Phase, start int) bool {
	return from.Running() && (start > 1 || from == Computing)
}
