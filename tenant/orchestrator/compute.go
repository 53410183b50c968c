package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"time"

	"foothold/protocol/agentmsg"
	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/protocol/zone"
	"foothold/tenant/expect"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// Times of act 10.
const (
	probePause    = 250 * time.Millisecond // between tries of a workload that does not answer yet
	probeTimeout  = 3 * time.Second        // one try
	workloadLimit = 3 * time.Minute        // from computing to the workload's first answer
	auditEvery    = time.Minute            // audits of a computing VM's OS
	watchRetry    = 5 * time.Second        // after a try at which the host gave no quote
)

// States of a workload, as guests report them; the last two end it.
const (
	workloadRunning = "running"
	workloadFailed  = "failed"
	workloadExited  = "exited"
)

// judgeOS judges an audit of the running OS that answers the nonce we gave.
func (o *Orchestrator) judgeOS(ctx context.Context, m accepted) error {
	tpl, err := o.templateOf(ctx, m.r)
	if err != nil {
		return err
	}
	expected, err := expect.Parse(tpl.Audit)
	if err != nil {
		return err
	}
	if err := expect.Err(expect.OS(expected, o.instance(m.r, m.s, tpl, m.up.Nonce), *m.up.Audit)); err != nil {
		return err
	}
	err = o.ledger.Write(ctx, func(t *ledger.Tx) error {
		return errors.Join(
			t.ChangeStart(m.r.ID, m.r.Start, func(s *ledger.Start) { s.AuditNonce, s.Audited = nil, t.Now }),
			t.Journal(event.Event{Kind: "audit.passed", Reservation: m.r.ID, Detail: map[string]string{"stage": m.up.Audit.Stage}}))
	})
	o.zones.journalled()
	return err
}

// compute begins act 10: it moves the VM to computing, and returns when the opened
// rules are live in the kernels, so that what the VM is told to fetch it can fetch.
func (o *Orchestrator) compute(ctx context.Context, r ledger.Reservation) error {
	err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		if err := o.owesEnd(r.ID, r.Start); err != nil {
			return err
		}
		if err := t.Move(r.ID, r.Start, reservation.Connecting, reservation.Computing, t.Now.Add(o.limits.Lease)); err != nil {
			return err
		}
		if err := t.Journal(event.Event{Kind: "vm.computing", Reservation: r.ID}); err != nil {
			return err
		}
		if r.Workload != nil {
			return t.BeginPart(r.ID, r.Start, partReady)
		}
		return errors.Join(
			t.ChangeStart(r.ID, r.Start, func(s *ledger.Start) { s.Ready = t.Now }),
			t.Journal(event.Event{Kind: "vm.ready", Reservation: r.ID}))
	})
	if err != nil {
		return err
	}
	o.zones.journalled()
	if err := o.publish(ctx); err != nil {
		return err
	}
	if err := o.waitLive(ctx, zone.External, zone.Internal, zone.Gateway); err != nil {
		return err
	}
	o.keepComputing(r)
	return nil
}

// keepComputing starts what goes on beside the heartbeats.
func (o *Orchestrator) keepComputing(r ledger.Reservation) {
	o.drive(r.ID, r.Start, "watch host", func(ctx context.Context) error { return o.watchHost(ctx, r.ID) })
	o.drive(r.ID, r.Start, "limit attestation", func(ctx context.Context) error { return o.limitAttestation(ctx, r.ID) })
	if r.Workload != nil {
		o.drive(r.ID, r.Start, "workload", func(ctx context.Context) error { return o.awaitWorkload(ctx, r.ID) })
	}
}

