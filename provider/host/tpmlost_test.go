package host

import (
	"errors"
	"testing"
	"time"

	"foothold/internal/tpm/swtpmtest"
	"foothold/protocol/channel"
	"foothold/protocol/event"
	"foothold/protocol/hostapi"
	"foothold/provider/broker"

	"github.com/google/go-tpm/tpm2"
)

// speechless passes a command on and hears no answer, which the test does itself.
type speechless struct{ l *loader }

func (s speechless) Send(command []byte) ([]byte, error) {
	s.l.say(channel.Message{Type: channel.Command, Data: command})
	return nil, errors.New("no answer")
}

// A TPM that ends while one VM needs it, the next one waits for its boot server, and a
// third comes later: each is ended for that reason, and none is left waiting.
func TestTPMLostInEachStage(t *testing.T) {
	v := swtpmtest.New(t)
	a := agentOf(t, v, time.Minute)
	tunnel := func(l *loader) {
		l.say(channel.Message{Type: channel.TunnelUp})
		asked := l.hear(channel.AskTunnel)
		l.say(channel.Message{Type: channel.Tunnel, Challenge: asked.Challenge, Measurement: &oneTunnel})
	}
	needs, waits := a.boot(t, "needs"), a.boot(t, "waits")
	needs.upTo(channel.Ready)
	waits.upTo(channel.Ready)
	v.Restart() // one that is back has not what the host put into it
	_, session := a.broker.Keys()
	go tpm2.HMACSession(speechless{needs}, tpm2.TPMAlgSHA256, 16, tpm2.Salted(session.Handle, session.Public), tpm2.AESEncryption(128, tpm2.EncryptInOut))
	needs.refused(event.TPMLost)
	waits.refused(event.TPMLost)
	late := a.boot(t, "late")
	tunnel(late)
	late.refused(event.TPMLost)
}

// An agent whose TPM is lost says so to its tenants and ends; the next one serves again.
// Its quotes hold what the TPM holds: nothing, until the host boots and is measured anew.
func TestTPMLostEndsTheAgent(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	c := w.client("acme-orchestrator")
	c.putTemplate()
	req := request("web", 1)
	c.ok("POST", "/v1/vms", req, nil)
	w.tpm.Restart()
	select {
	case err := <-w.done:
		if !errors.Is(err, broker.ErrFailed) {
			t.Errorf("the agent ended with %v", err)
		}
		w.done <- nil
	case <-time.After(4 * probeTPM):
		t.Fatal("the agent runs on without its TPM")
	}
	w.run()
	c = w.client("acme-orchestrator")
	var vm hostapi.VM
	c.ok("GET", "/v1/vms/"+req.Spec.Reservation, nil, &vm)
	if vm.State != hostapi.Stopped || vm.Reason != event.TPMLost || vm.Detail == "" {
		t.Errorf("its VM: %+v", vm)
	}
}
