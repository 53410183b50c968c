package host

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"time"

	"foothold/protocol/channel"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/frame"
	"foothold/protocol/hostapi"
	"foothold/protocol/vmspec"
	"foothold/provider/broker"
)

// writeTimeout bounds one message to the VM: a guest that does not read its channel
// is at fault.
const writeTimeout = 5 * time.Second

// errGone is the end of the channel with QEMU's own end.
var errGone = errors.New("the VM has ended")

// loaderReasons are the reasons that a loader may give; any other counts as loader-failed.
var loaderReasons = []event.Reason{
	event.LoaderFailed, event.BootServerFailed, event.ServerUntrusted, event.SignatureInvalid, event.DigestMismatch, event.CertificateInvalid, event.QuoteRefused,
}

// agentReasons are those that the delivered system's agent may give for its end. It may
// give no other, but can end: then its host knows no more than that it powered off.
var agentReasons = []event.Reason{
	event.BootServerFailed, event.ServerUntrusted, event.ReportRefused, event.SSHFailed, event.AuditFailed, event.HandoverFailed, event.DiskRefused,
	event.GatewayFailed, event.AdmissionRefused,
}

// conversation is the host's side of one VM's local channel.
type conversation struct {
	vm   *vm
	conn net.Conn
	in   chan channel.Message // closed at the channel's end
	err  error                // why it ended; read after in is closed
}

// converse answers the loader, in the one order that package channel draws. It
// returns errGone, or why the VM must be ended. After the handover it goes on to
// watch that nothing more comes but the delivered system's last word.
func (v *vm) converse(ctx context.Context, conn net.Conn, timer *time.Timer) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c := &conversation{vm: v, conn: conn, in: make(chan channel.Message)}
	go c.read(ctx)
	err := c.run(ctx, timer)
	if !errors.Is(err, errGone) {
		c.send(channel.Message{Type: channel.Refused, Reason: string(event.ReasonOf(err))})
	}
	return err
}

func (c *conversation) run(ctx context.Context, timer *time.Timer) error {
	// 1. A hint, once: the tunnel stands.
	if _, err := c.receive(ctx, channel.TunnelUp); err != nil {
		return err
	}
	// 2. The host asks for the tunnel's measurement, and takes it from this answer alone.
	tunnel, err := c.askTunnel(ctx)
	if err != nil {
		return err
	}
	// 3. The host takes down what the VM's quote is to prove.
	attestation, err := c.vm.agent.broker.Attest(c.vm.tenant, vmspec.Measurements(c.vm.agent.firmware, c.vm.spec.Digest()), tunnel)
	if err != nil {
		return tpmError(err)
	}
	defer c.release(attestation)
	c.stage(hostapi.Attesting)
	if err := c.send(channel.Message{Type: channel.Ready}); err != nil {
		return err
	}
	// 4. The boot server's TPM session, until the loader has verified what it was sent.
	// The TPM is the VM's for the quote alone.
	if err := c.attest(ctx, attestation); err != nil {
		return err
	}
	c.release(attestation)
	// 5. Handover: from here on the VM is the tenant's software, which has no
	// business on this channel but to say that it gives up, and why.
	if !timer.Stop() {
		return event.Refuse(event.DeadlinePassed, "the VM's boot timer ran out at its handover")
	}
	c.stage(hostapi.Delivered)
	if err := c.send(channel.Message{Type: channel.Released}); err != nil {
		return err
	}
	_, err = c.receive(ctx)
	return err
}

func (c *conversation) askTunnel(ctx context.Context) (digest.SHA256, error) {
	challenge := make([]byte, channel.ChallengeLen)
	rand.Read(challenge)
	if err := c.send(channel.Message{Type: channel.AskTunnel, Challenge: challenge}); err != nil {
		return digest.SHA256{}, err
	}
	m, err := c.receive(ctx, channel.Tunnel)
	if err != nil {
		return digest.SHA256{}, err
	}
	if subtle.ConstantTimeCompare(m.Challenge, challenge) != 1 || m.Measurement == nil || m.Measurement.IsZero() {
		return digest.SHA256{}, misuse("the tunnel's measurement does not answer the challenge")
	}
	return *m.Measurement, nil
}

