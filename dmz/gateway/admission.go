package gateway

import (
	"context"
	"crypto/subtle"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"time"

	"foothold/dmz/upstream"
	"foothold/internal/secret"
	"foothold/internal/strictjson"
	"foothold/protocol/agentmsg"
	"foothold/protocol/bootmsg"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/token"
	wire "foothold/protocol/upstream"
	"foothold/protocol/vmcert"
)

// Bounds of admissions.
const (
	maxAdmit    = 16 << 10 // bytes of a request
	maxPending  = 64       // at once
	maxUserName = 128      // bytes
	readBody    = 15 * time.Second
)

// caller is what a VM's verified certificate says of it.
type caller struct {
	cert   *x509.Certificate
	info   vmcert.Info
	source netip.Addr
}

func callerOf(r *http.Request) (caller, error) {
	cert := r.TLS.PeerCertificates[0]
	info, err := vmcert.Parse(cert)
	if err != nil {
		return caller{}, event.Refuse(event.CertificateInvalid, "%v", err)
	}
	from, err := netip.ParseAddrPort(r.RemoteAddr)
	if err != nil {
		return caller{}, fmt.Errorf("read source address: %w", err)
	}
	return caller{cert, info, from.Addr().Unmap()}, nil
}

// admit is act 9 on the cloud network.
func (g *Gateway) admit(w http.ResponseWriter, r *http.Request) {
	v, err := callerOf(r)
	var out agentmsg.AdmitResponse
	if err == nil {
		out, err = g.decide(w, r, v)
	}
	if err != nil {
		g.refuse(w, "admission.refused", v, err)
		return
	}
	write(w, out)
}

// decide checks that certificate, address and key belong together, and asks.
func (g *Gateway) decide(w http.ResponseWriter, r *http.Request, v caller) (agentmsg.AdmitResponse, error) {
	var none agentmsg.AdmitResponse
	if v.info.Address != v.source {
		return none, event.Refuse(event.CertificateInvalid, "certificate is for %s", v.info.Address)
	}
	if !g.take(v.info.Reservation) {
		return none, event.Refuse(event.AdmissionRefused, "too many requests")
	}
	var in agentmsg.AdmitRequest
	if err := read(w, r, maxAdmit, &in); err != nil {
		return none, err
	}
	defer in.Password.Wipe()
	if !in.T3.Is(token.T3) || in.User == "" || len(in.User) > maxUserName || in.Password.Len() == 0 {
		return none, event.Refuse(event.BadRequest, "admission without T3, user or password")
	}
	psk, err := r.TLS.ExportKeyingMaterial(evidence.PSKLabel, []byte(v.info.Reservation), evidence.PSKLen)
	if err != nil {
		return none, fmt.Errorf("derive pre-shared key: %w", err)
	}
	address, release, err := g.reserve()
	if err != nil {
		return none, err
	}
	defer release()
	asked := upstream.Boottime()
	answer, err := g.client.Admit(r.Context(), wire.AdmitRequest{T3: in.T3, User: in.User, Password: in.Password,
		Certificate: v.cert.Raw, Source: v.source, Address: address})
	if err != nil {
		return none, err
	}
	if err := agree(answer, v); err != nil {
		return none, err
	}
	p := &peer{Reservation: v.info.Reservation, Start: v.info.Start, Serial: answer.Serial, PublicKey: v.info.WireGuardKey, PSK: secret.New(psk),
		Address: address, Source: v.source, Admitted: upstream.Boottime(), Until: asked + answer.TTL}
	// The orchestrator has spent T3: an admission is finished although the VM may have gone.
	if err := g.install(context.WithoutCancel(r.Context()), p); err != nil {
		return none, err
	}
	slog.Info("tunnel admitted", "reservation", p.Reservation, "source", p.Source.String(), "address", p.Address.String())
	g.events.Emit(event.Event{Kind: "tunnel.admitted", Reservation: p.Reservation,
		Detail: map[string]string{"source": p.Source.String(), "address": p.Address.String(), "serial": p.Serial}})
	public := g.wg.PublicKey()
	return agentmsg.AdmitResponse{Address: address, GatewayKey: public[:], Endpoint: g.conf.WireGuard,
		Relay: netip.AddrPortFrom(g.self, uint16(g.conf.RelayPort)), MTU: g.conf.MTU - overhead, Keepalive: keepalive}, nil
}

