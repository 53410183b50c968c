package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"time"

	"foothold/client"
	"foothold/internal/config"
	"foothold/internal/durable"
	"foothold/lab"
	"foothold/lab/control"
	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/tenant/ledger"
	"foothold/tenant/orchestrator"
	"foothold/tenant/verify"

	"github.com/goccy/go-yaml"
	"golang.org/x/sys/unix"
)

// refusalRounds is how many VMs lose their host by each way.
const refusalRounds = 3

// A host that is late: how often it is quoted, and how long it may give no good quote, in
// place of a lab's minute and five.
const (
	lateEvery  = 15 * time.Second
	lateWithin = 30 * time.Second
)

// closing is one VM whose host was refused or late, in ms from when that was known: to its
// last packet through its tunnel, and until a listing of each firewall's rules by its kernel
// names the VM no more, one listing's time included.
type closing struct{ tunnel, external, internal float64 }

// watched is a VM's traffic and rules, as three places of the lab see them.
type watched struct{ fetches, external, internal *asker }

// measureRefusals is how long a VM is reached, and passed by the firewalls, after its host's
// quote was refused, and after the last moment at which it should have come.
func measureRefusals(ctx context.Context, l *labState) ([]Result, error) {
	var w watched
	for place, to := range map[string]**asker{lab.Tenant: &w.fetches, lab.External: &w.external, lab.Internal: &w.internal} {
		var err error
		if *to, err = startAsker(ctx, l, place); err != nil {
			return nil, err
		}
		defer (*to).close()
	}
	var called []float64
	refused, err := l.closings(ctx, "refused", func(vm api.VM) (c closing, err error) {
		c, late, err := l.refuse(ctx, w, vm)
		called = append(called, late)
		return c, err
	})
	if err != nil {
		return nil, err
	}
	put, err := l.setAttestation(ctx, lateEvery, lateWithin)
	if err != nil {
		return nil, err
	}
	late, err := l.closings(ctx, "late", func(vm api.VM) (closing, error) { return l.beLate(ctx, w, vm) })
	if err := errors.Join(err, put()); err != nil {
		return nil, err
	}
	results := closingResults("a refused quote's evidence", refused)
	results[0] = results[0].against("from the call for it", p99(called))
	return append(results, closingResults("the end of a late host's time", late)...), nil
}

// closings has one VM after the other lose its host.
func (l *labState) closings(ctx context.Context, how string, lose func(api.VM) (closing, error)) (list []closing, err error) {
	for i := range refusalRounds {
		say("VM %d of %d, whose host is %s", i+1, refusalRounds, how)
		vm, err := l.create(ctx, fmt.Sprintf("%s-%d", how, i))
		if err != nil {
			return nil, err
		}
		c, err := lose(vm)
		if err != nil {
			return nil, err
		}
		say("  after %.0f ms its last packet came, after %.0f ms it was gone from the external firewall, after %.0f ms from the internal one", c.tunnel, c.external, c.internal)
		list = append(list, c)
		if err := l.delete(ctx, vm.Name); err != nil {
			return nil, err
		}
	}
	return list, nil
}

// closingResults are the worst of each.
func closingResults(since string, list []closing) []Result {
	worst := func(to string, of func(closing) float64) Result {
		var values []float64
		for _, c := range list {
			values = append(values, of(c))
		}
		return atMost(fmt.Sprintf("from %s to %s, worst of %d VMs", since, to, len(list)), p99(values), "ms", aimRevoked)
	}
	return []Result{
		worst("the last packet through the tunnel", func(c closing) float64 { return c.tunnel }),
		worst("rules gone from the external firewall's kernel", func(c closing) float64 { return c.external }),
		worst("rules gone from the internal firewall's kernel", func(c closing) float64 { return c.internal }),
	}
}

// begin has the VM connected to over and over through its tunnel, and its rules looked for,
// until both are gone.
func (w watched) begin(ctx context.Context, vm api.VM) error {
	page, err := url.Parse(vm.WorkloadURL)
	if err != nil {
		return fmt.Errorf("VM %s: %w", vm.Name, err)
	}
	for _, q := range []struct {
		of        *asker
		what, url string
	}{{w.fetches, "last", "tcp://" + page.Host}, {w.external, "gone", "rules://" + vm.Address.String()}, {w.internal, "gone", "rules://" + vm.TunnelAddress.String()}} {
		if err := q.of.ask(q.what, q.url); err != nil {
			return err
		}
		if _, err := q.of.answer(); err != nil {
			return fmt.Errorf("VM %s: %s: %w", vm.Name, q.url, err)
		}
	}
	return sleep(ctx, flowing)
}

// end waits until all is gone. since returns when it had to go, once it is.
func (w watched) end(vm api.VM, since func() (time.Time, error)) (c closing, err error) {
	var gone [3]time.Time
	for i, a := range []*asker{w.fetches, w.external, w.internal} {
		if gone[i], err = a.answer(); err != nil {
			return c, fmt.Errorf("VM %s: %w", vm.Name, err)
		}
	}
	from, err := since()
	if err != nil {
		return c, err
	}
	for i, to := range []*float64{&c.tunnel, &c.external, &c.internal} {
		if from.Sub(gone[i]) > askLimit { // then something else ended it
			return c, fmt.Errorf("VM %s: what should end after %s ended %s before", vm.Name, from, from.Sub(gone[i]))
		}
		*to = max(0, gone[i].Sub(from).Seconds()*1000)
	}
	return c, nil
}

