package ledger

import (
	"database/sql"
	"errors"
	"fmt"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/event"
)

// HostAudit is an order to audit a host's TPM from trusted media.
type HostAudit struct {
	Number  string
	Host    string
	Order   []byte        // JSON of hostaudit.Order
	Key     []byte        // public key of the medium
	Answer  digest.SHA256 // of what the TPM must answer
	Expires time.Time

	Judged time.Time // zero: no report yet
	Failed string    // JSON of what was found; empty for a good one
	Report []byte    // JSON of the signed report
}

// AddHostAudit stores an order, before it is handed out.
func (t *Tx) AddHostAudit(a HostAudit) error {
	return t.one("store host audit", `INSERT INTO host_audits (number, host, ordered, key, answer, expires, judged, failed, report)
		VALUES ($1,$2,$3,$4,$5,$6,0,'',x'')`, a.Number, a.Host, a.Order, a.Key, a.Answer.String(), nanos(a.Expires))
}

// JudgeHostAudit stores what came of an order, and with it the host's standing: a failed
// audit is one until one that was ordered later is good. A good report of an earlier order,
// which may have been held back, changes no standing. It succeeds once for each order, before
// it expires.
func (t *Tx) JudgeHostAudit(a HostAudit, why string) error {
	n, err := t.change("judge host audit", `UPDATE host_audits SET judged = $2, failed = $3, report = $4
		WHERE number = $1 AND judged = 0 AND expires > $2`, a.Number, nanos(t.Now), a.Failed, append([]byte{}, a.Report...))
	if err != nil {
		return err
	}
	if n != 1 {
		return event.Refuse(event.BadRequest, "audit %s of host %s has had its report, or expired at %s: order another", a.Number, a.Host, a.Expires.UTC().Format(time.RFC3339))
	}
	if a.Failed == "" {
		var outdone bool
		if err := t.tx.queryRow(`SELECT EXISTS (SELECT 1 FROM host_audits WHERE host = $1 AND failed <> ''
			AND rowid > (SELECT rowid FROM host_audits WHERE number = $2))`, a.Host, a.Number).Scan(&outdone); err != nil {
			return fmt.Errorf("judge host audit: %w", err)
		}
		if outdone {
			return nil
		}
	}
	_, err = t.change("judge host audit", `INSERT INTO hosts (name, clock, standing, quoted, activated, audit_failed) VALUES ($1,x'','',0,$3,$2)
		ON CONFLICT (name) DO UPDATE SET audit_failed = excluded.audit_failed`, a.Host, why, digest.SHA256{}.String())
	return err
}

// HostAudits lists a host's, newest first, at most limit.
func (t *Tx) HostAudits(host string, limit int) ([]HostAudit, error) {
	rows, err := t.tx.query(`SELECT number, host, ordered, key, answer, expires, judged, failed, report FROM host_audits
		WHERE host = $1 ORDER BY rowid DESC LIMIT $2`, host, limit)
	if err != nil {
		return nil, fmt.Errorf("list host audits: %w", err)
	}
	defer rows.Close()
	var list []HostAudit
	for rows.Next() {
		a, err := scanHostAudit(rows)
		if err != nil {
			return nil, err
		}
		list = append(list, a)
	}
	return list, rows.Err()
}

// HostAudit reads one order.
func (t *Tx) HostAudit(number string) (HostAudit, error) {
	return scanHostAudit(t.tx.queryRow(`SELECT number, host, ordered, key, answer, expires, judged, failed, report FROM host_audits WHERE number = $1`, number))
}

func scanHostAudit(row interface{ Scan(...any) error }) (HostAudit, error) {
	var a HostAudit
	var answer string
	var expires, judged int64
	err := row.Scan(&a.Number, &a.Host, &a.Order, &a.Key, &answer, &expires, &judged, &a.Failed, &a.Report)
	if errors.Is(err, sql.ErrNoRows) {
		return a, ErrNotFound
	}
	if err == nil {
		err = a.Answer.UnmarshalText([]byte(answer))
	}
	if err != nil {
		return a, fmt.Errorf("read host audit: %w", err)
	}
	a.Expires, a.Judged = instant(expires), instant(judged)
	return a, nil
}
