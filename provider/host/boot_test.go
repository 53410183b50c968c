package host

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"foothold/internal/tpm/swtpmtest"
	"foothold/protocol/channel"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/frame"
	"foothold/protocol/hostapi"
	"foothold/protocol/inventory"
	"foothold/protocol/token"
	"foothold/provider/broker"
	"foothold/provider/enroll"

	"github.com/google/go-tpm/tpm2"
)

// loader is the VM's end of a channel whose other end the agent answers.
type loader struct {
	t      *testing.T
	conn   net.Conn
	vm     *vm
	ended  chan error // what converse returned
	cancel context.CancelCauseFunc
}

// agentWithTPM is an agent that has a broker and no VMs.
func agentWithTPM(t *testing.T, hold time.Duration) *Agent {
	t.Helper()
	return agentOf(t, swtpmtest.New(t), hold)
}

func agentOf(t *testing.T, v *swtpmtest.TPM, hold time.Duration) *Agent {
	t.Helper()
	dev := v.Open()
	entry, err := enroll.Enroll(dev, inventory.Host{Name: "host-1"})
	if err != nil {
		t.Fatal(err)
	}
	keys, err := broker.KeysOf(entry)
	if err != nil {
		t.Fatal(err)
	}
	b, err := broker.New(dev, keys, hold)
	if err != nil {
		t.Fatal(err)
	}
	a := &Agent{conf: Config{Name: "host-1", State: t.TempDir()}, broker: b, vms: map[string]*vm{}}
	one := digest.Of([]byte("file"))
	a.firmware.BIOS, a.firmware.LoaderKernel, a.firmware.LoaderInitramfs = one, one, one
	if err := os.Mkdir(filepath.Join(a.conf.State, "vms"), 0o700); err != nil {
		t.Fatal(err)
	}
	return a
}

// boot begins a conversation.
func (a *Agent) boot(t *testing.T, name string) *loader {
	t.Helper()
	ours, theirs := net.Pipe()
	ctx, cancel := context.WithCancelCause(context.Background())
	l := &loader{t, theirs, a.newVM("acme", request(name, 1).Spec, token.Token{}), make(chan error, 1), cancel}
	timer := time.NewTimer(time.Hour)
	go func() {
		l.ended <- l.vm.converse(ctx, ours, timer)
		ours.Close()
	}()
	t.Cleanup(func() { theirs.Close(); cancel(nil) })
	return l
}

// say may run beside the test: the host may close the channel while it is spoken to.
func (l *loader) say(m channel.Message) {
	l.t.Helper()
	if err := frame.Write(l.conn, channel.MaxFrame, m); err != nil && !errors.Is(err, io.ErrClosedPipe) {
		l.t.Error(err)
	}
}

func (l *loader) hear(want channel.Type) channel.Message {
	l.t.Helper()
	var m channel.Message
	if err := frame.Read(l.conn, channel.MaxFrame, &m); err != nil {
		l.t.Fatalf("waiting for %s: %v", want, err)
	}
	if m.Type != want {
		l.t.Fatalf("the host says %+v, want %s", m, want)
	}
	return m
}

var oneTunnel = digest.Of([]byte("tunnel"))

// upTo plays a good loader up to a point of the story.
func (l *loader) upTo(point channel.Type) {
	l.t.Helper()
	if point == "" {
		return
	}
	l.say(channel.Message{Type: channel.TunnelUp})
	asked := l.hear(channel.AskTunnel)
	if point == channel.AskTunnel {
		return
	}
	l.say(channel.Message{Type: channel.Tunnel, Challenge: asked.Challenge, Measurement: &oneTunnel})
	l.hear(channel.Ready)
	if point == channel.Ready {
		return
	}
	l.quote()
	if point == channel.Response {
		return
	}
	l.say(channel.Message{Type: channel.Handover})
	l.hear(channel.Released)
}

// Send makes the loader a TPM for the boot server's session.
func (l *loader) Send(command []byte) ([]byte, error) {
	l.say(channel.Message{Type: channel.Command, Data: command})
	return l.hear(channel.Response).Data, nil
}

func (l *loader) quote() {
	l.t.Helper()
	aik, session := l.vm.agent.broker.Keys()
	s, closeSession, err := tpm2.HMACSession(l, tpm2.TPMAlgSHA256, 16, tpm2.Salted(session.Handle, session.Public), tpm2.AESEncryption(128, tpm2.EncryptInOut))
	if err != nil {
		l.t.Fatal(err)
	}
	_, err = tpm2.Quote{
		SignHandle: aik.Auth(s), QualifyingData: tpm2.TPM2BData{Buffer: oneTunnel[:]}, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: []byte{0xff, 0x7f, 0xff}}}},
	}.Execute(l)
	if err != nil {
		l.t.Fatal(err)
	}
	if err := closeSession(); err != nil {
		l.t.Fatal(err)
	}
}

