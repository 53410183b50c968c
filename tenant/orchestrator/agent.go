package orchestrator

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"foothold/internal/mtls"
	"foothold/protocol/agentmsg"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/signed"
	"foothold/protocol/upstream"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// Bounds of what a guest says beside an audit.
const (
	maxSaid     = 32  // lines of one message
	maxSaidText = 256 // bytes of a line
)

// hearLimit bounds the acting on one message; it is longer than the wait for rules.
const hearLimit = 2 * liveWait

// quickInterval is how soon a guest reports again while something is awaited from it.
const quickInterval = 1 // seconds

// accepted is one message of a guest, accepted, with the row as it was then.
type accepted struct {
	r     ledger.Reservation
	s     ledger.Start // with the nonce that the answer carries
	up    agentmsg.Up
	again bool // the same message came before; its answer got lost
}

// asked reports whether an answer has asked for an audit that did not come yet.
func (m accepted) asked() bool { return len(m.s.AuditNonce) > 0 }

// audits reports whether the message carries the audit that was asked for: it answers
// the very question. One that answers it and carries none is refused. A repeated message
// may be older than the question, which its answer then repeats.
func (m accepted) audits() (bool, error) {
	if !m.asked() {
		return false, nil
	}
	carried := m.up.Audit != nil && subtle.ConstantTimeCompare(m.up.Nonce, m.s.AuditNonce) == 1
	if !carried && !m.again {
		return false, event.Refuse(event.AuditFailed, "the VM was asked for an audit and sent none")
	}
	return carried, nil
}

// gatewayAgent answers a message of a guest that came through its tunnel: the second
// audit (act 9), heartbeats and the workload's state (act 10). The gateway only relays:
// the message is signed by the VM's key, the answer by the manifest key.
func (o *Orchestrator) gatewayAgent(ctx context.Context, who mtls.Identity, in upstream.AgentRequest) (signed.Envelope, error) {
	m, err := o.acceptUp(ctx, in)
	if err != nil {
		return signed.Envelope{}, o.refusedCall(ctx, who, upstream.PathGatewayAgent, m.r.ID, err)
	}
	// What was accepted is acted on, whatever becomes of the gateway meanwhile: it must not
	// choose where a VM's story breaks off.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), hearLimit)
	defer cancel()
	down, err := o.hear(ctx, m)
	if err != nil {
		o.abort(context.WithoutCancel(ctx), m.r.ID, m.r.Start, err)
		return signed.Envelope{}, err
	}
	down.Reservation, down.Seq, down.Nonce = m.r.ID, m.up.Seq, m.s.AgentNonce
	payload, err := json.Marshal(down)
	if err != nil {
		return signed.Envelope{}, fmt.Errorf("encode answer: %w", err)
	}
	return signed.Seal(o.ground.manifestKey, signed.AgentDown, payload), nil
}

// acceptUp checks whom a message is from and that it is the next one. Each answers the
// nonce of the last answer; the very same message again, whose answer got lost, is
// accepted and answered again. A message that is refused ends nothing: the gateway
// could make such. It does not renew the lease either.
func (o *Orchestrator) acceptUp(ctx context.Context, in upstream.AgentRequest) (m accepted, err error) {
	err = o.ledger.Write(ctx, func(t *ledger.Tx) error {
		if err := m.identify(t, in); err != nil {
			return err
		}
		if err := o.owesEnd(m.r.ID, m.r.Start); err != nil {
			return err
		}
		if err := in.Envelope.Open(m.s.VMKey, signed.AgentUp, &m.up); err != nil {
			return event.Refuse(event.ReportRefused, "the agent's message: %v", err)
		}
		if m.up.Reservation != m.r.ID || m.up.Start != m.r.Start {
			return event.Refuse(event.ReportRefused, "the agent's message is of another VM or start")
		}
		last := digest.Of(in.Envelope.Payload)
		if m.again = last == m.s.AgentLast; m.again {
			return nil
		}
		if m.up.Seq <= m.s.AgentSeq || subtle.ConstantTimeCompare(m.up.Nonce, m.s.AgentNonce) != 1 {
			return event.Refuse(event.ReportRefused, "the agent's message does not answer the last one")
		}
		m.s.AgentSeq, m.s.AgentLast, m.s.AgentNonce = m.up.Seq, last, make([]byte, evidence.NonceLen)
		rand.Read(m.s.AgentNonce)
		return t.PutStart(m.r.ID, m.r.Start, m.s)
	})
	return m, err
}

