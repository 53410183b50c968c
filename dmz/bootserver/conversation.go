package bootserver

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"strconv"
	"sync"
	"time"

	"foothold/internal/strictjson"
	"foothold/protocol/bootmsg"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/signed"
	"foothold/protocol/token"
	wire "foothold/protocol/upstream"
	"foothold/protocol/vmspec"
)

// Time limits of one exchange with a VM.
const (
	readBody  = 15 * time.Second
	writeBody = 3 * time.Minute // 60 MB into an emulated VM
	reportEnd = 5 * time.Second // telling the orchestrator of an end that the VM did not tell
)

// phase is where a conversation stands. It only grows.
type phase int

const (
	fresh     phase = iota // connected
	opened                 // T1 was spent for this connection
	attesting              // the TPM session is under way
	admitted               // the grant was given
	finished               // done, reported ready, or refused
)

// conversation belongs to one connection.
type conversation struct {
	srv    *server
	ctx    context.Context // ends with the connection
	tls    *tls.Conn
	source netip.Addr

	mu        sync.Mutex // held for one exchange, and for the end; guards all that follows
	phase     phase
	opening   wire.OpenResponse
	keys      *hostKeys
	vmKey     []byte
	exporter  digest.SHA256 // SHA-256 of the exporter
	leaf      []byte        // the loader's certificate
	tpm       *session
	verdict   wire.VerdictResponse
	delivered []bootmsg.Component
	told      bool // the orchestrator knows how it ended
}

type conversationKey struct{}

// begin makes a connection's conversation (http.Server.ConnContext), and sees to its
// end when the connection goes.
func (s *server) begin(ctx context.Context, c net.Conn) context.Context {
	conn, ok := c.(*tls.Conn)
	if !ok {
		return ctx
	}
	gated, ok := conn.NetConn().(*gatedConn)
	if !ok {
		return ctx
	}
	v := &conversation{srv: s, ctx: gated.ctx, tls: conn, source: gated.from}
	return context.WithValue(ctx, conversationKey{}, v)
}

// step wraps one call of the conversation: bounded, and every error is the same
// refusal to the VM, with its reason in log and journal.
func (s *server) step(f func(*conversation, http.ResponseWriter, *http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		v, ok := r.Context().Value(conversationKey{}).(*conversation)
		if !ok {
			refuse(w)
			return
		}
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.phase == finished {
			refuse(w)
			return
		}
		if err := f(v, w, r); err != nil {
			v.fail(err)
			refuse(w)
		}
	}
}

// refuse tells the VM nothing but that, and ends the connection.
func refuse(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Connection", "close")
	w.WriteHeader(http.StatusForbidden)
	_ = json.NewEncoder(w).Encode(bootmsg.Refusal{Error: "refused"})
}

// fail ends the conversation. The caller holds mu.
func (v *conversation) fail(err error) {
	v.phase = finished
	reason := event.ReasonOf(err)
	if reason == event.InternalError {
		reason = event.BootServerFailed
	}
	slog.Warn("boot refused", "from", v.source.String(), "reservation", v.opening.Reservation, "reason", string(reason), "err", err)
	v.srv.events.Emit(event.Event{Kind: "boot.refused", Reservation: v.opening.Reservation, Reason: reason,
		Detail: map[string]string{"from": v.source.String(), "error": truncated(err.Error())}})
	v.tellEnd(reason, truncated(err.Error()))
}

// tellEnd reports an opened conversation's failure once, so that the orchestrator
// need not wait for the deadline.
func (v *conversation) tellEnd(reason event.Reason, detail string) {
	if v.told || v.opening.Reservation == "" {
		return
	}
	v.told = true
	ctx, cancel := context.WithTimeout(context.WithoutCancel(v.ctx), reportEnd)
	defer cancel()
	err := v.srv.client.BootDone(ctx, wire.DoneRequest{Reservation: v.opening.Reservation, Reason: reason, Detail: detail, Delivered: v.delivered})
	if err != nil {
		slog.Warn("end of boot not reported", "reservation", v.opening.Reservation, "err", err)
	}
}

