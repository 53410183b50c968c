package fsck

import (
	"fmt"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/token"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
	"foothold/tenant/verify"
)

// ledger compares the ledger with itself. It was read in one transaction, so nothing in
// it is in motion.
func (c *check) ledger() {
	if c.Chain != "" {
		c.misfit(JournalBroken, "journal", "each entry continues the chain", c.Chain)
	}
	c.starts()
	c.history()
	c.tokens()
	c.certificates()
	c.nonces()
	c.evidence()
	c.twice()
}

// starts: a reservation has the facts of each of its starts, and no more.
func (c *check) starts() {
	has := set(c.Ledger.Starts)
	for _, k := range c.Ledger.Starts {
		if r, ok := c.by[k.Reservation]; !ok || k.Start < 1 || k.Start > r.Start {
			c.misfit(StartUnexpected, fmt.Sprintf("start %d of %s", k.Start, c.owner(k.Reservation)), "no such start", "its facts are there")
		}
	}
	for _, r := range c.Ledger.Reservations {
		for n := 1; n <= r.Start; n++ {
			if !has[ledger.StartKey{Reservation: r.ID, Start: n}] {
				c.misfit(StartMissing, vm(r), fmt.Sprintf("the facts of start %d", n), "none")
			}
		}
	}
}

// history: of a live reservation exactly its phase is open, and parts of it at most; of
// an ended one nothing is.
func (c *check) history() {
	open := map[string]int{}
	for _, p := range c.Ledger.Open {
		r := c.by[p.Reservation]
		_, notPhase := reservation.Parse(p.Name)
		switch {
		case !r.Live() || p.Start != r.Start || notPhase == nil && p.Name != string(r.Phase):
			c.misfit(PhaseHistory, c.owner(p.Reservation), "it is "+stands(r), fmt.Sprintf("%s of start %d is open", p.Name, p.Start))
		case notPhase == nil:
			open[r.ID]++
		}
	}
	for _, r := range c.Ledger.Reservations {
		if r.Live() && open[r.ID] == 0 {
			c.misfit(PhaseHistory, vm(r), fmt.Sprintf("%s of start %d is open", r.Phase, r.Start), "it is not in the history")
		}
	}
}

// presentedIn is the phase in which each kind of token may be spent.
var presentedIn = map[token.Kind]reservation.Phase{token.T1: reservation.Booting, token.T2: reservation.Booting, token.T3: reservation.Connecting}

// tokens: one that is open belongs to the start and phase that its VM is in. T3 is made
// in the phase before its own.
func (c *check) tokens() {
	for _, t := range c.Ledger.Tokens {
		r := c.by[t.Reservation]
		now := r.Phase
		if t.Kind == token.T3 && now == reservation.Unlocking {
			now = reservation.Connecting
		}
		if t.Start == r.Start && t.Phase == now && t.Phase == presentedIn[t.Kind] {
			continue
		}
		c.misfit(TokenOpen, fmt.Sprintf("%s of start %d of %s", t.Kind, t.Start, c.owner(t.Reservation)), "it is spent or void",
			fmt.Sprintf("it is open for %s; the VM is %s", t.Phase, stands(r)))
	}
}

// certificates: one that is not revoked belongs to a start that runs, and a start that
// was handed one still has it.
func (c *check) certificates() {
	valid := map[string]bool{}
	for _, cert := range c.Ledger.Certificates {
		r := c.by[cert.Reservation]
		valid[cert.Serial] = true
		if !r.Phase.Running() || cert.Start != r.Start {
			c.misfit(CertificateValid, fmt.Sprintf("certificate %s of start %d of %s", cert.Serial, cert.Start, c.owner(cert.Reservation)), "it is revoked",
				fmt.Sprintf("it is valid until %s; the VM is %s", cert.Expires.Format(time.RFC3339), stands(r)))
		}
	}
	for _, r := range c.Ledger.Reservations {
		if serial := c.Ledger.Latest[r.ID].Serial; r.Phase.Running() && serial != "" && !valid[serial] {
			c.misfit(CertificateAbsent, vm(r), "its certificate "+serial+" is valid", "it is revoked or was not issued here")
		}
	}
}

// nonces belong to starts and are used after they were issued.
func (c *check) nonces() {
	has := set(c.Ledger.Starts)
	for _, n := range c.Ledger.Nonces {
		switch {
		case !has[n.StartKey]:
			c.misfit(NonceOdd, fmt.Sprintf("nonces of start %d of %s", n.Start, c.owner(n.Reservation)), "none", fmt.Sprintf("%d", n.Issued))
		case n.Odd > 0:
			c.misfit(NonceOdd, fmt.Sprintf("nonces of start %d of %s", n.Start, c.owner(n.Reservation)), "used after they were issued", fmt.Sprintf("%d were used before", n.Odd))
		}
	}
}

