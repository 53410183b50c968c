// Package loader is the first process of a VM's firmware stage: acts 4 to 6 of the
// boot story, from the settings that the platform passes to the start of the
// delivered system.
//
// It trusts what was measured into PCR 16 together with it - its settings, among them
// the boot server's authority and name and the two keys that sign what it may run -
// and nothing else: neither the boot server, which only carries, nor the host, which
// only measures. One connection, one conversation, one attempt. Every answer is
// checked before the next question; what cannot be checked ends the VM. There is no
// step that may be skipped and no error that is survived.
//
// The steps, in [Boot]:
//
//  1. open the tunnel: pinned authority and name, TLS 1.3, ephemeral client certificate
//  2. present T1 and the VM's public key, made here for this start
//  3. derive the tunnel measurement; tell it to the host, when the host asks
//  4. pass TPM commands between tunnel and host, until the grant
//  5. check both signatures and what they say of this VM
//  6. fetch kernel, initramfs and unique part, each by size and digest
//  7. append the private key in an archive of the loader's own
//  8. tell boot server and host; when the host has let go, start the system
package loader

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"io"
	"os"
	"time"

	"foothold/guest/pinned"
	"foothold/protocol/bootmsg"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/token"
	"foothold/protocol/vmspec"
)

// Limit is the most that the whole stage may take. The host's boot timer and the
// orchestrator's deadline are shorter as a rule; this one needs nobody.
const Limit = 4 * time.Minute

// farewell bounds what is said after a failure.
const farewell = 3 * time.Second

// Machine is what the loader has to do with.
type Machine struct {
	Spec    vmspec.Spec // validated
	Token   token.Token // T1
	Channel io.ReadWriter
	// Kexec makes the kernel ready to start; the files may be closed afterwards.
	Kexec func(kernel, initrd *os.File, cmdline string) error
	Say   func(format string, args ...any)
}

// boot is one attempt.
type boot struct {
	Machine
	local    *local
	link     *pinned.Conn
	key      ed25519.PrivateKey // of the VM, for this start
	public   ed25519.PublicKey
	reserved string // the reservation that the boot server opened
	tunnel   digest.SHA256
}

// Boot runs the stage. When it returns nil, the delivered system is loaded, the host
// has let go and nothing is left but the jump. When it returns an error, boot server
// and host have been told its reason as far as they can be reached, and the caller
// powers the VM off.
func Boot(ctx context.Context, m Machine) error {
	ctx, cancel := context.WithTimeout(ctx, Limit)
	defer cancel()
	b := &boot{Machine: m, local: &local{port: m.Channel}}
	defer func() { clear(b.key) }()
	err := b.run(ctx)
	if err != nil {
		b.fail(err)
	}
	if b.link != nil {
		b.link.Close()
	}
	return err
}

func (b *boot) run(ctx context.Context) error {
	if err := b.openTunnel(ctx); err != nil { // steps 1 to 3
		return err
	}
	grant, err := b.attest(ctx) // step 4
	if err != nil {
		return err
	}
	manifest, err := b.check(grant, time.Now()) // step 5
	if err != nil {
		return err
	}
	b.Say("admitted; both signatures verify")
	files, err := b.fetch(ctx, manifest) // steps 6 and 7
	if err != nil {
		return err
	}
	defer files.Close()
	return b.start(ctx, files, manifest.Cmdline) // step 8
}

