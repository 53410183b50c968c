package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
	"foothold/tenant/verify"
)

// What becomes of the VMs that run on a host which lost its good standing (host_lost).
const (
	lostAlert     = "alert"     // they run on, unattested
	lostClose     = "close"     // their network, tunnel and instance go; the volume waits for the next start
	lostTerminate = "terminate" // they are ended for good
)

// mayHost refuses a host that must get no VM now: by the documents, by what its TPM did not
// prove, because its last audit failed, or because a static quote of it was refused and
// nobody has readmitted it.
func (b *basis) mayHost(t *ledger.Tx, name string) error {
	if err := b.verifier.Host(name); err != nil {
		return noHost(name, err)
	}
	state, err := t.Host(name)
	if err != nil {
		return err
	}
	if err := trusted(name, state, event.NoHost); err != nil {
		return err
	}
	standing, _ := b.inventory.Host(name)
	found, err := t.HostKeys(name, standing.Keys())
	switch {
	case errors.Is(err, ledger.ErrNotFound):
		return event.Refuse(event.NoHost, "host %s: its keys were not examined", name)
	case err != nil:
		return err
	case found.State == ledger.KeysFailed:
		return event.Refuse(event.NoHost, "host %s: %s", name, found.Reason)
	}
	return nil
}

// trusted refuses a host whose last audit failed, or that is barred: barred is the reason then.
func trusted(name string, state ledger.HostState, barred event.Reason) error {
	switch {
	case state.AuditFailed != "":
		return event.Refuse(event.HostAuditFailed, "host %s: %s", name, state.AuditFailed)
	case state.Barred != "":
		return event.Refuse(barred, "host %s: %s", name, state.Barred)
	}
	return nil
}

// unfit reports whether err is a refusal of mayHost, and not a fault of ours.
func unfit(err error) bool {
	why := event.ReasonOf(err)
	return why == event.NoHost || why == event.HostAuditFailed
}

// noHost turns what the documents say of a host into the refusal of a VM there.
func noHost(name string, err error) error {
	var why *event.Refusal
	if !errors.As(err, &why) {
		return err
	}
	return event.Refuse(event.NoHost, "host %s: %s", name, findingsText(why.Findings))
}

func findingsText(findings []event.FailedCheck) string {
	list := make([]string, len(findings))
	for i, f := range findings {
		list[i] = f.String()
	}
	return strings.Join(list, "; ")
}

// loss is why a running VM does not stand any more on what it was admitted by.
type loss struct {
	why event.Refusal
	now bool // the host itself is another, may be, or is known no more: what host_lost says happens at once
}

// lost says what a running VM has lost by this basis and its host's last audit; nil: nothing.
// A host whose quote was refused is not in it: its own next quote decides on each VM.
func (b *basis) lost(t *ledger.Tx, r ledger.Reservation, s ledger.Start) (*loss, error) {
	l := b.disowned(r, s)
	if l != nil && l.now {
		return l, nil
	}
	host, err := t.Host(r.Host)
	if err == nil && host.AuditFailed != "" {
		l = &loss{*event.Refuse(event.HostAuditFailed, "host %s: %s", r.Host, host.AuditFailed), true}
	}
	return l, err
}

// lostNow is lost by the current basis, in a transaction of its own.
func (o *Orchestrator) lostNow(ctx context.Context, r ledger.Reservation, s ledger.Start) (l *loss, err error) {
	err = o.ledger.Read(ctx, func(t *ledger.Tx) (err error) { l, err = o.basis().lost(t, r, s); return err })
	return l, err
}

// disowned is what the documents alone take from a running VM.
func (b *basis) disowned(r ledger.Reservation, s ledger.Start) *loss {
	standing, ok := b.inventory.Host(r.Host)
	switch {
	case !ok:
		return &loss{*event.Refuse(event.HostLost, "host %s is not in inventory %d", r.Host, b.inventory.Version()), true}
	case len(standing.Problems) > 0:
		return &loss{*event.Refuse(event.HostLost, "host %s: %s", r.Host, strings.Join(standing.Problems, "; ")), true}
	case !s.HostKeys.IsZero() && s.HostKeys != standing.Keys():
		return &loss{*event.Refuse(event.HostLost, "host %s has other keys than when the VM was begun", r.Host), true}
	}
	if why := new(event.Refusal); errors.As(b.verifier.Host(r.Host), &why) {
		return &loss{*event.Refuse(event.HostLost, "host %s: %s", r.Host, findingsText(why.Findings)), false}
	}
	if !s.Manifest.IsZero() && !b.counts(s.Manifest) {
		return &loss{*event.Refuse(event.ValuesWithdrawn, "reference values with sha256 %s", s.Manifest), false}
	}
	return nil
}