// open is act 4: T1 goes to the orchestrator, which spends it.
func (v *conversation) open(w http.ResponseWriter, r *http.Request) error {
	if v.phase != fresh {
		return event.Refuse(event.BadRequest, "a second open")
	}
	v.phase = finished // until proven otherwise
	var in bootmsg.OpenRequest
	if err := v.read(w, r, &in); err != nil {
		return err
	}
	if !in.Token.Is(token.T1) || len(in.VMKey) != ed25519.PublicKeySize {
		return event.Refuse(event.BadRequest, "open without a T1 or an Ed25519 key")
	}
	out, err := v.srv.client.BootOpen(v.ctx, wire.OpenRequest{Token: in.Token, Source: v.source, VMKey: in.VMKey})
	if err != nil {
		return err
	}
	v.opening, v.vmKey = out, in.VMKey
	if err := v.bind(); err != nil {
		return err
	}
	v.phase = opened
	context.AfterFunc(v.ctx, v.ended)
	slog.Info("boot opened", "from", v.source.String(), "reservation", out.Reservation)
	return write(w, bootmsg.OpenResponse{Reservation: out.Reservation, Nonce: out.Nonce})
}

// bind derives our end of the tunnel (RFC 8446, section 7.5) and reads the keys that
// the TPM session needs.
func (v *conversation) bind() error {
	o := v.opening
	if !vmspec.ValidID(o.Reservation) || len(o.Nonce) != evidence.NonceLen || o.Settings.IsZero() {
		return event.Refuse(event.BootServerFailed, "the orchestrator's answer is incomplete")
	}
	keys, err := v.srv.keys.read(o.AIK, o.Session, o.Own)
	if err != nil {
		return err
	}
	v.keys = keys
	state := v.tls.ConnectionState()
	exporter, err := state.ExportKeyingMaterial(evidence.ExporterLabel, evidence.ExporterContext(o.Reservation, o.Nonce), evidence.ExporterLen)
	if err != nil {
		return fmt.Errorf("derive exporter: %w", err)
	}
	v.exporter, v.leaf = digest.Of(exporter), state.PeerCertificates[0].Raw
	clear(exporter)
	return nil
}

// ended runs when the connection is gone. A conversation that was opened and did not
// come to its end has failed.
func (v *conversation) ended() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.phase = finished
	if !v.told {
		slog.Warn("boot cut off", "from", v.source.String(), "reservation", v.opening.Reservation)
		v.tellEnd(event.LoaderFailed, "the connection was cut off")
	}
}

func (v *conversation) kernel(w http.ResponseWriter, r *http.Request) error {
	return v.file(w, r, v.verdict.Kernel)
}

func (v *conversation) initramfs(w http.ResponseWriter, r *http.Request) error {
	return v.file(w, r, v.verdict.Initramfs)
}

// file streams a shared component as it lies in the cache: nothing is repacked for a VM.
func (v *conversation) file(w http.ResponseWriter, r *http.Request, c bootmsg.Component) error {
	if err := v.mayFetch(c); err != nil {
		return err
	}
	f, err := v.srv.components.open(v.ctx, c)
	if err != nil {
		return event.Refuse(event.BootServerFailed, "%v", err)
	}
	defer f.Close()
	return v.send(w, c, f)
}

func (v *conversation) unique(w http.ResponseWriter, _ *http.Request) error {
	data := v.verdict.Unique
	c := bootmsg.Component{Name: "unique", SHA256: digest.Of(data), Size: int64(len(data))}
	if err := v.mayFetch(c); err != nil {
		return err
	}
	return v.send(w, c, bytes.NewReader(data))
}

// mayFetch: nothing before admission, nothing twice.
func (v *conversation) mayFetch(c bootmsg.Component) error {
	if v.phase != admitted {
		return event.Refuse(event.BadRequest, "a component before admission")
	}
	for _, d := range v.delivered {
		if d.Name == c.Name {
			return event.Refuse(event.BadRequest, "%s a second time", c.Name)
		}
	}
	return nil
}

