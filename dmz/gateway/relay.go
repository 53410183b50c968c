package gateway

import (
	"net/http"
	"time"

	"foothold/dmz/upstream"
	"foothold/protocol/agentmsg"
	"foothold/protocol/event"
	"foothold/protocol/signed"
	wire "foothold/protocol/upstream"
)

// Rate of one VM's requests, admissions and messages together. An agent sends one
// every few seconds; start and audits come in bursts.
const (
	burst    = 20
	perToken = 500 * time.Millisecond
	maxKnown = 1 << 16 // reservations in the table; certificates bound it far below
)

// bucket holds a VM's unused requests.
type bucket struct {
	left int
	at   time.Duration // boot-time clock of the last refill
}

// take reports whether the VM may make one more request now.
func (g *Gateway) take(reservation string) bool {
	now := upstream.Boottime()
	g.mu.Lock()
	defer g.mu.Unlock()
	b := g.limits[reservation]
	if b == nil {
		if len(g.limits) >= maxKnown {
			clear(g.limits)
		}
		b = &bucket{left: burst, at: now}
		g.limits[reservation] = b
	}
	if n := int((now - b.at) / perToken); n > 0 {
		b.left, b.at = min(burst, b.left+n), b.at+time.Duration(n)*perToken
	}
	if b.left == 0 {
		return false
	}
	b.left--
	return true
}

// agent relays a guest's signed message and the orchestrator's signed answer. The
// tunnel address says which peer speaks (WireGuard lets no other use it), and the
// certificate must be the one that this peer was admitted with.
func (g *Gateway) agent(w http.ResponseWriter, r *http.Request) {
	v, err := callerOf(r)
	var down signed.Envelope
	if err == nil {
		down, err = g.relay(w, r, v)
	}
	if err != nil {
		g.refuse(w, "agent.refused", v, err)
		return
	}
	write(w, down)
}

func (g *Gateway) relay(w http.ResponseWriter, r *http.Request, v caller) (signed.Envelope, error) {
	var none signed.Envelope
	serial := v.cert.SerialNumber.String()
	g.mu.Lock()
	p := g.peers.byAddress(v.source)
	known := p != nil && p.Reservation == v.info.Reservation && p.Start == v.info.Start && p.Serial == serial
	g.mu.Unlock()
	if !known {
		return none, event.Refuse(event.CertificateInvalid, "tunnel address %s was not given to this certificate", v.source)
	}
	if !g.take(v.info.Reservation) {
		return none, event.Refuse(event.NotPermitted, "too many requests")
	}
	var up signed.Envelope
	if err := read(w, r, agentmsg.MaxMessage, &up); err != nil {
		return none, err
	}
	return g.client.Agent(r.Context(), wire.AgentRequest{Address: v.source, Serial: serial, Envelope: up})
}