// counts reports whether reference values count: they were not withdrawn, and are in force.
func (b *basis) counts(sum digest.SHA256) bool {
	for _, p := range b.platforms {
		if p.Digest() == sum {
			return p.InForce(b.now()) == nil
		}
	}
	return false
}

// keys are those of an inventoried host.
func (b *basis) keys(name string) digest.SHA256 {
	s, ok := b.inventory.Host(name)
	if !ok {
		return digest.SHA256{}
	}
	return s.Keys()
}

// review holds every running VM against the basis that has just become the current one, or
// those at one host against the audit that has just failed; host is "" for all. It
// reads in a write transaction: what was begun or judged by the basis before is stored by
// then, and what comes later sees this one. A crash before leaves it to the next start.
func (o *Orchestrator) review(ctx context.Context, host string) ([]api.Alert, error) {
	type found struct {
		r ledger.Reservation
		loss
	}
	var list []found
	alerts := []api.Alert{}
	err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		list, alerts = nil, alerts[:0]
		b := o.basis()
		return eachRunning(t, func(r ledger.Reservation, s ledger.Start) error {
			if host != "" && r.Host != host {
				return nil
			}
			l, err := b.lost(t, r, s)
			if l == nil || err != nil {
				return err
			}
			list = append(list, found{r, *l})
			a := o.alertOf(r, *l)
			alerts = append(alerts, a)
			return t.Journal(alertEvent(r, a))
		})
	})
	o.zones.journalled()
	if err != nil {
		return nil, err
	}
	for _, f := range list {
		slog.Warn("VM lost what it was admitted by", "reservation", f.r.ID, "host", f.r.Host, "reason", f.why.Reason, "detail", f.why.Detail)
		if f.now && o.conf.HostLost != lostAlert {
			o.abort(ctx, f.r.ID, f.r.Start, &f.why)
		}
	}
	return alerts, nil
}

// eachRunning hands every VM that may have an instance to f.
func eachRunning(t *ledger.Tx, f func(ledger.Reservation, ledger.Start) error) error {
	live, err := t.Live()
	if err != nil {
		return err
	}
	for _, r := range live {
		if !r.Phase.Running() {
			continue
		}
		s, err := t.Start(r.ID, r.Start)
		if err != nil {
			return fmt.Errorf("start %d of %s: %w", r.Start, r.ID, err)
		}
		if err := f(r, s); err != nil {
			return err
		}
	}
	return nil
}

func (o *Orchestrator) alertOf(r ledger.Reservation, l loss) api.Alert {
	a := api.Alert{VM: r.Name, Host: r.Host, Reason: l.why.Reason, Detail: l.why.Detail, Action: api.ActionNone}
	switch {
	case !l.now:
	case o.conf.HostLost == lostAlert:
	case o.conf.HostLost == lostClose && reservation.MayStop(r.Phase, r.Start):
		a.Action = api.ActionClosed
	default:
		a.Action = api.ActionTerminated
	}
	return a
}

// alertEvent is an alert in the journal: vm.host-lost, vm.host-audit-failed, vm.values-withdrawn.
func alertEvent(r ledger.Reservation, a api.Alert) event.Event {
	return event.Event{Kind: "vm." + string(a.Reason), Reservation: r.ID, Reason: a.Reason, Detail: map[string]string{"host": a.Host, "detail": a.Detail, "action": a.Action}}
}

// attestWatched is one look of act 10 at a VM's host. A host that the documents have
// dropped is not asked: there is nothing to judge its answer by. The VM is ended as
// host_lost says, or told of once, and goes on unattested. One whose host failed an audit is
// ended so, or goes on, and its host is asked: the documents still say what to answer.
func (o *Orchestrator) attestWatched(ctx context.Context, id string, told *string) error {
	r, s, err := o.row(ctx, id)
	if err != nil {
		return err
	}
	l, err := o.lostNow(ctx, r, s)
	if err != nil {
		return err
	}
	if l == nil || l.why.Reason == event.ValuesWithdrawn || l.why.Reason == event.HostAuditFailed && o.conf.HostLost == lostAlert {
		*told = ""
		_, err := o.attestAgain(ctx, id, evidence.RoleWatch)
		if event.ReasonOf(err) != event.HostLost {
			return err
		}
		if l = o.basis().disowned(r, s); l == nil { // dropped while it answered, and taken up again
			return nil
		}
	}
	if o.conf.HostLost != lostAlert {
		return &l.why
	}
	if *told != l.why.Detail {
		*told = l.why.Detail
		o.journal(ctx, alertEvent(r, o.alertOf(r, *l)))
	}
	return nil
}

// barring reports whether a refused static quote says something of the host itself, and not
// only of the documents or of a boot since. It came from the host over its own connection:
// nobody in between can spoil it, as a boot server can the boot quote.
func barring(v verify.Verdict) bool {
	if v.Good() || v.Role == evidence.RoleBoot {
		return false
	}
	for _, f := range v.Findings {
		switch f.Check {
		case "quote", "signature", "binding", "selection", "log", "policy", "registers":
			return true
		}
	}
	return false
}

