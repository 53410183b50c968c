package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"foothold/guest/pid1"
	"foothold/guest/pinned"
	"foothold/protocol/bootmsg"
	"foothold/protocol/event"
	"foothold/protocol/signed"
	"foothold/protocol/token"
)

// reportPause lies between two tries to deliver the report.
const reportPause = 500 * time.Millisecond

// sending is the report on its way, beside the wait for the orchestrator's login. That
// login is as good as the answer: once the report is accepted, the firewall passes nothing
// between boot server and VM any more, and may cut the answer off.
type sending struct {
	callOff context.CancelCauseFunc
	ended   chan struct{} // closed at the end; err does not change then
	err     error         // nil as well if the login came first
}

// errAnswered calls a report off.
var errAnswered = errors.New("the orchestrator has logged in")

// send begins to send a report, which must have been answered within limit.
func send(ctx context.Context, limit time.Duration, report func(context.Context) error) *sending {
	ctx, callOff := context.WithCancelCause(ctx)
	s := &sending{callOff: callOff, ended: make(chan struct{})}
	go func() {
		defer close(s.ended)
		ctx, cancel := context.WithTimeout(ctx, limit)
		defer cancel()
		if s.err = report(ctx); errors.Is(context.Cause(ctx), errAnswered) {
			s.err = nil
		}
	}()
	return s
}

// beside is a context that ends when the report fails, for that cause.
func (s *sending) beside(ctx context.Context) (context.Context, func()) {
	ctx, end := context.WithCancelCause(ctx)
	go func() {
		select {
		case <-s.ended:
			if s.err != nil {
				end(s.err)
			}
		case <-ctx.Done():
		}
	}()
	return ctx, func() { end(context.Canceled) }
}

// answered ends the sending: the login has come.
func (s *sending) answered() {
	s.callOff(errAnswered)
	<-s.ended
}

// report tells the orchestrator, through the boot server, that the delivered system
// runs. A connection that breaks is tried again with the same report; a refusal is
// final, because T2 is spent by then.
func (i *instance) report(ctx context.Context, kernel string) error {
	payload, err := json.Marshal(bootmsg.Report{Reservation: i.Reservation, Start: i.Start, T2: i.T2, Kernel: kernel, BootMillis: pid1.Uptime().Milliseconds()})
	if err != nil {
		return fmt.Errorf("encode the report: %w", err)
	}
	defer clear(payload)
	envelope := signed.Seal(i.key, signed.Report, payload)
	i.T2 = token.Token{}
	for {
		err := i.deliver(ctx, envelope)
		if err == nil {
			return nil
		}
		if errors.Is(err, pinned.ErrRefused) {
			return event.Refuse(event.ReportRefused, "%v", err)
		}
		select {
		case <-ctx.Done():
			return event.Refuse(pinned.Reason(err, event.BootServerFailed), "%v", err)
		case <-time.After(reportPause):
		}
	}
}

func (i *instance) deliver(ctx context.Context, envelope signed.Envelope) error {
	cert, err := pinned.Ephemeral()
	if err != nil {
		return err
	}
	link, err := pinned.Dial(ctx, pinned.Pins{URL: i.BootURL, ServerName: i.ServerName, CA: i.BootCA}, cert)
	if err != nil {
		return err
	}
	defer link.Close()
	var none struct{}
	return link.Post(ctx, bootmsg.PathReady, envelope, &none, bootmsg.MaxMessage)
}