// send writes a component and logs its digest once all of it has gone out.
func (v *conversation) send(w http.ResponseWriter, c bootmsg.Component, from io.Reader) error {
	if err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(writeBody)); err != nil {
		return fmt.Errorf("send %s: %w", c.Name, err)
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.FormatInt(c.Size, 10))
	start := time.Now()
	n, err := io.Copy(w, from)
	if err != nil || n != c.Size {
		return event.Refuse(event.LoaderFailed, "%s was cut off after %d of %d bytes", c.Name, n, c.Size)
	}
	v.delivered = append(v.delivered, c)
	slog.Info("component delivered", "from", v.source.String(), "reservation", v.opening.Reservation,
		"component", c.Name, "sha256", c.SHA256.String(), "bytes", c.Size, "millis", time.Since(start).Milliseconds())
	v.srv.events.Emit(event.Event{Kind: "component.delivered", Reservation: v.opening.Reservation,
		Detail: map[string]string{"name": c.Name, "sha256": c.SHA256.String(), "size": strconv.FormatInt(c.Size, 10)}})
	return nil
}

var reasonForm = regexp.MustCompile(`^[a-z][a-z0-9-]{0,63}$`)

// done is the loader's word that it has everything, or why it gives up.
func (v *conversation) done(w http.ResponseWriter, r *http.Request) error {
	var in bootmsg.DoneRequest
	if err := v.read(w, r, &in); err != nil {
		return err
	}
	switch {
	case v.phase == fresh:
		return event.Refuse(event.BadRequest, "done before open")
	case in.Reason != "" && !reasonForm.MatchString(in.Reason):
		return event.Refuse(event.BadRequest, "malformed reason")
	case in.Reason == "" && len(v.delivered) != 3:
		return event.Refuse(event.BadRequest, "done before everything was delivered")
	}
	v.phase, v.told = finished, true
	err := v.srv.client.BootDone(v.ctx, wire.DoneRequest{Reservation: v.opening.Reservation, Reason: event.Reason(in.Reason), Delivered: v.delivered})
	if err != nil {
		return err
	}
	kind := "boot.delivered"
	if in.Reason != "" {
		kind = "boot.failed"
	}
	slog.Info("boot done", "from", v.source.String(), "reservation", v.opening.Reservation, "reason", in.Reason)
	v.srv.events.Emit(event.Event{Kind: kind, Reservation: v.opening.Reservation, Reason: event.Reason(in.Reason)})
	return write(w, struct{}{})
}

// ready is act 7. The report is the VM's and signed by its key; it is relayed as it is.
func (v *conversation) ready(w http.ResponseWriter, r *http.Request) error {
	if v.phase != fresh {
		return event.Refuse(event.BadRequest, "ready report inside a boot conversation")
	}
	v.phase = finished
	var in signed.Envelope
	if err := v.read(w, r, &in); err != nil {
		return err
	}
	if err := v.srv.client.BootReady(v.ctx, wire.ReadyRequest{Source: v.source, Report: in}); err != nil {
		return err
	}
	slog.Info("ready report relayed", "from", v.source.String())
	v.srv.events.Emit(event.Event{Kind: "boot.reported", Detail: map[string]string{"from": v.source.String()}})
	return write(w, struct{}{})
}

// read takes one JSON message within its time.
func (v *conversation) read(w http.ResponseWriter, r *http.Request, into any) error {
	rc := http.NewResponseController(w)
	if err := rc.SetReadDeadline(time.Now().Add(readBody)); err != nil {
		return fmt.Errorf("read request: %w", err)
	}
	if err := strictjson.Read(r.Body, bootmsg.MaxMessage, into); err != nil {
		return event.Refuse(event.BadRequest, "%v", err)
	}
	// The server watches the connection while we work; that has no deadline of its own.
	if err := rc.SetReadDeadline(time.Time{}); err != nil {
		return fmt.Errorf("read request: %w", err)
	}
	return nil
}

func write(w http.ResponseWriter, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode answer: %w", err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(data)))
	_, _ = w.Write(data) // a VM that has gone is noticed by its connection
	return nil
}

// truncated bounds text for the journal.
func truncated(text string) string {
	const most = 300
	if len(text) > most {
		return text[:most] + "..."
	}
	return text
}