// refuse has a VM's host quoted while the VM is being connected to. The quote is genuine and
// is refused, because the ledger was made to expect counters of the TPM that it does not
// have: as after a restart of the TPM that nobody measured. called is the time from the
// operator's call to the last packet, in ms.
func (l *labState) refuse(ctx context.Context, w watched, vm api.VM) (c closing, called float64, err error) {
	if err := w.begin(ctx, vm); err != nil {
		return c, 0, err
	}
	if err := l.expectOtherCounters(ctx, vm); err != nil {
		return c, 0, err
	}
	began := time.Now()
	_, err = l.api.Attest(ctx, vm.ID)
	var refusal *client.Refusal
	if !errors.As(err, &refusal) || refusal.Reason != event.QuoteRefused || len(refusal.Findings) == 0 {
		return c, 0, fmt.Errorf("VM %s: its host's quote was not refused: %v", vm.Name, err)
	}
	var judged time.Time
	c, err = w.end(vm, func() (time.Time, error) {
		v, err := l.newest(ctx, vm)
		if err == nil && (v.Accepted || v.At.Before(began)) {
			err = fmt.Errorf("VM %s: the newest evidence is not the refusal's: %+v", vm.Name, v)
		}
		judged = v.At
		return judged, err
	})
	return c, c.tunnel + judged.Sub(began).Seconds()*1000, err
}

// beLate stops a VM's host agent, while the VM runs on and is being connected to, so that
// no further quote comes. What had to go had to when lateWithin was over since the last one.
func (l *labState) beLate(ctx context.Context, w watched, vm api.VM) (c closing, err error) {
	if err := w.begin(ctx, vm); err != nil {
		return c, err
	}
	// A VM that has just begun to compute has a little longer; its next good quote ends that.
	if _, err := l.api.Attest(ctx, vm.ID); err != nil {
		return c, fmt.Errorf("VM %s: its host's last quote: %w", vm.Name, err)
	}
	if err := l.signal(ctx, lab.Host, unix.SIGSTOP); err != nil {
		return c, err
	}
	c, err = w.end(vm, func() (time.Time, error) {
		v, err := l.newest(ctx, vm)
		if err == nil && !v.Accepted {
			err = fmt.Errorf("VM %s: its host was refused, not late: %+v", vm.Name, v)
		}
		return v.At.Add(lateWithin), err
	})
	if err != nil {
		return c, errors.Join(err, l.signal(ctx, lab.Host, unix.SIGCONT))
	}
	now, err := l.api.VM(ctx, vm.ID)
	if err == nil && now.Reason != event.AttestationLate {
		err = fmt.Errorf("VM %s ended for %q", vm.Name, now.Reason)
	}
	return c, errors.Join(err, l.signal(ctx, lab.Host, unix.SIGCONT))
}

// newest is the last verdict on what a VM's host quoted; that it quoted nothing is none.
func (l *labState) newest(ctx context.Context, vm api.VM) (v api.Verdict, err error) {
	e, err := l.api.Evidence(ctx, vm.ID, vm.Start)
	if err != nil {
		return v, err
	}
	for _, v := range slices.Backward(e.Verdicts) {
		if !v.Unjudged {
			return v, nil
		}
	}
	return v, fmt.Errorf("VM %s has no evidence", vm.Name)
}

func (l *labState) signal(ctx context.Context, daemon string, s unix.Signal) error {
	_, err := control.Call(ctx, l.state.Run(), control.Request{Op: control.OpKill, Name: daemon, Signal: int(s)})
	return err
}

// setAttestation has the lab's orchestrator start anew with other limits, and returns what
// puts the former ones back.
func (l *labState) setAttestation(ctx context.Context, every, within time.Duration) (put func() error, err error) {
	file := l.state.Tenant("orchestrator.yaml")
	former, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var conf orchestrator.Config
	if err := config.Read(file, &conf); err != nil {
		return nil, err
	}
	conf.Limits.AttestEvery, conf.Limits.AttestWithin = every, within
	changed, err := yaml.Marshal(conf)
	if err != nil {
		return nil, err
	}
	return func() error { return l.reconfigure(ctx, file, former) }, l.reconfigure(ctx, file, changed)
}

// reconfigure gives the orchestrator another configuration, and waits until it answers.
func (l *labState) reconfigure(ctx context.Context, file string, data []byte) error {
	if err := durable.WriteFile(file, data, 0o600); err != nil {
		return err
	}
	r := &restarts{labState: l}
	_, _, err := r.restart(ctx, daemonCase{name: "orchestrator", serves: func(ctx context.Context, _ time.Time) error { _, err := l.api.Status(ctx); return err }})
	if err != nil {
		return fmt.Errorf("start the orchestrator anew: %w", err)
	}
	return nil
}

// expectOtherCounters changes the ledger beside the orchestrator.
func (l *labState) expectOtherCounters(ctx context.Context, vm api.VM) error {
	db, err := ledger.Open(ctx, filepath.Join(l.state.Tenant("orchestrator"), "ledger.db"), time.Now)
	if err != nil {
		return err
	}
	defer db.Close()
	return db.Write(ctx, func(t *ledger.Tx) error {
		s, err := t.Start(vm.ID, vm.Start)
		if err != nil {
			return err
		}
		var clock verify.Clock
		if err := json.Unmarshal(s.Clock, &clock); err != nil {
			return fmt.Errorf("clock of %s: %w", vm.Name, err)
		}
		clock.Restarts++
		if s.Clock, err = json.Marshal(clock); err != nil {
			return err
		}
		return t.PutStart(vm.ID, vm.Start, s)
	})
}