// changed reports whether a refused quote says that the host's platform may be another for
// all who run there: it bars the host, or the host's own log, which does not come through
// the VM, shows it.
func changed(v verify.Verdict) bool {
	return barring(v) || slices.ContainsFunc(v.Findings, func(f event.FailedCheck) bool { return f.Check == "log" })
}

// neighbours are the other VMs that may have an instance on a VM's host.
func neighbours(t *ledger.Tx, of ledger.Reservation) (ids []string, err error) {
	err = eachRunning(t, func(r ledger.Reservation, _ ledger.Start) error {
		if r.Host == of.Host && r.ID != of.ID {
			ids = append(ids, r.ID)
		}
		return nil
	})
	return ids, err
}

// tellNeighbours raises an alert for every other VM on a host whose static quote was just
// refused. Each one's own next quote, which is due at once, decides on it.
func tellNeighbours(t *ledger.Tx, of ledger.Reservation, why string) error {
	return eachRunning(t, func(r ledger.Reservation, _ ledger.Start) error {
		if r.Host != of.Host || r.ID == of.ID {
			return nil
		}
		return t.Journal(alertEvent(r, api.Alert{Host: r.Host, Reason: event.HostLost, Detail: why, Action: api.ActionNone}))
	})
}

// quoteNeighbours has the host quoted at once for every other VM there. A crash leaves them
// to their next turn.
func (o *Orchestrator) quoteNeighbours(ctx context.Context, of ledger.Reservation) {
	var ids []string
	if err := o.ledger.Read(context.WithoutCancel(ctx), func(t *ledger.Tx) (err error) { ids, err = neighbours(t, of); return err }); err != nil {
		slog.Error("quote neighbours at once", "host", of.Host, "error", err)
	}
	for _, id := range ids {
		o.quoteSoon(id)
	}
}

// expiryNotice is how long before its end a document is told of, so that the next one may
// be imported in time.
const expiryNotice = 72 * time.Hour

// tellExpiry journals, once each in this process, that the inventory, or the last of the
// reference values that a host's release has, ends soon.
func (o *Orchestrator) tellExpiry(ctx context.Context) {
	b, soon := o.basis(), o.now().Add(expiryNotice)
	ends := map[digest.SHA256]event.Event{}
	if inv := b.inventory; inv.Expires().Before(soon) {
		ends[inv.Digest()] = event.Event{Kind: "inventory.ends-soon", Detail: map[string]string{"version": strconv.Itoa(inv.Version()),
			"sha256": inv.Digest().String(), "at": inv.Expires().UTC().Format(time.RFC3339)}}
	}
	last := map[string]*verify.Platform{} // by release
	for _, p := range b.platforms {
		if was := last[p.Manifest().Name]; was == nil || p.Manifest().ValidUntil.After(was.Manifest().ValidUntil) {
			last[p.Manifest().Name] = p
		}
	}
	for _, s := range b.inventory.Hosts() {
		if p := last[s.Host.Software]; p != nil && p.Manifest().ValidUntil.Before(soon) {
			ends[p.Digest()] = event.Event{Kind: "platform.ends-soon", Detail: map[string]string{"release": p.Manifest().Name,
				"sha256": p.Digest().String(), "at": p.Manifest().ValidUntil.UTC().Format(time.RFC3339)}}
		}
	}
	o.mu.Lock()
	maps.DeleteFunc(ends, func(sum digest.SHA256, _ event.Event) bool { return o.ending[sum] })
	for sum := range ends {
		o.ending[sum] = true
	}
	o.mu.Unlock()
	for _, e := range ends {
		o.journal(ctx, e)
	}
}

// Readmit lets a host get VMs again after a static quote of it was refused. Nothing is
// released to them without a new quote.
func (o *Orchestrator) Readmit(ctx context.Context, name, by string) (api.Host, error) {
	err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		if _, ok := o.basis().inventory.Host(name); !ok {
			return event.Refuse(event.NoHost, "host %q is not in the inventory", clip(name, maxText))
		}
		state, err := t.Host(name)
		if err != nil {
			return err
		}
		was := state.Barred
		state.Barred, state.Standing = "", ""
		return errors.Join(t.PutHost(name, state), t.Journal(event.Event{Kind: "host.readmitted", Detail: map[string]string{"host": name, "by": by, "was": was}}))
	})
	o.zones.journalled()
	if err != nil {
		return api.Host{}, err
	}
	hosts, err := o.hostList(ctx)
	for _, h := range hosts {
		if h.Name == name {
			return h, err
		}
	}
	return api.Host{}, errors.Join(err, event.Refuse(event.NoHost, "host %q is not in the inventory", name))
}
