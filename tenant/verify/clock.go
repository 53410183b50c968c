package verify

import (
	"fmt"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"

	"github.com/google/go-tpm/tpm2"
)

// Clock is what the last accepted quote of an AIK said of its TPM's counters. The
// ledger keeps one a host, for boot quotes, and one a start, for its static quotes.
// The zero value means that the host was never quoted.
type Clock struct {
	AIK      digest.SHA256 `json:"aik"`      // SHA-256 of the marshalled public area
	Resets   uint32        `json:"resets"`   // host boots
	Restarts uint32        `json:"restarts"` // suspends and resumes since
	Millis   uint64        `json:"millis"`   // TPM clock
}

// orderSlack allows for quotes of one host that are judged in another order than they
// were made; each is fresh anyhow, by its nonce.
const orderSlack = 2 * time.Minute

// Later is the one of two clocks of a host to keep.
func (c Clock) Later(o Clock) Clock {
	if c.AIK != o.AIK || booted(c, o) > 0 || booted(c, o) == 0 && o.Millis > c.Millis {
		return o
	}
	return c
}

func clockOf(aik digest.SHA256, info tpm2.TPMSClockInfo) Clock {
	return Clock{AIK: aik, Resets: info.ResetCount, Restarts: info.RestartCount, Millis: info.Clock}
}

// booted counts host boots from a to b, modulo 2^32: a TPM whose AIK lies outside the
// endorsement and platform hierarchies adds a constant to its counts (TPM 2.0 Library,
// part 1, "Obfuscation of ClockInfo").
func booted(a, b Clock) int32 { return int32(b.Resets - a.Resets) }

// follow reports whether a quote's clock goes on from the last one, and whether the
// host has booted in between. That is allowed to a boot quote, which starts afresh, and to a
// survey, which concerns no VM; a static quote continues an admitted start, which no host
// boot survives.
func (c Clock) follow(q Clock, role string) (rebooted bool, err error) {
	boots, afresh := booted(c, q), role == evidence.RoleBoot || role == evidence.RoleSurvey
	switch {
	case c == Clock{} && !afresh:
		return false, fmt.Errorf("no earlier quote of this start is known")
	case c == Clock{}:
		return false, nil
	case c.AIK != q.AIK:
		return false, fmt.Errorf("the last quote of this host was by another attestation key")
	case boots < 0:
		return false, fmt.Errorf("the TPM's reset count went back by %d", -int64(boots))
	case boots > 0 && !afresh:
		return true, fmt.Errorf("the host has booted %d times since this VM was admitted", boots)
	case boots > 0:
		// The clock may step back over an unclean power-off (part 1, "Clock").
		return true, nil
	case c.Restarts != q.Restarts:
		return false, fmt.Errorf("the TPM's restart count changed from %d to %d without a host boot: the host was suspended, or its TPM restarted", c.Restarts, q.Restarts)
	case q.Millis+uint64(orderSlack.Milliseconds()) < c.Millis:
		return false, fmt.Errorf("the TPM's clock went back by %d ms", c.Millis-q.Millis)
	}
	return false, nil
}