// hearComputing takes a heartbeat: it renews the lease, judges an audit that was asked
// for, and follows the workload. The same message again gets its answer again and no
// more: neither a VM that has frozen nor a gateway that repeats it lives on by it.
func (o *Orchestrator) hearComputing(ctx context.Context, m accepted) (agentmsg.Down, error) {
	carried, err := m.audits()
	if err != nil {
		return agentmsg.Down{}, err
	}
	if carried {
		if err := o.judgeOS(ctx, m); err != nil {
			return agentmsg.Down{}, err
		}
	}
	if err := o.hearWorkload(ctx, m); err != nil {
		return agentmsg.Down{}, err
	}
	if m.r.Wish != ledger.WishNone { // it has stopGrace, not a lease
		err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
			if err := o.owesEnd(m.r.ID, m.r.Start); err != nil {
				return err
			}
			return t.Renew(m.r.ID, m.r.Start, m.r.Wished.Add(stopGrace+o.limits.Lease))
		})
		if errors.Is(err, ledger.ErrMoved) {
			err = nil
		}
		return agentmsg.Down{Stop: true}, err
	}
	down := agentmsg.Down{Workload: o.workloadFor(m.r), Interval: o.interval()}
	if m.r.Workload != nil && m.s.Ready.IsZero() {
		down.Interval = quickInterval
	}
	if m.again {
		down.Audit = !carried && m.asked()
		return down, nil
	}
	down.Audit = !carried && o.now().Sub(m.s.Audited) >= auditEvery
	err = o.ledger.Write(ctx, func(t *ledger.Tx) error {
		if err := o.owesEnd(m.r.ID, m.r.Start); err != nil {
			return err
		}
		if down.Audit {
			if err := t.ChangeStart(m.r.ID, m.r.Start, func(s *ledger.Start) { s.AuditNonce = m.s.AgentNonce }); err != nil {
				return err
			}
		}
		return t.Renew(m.r.ID, m.r.Start, t.Now.Add(o.limits.Lease))
	})
	if errors.Is(err, ledger.ErrMoved) {
		return down, event.Refuse(event.HeartbeatMissed, "it came after the end of the lease")
	}
	return down, err
}

// hearWorkload follows what the guest says of the workload. One that fails before it
// ever answered ends the VM: it would never be what was asked for. Later, that is the
// operator's to decide; the VM is no longer ready.
func (o *Orchestrator) hearWorkload(ctx context.Context, m accepted) error {
	w := m.up.Workload
	if w == nil || m.r.Workload == nil || w.State == m.s.Workload {
		return nil
	}
	switch w.State {
	case "fetching", workloadRunning, workloadFailed, workloadExited:
	default:
		return event.Refuse(event.ReportRefused, "the VM reports an unknown state of its workload")
	}
	if w.SHA256 != m.r.Workload.SHA256 {
		if slices.ContainsFunc(m.s.Former, func(f api.Workload) bool { return f.SHA256 == w.SHA256 }) {
			return nil // it is told with the answer
		}
		return event.Refuse(event.ReportRefused, "the VM runs %s instead of %s", w.SHA256.Short(), m.r.Workload.SHA256.Short())
	}
	ended := w.State == workloadFailed || w.State == workloadExited
	never := false
	err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		never = false
		now, err := t.Reservation(m.r.ID)
		if stale := err == nil && (now.Start != m.r.Start || *now.Workload != *m.r.Workload); stale || err != nil {
			return err // it was given another one meanwhile
		}
		e := event.Event{Kind: "workload." + w.State, Reservation: m.r.ID, Detail: map[string]string{"detail": clip(w.Detail, maxText)}}
		if ended {
			e.Reason = event.WorkloadFailed
		}
		return errors.Join(
			t.ChangeStart(m.r.ID, m.r.Start, func(s *ledger.Start) {
				s.Workload = w.State
				if w.State == workloadRunning {
					s.Former = nil
				}
				if ended {
					s.Answered = s.Answered || !s.Ready.IsZero() // it may have answered since the message came
					never = !s.Answered && !s.Replaced
					s.Ready = time.Time{}
				}
			}),
			t.Journal(e))
	})
	o.zones.journalled()
	if err == nil && never {
		err = event.Refuse(event.WorkloadFailed, "%s: %s", w.State, clip(w.Detail, maxText))
	}
	return err
}