// refused expects the host to end the VM for reason, and to say so.
func (l *loader) refused(reason event.Reason) {
	l.t.Helper()
	if m := l.hear(channel.Refused); m.Reason != string(reason) {
		l.t.Errorf("the host refuses for %q, want %q", m.Reason, reason)
	}
	if err := <-l.ended; event.ReasonOf(err) != reason {
		l.t.Errorf("the VM ends with %v, want %s", err, reason)
	}
}

func TestConversationAsDrawn(t *testing.T) {
	a := agentWithTPM(t, time.Minute)
	l := a.boot(t, "good")
	l.upTo(channel.Released)
	if vm := l.vm.describe(); vm.Boot != hostapi.Delivered || vm.TPMHeld <= 0 {
		t.Errorf("%+v", vm)
	}
	l.conn.Close()
	if err := <-l.ended; !errors.Is(err, errGone) {
		t.Errorf("after the VM's end: %v", err)
	}
}

func TestMisuseEndsTheVM(t *testing.T) {
	a := agentWithTPM(t, time.Minute)
	challenge := make([]byte, channel.ChallengeLen)
	for name, try := range map[string]struct {
		after  channel.Type
		say    channel.Message
		reason event.Reason
	}{
		"tunnel unasked":              {"", channel.Message{Type: channel.Tunnel, Challenge: challenge, Measurement: &oneTunnel}, event.ChannelMisuse},
		"command before all":          {"", channel.Message{Type: channel.Command, Data: []byte{1}}, event.ChannelMisuse},
		"handover before all":         {"", channel.Message{Type: channel.Handover}, event.ChannelMisuse},
		"host's own message":          {"", channel.Message{Type: channel.Ready}, event.ChannelMisuse},
		"unknown message":             {"", channel.Message{Type: "hello"}, event.ChannelMisuse},
		"hint with a measurement":     {"", channel.Message{Type: channel.TunnelUp, Measurement: &oneTunnel}, event.ChannelMisuse},
		"hint twice":                  {channel.AskTunnel, channel.Message{Type: channel.TunnelUp}, event.ChannelMisuse},
		"wrong challenge":             {channel.AskTunnel, channel.Message{Type: channel.Tunnel, Challenge: challenge, Measurement: &oneTunnel}, event.ChannelMisuse},
		"no challenge":                {channel.AskTunnel, channel.Message{Type: channel.Tunnel, Measurement: &oneTunnel}, event.ChannelMisuse},
		"tunnel twice":                {channel.Ready, channel.Message{Type: channel.Tunnel, Challenge: challenge, Measurement: &oneTunnel}, event.ChannelMisuse},
		"handover without a quote":    {channel.Ready, channel.Message{Type: channel.Handover}, event.ChannelMisuse},
		"no TPM command":              {channel.Ready, channel.Message{Type: channel.Command, Data: []byte("x")}, event.TPMCommandRefused},
		"empty TPM command":           {channel.Ready, channel.Message{Type: channel.Command}, event.TPMCommandRefused},
		"command with a reason":       {channel.Ready, channel.Message{Type: channel.Command, Data: []byte("x"), Reason: "x"}, event.ChannelMisuse},
		"another command after quote": {channel.Response, channel.Message{Type: channel.Command, Data: []byte("x")}, event.TPMCommandRefused},
		"more after the release":      {channel.Released, channel.Message{Type: channel.Command, Data: []byte("x")}, event.ChannelMisuse},
		"handover twice":              {channel.Released, channel.Message{Type: channel.Handover}, event.ChannelMisuse},
		"loader gives up":             {channel.AskTunnel, channel.Message{Type: channel.Failed, Reason: string(event.SignatureInvalid)}, event.SignatureInvalid},
		"loader met a false server":   {"", channel.Message{Type: channel.Failed, Reason: string(event.ServerUntrusted)}, event.ServerUntrusted},
		"loader invents a reason":     {channel.AskTunnel, channel.Message{Type: channel.Failed, Reason: string(event.Released)}, event.LoaderFailed},
		"agent met a false server":    {channel.Released, channel.Message{Type: channel.Failed, Reason: string(event.ServerUntrusted)}, event.ServerUntrusted},
		"agent and gateway part":      {channel.Released, channel.Message{Type: channel.Failed, Reason: string(event.GatewayFailed)}, event.GatewayFailed},
		"agent invents a reason":      {channel.Released, channel.Message{Type: channel.Failed, Reason: string(event.Released)}, event.GuestPoweredOff},
		"agent speaks for the loader": {channel.Released, channel.Message{Type: channel.Failed, Reason: string(event.DigestMismatch)}, event.GuestPoweredOff},
		"loader speaks for the agent": {channel.Ready, channel.Message{Type: channel.Failed, Reason: string(event.GatewayFailed)}, event.LoaderFailed},
	} {
		t.Run(name, func(t *testing.T) {
			l := a.boot(t, "bad")
			l.upTo(try.after)
			go l.say(try.say)
			l.refused(try.reason)
		})
	}
	l := a.boot(t, "good") // the TPM is free after all of that
	l.upTo(channel.Released)
}

