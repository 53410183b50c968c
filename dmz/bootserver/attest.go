package bootserver

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"strconv"
	"time"

	"foothold/internal/tpm"
	"foothold/protocol/bootmsg"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/inventory"
	"foothold/protocol/pcr"
	wire "foothold/protocol/upstream"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

const (
	// answerTime is what one TPM command may take: through the VM, to the host's TPM
	// and back. The host holds its TPM no longer anyway.
	answerTime = 15 * time.Second
	// maxCommands bounds a session: start, quote, and a flush when the quote fails.
	maxCommands = 3
	nonceSize   = 32 // bytes of our session nonces
)

// session runs a TPM session against the host's TPM, far away: the loader polls for
// each command and brings the response with its next poll.
type session struct {
	ctx       context.Context // of the connection
	commands  chan []byte
	responses chan []byte
	result    chan quoted // capacity 1
	sent      int         // commands; used by the session's goroutine alone
}

type quoted struct {
	quote evidence.Quote
	err   error
}

var errTooMany = errors.New("the TPM session takes too many commands")

// Send implements go-tpm's transport.TPM.
func (s *session) Send(command []byte) ([]byte, error) {
	if s.sent++; s.sent > maxCommands {
		return nil, errTooMany
	}
	late := time.NewTimer(answerTime)
	defer late.Stop()
	select {
	case s.commands <- command:
	case <-s.ctx.Done():
		return nil, context.Cause(s.ctx)
	}
	select {
	case r := <-s.responses:
		return r, nil
	case <-s.ctx.Done():
		return nil, context.Cause(s.ctx)
	case <-late.C:
		return nil, errors.New("no response of the TPM in time")
	}
}

// attest is act 5, one poll: it takes the response to the last command and gives the
// next command, or the grant.
func (v *conversation) attest(w http.ResponseWriter, r *http.Request) error {
	var in bootmsg.AttestRequest
	if err := v.read(w, r, &in); err != nil {
		return err
	}
	switch {
	case v.phase == opened && len(in.Response) == 0:
		v.start()
	case v.phase == attesting && len(in.Response) > 0 && len(in.Response) <= tpm.MaxMessage:
		select {
		case v.tpm.responses <- in.Response:
		case q := <-v.tpm.result: // the session gave up on this response
			return quoteFailed(q.err)
		case <-v.ctx.Done():
			return event.Refuse(event.LoaderFailed, "the connection ended")
		}
	default:
		return event.Refuse(event.BadRequest, "attest out of turn")
	}
	select {
	case c := <-v.tpm.commands:
		return write(w, bootmsg.AttestResponse{Command: c})
	case q := <-v.tpm.result:
		return v.decide(w, q)
	case <-v.ctx.Done():
		return event.Refuse(event.LoaderFailed, "the connection ended")
	}
}

// start begins the session when the loader says that the host holds the TPM.
func (v *conversation) start() {
	v.phase = attesting
	s := &session{ctx: v.ctx, commands: make(chan []byte), responses: make(chan []byte), result: make(chan quoted, 1)}
	v.tpm = s
	tunnel := evidence.Tunnel(v.exporter, v.srv.leaf, v.leaf, v.vmKey)
	binding := evidence.Binding(evidence.RoleBoot, v.opening.Reservation, tunnel, v.opening.Settings, v.opening.Nonce)
	keys := v.keys
	go func() {
		q, err := quote(s, keys, binding)
		s.result <- quoted{q, err}
	}()
}

// quote asks for TPM2_Quote in a session salted to the inventoried key, or to the tenant's
// own, so that only
// that TPM can know the session's key, with parameters encrypted both ways (TPM 2.0
// Library, part 1, "Session-based encryption"). The session ends with the command.
func quote(t transport.TPM, keys *hostKeys, binding digest.SHA256) (evidence.Quote, error) {
	auth := tpm2.HMAC(tpm2.TPMAlgSHA256, nonceSize,
		tpm2.Salted(keys.salt, keys.session), tpm2.AESEncryption(128, tpm2.EncryptInOut))
	rsp, err := tpm2.Quote{
		SignHandle:     tpm2.AuthHandle{Handle: tpm2.TPMHandle(inventory.AIKHandle), Name: keys.name, Auth: auth},
		QualifyingData: tpm2.TPM2BData{Buffer: binding[:]},
		InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgECDSA,
			Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSchemeHash{HashAlg: tpm2.TPMAlgSHA256})},
		PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{
			Hash: tpm2.TPMAlgSHA256, PCRSelect: bitmap(pcr.BootSelection())}}},
	}.Execute(t)
	if err != nil {
		return evidence.Quote{}, err
	}
	return evidence.Quote{Attest: rsp.Quoted.Bytes(), Signature: tpm2.Marshal(rsp.Signature)}, nil
}

// bitmap encodes a selection (TPMS_PCR_SELECTION: register 0 is bit 0 of byte 0), 24
// registers as on every PC client.
func bitmap(selection []int) []byte {
	bits := make([]byte, 3)
	for _, i := range selection {
		bits[i/8] |= 1 << (i % 8)
	}
	return bits
}

// decide has the orchestrator judge the quote and gives the loader the grant. Nothing
// is judged here.
func (v *conversation) decide(w http.ResponseWriter, q quoted) error {
	if q.err != nil {
		return quoteFailed(q.err)
	}
	start := time.Now()
	verdict, err := v.srv.client.BootVerdict(v.ctx, wire.VerdictRequest{
		Reservation: v.opening.Reservation, Source: v.source, ExporterHash: v.exporter,
		ServerLeaf: v.srv.leaf, LoaderLeaf: v.leaf, VMKey: v.vmKey, Quote: q.quote,
	})
	if err != nil {
		return err
	}
	for _, c := range []struct {
		part bootmsg.Component
		name string
		most int64
	}{{verdict.Kernel, "kernel", bootmsg.MaxKernel}, {verdict.Initramfs, "initramfs", bootmsg.MaxInitramfs}} {
		if c.part.Name != c.name || c.part.SHA256.IsZero() || c.part.Size < 1 || c.part.Size > c.most {
			return event.Refuse(event.BootServerFailed, "the verdict names no good %s", c.name)
		}
	}
	if len(verdict.Unique) == 0 || len(verdict.Unique) > bootmsg.MaxUnique {
		return event.Refuse(event.BootServerFailed, "the verdict brings no good unique part")
	}
	v.verdict, v.phase = verdict, admitted
	slog.Info("boot admitted", "from", v.source.String(), "reservation", v.opening.Reservation, "millis", time.Since(start).Milliseconds())
	v.srv.events.Emit(event.Event{Kind: "boot.admitted", Reservation: v.opening.Reservation,
		Detail: map[string]string{"verdict_millis": strconv.FormatInt(time.Since(start).Milliseconds(), 10)}})
	return write(w, bootmsg.AttestResponse{Grant: &verdict.Grant})
}

func quoteFailed(err error) error {
	return event.Refuse(event.QuoteRefused, "TPM session: %v", err)
}
