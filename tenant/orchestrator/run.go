package orchestrator

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"foothold/internal/mtls"
	"foothold/internal/serve"
	"foothold/protocol/event"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
	"foothold/tenant/verify"
)

// Run serves both APIs until ctx ends.
func (o *Orchestrator) Run(ctx context.Context) error {
	operators, dmz, err := o.listen()
	if err != nil {
		return err
	}
	return o.serve(ctx, operators, dmz)
}

// serve takes up what an earlier run left, then answers on the two listeners until ctx
// ends, and waits for its own goroutines.
func (o *Orchestrator) serve(ctx context.Context, operators, dmz net.Listener) error {
	defer operators.Close()
	defer dmz.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer func() {
		cancel()
		o.tasks.Wait()
	}()
	o.mu.Lock()
	o.ctx = ctx
	o.mu.Unlock()
	operatorCert, operatorCA, err := loadTLS(o.conf.OperatorTLS, "operator_tls")
	if err != nil {
		return err
	}
	dmzCert, dmzCA, err := loadTLS(o.conf.UpstreamTLS, "upstream_tls")
	if err != nil {
		return err
	}
	if err := o.recover(ctx); err != nil {
		return fmt.Errorf("take up what was left: %w", err)
	}
	o.task(func() { o.keepZones(ctx) })
	o.task(func() { o.keepProving(ctx) })
	o.task(func() { o.removeStrangers(ctx) })
	o.task(func() { o.watchListings(ctx) })
	o.task(func() { o.sweep(ctx) })
	failed := make(chan error, 2)
	go func() {
		failed <- serve.HTTPS(ctx, operators, mtls.ServerConfig(operatorCert, operatorCA, mtls.Operator), o.operatorAPI(),
			serve.TellRefused(ctx, o.tellTLS(ctx, "operators")))
	}()
	go func() {
		failed <- serve.HTTPS(ctx, dmz, mtls.ServerConfig(dmzCert, dmzCA, mtls.BootServer, mtls.Gateway, mtls.Firewall, mtls.Store), o.upstreamAPI(),
			serve.TellRefused(ctx, o.tellTLS(ctx, "dmz")))
	}()
	slog.Info("serving", "listening", []string{operators.Addr().String(), dmz.Addr().String()}, "profile", o.conf.Profile, "epoch", o.zones.epoch)
	first := <-failed
	cancel()
	return errors.Join(first, <-failed)
}

func (o *Orchestrator) listen() (operators, dmz net.Listener, err error) {
	if operators, err = listenAPI(o.conf.API); err != nil {
		return nil, nil, err
	}
	if dmz, err = net.Listen("tcp", o.conf.Upstream.String()); err != nil {
		operators.Close()
		return nil, nil, fmt.Errorf("listen for the DMZ: %w", err)
	}
	return operators, dmz, nil
}

// listenAPI listens at HOST:PORT, or takes the listening socket that was handed in as
// open file N for fd:N.
func listenAPI(where string) (net.Listener, error) {
	number, handed := strings.CutPrefix(where, "fd:")
	if !handed {
		l, err := net.Listen("tcp", where)
		if err != nil {
			return nil, fmt.Errorf("listen for operators: %w", err)
		}
		return l, nil
	}
	n, err := strconv.Atoi(number)
	if err != nil || n < 3 {
		return nil, fmt.Errorf("api: fd:N wants a number from 3")
	}
	file := os.NewFile(uintptr(n), "operators' listener")
	defer file.Close() // FileListener has its own copy
	l, err := net.FileListener(file)
	if err != nil {
		return nil, fmt.Errorf("listen for operators on open file %d: %w", n, err)
	}
	return l, nil
}

// recover takes up the live rows where they stand. While we were down no heartbeat
// could come, so computing VMs get one lease more; the firewalls held what they had
// until their own leases ended.
func (o *Orchestrator) recover(ctx context.Context) error {
	if _, err := o.review(ctx, ""); err != nil {
		return err
	}
	var live []ledger.Reservation
	err := o.ledger.Write(ctx, func(t *ledger.Tx) (err error) {
		if err := t.Grace(t.Now.Add(o.limits.Lease)); err != nil {
			return err
		}
		if live, err = t.Live(); err != nil {
			return err
		}
		return t.Journal(event.Event{Kind: "orchestrator.started", Detail: map[string]string{"live": strconv.Itoa(len(live))}})
	})
	if err != nil {
		return err
	}
	if err := removeAll(filepath.Join(o.conf.State, uploads)); err != nil {
		return err
	}
	for _, r := range live {
		if err := o.resume(ctx, r); err != nil {
			return err
		}
	}
	return o.publish(ctx)
}

// resume continues one reservation by the normal path, or ends it by the normal path.
func (o *Orchestrator) resume(ctx context.Context, r ledger.Reservation) error {
	_, s, err := o.row(ctx, r.ID)
	if err != nil {
		return err
	}
	if r.Phase == reservation.Reserved {
		o.drive(r.ID, r.Start, "create", func(ctx context.Context) error { return o.create(ctx, r.ID) })
		return nil
	}
	if why, err := o.refusedBefore(ctx, r); err != nil {
		return err
	} else if why != nil && s.Closed.IsZero() {
		o.abort(ctx, r.ID, r.Start, why)
		return nil
	}
	if r.Phase == reservation.Stopped { // the sweep has its instance destroyed, and starts it when that is due
		return nil
	}
	if r.Wish != ledger.WishNone && r.Phase != reservation.Computing { // it was stored, and a crash came before what follows
		o.abort(ctx, r.ID, r.Start, event.Refuse(event.VMStopped, "as asked, while it was %s", r.Phase))
		return nil
	}
	if s.HostStarted.IsZero() {
		return o.createAnew(ctx, r)
	}
	h, err := o.reach(r.Host)
	if err != nil {
		o.abort(ctx, r.ID, r.Start, err)
		return nil
	}
	o.task(func() { o.watch(o.liveRun(r.ID).ctx, h, r.ID, r.Start) })
	o.resumeAct(r)
	return nil
}

// refusedBefore is the refusal of a quote of a live reservation's latest start whose evidence
// is stored: a crash came before the end that it brings. nil: there is none.
func (o *Orchestrator) refusedBefore(ctx context.Context, r ledger.Reservation) (why, err error) {
	var p verify.Parts
	err = o.ledger.Read(ctx, func(t *ledger.Tx) (err error) { p, err = t.RefusedBundle(r.ID, r.Start); return err })
	if errors.Is(err, ledger.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var record verify.Record
	if err := json.Unmarshal(p.Record, &record); err != nil {
		return nil, fmt.Errorf("evidence of the refusal of %s: %w", r.ID, err)
	}
	return verify.Verdict{Role: p.Link.Role, Host: p.Link.Host, Reservation: r.ID, Findings: record.Findings}.Err(), nil
}

// Main reads the configuration, opens the state and runs. The version is this program's, for people.
func Main(ctx context.Context, configFile, version string) error {
	conf, err := ReadConfig(configFile)
	if err != nil {
		return err
	}
	o, err := New(ctx, conf)
	if err != nil {
		return err
	}
	o.version = version
	return errors.Join(o.Run(ctx), o.Close())
}
