package orchestrator

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"foothold/internal/secret"
	"foothold/internal/tpm"
	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/hostaudit"
	"foothold/protocol/signed"
	"foothold/tenant/ledger"
	"foothold/tenant/verify"

	"github.com/danielgtaylor/huma/v2"
)

// auditLimit is how long an order counts: media are made, carried, booted, and read again.
const auditLimit = 7 * 24 * time.Hour

// auditsShown bounds how many of a host's audits are listed.
const auditsShown = 100

func (o *Orchestrator) hostAuditOperations(a huma.API) {
	huma.Register(a, operation("POST", "/v1/hosts/{name}/audits", "order-host-audit", "Order an audit of a host's TPM from trusted media", http.StatusCreated),
		func(ctx context.Context, in *struct {
			Name string `path:"name" maxLength:"64" doc:"host"`
			Body api.OrderHostAudit
		}) (*body[hostaudit.Order], error) {
			return answer(o.orderAudit(ctx, in.Name, in.Body.Key, caller(ctx)))
		})
	report := operation("POST", "/v1/hosts/{name}/audits/report", "judge-host-audit", "Hold an audit's report against the inventory", http.StatusOK)
	report.MaxBodyBytes = 2 * hostaudit.MaxReport
	huma.Register(a, report,
		func(ctx context.Context, in *struct {
			Name string `path:"name" maxLength:"64" doc:"host"`
			Body signed.Envelope
		}) (*body[api.HostAudit], error) {
			return answer(o.judgeAudit(ctx, in.Name, in.Body, caller(ctx)))
		})
	huma.Register(a, operation("GET", "/v1/hosts/{name}/audits", "list-host-audits", "List a host's audits, newest first", http.StatusOK),
		func(ctx context.Context, in *byName) (*body[[]api.HostAudit], error) {
			return answer(o.hostAudits(ctx, in.Name))
		})
}

// orderAudit makes an order for one host: a nonce, and a challenge that only the TPM of the
// inventory's endorsement certificate answers, while it holds the inventory's attestation
// key. What it must answer is kept as a digest.
func (o *Orchestrator) orderAudit(ctx context.Context, host string, key ed25519.PublicKey, by string) (hostaudit.Order, error) {
	var none hostaudit.Order
	known, ok := o.basis().inventory.Host(host)
	switch {
	case !ok:
		return none, event.Refuse(event.NoHost, "host %s is not in the inventory", host)
	case len(key) != ed25519.PublicKeySize:
		return none, event.Refuse(event.BadRequest, "key: the medium's public key has %d bytes, want %d", len(key), ed25519.PublicKeySize)
	}
	ek, err := x509.ParseCertificate(known.Host.EK)
	if err != nil {
		return none, event.Refuse(event.NoHost, "host %s: its endorsement certificate in the inventory is malformed", host)
	}
	aik, err := tpm.ParsePublic(known.Host.AIK)
	if err != nil {
		return none, event.Refuse(event.NoHost, "host %s: its attestation key in the inventory is malformed", host)
	}
	want := secret.Random(tpm.SecretLen)
	defer want.Wipe()
	number := make([]byte, 16)
	rand.Read(number)
	order := hostaudit.Order{Number: hex.EncodeToString(number), Host: host, Nonce: make([]byte, evidence.NonceLen), Expires: o.now().Add(auditLimit).UTC().Truncate(time.Second)}
	rand.Read(order.Nonce)
	if order.Blob, order.Secret, err = tpm.Challenge(ek, aik, want.Reveal()); err != nil {
		return none, event.Refuse(event.NoHost, "host %s: %v", host, err)
	}
	text, err := json.Marshal(order)
	if err != nil {
		return none, fmt.Errorf("order host audit: %w", err)
	}
	err = o.ledger.Write(ctx, func(t *ledger.Tx) error {
		return errors.Join(
			t.AddHostAudit(ledger.HostAudit{Number: order.Number, Host: host, Order: text, Key: key, Answer: digest.Of(want.Reveal()), Expires: order.Expires}),
			t.Journal(event.Event{Kind: "host.audit-ordered", Detail: map[string]string{"host": host, "audit": order.Number, "by": by}}))
	})
	o.zones.journalled()
	return order, err
}

