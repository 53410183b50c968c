// Package resident is the agent as it runs beside the OS, from memory: acts 9 to 11 of
// the boot story.
//
// It answers the orchestrator, through the tunnel and the gateway's relay, and runs the
// workload. Every message up is signed by the VM's key and carries the nonce of the
// last message down; every message down must be signed by the orchestrator and answer
// the message it follows. The relay can drop messages, and that is all it can do.
//
// Without valid answers the agent goes on asking and changes nothing: it opens nothing
// and starts nothing that it was not told to by a signed message.
package resident

import (
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"foothold/guest/facts"
	"foothold/guest/filter"
	"foothold/guest/opener"
	"foothold/guest/pid1"
	"foothold/guest/pinned"
	"foothold/protocol/agentmsg"
	"foothold/protocol/audit"
	"foothold/protocol/signed"

	"golang.org/x/sys/unix"
)

// Limits and paces.
const (
	startLimit   = 3 * time.Minute  // for the OS to start
	answerLimit  = 60 * time.Second // for one exchange; the orchestrator may take a quote meanwhile
	dialLimit    = 10 * time.Second
	retryFirst   = 500 * time.Millisecond // after a failed exchange, doubling
	retryMost    = 10 * time.Second
	firstWait    = 5 * time.Second // between messages before the orchestrator named an interval
	longestWait  = 10 * time.Minute
	maxEvents    = 32  // of one message
	maxEventLen  = 256 // bytes
	shortestWait = time.Second
)

// Agent is the resident agent.
type Agent struct {
	state    *State
	key      ed25519.PrivateKey
	say      func(string, ...any)
	gather   func(nonce []byte) (audit.Report, error)
	filter   func(*agentmsg.Workload) error
	powerOff func() error
	workload *runner

	link   *pinned.Conn
	seq    int
	nonce  []byte // of the last valid answer
	events []string
}

// Main is the resident agent's process. It returns only on failure.
func Main(ctx context.Context) error {
	console := pid1.Console{Name: Name}
	file, notify, err := inherited()
	if err != nil {
		return err
	}
	state, err := read(file)
	file.Close()
	if err != nil {
		return err
	}
	if err := protect(); err != nil {
		return err
	}
	gatherer := &facts.Gatherer{}
	scope := []facts.Scope{{Dir: filepath.Join(opener.EtcUp, "upper"), As: "/etc"}}
	a := &Agent{state: state, key: state.key(), say: console.Say, powerOff: pid1.PowerOff,
		gather: func(nonce []byte) (audit.Report, error) { return gatherer.Gather(audit.OS, nonce, scope) },
		filter: func(w *agentmsg.Workload) error { return filter.Apply(state.Flows(w)...) },
	}
	a.workload = newRunner(systemd{}, state, filepath.Join(Dir, "workload"), console.Say)
	if err := waitForOS(ctx, notify); err != nil {
		a.event("the OS did not report its start: %v", err)
	}
	console.Say("OS started")
	gatherer.Warm(scope)
	return a.Run(ctx)
}

// protect keeps the process's memory out of reach and out of the way of the
// out-of-memory killer.
func protect() error {
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("protect the agent's memory: %w", err)
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-1000"), 0); err != nil {
		return fmt.Errorf("protect the agent: %w", err)
	}
	return nil
}

// waitForOS waits for READY=1 on the notification socket.
func waitForOS(ctx context.Context, notify *os.File) error {
	defer os.Remove(NotifySocket)
	defer notify.Close()
	conn, err := net.FilePacketConn(notify)
	if err != nil {
		return err
	}
	defer conn.Close()
	deadline := time.Now().Add(startLimit)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := conn.SetReadDeadline(deadline); err != nil {
		return err
	}
	buf := make([]byte, 4096)
	for {
		n, _, err := conn.ReadFrom(buf)
		if err != nil {
			return err
		}
		for _, line := range strings.Split(string(buf[:n]), "\n") {
			if line == "READY=1" {
				return nil
			}
		}
	}
}

