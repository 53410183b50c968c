// Package supervisor runs the lab: it makes the networks, starts the host's TPM and
// every daemon in its place, starts again what crashes, and answers `foothold lab`.
//
//	foothold lab up          starts, in new user, mount, network, PID, IPC and UTS namespaces,
//	  foothold lab init      process 1 of the lab, which collects orphans, and its child
//	    foothold lab supervise   which is this package's [Run]
//	      foothold lab confine → each daemon, in its place's network namespace
//
// Nothing that it makes outlives process 1: processes end with the PID namespace,
// mounts with the mount namespace, interfaces, taps and rules with the network
// namespaces. Outside there are only the files of the state directory and the API's
// listening socket, which comes in as an open file.
package supervisor

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"foothold/lab"
	"foothold/lab/control"
	"foothold/lab/wiring"
)

// startTimeout is how long a daemon may take until it serves.
const startTimeout = 60 * time.Second

type supervisor struct {
	state   lab.State
	options Options
	net     *wiring.Network
	report  *reporter
	api     *os.File
	began   time.Time

	daemons []*daemon
	running sync.WaitGroup
	stop    context.CancelFunc
}

// Run is the supervisor's whole life. It returns when the lab was asked to end, or
// when it could not start.
func Run(options string) error {
	var o Options
	if err := json.Unmarshal([]byte(options), &o); err != nil {
		return fmt.Errorf("read options: %w", err)
	}
	slog.SetDefault(slog.New(slog.NewJSONHandler(os.Stderr, nil)))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for _, fd := range []int{lockFD, reportFD, apiFD} {
		unix.CloseOnExec(fd)
	}
	s := &supervisor{
		state: lab.State{Dir: o.State}, options: o, began: time.Now(), stop: cancel,
		report: &reporter{w: os.NewFile(reportFD, "report")},
		api:    os.NewFile(apiFD, "api"),
	}
	defer s.report.close()
	err := s.start(ctx)
	if err != nil {
		slog.Error("the lab does not start", "error", err)
		s.report.send(Step{Error: err.Error()})
	} else {
		s.report.send(Step{Ready: true})
		s.report.close()
		slog.Info("serving", "state", o.State)
		<-ctx.Done()
	}
	cancel()
	s.running.Wait()
	return err
}

// step does one part of the start and reports how long it took.
func (s *supervisor) step(text string, f func() error) error {
	began := time.Now()
	if err := f(); err != nil {
		return fmt.Errorf("%s: %w", text, err)
	}
	s.report.send(Step{Text: text, Seconds: time.Since(began).Seconds()})
	return nil
}

func (s *supervisor) start(ctx context.Context) error {
	if err := s.step("make networks", func() (err error) {
		s.net, err = wiring.Build(lab.Places())
		return err
	}); err != nil {
		return err
	}
	l, err := control.Listen(s.state.Run())
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { l.Close() })
	for _, p := range s.programs() {
		if err := s.add(p); err != nil {
			return err
		}
	}
	s.running.Go(func() { s.answer(ctx, l) })
	for _, d := range s.daemons {
		if d.program.Name != hostAgent {
			s.running.Go(func() { d.run(ctx) })
		}
	}
	if err := s.step("boot the host, measuring its platform", func() error {
		booted := make(chan error, 1)
		s.running.Go(func() { s.powerOn(ctx, s.find(hostAgent), booted) })
		return <-booted
	}); err != nil {
		return err
	}
	return s.awaitAll(ctx)
}

func (s *supervisor) add(p Program) error {
	place, ok := s.net.Place(p.Place)
	if !ok {
		return fmt.Errorf("add %s: no place %s", p.Name, p.Place)
	}
	log, err := openLog(s.state.Log(p.Name))
	if err != nil {
		return err
	}
	s.daemons = append(s.daemons, &daemon{
		program: p, place: place, launch: s.command, log: log,
		serving: make(chan struct{}), ended: make(chan error, 1),
		status: control.Daemon{Name: p.Name, Place: p.Place, State: control.Stopped, Log: log.path},
	})
	return nil
}

func (s *supervisor) find(name string) *daemon {
	for _, d := range s.daemons {
		if d.program.Name == name {
			return d
		}
	}
	return nil
}

// awaitAll waits until every daemon serves. A daemon that ends before it ever served,
// or takes too long, ends the start, unless the lab is to keep going without it.
func (s *supervisor) awaitAll(ctx context.Context) error {
	for _, d := range s.daemons {
		began := time.Now()
		err := d.await(ctx)
		switch {
		case err == nil:
			s.report.send(Step{Text: "start " + d.program.Name, Seconds: time.Since(began).Seconds()})
		case s.options.KeepGoing && ctx.Err() == nil:
			slog.Error("going on without a daemon", "daemon", d.program.Name, "error", err)
			s.report.send(Step{Text: "WITHOUT " + d.program.Name, Seconds: time.Since(began).Seconds()})
		default:
			return err
		}
	}
	return nil
}