// evidence: the verdicts of a VM's latest start are one chain from its boot on, and end with
// the one that the start stands on.
func (c *check) evidence() {
	for _, r := range c.Ledger.Reservations {
		s, rows := c.Ledger.Latest[r.ID], c.Ledger.Evidence[r.ID]
		var links []verify.Link
		var stands digest.SHA256 // newest accepted
		for _, row := range rows {
			links = append(links, row.Link)
			if row.Digest != row.Link.Digest() {
				c.misfit(EvidenceBroken, vm(r), "each verdict has the digest of what it rests on", "verdict "+row.Digest.Short()+" has another")
			}
			if row.Accepted {
				stands = row.Digest
			}
		}
		if stands != s.Verdict {
			c.misfit(EvidenceBroken, vm(r), "the newest accepted verdict is "+short(s.Verdict), "it is "+short(stands))
		}
		if len(links) == 0 {
			continue
		}
		chain := verify.AuditChain(nil, links)
		for _, t := range chain.Tests {
			if !t.Holds {
				c.misfit(EvidenceBroken, vm(r), "the verdicts of its start are one chain", t.Says)
			}
		}
		if chain.Holds() && !chain.Complete {
			c.misfit(EvidenceBroken, vm(r), "the verdicts of its start begin with its boot", "verdict "+chain.Missing.Short()+" is not there")
		}
	}
}

// short is a digest for people.
func short(d digest.SHA256) string {
	if d.IsZero() {
		return "none"
	}
	return d.Short()
}

// twice: an address is one VM's until that is proven gone, a name until it is deleted, a
// volume for ever.
func (c *check) twice() {
	c.once("address", func(r ledger.Reservation) (string, bool) { return r.Address.String(), r.Cleanup != ledger.CleanupDone })
	c.once("name", func(r ledger.Reservation) (string, bool) { return r.Name, r.Deleted.IsZero() })
	c.once("volume", func(r ledger.Reservation) (string, bool) { return r.Volume, true })
}

// once: of those that hold a thing, no two hold the same.
func (c *check) once(what string, thing func(ledger.Reservation) (string, bool)) {
	holder := map[string]ledger.Reservation{}
	for _, r := range c.Ledger.Reservations {
		name, holds := thing(r)
		if !holds {
			continue
		}
		if first, taken := holder[name]; taken {
			c.misfit(HeldTwice, what+" "+name, "one holder", vm(first)+" and "+vm(r))
			continue
		}
		holder[name] = r
	}
}

// full reports whether as many VMs boot at a host as may at once.
func (c *check) full(host string) bool {
	n := 0
	for _, r := range c.Ledger.Reservations {
		if r.Phase == reservation.Booting && r.Host == host {
			n++
		}
	}
	return n >= c.Limits.Boots
}

// motion lists what is under way, with the time that it has.
func (c *check) motion() {
	for _, r := range c.Ledger.Reservations {
		late := r.Deadline.Add(c.Limits.Sweep)
		switch {
		case r.Closed():
			add(&c.Notes, VMClosed, vm(r), "an operator looks into it", "its instance is kept at host "+r.Host+", without a network", time.Time{})
		case leaving(r):
			c.under(CleanUp, vm(r), "host "+r.Host+" confirms that it is gone", "it has not yet", c.Ended[r.ID].Add(c.Limits.CleanUp))
		case !r.Live():
		case r.Phase == reservation.Stopped:
			if !r.NextStart().IsZero() {
				if c.full(r.Host) { // it waits its turn
					late = c.Now
				}
				c.under(StartPending, vm(r), fmt.Sprintf("start %d begins at %s", r.Start+1, r.NextStart().Format(time.RFC3339)), "it is stopped", late)
			}
		case r.Wish != ledger.WishNone:
			c.under(UnderWay, vm(r), "it stops", "it was asked to "+string(r.Wish)+" and is "+string(r.Phase), r.Wished.Add(c.Limits.Stop+c.Limits.Sweep))
		case r.Phase != reservation.Computing:
			c.under(UnderWay, vm(r), reservation.Awaited(r.Phase), "it is "+string(r.Phase), late)
		case c.Now.After(late):
			c.under(UnderWay, vm(r), reservation.Awaited(r.Phase), "it is "+string(r.Phase), late)
		}
	}
}
