package loader

import (
	"context"
	"fmt"
	"io"
	"time"

	"foothold/protocol/channel"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/frame"
)

// local is the loader's end of the channel to the host (package channel). Every
// message has one place in the conversation; any other message, a second one of its
// kind included, is met where another is expected and ends the VM.
type local struct {
	port   io.ReadWriter
	broken bool // a frame was cut off: nothing more can be said
}

// announce tells of the tunnel, answers the host's one question, and waits until the host
// has taken down what the VM's quote is to prove.
func (l *local) announce(ctx context.Context, tunnel digest.SHA256) error {
	if err := l.send(ctx, channel.Message{Type: channel.TunnelUp}); err != nil {
		return err
	}
	ask, err := l.expect(ctx, channel.AskTunnel)
	if err != nil {
		return err
	}
	if len(ask.Challenge) != channel.ChallengeLen {
		return event.Refuse(event.ChannelMisuse, "the host's challenge has %d bytes", len(ask.Challenge))
	}
	if err := l.send(ctx, channel.Message{Type: channel.Tunnel, Challenge: ask.Challenge, Measurement: &tunnel}); err != nil {
		return err
	}
	_, err = l.expect(ctx, channel.Ready)
	return err
}

// command has the host execute one TPM command.
func (l *local) command(ctx context.Context, command []byte) ([]byte, error) {
	if err := l.send(ctx, channel.Message{Type: channel.Command, Data: command}); err != nil {
		return nil, err
	}
	m, err := l.expect(ctx, channel.Response)
	if err != nil {
		return nil, err
	}
	if len(m.Data) == 0 {
		return nil, event.Refuse(event.ChannelMisuse, "the host sends an empty TPM response")
	}
	return m.Data, nil
}

// handover waits until the host has let go of the VM.
func (l *local) handover(ctx context.Context) error {
	if err := l.send(ctx, channel.Message{Type: channel.Handover}); err != nil {
		return err
	}
	_, err := l.expect(ctx, channel.Released)
	return err
}

// failed tells the host that the VM gives up.
func (l *local) failed(ctx context.Context, reason event.Reason) {
	if !l.broken {
		_ = l.send(ctx, channel.Message{Type: channel.Failed, Reason: string(reason)})
	}
}

func (l *local) send(ctx context.Context, m channel.Message) error {
	if err := l.bounded(ctx, func() error { return frame.Write(l.port, channel.MaxFrame, m) }); err != nil {
		return event.Refuse(event.LoaderFailed, "tell the host %s: %v", m.Type, err)
	}
	return nil
}

// expect takes the next message, which must be of that type and carry that type's
// fields alone.
func (l *local) expect(ctx context.Context, want channel.Type) (channel.Message, error) {
	var m channel.Message
	if err := l.bounded(ctx, func() error { return frame.Read(l.port, channel.MaxFrame, &m) }); err != nil {
		return m, event.Refuse(event.ChannelMisuse, "hear from the host (%s): %v", want, err)
	}
	if m.Type == channel.Refused {
		return m, event.Refuse(event.HostRefused, "the host refuses (%s)", printable(m.Reason))
	}
	bare := m.Measurement == nil && m.Reason == "" && (m.Challenge == nil || want == channel.AskTunnel) && (m.Data == nil || want == channel.Response)
	if m.Type != want || !bare {
		return m, event.Refuse(event.ChannelMisuse, "the host says %q where %q is due", printable(string(m.Type)), want)
	}
	return m, nil
}

// bounded ends a read or write with ctx. A port that knows no deadlines is left with
// its pending call, which the VM's end cuts off.
func (l *local) bounded(ctx context.Context, call func() error) error {
	if p, ok := l.port.(interface{ SetDeadline(time.Time) error }); ok {
		deadline, _ := ctx.Deadline() // none: the zero time, which lifts the last one
		if p.SetDeadline(deadline) == nil {
			stop := context.AfterFunc(ctx, func() { _ = p.SetDeadline(time.Unix(1, 0)) })
			defer stop()
			return l.mark(call())
		}
	}
	done := make(chan error, 1)
	go func() { done <- call() }()
	select {
	case err := <-done:
		return l.mark(err)
	case <-ctx.Done():
		return l.mark(context.Cause(ctx))
	}
}

func (l *local) mark(err error) error {
	l.broken = l.broken || err != nil
	return err
}

// printable bounds text of the host's for the console.
func printable(text string) string {
	if len(text) > 40 {
		text = text[:40]
	}
	return fmt.Sprintf("%+q", text)
}

// Refuse tells the host of a failure before the conversation could begin, and
// returns it.
func Refuse(port io.ReadWriter, err error) error {
	ctx, cancel := context.WithTimeout(context.Background(), farewell)
	defer cancel()
	(&local{port: port}).failed(ctx, event.LoaderFailed)
	return err
}