// Run exchanges messages until it is told to stop or ctx ends.
func (a *Agent) Run(ctx context.Context) error {
	defer a.hangUp()
	up := a.next(nil)
	for {
		down, err := a.exchange(ctx, up)
		if err != nil {
			return err
		}
		a.nonce = down.Nonce
		if down.Stop {
			return a.stop()
		}
		if err := a.adopt(ctx, down.Workload); err != nil {
			a.event("workload: %v", err)
		}
		var report *audit.Report
		if down.Audit {
			r, err := a.gather(down.Nonce)
			if err == nil {
				report = &r
				a.say("audited")
			} else {
				a.event("audit: %v", err)
			}
		}
		if report == nil {
			a.wait(ctx, down.Interval)
		}
		up = a.next(report)
	}
}

// next makes the next message.
func (a *Agent) next(report *audit.Report) agentmsg.Up {
	a.seq++
	up := agentmsg.Up{Reservation: a.state.Reservation, Start: a.state.Start, Seq: a.seq, Nonce: a.nonce, Audit: report, Workload: a.workload.status(), Events: a.events}
	a.events = nil
	return up
}

// wait ends at the interval, or at once when the workload's state changes.
func (a *Agent) wait(ctx context.Context, seconds int) {
	pause := firstWait
	if seconds > 0 {
		pause = min(max(time.Duration(seconds)*time.Second, shortestWait), longestWait)
	}
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	case <-a.workload.changed:
	}
}

// exchange sends one message until a valid answer comes. The same bytes are sent
// again: an orchestrator that has seen them answers as before.
func (a *Agent) exchange(ctx context.Context, up agentmsg.Up) (agentmsg.Down, error) {
	payload, err := json.Marshal(up)
	if err != nil {
		return agentmsg.Down{}, fmt.Errorf("encode message: %w", err)
	}
	envelope := signed.Seal(a.key, signed.AgentUp, payload)
	pause := retryFirst
	for failures := 1; ; failures++ {
		down, err := a.try(ctx, envelope, up.Seq)
		if err == nil {
			return down, nil
		}
		a.hangUp()
		if ctx.Err() != nil {
			return agentmsg.Down{}, context.Cause(ctx)
		}
		if failures&(failures-1) == 0 { // the 1st, 2nd, 4th ... of a row
			a.say("no answer (%d): %v", failures, err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		pause = min(2*pause, retryMost)
	}
}

func (a *Agent) try(ctx context.Context, envelope signed.Envelope, seq int) (agentmsg.Down, error) {
	var down agentmsg.Down
	if a.link == nil {
		dial, cancel := context.WithTimeout(ctx, dialLimit)
		defer cancel()
		link, err := pinned.Dial(dial, a.state.relay(), a.state.certificate())
		if err != nil {
			return down, err
		}
		a.link = link
	}
	exchange, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	var answer signed.Envelope
	if err := a.link.Post(exchange, agentmsg.PathAgent, envelope, &answer, agentmsg.MaxMessage); err != nil {
		return down, err
	}
	if err := answer.Open(a.state.ManifestKey, signed.AgentDown, &down); err != nil {
		return down, fmt.Errorf("the answer: %w", err)
	}
	if down.Reservation != a.state.Reservation || down.Seq != seq || len(down.Nonce) < 16 || len(down.Nonce) > 64 {
		return down, errors.New("the answer is not to this message")
	}
	return down, nil
}

func (a *Agent) hangUp() {
	if a.link != nil {
		a.link.Close()
		a.link = nil
	}
}

// adopt makes the workload the one that the VM runs; none changes nothing.
func (a *Agent) adopt(ctx context.Context, w *agentmsg.Workload) error {
	if w == nil || a.workload.runs(w) {
		return nil
	}
	if err := checkWorkload(w); err != nil {
		return err
	}
	if err := a.filter(w); err != nil {
		return err
	}
	a.say("workload %s", w.SHA256.Short())
	a.workload.replace(ctx, w)
	return nil
}

// stop erases and powers off.
func (a *Agent) stop() error {
	a.say("told to stop")
	a.workload.end()
	clear(a.key)
	a.state.wipe()
	return a.powerOff()
}

// event is told with the next message.
func (a *Agent) event(format string, args ...any) {
	line := fmt.Sprintf(format, args...)
	a.say("%s", line)
	if len(line) > maxEventLen {
		line = line[:maxEventLen]
	}
	if len(a.events) < maxEvents {
		a.events = append(a.events, strings.ToValidUTF8(line, "?"))
	}
}
