// Package fsck holds the tenant's database, vault, hosts, kernel rules and tunnels
// against each other and names what does not fit. It is pure: it takes what was read as
// a [Snapshot] and returns findings.
//
// A snapshot is not of one moment: the ledger's part is, but hosts and daemons were asked
// before or after. Three things keep that from being reported as misfits. What the ledger
// says is under way - a phase, a clean-up, a start that is due - and what a daemon has
// been told but has not reported yet, may stand either way until its deadline; it is
// listed as in motion. What changed between two readings without the ledger saying so
// beforehand shows up in one snapshot and not in the next: [Confirm] keeps only what two
// snapshots agree on. And a thing that moves on time, again and again, never becomes a
// finding; one that is stuck does, when its deadline has passed.
//
// Nothing is believed of a host or a daemon for more than its word: fsck shows what
// they say against what should be, not what a liar hides.
package fsck

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/hostapi"
	"foothold/protocol/zone"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// Snapshot is everything that is compared.
type Snapshot struct {
	Now    time.Time
	Ledger ledger.Survey
	Chain  string // why the journal's chain does not verify; empty: it does
	// Ended is when the end, stop or deletion of each reservation that is being cleaned up was recorded.
	Ended        map[string]time.Time
	VolumeKeys   []string // in the vault: ids of volumes
	TemplateKeys []string // in the vault: labels of templates' versions
	// Parts are the objects of the store that each version of a template boots, by its label.
	Parts  map[string][]digest.SHA256
	Hosts  []Host
	Zones  []Zone
	Limits Limits
}

// Limits is how long what is under way may take where the ledger has no deadline.
type Limits struct {
	Sweep   time.Duration // behind any deadline, until the orchestrator has acted on it
	CleanUp time.Duration // from an end until the host has confirmed it
	Stop    time.Duration // from the wish that a VM stops until it has
	Boots   int           // at one host at once; a start that is due waits for its turn
}

// Host is what one inventoried host says of this tenant.
type Host struct {
	Name      string
	Problem   string // why it could not be asked; empty: it was
	VMs       []hostapi.VM
	Volumes   []hostapi.Volume
	Templates []hostapi.Template
}

// Zone is one daemon's desired and reported state.
type Zone struct {
	Document zone.Document // newest, as signed
	Outdated bool          // the ledger asks for another document
	Changed  time.Time     // when the document last said something new
	Report   zone.Report
	Seen     time.Time     // when the last report came; zero: never
	Settle   time.Duration // from a new document to its report
	Late     time.Duration // from a new document until its tunnels are there and others gone
}

// Report is what was found.
type Report struct {
	Findings []api.Finding // what does not fit
	Motion   []api.Finding // what is under way and has time left
	Notes    []api.Finding // what fits and may be of interest
}

// Bounds of a report: what hosts and daemons say is theirs to choose.
const (
	maxText = 240 // bytes of one text
	maxList = 1000
)

// Check compares.
func Check(s Snapshot) Report {
	c := &check{Snapshot: s, by: map[string]ledger.Reservation{}, volumes: map[string]ledger.Reservation{}}
	for _, r := range s.Ledger.Reservations {
		c.by[r.ID] = r
		if first, taken := c.volumes[r.Volume]; !taken || !first.Deleted.IsZero() { // whose data it may hold
			c.volumes[r.Volume] = r
		}
	}
	c.ledger()
	c.motion()
	c.vault()
	c.objects()
	for _, h := range s.Hosts {
		c.host(h)
	}
	c.placed()
	for _, z := range s.Zones {
		c.zone(z)
	}
	return c.Report
}

// Confirm keeps of the second report's findings those that the first one has too. The
// others came up in between; what the first one alone has is gone. A zone's document that
// was made in between follows from the ledger of then: what it lacks came up later.
func Confirm(first, second Report) Report {
	var kept []api.Finding
	for _, f := range second.Findings {
		same := func(x api.Finding) bool {
			return x.Code == f.Code && x.Thing == f.Thing && (f.Code != string(ZoneOutdated) || x.Found == f.Found)
		}
		if slices.ContainsFunc(first.Findings, same) {
			kept = append(kept, f)
		} else {
			second.Motion = append(second.Motion, f)
		}
	}
	second.Findings = kept
	return second
}

// check is one comparison under way.
type check struct {
	Snapshot
	Report
	by      map[string]ledger.Reservation // by id
	volumes map[string]ledger.Reservation // by the volume's id
}

// add makes an entry of a list.
func add(list *[]api.Finding, code Code, thing, expected, found string, until time.Time) {
	if len(*list) >= maxList {
		return
	}
	*list = append(*list, api.Finding{Code: string(code), Thing: clip(thing), Expected: clip(expected), Found: clip(found), Until: until, Next: Codes()[code].Next})
}

// misfit records what does not fit.
func (c *check) misfit(code Code, thing, expected, found string) {
	add(&c.Findings, code, thing, expected, found, time.Time{})
}

// under records what is under way until then; behind it, it does not fit.
func (c *check) under(code Code, thing, expected, found string, until time.Time) {
	if c.Now.After(until) {
		add(&c.Findings, code, thing, expected, found, until)
		return
	}
	add(&c.Motion, code, thing, expected, found, until)
}

// clip bounds a text, whole characters only.
func clip(text string) string {
	text = strings.ToValidUTF8(text, "?")
	if len(text) <= maxText {
		return text
	}
	return strings.ToValidUTF8(text[:maxText], "") + "..."
}

// vm names a reservation for people.
func vm(r ledger.Reservation) string {
	if !r.Deleted.IsZero() {
		return fmt.Sprintf("deleted VM %s (%s)", r.Name, r.ID)
	}
	return fmt.Sprintf("VM %s (%s)", r.Name, r.ID)
}

// owner names the reservation of that id for people.
func (c *check) owner(id string) string {
	if r, ok := c.by[id]; ok {
		return vm(r)
	}
	return fmt.Sprintf("reservation %q, which the ledger does not have", id)
}

// stands says where a reservation stands, for people.
func stands(r ledger.Reservation) string {
	switch {
	case !r.Deleted.IsZero():
		return "deleted"
	case r.Phase.Running() || r.Phase == reservation.Stopped:
		return fmt.Sprintf("%s, start %d", r.Phase, r.Start)
	}
	return string(r.Phase)
}

// leaving reports whether the reservation's last instance may still be at its host.
func leaving(r ledger.Reservation) bool {
	return r.Cleanup == ledger.CleanupPending || r.Phase == reservation.Stopped && !r.Gone
}

// running reports whether the host has reported the VM's latest start running.
func (c *check) running(r ledger.Reservation) bool {
	return r.Phase.Running() && !c.Ledger.Latest[r.ID].HostStarted.IsZero()
}

// set has each of a list's values.
func set[T comparable](list []T) map[T]bool {
	all := make(map[T]bool, len(list))
	for _, v := range list {
		all[v] = true
	}
	return all
}

// sorted lists a map's keys in order.
func sorted[K cmp.Ordered, V any](m map[K]V) []K {
	keys := make([]K, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