// openTunnel also sends T1, and has the host measure the tunnel.
func (b *boot) openTunnel(ctx context.Context) error {
	var err error
	if b.public, b.key, err = ed25519.GenerateKey(rand.Reader); err != nil {
		return event.Refuse(event.LoaderFailed, "make the VM's key: %v", err)
	}
	cert, err := pinned.Ephemeral()
	if err != nil {
		return event.Refuse(event.LoaderFailed, "%v", err)
	}
	pins := pinned.Pins{URL: b.Spec.Boot.URL, ServerName: b.Spec.Boot.ServerName, CA: b.Spec.Boot.CA}
	if b.link, err = pinned.Dial(ctx, pins, cert); err != nil {
		return event.Refuse(pinned.Reason(err, event.BootServerFailed), "%v", err)
	}
	b.Say("tunnel open")
	var opened bootmsg.OpenResponse
	request := bootmsg.OpenRequest{Token: b.Token, VMKey: b.public}
	err = b.link.Post(ctx, bootmsg.PathOpen, request, &opened, bootmsg.MaxMessage)
	b.Token, request.Token = token.Token{}, token.Token{} // spent, whatever the answer
	if err != nil {
		return event.Refuse(event.BootServerFailed, "%v", err)
	}
	if opened.Reservation != b.Spec.Reservation || len(opened.Nonce) != evidence.NonceLen {
		return event.Refuse(event.BootServerFailed, "the boot server opened another reservation, or gave no nonce")
	}
	b.reserved = opened.Reservation
	exporter, err := b.link.Exporter(evidence.ExporterLabel, evidence.ExporterContext(opened.Reservation, opened.Nonce), evidence.ExporterLen)
	if err != nil {
		return event.Refuse(event.LoaderFailed, "%v", err)
	}
	b.tunnel = evidence.Tunnel(digest.Of(exporter), b.link.ServerLeaf(), cert.Certificate[0], b.public)
	clear(exporter)
	if err := b.local.announce(ctx, b.tunnel); err != nil {
		return err
	}
	b.Say("the host holds the TPM for this VM")
	return nil
}

// attest passes commands one by one. What they do is the boot server's business and
// the host's to permit; the loader only carries.
func (b *boot) attest(ctx context.Context) (*bootmsg.Grant, error) {
	const most = 16 // commands; a quote takes three
	var request bootmsg.AttestRequest
	for range most {
		var answer bootmsg.AttestResponse
		if err := b.link.Post(ctx, bootmsg.PathAttest, request, &answer, bootmsg.MaxMessage); err != nil {
			return nil, event.Refuse(event.BootServerFailed, "%v", err)
		}
		switch {
		case answer.Grant != nil && answer.Command == nil:
			return answer.Grant, nil
		case answer.Grant != nil || len(answer.Command) == 0:
			return nil, event.Refuse(event.BootServerFailed, "the boot server sends neither one command nor the grant")
		}
		response, err := b.local.command(ctx, answer.Command)
		if err != nil {
			return nil, err
		}
		request.Response = response
	}
	return nil, event.Refuse(event.BootServerFailed, "the boot server asks for more than %d TPM commands", most)
}

// start is the last step. After Released the host has stopped its boot timer, so
// loading, which can fail, comes before.
func (b *boot) start(ctx context.Context, files *delivery, cmdline string) error {
	if err := b.Kexec(files.kernel, files.initrd, cmdline); err != nil {
		return event.Refuse(event.LoaderFailed, "load the delivered kernel: %v", err)
	}
	if err := files.wipe(); err != nil {
		return event.Refuse(event.LoaderFailed, "%v", err)
	}
	b.Say("system loaded")
	var none struct{}
	if err := b.link.Post(ctx, bootmsg.PathDone, bootmsg.DoneRequest{}, &none, bootmsg.MaxMessage); err != nil {
		return event.Refuse(event.BootServerFailed, "%v", err)
	}
	if err := b.local.handover(ctx); err != nil {
		return err
	}
	b.Say("host released; starting the delivered system")
	return nil
}

// fail tells the host and the boot server why, each as far as it listens.
func (b *boot) fail(err error) {
	reason := Reason(err)
	ctx, cancel := context.WithTimeout(context.Background(), farewell)
	defer cancel()
	b.local.failed(ctx, reason)
	if b.link != nil {
		var none struct{}
		_ = b.link.Post(ctx, bootmsg.PathDone, bootmsg.DoneRequest{Reason: string(reason)}, &none, bootmsg.MaxMessage)
	}
}

// Reason is the stable code of an error that Boot returned.
func Reason(err error) event.Reason {
	if reason := event.ReasonOf(err); reason != event.InternalError {
		return reason
	}
	return event.LoaderFailed
}
