// Package verify decides whether a quote proves what it must, and is the only maker
// of [Admitted], without which no component, key or certificate is released.
//
// A quote is accepted only if every one of these holds. All are checked, all that
// fail are reported, and no option skips one:
//
//	inventory   the inventory is signed by the provider and has not expired
//	host        the host that acknowledged the VM is in it, its keys are in order: AIK a
//	            restricted signing key of a TPM, session key certified by that AIK
//	platform    the host's release has reference values, of this installation's profile, in force;
//	            where several are, the quote has to satisfy all of one of them
//	input       the tunnel's parts and the settings are well-formed, and the boot server's
//	            certificate is one that the settings let the loader believe
//	quote       the quoted structure is exactly one TPMS_ATTEST, made by a TPM, for a quote
//	signature   the AIK signed it, ECDSA with SHA-256
//	binding     the qualifying data is the transcript of role, reservation, tunnel,
//	            settings and nonce
//	selection   exactly the registers of protocol/pcr, SHA-256 bank
//	log         the host's logs consist of what the reference values name: in a lab the platform's
//	            files, in order; in production each register's events of firmware and boot loader,
//	            in order, and of the files that the kernel measured none that is not named
//	policy      the host stands where it may, and in production its logs prove the secure boot
//	            state, the firmware, the kernel's command line and the dynamic launch that the
//	            tenant's [Policy] for it demands
//	registers   PCR 16 as predicted from the reservation, PCR 23 as computed from our end
//	            of the tunnel, the static ones as those logs lead to
//	clock       reset count, restart count and clock go on from the last quote of that AIK;
//	            no host boot lies between it and a VM that was started before it
//
// That the nonce is ours, fresh and unused is the ledger's to decide, in the swap that
// uses it up, before it asks here.
//
// A quote holds one digest over all registers, so which register differs can only be
// told by trying: the explanation tries the registers that the host's log and the
// host's claims lead to. Explanations rest on claims; decisions do not.
package verify

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
)

// Limits in bytes.
const (
	maxQuote = 1024     // TPMS_ATTEST, TPMT_SIGNATURE, as package evidence says
	maxLeaf  = 16 << 10 // a certificate of the tunnel
)

// Config is what a verifier believes.
type Config struct {
	Inventory *Inventory       // from OpenInventory
	Platforms []*Platform      // from OpenPlatform; a host's release is found by its name, which several may have
	Profile   string           // platform.Lab or platform.Production
	Policies  Policies         // what is demanded of hosts beside; the zero value is the strictest
	Now       func() time.Time // time.Now, but in tests
}

// Verifier judges quotes. What it believes is immutable; it may be used by many goroutines.
type Verifier struct {
	inventory *Inventory
	platforms map[string][]*Platform // by release, those that begin last first
	profile   string
	policies  Policies
	most      int // findings, if more than maxFindings
	now       func() time.Time
	leaves    *leaves // shared by copies
}

// New refuses an incomplete configuration: a missing part would be a skipped check. A list
// of no reference values is one: every quote is refused.
func New(c Config) (*Verifier, error) {
	if c.Inventory == nil || c.Now == nil || c.Platforms == nil {
		return nil, errors.New("verifier: needs an inventory, reference values and a clock")
	}
	if !validProfile(c.Profile) {
		return nil, errors.New("verifier: profile must be lab or production")
	}
	if err := c.Policies.Check(c.Profile); err != nil {
		return nil, fmt.Errorf("verifier: %w", err)
	}
	v := &Verifier{inventory: c.Inventory, platforms: map[string][]*Platform{}, profile: c.Profile, policies: c.Policies, now: c.Now, leaves: new(leaves)}
	for _, p := range c.Platforms {
		if p == nil || p.doc.Profile != c.Profile {
			return nil, errors.New("verifier: reference values of another profile")
		}
		if slices.ContainsFunc(v.platforms[p.doc.Name], func(q *Platform) bool { return q.digest == p.digest }) {
			return nil, errors.New("verifier: the same reference values twice, for release " + p.doc.Name)
		}
		v.platforms[p.doc.Name] = append(v.platforms[p.doc.Name], p)
	}
	for _, list := range v.platforms {
		slices.SortStableFunc(list, func(a, b *Platform) int { return b.doc.ValidFrom.Compare(a.doc.ValidFrom) })
	}
	return v, nil
}

// Finding is one check that failed; Check is as in the package's table.
type Finding = event.FailedCheck

// Verdict is what was found. It is no permission: [Admitted] is.
type Verdict struct {
	Role        string
	Reservation string
	Start       int
	Host        string
	At          time.Time
	Manifest    digest.SHA256 // the reference values that it was judged by; zero: there were none
	Findings    []Finding
	Digest      digest.SHA256 // names this verdict in the chain of its start: [Link.Digest]
	Previous    digest.SHA256 // static: the verdict before
	Clock       Clock         // as the quote says; to be stored for the host if the verdict is good
	Rebooted    bool          // the host has booted since the last clock: what ran on it before is gone
	VMKey       []byte        // boot: the key that the quote admits
	Tunnel      digest.SHA256 // boot: the tunnel measurement
	Parts       Parts         // what its bundle is made of
	good        bool
}

// Good reports whether every check held.
func (v Verdict) Good() bool { return v.good && len(v.Findings) == 0 }

// Err is nil for a good verdict, else a refusal with every finding.
func (v Verdict) Err() error {
	if v.Good() {
		return nil
	}
	refusal := event.Refuse(event.QuoteRefused, "the %s quote of host %s for %s does not prove what it must", v.Role, v.Host, v.Reservation)
	refusal.Findings = slices.Clone(v.Findings)
	return refusal
}

// phases in which a role's verdict may be used. A role that is not here is refused.
func phaseOf(role string) (string, bool) {
	phase, ok := map[string]string{
		evidence.RoleBoot:    "booting",
		evidence.RoleUnlock:  "unlocking",
		evidence.RoleConnect: "connecting",
		evidence.RoleWatch:   "computing",
	}[role]
	return phase, ok
}
