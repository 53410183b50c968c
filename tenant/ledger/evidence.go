package ledger

import (
	"bytes"
	"database/sql"
	"errors"
	"fmt"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"

	"crypto/rand"
)

// nonceKept is how long nonces are remembered: far longer than any is fresh. One that is
// forgotten is refused for being unknown, as it was for its age.
const nonceKept = 24 * time.Hour

// NewNonce makes a fresh nonce for one quote.
func (t *Tx) NewNonce(id string, start int, role string) ([]byte, error) {
	nonce := make([]byte, evidence.NonceLen)
	rand.Read(nonce)
	if _, err := t.change("forget nonces", `DELETE FROM nonces WHERE reservation = $1 AND issued < $2`, id, nanos(t.Now.Add(-nonceKept))); err != nil {
		return nil, err
	}
	return nonce, t.one("store nonce", `INSERT INTO nonces (digest, reservation, start, role, issued, used) VALUES ($1,$2,$3,$4,$5,0)`,
		digest.Of(nonce).String(), id, start, role, nanos(t.Now))
}

// UseNonce uses up a nonce: it succeeds once, for the start and role that it was made
// for, within maxAge.
func (t *Tx) UseNonce(nonce []byte, id string, start int, role string, maxAge time.Duration) error {
	n, err := t.change("use nonce", `UPDATE nonces SET used = $6 WHERE digest = $1 AND reservation = $2 AND start = $3 AND role = $4
		AND used = 0 AND issued > $5`, digest.Of(nonce).String(), id, start, role, nanos(t.Now.Add(-maxAge)), nanos(t.Now))
	if err == nil && n != 1 {
		err = t.whyNotFresh(nonce, id, start, role)
	}
	return err
}

func (t *Tx) whyNotFresh(nonce []byte, id string, start int, role string) error {
	why := "it is not ours, or for another quote"
	err := t.each("nonces", `SELECT issued, used FROM nonces WHERE digest = $1 AND reservation = $2 AND start = $3 AND role = $4`, func(row scanner) error {
		var issued, used int64
		err := row.Scan(&issued, &used)
		why = "it is not fresh: it was made at " + instant(issued).UTC().Format(time.RFC3339)
		if used != 0 {
			why = "it was used before, at " + instant(used).UTC().Format(time.RFC3339)
		}
		return err
	}, digest.Of(nonce).String(), id, start, role)
	if err != nil {
		return err
	}
	return event.Refuse(event.QuoteRefused, "the nonce of the quote: %s", why)
}

// AwaitedQuote is when a start was last given a nonce for a quote of this role that has not
// come; zero: none is awaited.
func (t *Tx) AwaitedQuote(id string, start int, role string) (since time.Time, err error) {
	err = t.each("nonces", `SELECT issued, used FROM nonces WHERE reservation = $1 AND start = $2 AND role = $3 ORDER BY issued DESC LIMIT 1`, func(row scanner) error {
		var issued, used int64
		err := row.Scan(&issued, &used)
		if used == 0 {
			since = instant(issued)
		}
		return err
	}, id, start, role)
	return since, err
}

// Certificate is one that was issued to a VM.
type Certificate struct {
	Serial      string // decimal
	Reservation string
	Start       int
	DER         []byte
	Expires     time.Time
	Revoked     time.Time
}

// AddCertificate records an issued certificate, before it is released.
func (t *Tx) AddCertificate(c Certificate) error {
	return t.one("store certificate", `INSERT INTO certificates (serial, reservation, start, der, expires, revoked) VALUES ($1,$2,$3,$4,$5,0)`,
		c.Serial, c.Reservation, c.Start, c.DER, nanos(c.Expires))
}

