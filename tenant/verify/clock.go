package verify

import (
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"

	"github.com/google/go-tpm/tpm2"
)

// Clock is what the last accepted quote of an AIK said of its TPM's counters. The ledger
// keeps one for each AIK that a host has had, for boot quotes ([Clocks]), and one a start, for
// its static quotes. The zero value means that the AIK was never quoted.
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

// Clocks are a host's, one for each AIK it has had: a TPM that takes the place of another
// begins anew, and one that comes back goes on from where it was. Stored as a JSON array.
type Clocks []Clock

// ParseClocks reads what the ledger keeps of a host; nothing, for one that was never quoted.
func ParseClocks(data []byte) (Clocks, error) {
	if len(data) == 0 {
		return nil, nil
	}
	var c Clocks
	var err error
	if data[0] == '{' { // the form in which a host had one clock
		c = make(Clocks, 1)
		err = json.Unmarshal(data, &c[0])
	} else {
		err = json.Unmarshal(data, &c)
	}
	if err != nil {
		return nil, fmt.Errorf("stored clock: %w", err)
	}
	return c, nil
}

// Keep is c after an accepted quote.
func (c Clocks) Keep(q Clock) Clocks {
	for i, had := range c {
		if had.AIK == q.AIK {
			c = slices.Clone(c)
			c[i] = had.Later(q)
			return c
		}
	}
	return append(slices.Clip(c), q)
}

// Last is the clock to hold a host's quote against: that of the AIK which the inventory names
// for it; zero, if that one was never quoted.
func (v *Verifier) Last(host string, c Clocks) Clock {
	if h := v.inventory.hosts[host]; h != nil {
		for _, had := range c {
			if h.aik != nil && had.AIK == h.name {
				return had
			}
		}
	}
	return Clock{}
}

// Last is [Verifier.Last].
func (t *Trial) Last(host string, c Clocks) Clock { return t.v.Last(host, c) }

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