// judgeAudit judges a report once. A report that its medium did not sign says nothing of
// the host and changes nothing. A failed audit takes the host's standing, and host_lost says
// what becomes of the VMs that run there.
func (o *Orchestrator) judgeAudit(ctx context.Context, host string, env signed.Envelope, by string) (api.HostAudit, error) {
	var none api.HostAudit
	var unsure hostaudit.Report // whose order it names is looked up; nothing else of it is believed yet
	if err := json.Unmarshal(env.Payload, &unsure); err != nil {
		return none, event.Refuse(event.BadRequest, "the report is malformed")
	}
	var row ledger.HostAudit
	err := o.ledger.Read(ctx, func(t *ledger.Tx) (err error) { row, err = t.HostAudit(unsure.Number); return err })
	switch {
	case errors.Is(err, ledger.ErrNotFound), err == nil && row.Host != host:
		return none, event.Refuse(event.BadRequest, "the report is on no audit that was ordered of host %s", host)
	case err != nil:
		return none, err
	}
	var order hostaudit.Order
	if err := json.Unmarshal(row.Order, &order); err != nil {
		return none, fmt.Errorf("judge host audit: %w", err)
	}
	if row.Report, err = json.Marshal(env); err != nil {
		return none, fmt.Errorf("judge host audit: %w", err)
	}
	for {
		out, err := o.auditBy(ctx, o.basis(), row, order, env, by)
		if !errors.Is(err, errRebased) {
			return out, err
		}
	}
}

// auditBy holds a report against the inventory of one basis, and stores what came of it only
// while that is the current one.
func (o *Orchestrator) auditBy(ctx context.Context, b *basis, row ledger.HostAudit, order hostaudit.Order, env signed.Envelope, by string) (api.HostAudit, error) {
	var none api.HostAudit
	host := row.Host
	report, findings, err := b.inventory.HostAudit(verify.AuditExpectation{Order: order, Key: row.Key, Answer: row.Answer}, env)
	if err != nil {
		return none, event.Refuse(event.SignatureInvalid, "audit %s: %v", row.Number, err)
	}
	why := ""
	e := event.Event{Kind: "host.audited", Detail: map[string]string{"host": host, "audit": row.Number, "by": by}}
	if len(findings) > 0 {
		text, err := json.Marshal(findings)
		if err != nil {
			return none, fmt.Errorf("judge host audit: %w", err)
		}
		row.Failed = string(text)
		why = fmt.Sprintf("its audit from trusted media failed at %s: %s", o.now().UTC().Format(time.RFC3339), findings[0].Detail)
		e.Kind, e.Reason = "host.audit-failed", event.HostAuditFailed
		for i, f := range findings {
			e.Detail[fmt.Sprintf("finding %d", i+1)] = f.String()
		}
	}
	standing := ""
	err = o.ledger.Write(ctx, func(t *ledger.Tx) error {
		if o.basis() != b {
			return errRebased
		}
		if err := errors.Join(t.JudgeHostAudit(row, why), t.Journal(e)); err != nil {
			return err
		}
		state, err := t.Host(host)
		standing = state.AuditFailed
		return err
	})
	o.zones.journalled()
	if err != nil {
		return none, err
	}
	row.Judged = o.now()
	out := shownAudit(row)
	if out.Good {
		out.Outdone = standing
	} else if out.Alerts, err = o.review(ctx, host); err != nil {
		return none, err
	}
	if known, ok := b.inventory.Host(host); ok {
		out.Inventory = known.Host.Asset
	}
	out.Asset, out.Serial = clip(report.Asset, maxText), clip(report.Serial, maxText)
	return out, nil
}

// hostAudits lists a host's, newest first.
func (o *Orchestrator) hostAudits(ctx context.Context, host string) ([]api.HostAudit, error) {
	list := []api.HostAudit{}
	err := o.ledger.Read(ctx, func(t *ledger.Tx) error {
		rows, err := t.HostAudits(host, auditsShown)
		for _, row := range rows {
			list = append(list, shownAudit(row))
		}
		return err
	})
	if _, ok := o.basis().inventory.Host(host); !ok && len(list) == 0 && err == nil {
		err = event.Refuse(event.NoHost, "host %s is not in the inventory", host)
	}
	return list, err
}

// shownAudit is a row for people.
func shownAudit(row ledger.HostAudit) api.HostAudit {
	out := api.HostAudit{Number: row.Number, Host: row.Host, Expires: row.Expires, Judged: row.Judged, Good: !row.Judged.IsZero() && row.Failed == ""}
	var findings []verify.Finding
	if row.Failed != "" && json.Unmarshal([]byte(row.Failed), &findings) != nil {
		out.Checks = []api.Check{{Check: "ledger", Detail: "what was found cannot be read"}}
	}
	for _, f := range findings {
		out.Checks = append(out.Checks, api.Check{Check: f.Check, Detail: f.Detail, Component: f.Component, Expected: f.Expected, Seen: f.Seen, Do: f.Do})
	}
	return out
}