// CheckCertificate refuses a certificate that was not issued by us, byte for byte, to
// this start, that was revoked or has expired.
func (t *Tx) CheckCertificate(serial string, der []byte, id string, start int) error {
	c, err := t.certificate(serial)
	switch {
	case errors.Is(err, ErrNotFound):
		return event.Refuse(event.CertificateInvalid, "serial %s was not issued here", serial)
	case err != nil:
		return err
	case c.Reservation != id || c.Start != start:
		return event.Refuse(event.CertificateInvalid, "serial %s was issued to another VM or start", serial)
	case der != nil && !bytes.Equal(der, c.DER):
		return event.Refuse(event.CertificateInvalid, "serial %s was issued with other content", serial)
	case !c.Revoked.IsZero():
		return event.Refuse(event.CertificateRevoked, "serial %s was revoked at %s", serial, c.Revoked.Format(time.RFC3339))
	case !c.Expires.After(t.Now):
		return event.Refuse(event.CertificateInvalid, "serial %s has expired", serial)
	}
	return nil
}

// Holder is whom a certificate was issued to.
func (t *Tx) Holder(serial string) (id string, start int, err error) {
	c, err := t.certificate(serial)
	return c.Reservation, c.Start, err
}

func (t *Tx) certificate(serial string) (Certificate, error) {
	var c Certificate
	var expires, revoked int64
	err := t.tx.queryRow(`SELECT serial, reservation, start, der, expires, revoked FROM certificates WHERE serial = $1`, serial).
		Scan(&c.Serial, &c.Reservation, &c.Start, &c.DER, &expires, &revoked)
	if errors.Is(err, sql.ErrNoRows) {
		return c, ErrNotFound
	}
	if err != nil {
		return c, fmt.Errorf("read certificate: %w", err)
	}
	c.Expires, c.Revoked = instant(expires), instant(revoked)
	return c, nil
}

// HostState is what is remembered of a host between quotes.
type HostState struct {
	Clock    []byte // JSON of verify.Clocks; empty: never quoted
	Standing string // empty: good
	Quoted   time.Time
	// Activated is the digest of the keys (verify.Standing.Keys) that the host's TPM has proved to hold.
	Activated digest.SHA256
	Barred    string // why it gets no VM until an operator readmits it; empty: nothing
	// AuditFailed says why the host's last audit from trusted media failed; empty: none has,
	// or a later one was good. [Tx.JudgeHostAudit] alone changes it.
	AuditFailed string
}

// Host reads a host's state; an unknown one has the zero state.
func (t *Tx) Host(name string) (HostState, error) {
	var h HostState
	var quoted int64
	var activated string
	err := t.tx.queryRow(`SELECT clock, standing, quoted, activated, barred, audit_failed FROM hosts WHERE name = $1`, name).
		Scan(&h.Clock, &h.Standing, &quoted, &activated, &h.Barred, &h.AuditFailed)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return h, fmt.Errorf("read host: %w", err)
	}
	h.Quoted = instant(quoted)
	if err := h.Activated.UnmarshalText([]byte(activated)); err != nil {
		return h, fmt.Errorf("read host: %w", err)
	}
	return h, nil
}

// PutHost stores a host's state.
func (t *Tx) PutHost(name string, h HostState) error {
	activated, err := h.Activated.MarshalText()
	if err != nil {
		return fmt.Errorf("store host: %w", err)
	}
	return t.one("store host", `INSERT INTO hosts (name, clock, standing, quoted, activated, barred) VALUES ($1,$2,$3,$4,$5,$6)
		ON CONFLICT (name) DO UPDATE SET clock = excluded.clock, standing = excluded.standing, quoted = excluded.quoted, activated = excluded.activated,
		barred = excluded.barred`,
		name, append([]byte{}, h.Clock...), h.Standing, nanos(h.Quoted), string(activated), h.Barred)
}

// NextRevision counts a zone's document and returns its number, durably, before the
// document is signed: a number is never used for two documents.
func (t *Tx) NextRevision(zone string) (int64, error) {
	var n int64
	err := t.tx.queryRow(`INSERT INTO zones (zone, revision) VALUES ($1, 1)
		ON CONFLICT (zone) DO UPDATE SET revision = revision + 1 RETURNING revision`, zone).Scan(&n)
	if err != nil {
		return 0, fmt.Errorf("count zone revision: %w", err)
	}
	return n, nil
}