func (m *accepted) identify(t *ledger.Tx, in upstream.AgentRequest) error {
	id, start, err := t.Holder(in.Serial)
	if errors.Is(err, ledger.ErrNotFound) {
		return event.Refuse(event.CertificateInvalid, "serial was not issued here")
	}
	if err != nil {
		return err
	}
	if m.r, err = t.Reservation(id); err != nil {
		return err
	}
	if err := t.CheckCertificate(in.Serial, nil, id, m.r.Start); err != nil {
		return err
	}
	if m.s, err = t.Start(id, m.r.Start); err != nil {
		return err
	}
	switch {
	case start != m.r.Start || m.s.Serial != in.Serial:
		return event.Refuse(event.CertificateInvalid, "it is not this start's")
	case m.s.TunnelAddress != in.Address.Unmap():
		return event.Refuse(event.AdmissionRefused, "the message came from another tunnel address")
	case m.r.Phase != reservation.Connecting && m.r.Phase != reservation.Computing:
		return event.Refuse(event.AdmissionRefused, "the VM is %s", m.r.Phase)
	case !m.r.Deadline.After(t.Now):
		return event.Refuse(event.DeadlinePassed, "%s has ended", m.r.Phase)
	}
	return nil
}

// hear acts on an accepted message. Its errors end the VM.
func (o *Orchestrator) hear(ctx context.Context, m accepted) (agentmsg.Down, error) {
	if !m.again {
		o.journalSaid(ctx, m)
	}
	if m.r.Phase == reservation.Connecting {
		return o.hearConnecting(ctx, m)
	}
	return o.hearComputing(ctx, m)
}

// hearConnecting: the first message is answered by asking for the audit of the OS; the
// next must carry it, and decides.
func (o *Orchestrator) hearConnecting(ctx context.Context, m accepted) (agentmsg.Down, error) {
	carried, err := m.audits()
	if err != nil {
		return agentmsg.Down{}, err
	}
	if !carried {
		return o.askAudit(ctx, m)
	}
	if err := o.judgeOS(ctx, m); err != nil {
		return agentmsg.Down{}, err
	}
	if err := o.compute(ctx, m.r); err != nil {
		return agentmsg.Down{}, err
	}
	return agentmsg.Down{Workload: o.workloadFor(m.r), Interval: quickInterval}, nil
}

func (o *Orchestrator) askAudit(ctx context.Context, m accepted) (agentmsg.Down, error) {
	err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		return t.ChangeStart(m.r.ID, m.r.Start, func(s *ledger.Start) { s.AuditNonce = m.s.AgentNonce })
	})
	return agentmsg.Down{Audit: true, Interval: quickInterval}, err
}

// journalSaid enters what the guest tells of itself.
func (o *Orchestrator) journalSaid(ctx context.Context, m accepted) {
	if len(m.up.Events) == 0 {
		return
	}
	detail := map[string]string{}
	for i, line := range m.up.Events[:min(len(m.up.Events), maxSaid)] {
		detail[fmt.Sprintf("line-%02d", i+1)] = clip(line, maxSaidText)
	}
	o.journal(ctx, event.Event{Kind: "guest.said", Reservation: m.r.ID, Detail: detail})
}

// workloadFor is what the guest is told to run.
func (o *Orchestrator) workloadFor(r ledger.Reservation) *agentmsg.Workload {
	if r.Workload == nil {
		return nil
	}
	w := r.Workload
	return &agentmsg.Workload{SHA256: w.SHA256, Size: w.Size, Kind: w.Kind, Entry: w.Entry, Port: w.Port,
		Store: o.conf.Store.Address, StoreName: o.conf.Store.ServerName}
}

// interval is when the guest reports next, in seconds.
func (o *Orchestrator) interval() int { return int(o.conf.heartbeat() / time.Second) }