// attest forwards TPM commands until the loader hands over. The broker is done with the
// VM when it was quoted; a flush may still come after that.
func (c *conversation) attest(ctx context.Context, a *broker.Attestation) error {
	ended := a.Ended()
	for {
		select {
		case <-ended:
			ended = nil
			if !a.Quoted() {
				return tpmError(a.Cause())
			}
			c.release(a)
			c.stage(hostapi.Quoted)
		case m, ok := <-c.in:
			switch {
			case ok && m.Type == channel.Command && only(m, channel.Message{Type: m.Type, Data: m.Data}):
				response, err := c.forward(ctx, a, m.Data)
				if err != nil {
					return err
				}
				if err := c.send(channel.Message{Type: channel.Response, Data: response}); err != nil {
					return err
				}
			case ok && m.Type == channel.Handover && only(m, channel.Message{Type: m.Type}) && a.Quoted():
				return nil
			default:
				return c.unexpected(m, ok)
			}
		case <-c.vm.agent.broker.Failed():
			return tpmError(broker.ErrFailed)
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// forward waits for the VM's turn with the TPM and has a command carried out. Whatever
// the loader sends meanwhile is unasked; if the VM ends, it leaves the queue.
func (c *conversation) forward(ctx context.Context, a *broker.Attestation, command []byte) ([]byte, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type result struct {
		response []byte
		err      error
	}
	done := make(chan result, 1)
	go func() {
		response, err := a.Forward(ctx, command)
		done <- result{response, err}
	}()
	select {
	case r := <-done:
		if r.err != nil && ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return r.response, tpmError(r.err)
	case m, ok := <-c.in:
		cancel()
		<-done
		return nil, c.unexpected(m, ok)
	}
}

// tpmError gives the broker's errors their reasons.
func tpmError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, broker.ErrFailed):
		return event.Refuse(event.TPMLost, "%v", err)
	case errors.Is(err, broker.ErrTPM):
		return event.Refuse(event.QuoteRefused, "%v", err)
	case errors.Is(err, broker.ErrRefused):
		return event.Refuse(event.TPMCommandRefused, "%v", err)
	case errors.Is(err, broker.ErrBusy), errors.Is(err, broker.ErrEvicted):
		return event.Refuse(event.TPMBusy, "%v", err)
	case errors.Is(err, broker.ErrTimeout):
		return event.Refuse(event.DeadlinePassed, "%v", err)
	case errors.Is(err, broker.ErrOver):
		return event.Refuse(event.TPMCommandRefused, "%v", err)
	}
	return err
}

// release ends the broker's work for the VM, if it has not ended, and tells how long the
// TPM was held.
func (c *conversation) release(a *broker.Attestation) {
	a.Release()
	c.vm.update(func(info *hostapi.VM) { info.TPMHeld = a.Held() })
}

func (c *conversation) stage(stage string) {
	c.vm.update(func(info *hostapi.VM) { info.Boot = stage })
	c.vm.logger().Info("vm boot", "stage", stage)
}

func misuse(format string, args ...any) error {
	return event.Refuse(event.ChannelMisuse, format, args...)
}

// receive waits for a message of the type, with nothing but its own fields. Without a
// type it waits for the end.
func (c *conversation) receive(ctx context.Context, want ...channel.Type) (channel.Message, error) {
	select {
	case m, ok := <-c.in:
		bare := channel.Message{Type: m.Type}
		if m.Type == channel.Tunnel {
			bare.Challenge, bare.Measurement = m.Challenge, m.Measurement
		}
		if !ok || !slices.Contains(want, m.Type) || !only(m, bare) {
			return m, c.unexpected(m, ok)
		}
		return m, nil
	case <-ctx.Done():
		return channel.Message{}, context.Cause(ctx)
	}
}

// only reports whether m has no field that allowed lacks.
func only(m, allowed channel.Message) bool {
	return len(m.Challenge) == len(allowed.Challenge) && m.Measurement == allowed.Measurement &&
		len(m.Data) == len(allowed.Data) && m.Reason == allowed.Reason
}

// unexpected says what it means that m, or the channel's end, came.
func (c *conversation) unexpected(m channel.Message, ok bool) error {
	if !ok {
		return c.err
	}
	if m.Type != channel.Failed {
		return misuse("%q came unasked, twice or out of order", m.Type)
	}
	reason := event.Reason(m.Reason)
	switch delivered := c.vm.describe().Boot == hostapi.Delivered; {
	case delivered && slices.Contains(agentReasons, reason):
		return event.Refuse(reason, "the agent gave up")
	case delivered:
		return event.Refuse(event.GuestPoweredOff, "the agent gave up")
	case slices.Contains(loaderReasons, reason):
		return event.Refuse(reason, "the loader gave up")
	}
	return event.Refuse(event.LoaderFailed, "the loader gave up")
}

// read takes messages until the channel ends or sends what is no message.
func (c *conversation) read(ctx context.Context) {
	defer close(c.in)
	for {
		var m channel.Message
		err := frame.Read(c.conn, channel.MaxFrame, &m)
		var network net.Error
		switch {
		case err == nil:
		case err == io.EOF, errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, net.ErrClosed), errors.As(err, &network):
			c.err = errGone
			return
		default:
			c.err = misuse("no message: %v", err)
			return
		}
		select {
		case c.in <- m:
		case <-ctx.Done():
			c.err = errGone
			return
		}
	}
}

func (c *conversation) send(m channel.Message) error {
	if err := c.conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return errGone
	}
	if err := frame.Write(c.conn, channel.MaxFrame, m); err != nil {
		var network net.Error
		if errors.As(err, &network) && network.Timeout() {
			return misuse("the VM does not read its channel")
		}
		return fmt.Errorf("%w: %w", errGone, err)
	}
	return nil
}