// awaitWorkload asks the workload over the real path, from the tenant's network
// through the tunnel, until it answers. With its first answer the VM is ready. One that
// replaces another is not asked while the other may answer; that it never does changes
// nothing more. One that has answered and ended since is not awaited again.
func (o *Orchestrator) awaitWorkload(ctx context.Context, id string) error {
	r, s, err := o.row(ctx, id)
	if err != nil || !s.Ready.IsZero() || s.Answered {
		return err
	}
	url := workloadURL(s.TunnelAddress, r.Workload.Port)
	late := time.NewTimer(o.workloadLimit)
	defer late.Stop()
	client := &http.Client{Timeout: probeTimeout, Transport: &http.Transport{DisableKeepAlives: true, DialContext: o.dial},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	for {
		now, s, err := o.row(ctx, id)
		if err != nil || now.Start != r.Start || *now.Workload != *r.Workload || !s.Ready.IsZero() {
			return err // another start's, or another workload's turn
		}
		if err = errFormer; len(s.Former) == 0 {
			err = probeWorkload(ctx, client, url)
		}
		if err == nil {
			return o.ready(ctx, r)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-late.C:
			if s.Replaced {
				o.journal(ctx, event.Event{Kind: "workload.silent", Reservation: id, Reason: event.WorkloadFailed, Detail: map[string]string{"url": url}})
				return nil
			}
			return event.Refuse(event.WorkloadFailed, "it did not answer at %s within %v: %v", url, o.workloadLimit, err)
		case <-time.After(probePause):
		}
	}
}

// errFormer says that the workload which is being replaced may still answer.
var errFormer = errors.New("the VM still runs the workload that this one replaces")

// probeWorkload asks once. Any answer counts, one that is not HTTP too: that it is the
// right workload is shown by its digest, not by what it says.
func probeWorkload(ctx context.Context, client *http.Client, url string) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return fmt.Errorf("probe workload: %w", err)
	}
	resp, err := client.Do(req)
	if err != nil {
		if strings.Contains(err.Error(), "malformed HTTP response") {
			return nil
		}
		return fmt.Errorf("probe workload: %w", err)
	}
	io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10))
	return resp.Body.Close()
}

func (o *Orchestrator) ready(ctx context.Context, r ledger.Reservation) error {
	err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		now, err := t.Reservation(r.ID)
		if err != nil || now.Phase != reservation.Computing || now.Start != r.Start || *now.Workload != *r.Workload {
			return err // what answered is not what is wanted now
		}
		return errors.Join(
			t.ChangeStart(r.ID, r.Start, func(s *ledger.Start) { s.Ready = t.Now }),
			t.EndPart(r.ID, r.Start, partReady),
			t.Journal(event.Event{Kind: "vm.ready", Reservation: r.ID}))
	})
	o.zones.journalled()
	return err
}

// watchHost has the host of a computing VM quoted again and again, each time so long after
// the last good quote, also one that an operator asked for; and at once when what is heard
// of the host makes that due, until it has answered. A refused quote ends the VM; a
// host that gives none does not yet: a provider's management network may be down for a
// while. How long that is borne is for limitAttestation.
func (o *Orchestrator) watchHost(ctx context.Context, id string) error {
	told, wait, due := "", o.watchEvery, false
	wished := o.run(id).due
	for {
		asked, err := pauseUntil(ctx, wait, wished)
		if err != nil {
			return err
		}
		due = due || asked
		_, s, err := o.row(ctx, id)
		if err != nil {
			return err
		}
		if wait = s.Attested.Add(o.watchEvery).Sub(o.now()); wait > 0 && !due {
			continue
		}
		wait = o.watchEvery
		err = o.attestWatched(ctx, id, &told)
		if err != nil && !silent(err) {
			if due { // it may be taken up again
				o.quoteSoon(id)
			}
			return err
		}
		due = due && err != nil
		if err != nil && ctx.Err() == nil {
			why := refusalOf(err)
			o.journal(ctx, event.Event{Kind: "host.silent", Reservation: id, Reason: why.Reason, Detail: map[string]string{"detail": clip(why.Detail, maxText)}})
			wait = min(watchRetry, o.watchEvery)
		}
	}
}

// pauseUntil is pause that ends early, and says so, when something comes from a channel.
func pauseUntil(ctx context.Context, d time.Duration, c <-chan struct{}) (came bool, err error) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false, ctx.Err()
	case <-c:
		return true, nil
	case <-timer.C:
		return false, nil
	}
}

// resumeAct goes on, after a restart, with what the orchestrator drives in a phase.
func (o *Orchestrator) resumeAct(r ledger.Reservation) {
	switch r.Phase {
	case reservation.Unlocking:
		o.drive(r.ID, r.Start, "unlock", func(ctx context.Context) error { return o.unlock(ctx, r.ID) })
	case reservation.Computing:
		o.keepComputing(r)
	}
}
