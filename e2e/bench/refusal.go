package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"time"

	"foothold/client"
	"foothold/lab"
	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/tenant/ledger"
	"foothold/tenant/verify"
)

// refusalRounds is how many VMs lose their host.
const refusalRounds = 3

// closing is one refused quote, in ms to the VM's last packet through its tunnel: from the
// operator's call for the quote, and from when its evidence had come and was judged.
type closing struct{ called, judged float64 }

// measureRefusals is how long a VM is reached after its host's quote was refused.
func measureRefusals(ctx context.Context, l *labState) ([]Result, error) {
	fetches, err := startAsker(ctx, l, lab.Tenant)
	if err != nil {
		return nil, err
	}
	defer fetches.close()
	var called, judged []float64
	for i := range refusalRounds {
		say("VM %d of %d, whose host is refused", i+1, refusalRounds)
		vm, err := l.create(ctx, fmt.Sprintf("refused-%d", i))
		if err != nil {
			return nil, err
		}
		c, err := l.refuse(ctx, fetches, vm)
		if err != nil {
			return nil, err
		}
		say("  its last packet came %.0f ms after the call, %.0f ms after the evidence", c.called, c.judged)
		called, judged = append(called, c.called), append(judged, c.judged)
		if err := l.delete(ctx, vm.Name); err != nil {
			return nil, err
		}
	}
	name := fmt.Sprintf("from a refused quote's evidence to the last packet through the tunnel, worst of %d VMs", refusalRounds)
	return []Result{atMost(name, p99(judged), "ms", aimRevoked).against("from the call for it", p99(called))}, nil
}

// refuse has a VM's host quoted while the VM is being connected to, over and over, through
// its tunnel. The quote is genuine and is refused, because the ledger was made to expect
// counters of the TPM that it does not have: as after a restart of the TPM that nobody
// measured.
func (l *labState) refuse(ctx context.Context, a *asker, vm api.VM) (c closing, err error) {
	page, err := url.Parse(vm.WorkloadURL)
	if err != nil {
		return c, fmt.Errorf("VM %s: %w", vm.Name, err)
	}
	if err := a.ask("last", "tcp://"+page.Host); err != nil {
		return c, err
	}
	if _, err := a.answer(); err != nil {
		return c, err
	}
	if err := sleep(ctx, flowing); err != nil {
		return c, err
	}
	if err := l.expectOtherCounters(ctx, vm); err != nil {
		return c, err
	}
	began := time.Now()
	_, err = l.api.Attest(ctx, vm.ID)
	var refusal *client.Refusal
	if !errors.As(err, &refusal) || refusal.Reason != event.QuoteRefused || len(refusal.Findings) == 0 {
		return c, fmt.Errorf("VM %s: its host's quote was not refused: %v", vm.Name, err)
	}
	last, err := a.answer()
	if err != nil {
		return c, err
	}
	if began.Sub(last) > askLimit { // then the refusal did not end the traffic
		return c, fmt.Errorf("VM %s: its last packet came %s before its host was quoted", vm.Name, began.Sub(last))
	}
	e, err := l.api.Evidence(ctx, vm.ID, vm.Start)
	if err != nil {
		return c, err
	}
	newest := e.Verdicts[len(e.Verdicts)-1]
	if newest.Accepted || newest.At.Before(began) {
		return c, fmt.Errorf("VM %s: the newest evidence is not the refusal's: %+v", vm.Name, newest)
	}
	return closing{max(0, last.Sub(began).Seconds()*1000), max(0, last.Sub(newest.At).Seconds()*1000)}, nil
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