// agree: the orchestrator decided about the very VM that is connected, and its key.
func agree(a wire.AdmitResponse, v caller) error {
	if a.Reservation != v.info.Reservation || a.Start != v.info.Start || a.Serial != v.cert.SerialNumber.String() ||
		subtle.ConstantTimeCompare(a.PublicKey, v.info.WireGuardKey) != 1 || a.TTL <= 0 {
		return event.Refuse(event.AdmissionRefused, "the orchestrator's answer is about another VM, start, certificate or key")
	}
	return nil
}

// reserve keeps a tunnel address for an admission under way.
func (g *Gateway) reserve() (netip.Addr, func(), error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.pending) >= maxPending {
		return netip.Addr{}, nil, event.Refuse(event.AdmissionRefused, "too many admissions at once")
	}
	a, ok := g.peers.pick(g.conf.Pool, g.pending)
	if !ok {
		return netip.Addr{}, nil, event.Refuse(event.PoolEmpty, "no tunnel address is free")
	}
	g.pending[a] = true
	g.peers.Last = a
	return a, func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.pending, a)
	}, nil
}

// install makes the admitted peer, in quarantine. A tunnel of an earlier start of the
// same VM, or with the same key, goes.
func (g *Gateway) install(ctx context.Context, p *peer) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	old := g.peers
	old.Peers = append([]*peer(nil), g.peers.Peers...)
	gone := g.peers.remove(func(q *peer) bool { return q.Reservation == p.Reservation || q.key() == p.key() })
	g.peers.Peers = append(g.peers.Peers, p)
	if g.zone != nil { // the document may have been quicker than the answer
		if listed := match(g.zone.Document.Peers, p); listed != nil {
			p.Listed, p.Open, p.Until = true, !listed.Quarantined, g.zone.Until(listed.TTL)
		}
	}
	if err := g.settle(ctx); err != nil {
		g.peers = old
		if undo := g.settle(ctx); undo != nil {
			slog.Error("failed admission not undone; its time limit ends it", "reservation", p.Reservation, "err", undo)
		}
		return err
	}
	for _, q := range gone {
		g.ended(q, event.Released)
	}
	return nil
}

// refuse tells the VM nothing but that.
func (g *Gateway) refuse(w http.ResponseWriter, kind string, v caller, err error) {
	reason := event.ReasonOf(err)
	slog.Warn(kind, "reservation", v.info.Reservation, "source", v.source.String(), "reason", string(reason), "err", err)
	g.events.Emit(event.Event{Kind: kind, Reservation: v.info.Reservation, Reason: reason,
		Detail: map[string]string{"source": v.source.String(), "error": truncated(err.Error())}})
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Connection", "close")
	w.WriteHeader(http.StatusForbidden)
	_ = json.NewEncoder(w).Encode(bootmsg.Refusal{Error: "refused"})
}

// read takes one JSON message within its time and size.
func read(w http.ResponseWriter, r *http.Request, limit int64, into any) error {
	rc := http.NewResponseController(w)
	if err := rc.SetReadDeadline(time.Now().Add(readBody)); err != nil {
		return fmt.Errorf("read request: %w", err)
	}
	if err := strictjson.Read(r.Body, limit, into); err != nil {
		return event.Refuse(event.BadRequest, "%v", err)
	}
	if err := rc.SetReadDeadline(time.Time{}); err != nil {
		return fmt.Errorf("read request: %w", err)
	}
	return nil
}

func write(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // a VM that has gone is noticed elsewhere
}

// truncated bounds text for the journal.
func truncated(text string) string {
	const most = 300
	if len(text) > most {
		return text[:most] + "..."
	}
	return text
}