func TestMeasurementAnswersItsChallenge(t *testing.T) {
	a := agentWithTPM(t, time.Minute)
	l := a.boot(t, "bad")
	l.say(channel.Message{Type: channel.TunnelUp})
	asked := l.hear(channel.AskTunnel)
	go l.say(channel.Message{Type: channel.Tunnel, Challenge: asked.Challenge, Measurement: &digest.SHA256{}})
	l.refused(event.ChannelMisuse)
}

func TestGarbageEndsTheVM(t *testing.T) {
	a := agentWithTPM(t, time.Minute)
	for name, bytes := range map[string]string{
		"oversize":      "\xff\xff\xff\xff",
		"no JSON":       "\x00\x00\x00\x03xyz",
		"unknown field": "\x00\x00\x00\x0d{\"typo\":\"a\"} ",
	} {
		t.Run(name, func(t *testing.T) {
			l := a.boot(t, "bad")
			go io.WriteString(l.conn, bytes)
			l.refused(event.ChannelMisuse)
		})
	}
}

// TestVMsThatWaitDelayNobody: VMs that were promised the TPM and do nothing, or end, are
// no delay to one that quotes.
func TestVMsThatWaitDelayNobody(t *testing.T) {
	a := agentWithTPM(t, time.Minute)
	silent, dead, timed, mute := a.boot(t, "silent"), a.boot(t, "dead"), a.boot(t, "timed"), a.boot(t, "mute")
	for _, l := range []*loader{silent, dead, timed, mute} {
		l.upTo(channel.Ready)
	}
	for _, l := range []*loader{silent, mute} {
		_, session := a.broker.Keys()
		if _, _, err := tpm2.HMACSession(l, tpm2.TPMAlgSHA256, 16, tpm2.Salted(session.Handle, session.Public), tpm2.AESEncryption(128, tpm2.EncryptInOut)); err != nil {
			t.Fatal(err)
		}
	}
	dead.conn.Close()
	if err := <-dead.ended; !errors.Is(err, errGone) {
		t.Errorf("a VM that ended: %v", err)
	}
	timed.cancel(event.Refuse(event.DeadlinePassed, "boot timer"))
	timed.refused(event.DeadlinePassed)

	good := a.boot(t, "good")
	good.upTo(channel.Released)
	if vm := good.vm.describe(); vm.TPMHeld <= 0 {
		t.Errorf("the TPM was held for %s", vm.TPMHeld)
	}
	go mute.say(channel.Message{Type: channel.Handover})
	mute.refused(event.ChannelMisuse)
	if vm := silent.vm.describe(); vm.Boot != hostapi.Attesting || vm.TPMHeld != 0 {
		t.Errorf("the VM that stalls: %+v", vm)
	}
}

func TestTurnWithoutAQuoteEndsTheVM(t *testing.T) {
	a := agentWithTPM(t, 50*time.Millisecond)
	l := a.boot(t, "slow")
	l.upTo(channel.Ready)
	l.refused(event.DeadlinePassed)
}

func TestBootTimerWinsOverHandover(t *testing.T) {
	a := agentWithTPM(t, time.Minute)
	ours, theirs := net.Pipe()
	defer theirs.Close()
	timer := time.NewTimer(0)
	<-timer.C // it has run out, and its message is on the way
	l := &loader{t, theirs, a.newVM("acme", request("late", 1).Spec, token.Token{}), make(chan error, 1), nil}
	go func() { l.ended <- l.vm.converse(t.Context(), ours, timer) }()
	l.upTo(channel.Response)
	go l.say(channel.Message{Type: channel.Handover})
	l.refused(event.DeadlinePassed)
}

func TestVMRecordHoldsNoToken(t *testing.T) {
	a := agentWithTPM(t, time.Minute)
	req := request("web", 1)
	v := a.newVM("acme", req.Spec, req.Token)
	if err := v.write(v.describe()); err != nil {
		t.Fatal(err)
	}
	back, err := a.readVM(a.recordPath(req.Spec.Reservation))
	if err != nil {
		t.Fatal(err)
	}
	if got, _ := json.Marshal(back.describe()); !back.token.IsZero() || back.spec.Digest() != req.Spec.Digest() {
		t.Errorf("read back %s", got)
	}
}
