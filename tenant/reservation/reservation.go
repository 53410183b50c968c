// Package reservation is the life of a reservation: its phases, the legal moves
// between them, what each phase waits for and how long it may last. It is pure: no
// clock, no store. The ledger makes the moves, in one transaction each.
package reservation

import (
	"fmt"
	"slices"
	"time"
)

// Phase is where a reservation stands. The set is closed.
type Phase string

// The phases.
const (
	Reserved   Phase = "reserved"   // stored; nothing asked of the provider yet
	Booting    Phase = "booting"    // create asked; until T2 is spent
	Unlocking  Phase = "unlocking"  // T2 spent; until the secrets are handed over
	Connecting Phase = "connecting" // secrets handed over; until the second audit passed
	Computing  Phase = "computing"  // under a lease that heartbeats renew
	Stopped    Phase = "stopped"    // no instance; the volume is kept for the next start
	Released   Phase = "released"   // ended by wish
	Aborted    Phase = "aborted"    // ended with a reason
)

// moves is the one table of legal moves.
var moves = map[Phase][]Phase{
	Reserved:   {Booting, Released, Aborted},
	Booting:    {Unlocking, Stopped, Released, Aborted},
	Unlocking:  {Connecting, Stopped, Released, Aborted},
	Connecting: {Computing, Stopped, Released, Aborted},
	Computing:  {Stopped, Released, Aborted},
	Stopped:    {Booting, Released, Aborted}, // booting: the next start
	Released:   {},
	Aborted:    {},
}

// Phases lists the closed set in the order of the story.
func Phases() []Phase {
	return []Phase{Reserved, Booting, Unlocking, Connecting, Computing, Stopped, Released, Aborted}
}

// Parse accepts the name of a phase.
func Parse(name string) (Phase, error) {
	p := Phase(name)
	if _, ok := moves[p]; !ok {
		return "", fmt.Errorf("no phase is called %q", name)
	}
	return p, nil
}

// CanMove reports whether the table has the move.
func CanMove(from, to Phase) bool { return slices.Contains(moves[from], to) }

// Terminal reports whether no move leads out of p. An unknown phase is terminal.
func (p Phase) Terminal() bool { return len(moves[p]) == 0 }

// Limits is how long each phase may last.
type Limits struct {
	Reserved, Booting, Unlocking, Connecting time.Duration
	Lease                                    time.Duration // computing; each good heartbeat renews it
}

// Default is the design's table of limits.
func Default() Limits {
	return Limits{
		Reserved: 30 * time.Second, Booting: 60 * time.Second, Unlocking: 60 * time.Second,
		Connecting: 90 * time.Second, Lease: 60 * time.Second,
	}
}

// Of returns the limit of a phase; a terminal phase and a stopped VM have none.
func (l Limits) Of(p Phase) time.Duration {
	switch p {
	case Reserved:
		return l.Reserved
	case Booting:
		return l.Booting
	case Unlocking:
		return l.Unlocking
	case Connecting:
		return l.Connecting
	case Computing:
		return l.Lease
	}
	return 0
}

// Validate refuses a limit that is missing or beyond reason.
func (l Limits) Validate() error {
	for _, p := range []Phase{Reserved, Booting, Unlocking, Connecting, Computing} {
		if d := l.Of(p); d < time.Second || d > time.Hour {
			return fmt.Errorf("limit of %s: %v is not between 1s and 1h", p, d)
		}
	}
	return nil
}

// Awaited says what ends a phase, for people.
func Awaited(p Phase) string {
	switch p {
	case Reserved:
		return "the orchestrator to ask the provider for the VM"
	case Booting:
		return "the host to create and measure the VM, and the VM to boot, attest and report ready"
	case Unlocking:
		return "the orchestrator to probe and audit the VM over SSH and to hand over its secrets"
	case Connecting:
		return "the VM to open its disks, join the gateway's tunnel, start its system and pass the second audit"
	case Computing:
		return "the VM's next heartbeat through the tunnel"
	case Stopped:
		return "an operator to start it"
	}
	return ""
}

// Running reports whether an instance of the VM may run in p.
func (p Phase) Running() bool {
	return p == Booting || p == Unlocking || p == Connecting || p == Computing
}
