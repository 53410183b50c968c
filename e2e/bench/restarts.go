package main

import (
	"bytes"
	"context"
	"fmt"
	"strconv"
	"time"

	"foothold/lab"
	"foothold/lab/control"
	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/zone"

	"golang.org/x/sys/unix"
)

const (
	restartRounds = 3
	restartLimit  = time.Minute
	restartPoll   = 2 * time.Millisecond
	// calm is how long a daemon has run before it is killed: the lab's supervisor waits
	// longer, and not the 250 ms that are in each value, before it starts one again that
	// ran for less than 30 s.
	calm = 31 * time.Second
)

// restarts kills the lab's daemons.
type restarts struct {
	*labState
	tenant, bootserver *asker
}

// daemonCase is a daemon and how to see that it serves again. serves is called over and
// over and is nil when it does; since is when its new process began.
type daemonCase struct {
	name, until string
	serves      func(ctx context.Context, since time.Time) error
}

// measureRestarts is the time from a daemon's kill to its service: with the supervisor's
// pause, through the interfaces that others use. A VM computes meanwhile, but for the
// host, whose VMs end with its agent.
func measureRestarts(ctx context.Context, l *labState) ([]Result, error) {
	r := &restarts{labState: l}
	var err error
	for place, to := range map[string]**asker{lab.Tenant: &r.tenant, lab.BootServer: &r.bootserver} {
		if *to, err = startAsker(ctx, l, place); err != nil {
			return nil, err
		}
		defer (*to).close()
	}
	say("creating the VM that sees daemons restart")
	vm, err := l.create(ctx, "restarts")
	if err != nil {
		return nil, err
	}
	results, err := r.measure(ctx, r.cases(vm))
	if err != nil {
		return nil, err
	}
	if err := l.delete(ctx, vm.Name); err != nil {
		return nil, err
	}
	host, err := r.measure(ctx, []daemonCase{{"host", "it gives a quote", func(context.Context, time.Time) error {
		return first(r.tenant, "quote://"+l.state.Tenant("orchestrator.yaml"))
	}}})
	return append(results, host...), err
}

func (r *restarts) cases(vm api.VM) []daemonCase {
	boot := "tcp://" + lab.Address(lab.BootServer, lab.DMZLAN).String() + ":443"
	zoneLive := func(name string) func(context.Context, time.Time) error {
		return func(ctx context.Context, since time.Time) error { return r.zoneLive(ctx, name, since) }
	}
	return []daemonCase{
		{"orchestrator", "it answers", func(ctx context.Context, _ time.Time) error { _, err := r.api.Status(ctx); return err }},
		{"internal", "its rules are live", zoneLive(zone.Internal)},
		{"external", "its rules are live", zoneLive(zone.External)},
		{"store", "it takes an object", r.storeTakes},
		{"bootserver", "it accepts and its gate is live", func(ctx context.Context, since time.Time) error {
			if err := first(r.bootserver, boot); err != nil {
				return err
			}
			return r.zoneLive(ctx, zone.Boot, since)
		}},
		{"gateway", "a page comes through the tunnel", func(ctx context.Context, since time.Time) error {
			if err := first(r.tenant, vm.WorkloadURL); err != nil {
				return err
			}
			return r.zoneLive(ctx, zone.Gateway, since)
		}},
	}
}

// measure kills each daemon in turn, so that each is calm again when its turn comes.
func (r *restarts) measure(ctx context.Context, cases []daemonCase) ([]Result, error) {
	times, processes := make([][]float64, len(cases)), make([][]float64, len(cases))
	for round := range restartRounds {
		for i, c := range cases {
			process, served, err := r.restart(ctx, c)
			if err != nil {
				return nil, fmt.Errorf("restart of %s: %w", c.name, err)
			}
			say("restart %d of %s: %.0f ms", round+1, c.name, served)
			processes[i], times[i] = append(processes[i], process), append(times[i], served)
		}
	}
	var results []Result
	for i, c := range cases {
		name := fmt.Sprintf("restart, %s killed until %s, median of %d", c.name, c.until, restartRounds)
		results = append(results, atMost(name, median(times[i]), "ms", aimRestart).against("new process", median(processes[i])))
	}
	return results, nil
}

// restart kills a daemon and returns after how many ms there is a new process and it
// serves. What answers is the new one: the old one has been waited for by then.
func (r *restarts) restart(ctx context.Context, c daemonCase) (process, served float64, err error) {
	old, err := r.daemon(ctx, c.name)
	if err != nil {
		return 0, 0, err
	}
	if err := sleep(ctx, time.Until(old.Since.Add(calm))); err != nil {
		return 0, 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, restartLimit)
	defer cancel()
	began := time.Now()
	if _, err := control.Call(ctx, r.state.Run(), control.Request{Op: control.OpKill, Name: c.name, Signal: int(unix.SIGKILL)}); err != nil {
		return 0, 0, err
	}
	now := old
	for now.PID == old.PID || now.PID == 0 {
		if err := sleep(ctx, restartPoll); err != nil {
			return 0, 0, fmt.Errorf("no new process: %w", err)
		}
		if now, err = r.daemon(ctx, c.name); err != nil {
			return 0, 0, err
		}
	}
	process = since(began) * 1000
	for {
		err := c.serves(ctx, now.Since)
		if err == nil {
			return process, since(began) * 1000, nil
		}
		if sleep(ctx, restartPoll) != nil {
			return 0, 0, fmt.Errorf("it does not serve after %s: %w", restartLimit, err)
		}
	}
}

func (r *restarts) daemon(ctx context.Context, name string) (control.Daemon, error) {
	s, err := r.status(ctx)
	if err != nil {
		return control.Daemon{}, err
	}
	for _, d := range s.Daemons {
		if d.Name == name {
			return d, nil
		}
	}
	return control.Daemon{}, fmt.Errorf("the lab has no daemon %s", name)
}

// first waits until a place of the lab sees an answer.
func first(a *asker, url string) error {
	if err := a.ask("first", url); err != nil {
		return err
	}
	_, err := a.answer()
	return err
}

// zoneLive is nil when the zone's daemon has reported, since its start, that it has made
// the newest document so.
func (r *restarts) zoneLive(ctx context.Context, name string, since time.Time) error {
	s, err := r.api.Status(ctx)
	if err != nil {
		return err
	}
	for _, z := range s.Zones {
		if z.Zone == name && z.Live == z.Wanted && z.Error == "" && z.Seen.After(since) {
			return nil
		}
	}
	return fmt.Errorf("zone %s is not live: %+v", name, s.Zones)
}

// storeTakes puts an object, by way of the orchestrator, that the store does not have.
func (r *restarts) storeTakes(ctx context.Context, _ time.Time) error {
	data := []byte("object of " + strconv.FormatInt(time.Now().UnixNano(), 10))
	return r.api.PutObject(ctx, digest.Of(data), bytes.NewReader(data), int64(len(data)))
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
