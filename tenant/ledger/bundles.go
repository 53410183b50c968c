package ledger

import (
	"errors"
	"fmt"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/tenant/verify"
)

// How many bundles are kept of a VM. Of older ones the link stays. Every refusal of a quote is
// kept: it ends its VM, so a host cannot make many. One that came before there was a quote to
// judge ends a start, which may begin again.
const (
	KeepWatch  = 60     // of role watch: an hour's, at one a minute
	KeepStarts = 3 * 30 // of boot, unlock and connect: thirty starts'
	// KeepUnjudged of refusals without a judgement: of as many starts.
	KeepUnjudged = 30
)

// BundleRow is one verdict of a start.
type BundleRow struct {
	verify.Link
	Digest digest.SHA256
	Kept   bool // its bundle is there
}

// AddBundle keeps a verdict's evidence, and lets go of what is not kept longer.
func (t *Tx) AddBundle(p verify.Parts) error {
	l := p.Link
	for _, d := range []verify.Document{p.Logs, p.Inventory, p.Platform} {
		if err := t.putDocument(d); err != nil {
			return err
		}
	}
	err := t.one("keep evidence", `INSERT INTO bundles (digest, reservation, start, role, host, at, accepted, previous, record_sha256, unjudged, kept, record, logs, inventory, platform)
		VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,1,$11,$12,$13,$14)`, l.Digest().String(), l.Reservation, l.Start, l.Role, l.Host, nanos(l.At), l.Accepted,
		textOf(l.Previous), l.Record.String(), l.Unjudged, p.Record, textOf(p.Logs.SHA256), textOf(p.Inventory.SHA256), textOf(p.Platform.SHA256))
	switch {
	case err != nil:
		return err
	case l.Unjudged:
		return t.prune(l.Reservation, "unjudged = 1", KeepUnjudged)
	case !l.Accepted:
		return nil
	case l.Role == evidence.RoleWatch:
		return t.prune(l.Reservation, "role = 'watch' AND accepted = 1", KeepWatch)
	}
	return t.prune(l.Reservation, "role <> 'watch' AND accepted = 1", KeepStarts)
}

// textOf is a digest as the tables hold it: empty for none.
func textOf(d digest.SHA256) string {
	if d.IsZero() {
		return ""
	}
	return d.String()
}

func (t *Tx) putDocument(d verify.Document) error {
	if d.SHA256.IsZero() {
		return nil
	}
	there := false
	err := t.each("parts of evidence", `SELECT 1 FROM evidence_parts WHERE sha256 = $1`, func(scanner) error { there = true; return nil }, d.SHA256.String())
	if err != nil || there {
		return err
	}
	return t.one("keep part of evidence", `INSERT INTO evidence_parts (sha256, data) VALUES ($1,$2)`, d.SHA256.String(), d.Data)
}

// prune leaves the newest of some of a VM's bundles, and the links of the others.
func (t *Tx) prune(id, which string, most int) error {
	old := map[string][]string{} // digest → documents
	err := t.each("old evidence", `SELECT digest, logs, inventory, platform FROM bundles
		WHERE reservation = $1 AND `+which+` AND kept = 1 ORDER BY rowid DESC LIMIT -1 OFFSET $2`, func(row scanner) error {
		var sum string
		docs := make([]string, 3)
		err := row.Scan(&sum, &docs[0], &docs[1], &docs[2])
		old[sum] = docs
		return err
	}, id, most)
	if err != nil {
		return err
	}
	for sum := range old {
		if err := t.one("let go of evidence", `UPDATE bundles SET kept = 0, record = x'', logs = '', inventory = '', platform = '' WHERE digest = $1`, sum); err != nil {
			return err
		}
	}
	for _, docs := range old {
		for _, doc := range docs {
			if _, err := t.change("let go of part of evidence", `DELETE FROM evidence_parts WHERE sha256 = $1
				AND NOT EXISTS (SELECT 1 FROM bundles WHERE kept = 1 AND logs = $1)
				AND NOT EXISTS (SELECT 1 FROM bundles WHERE kept = 1 AND inventory = $1)
				AND NOT EXISTS (SELECT 1 FROM bundles WHERE kept = 1 AND platform = $1)`, doc); err != nil {
				return err
			}
		}
	}
	return nil
}

// Bundles lists the verdicts of a start, oldest first.
func (t *Tx) Bundles(id string, start int) ([]BundleRow, error) {
	list := []BundleRow{}
	err := t.each("evidence", `SELECT digest, reservation, start, role, host, at, accepted, previous, record_sha256, unjudged, kept FROM bundles
		WHERE reservation = $1 AND start = $2 ORDER BY rowid`, func(row scanner) error {
		r, err := scanLink(row)
		list = append(list, r)
		return err
	}, id, start)
	return list, err
}

// RefusedBundle reads the evidence of the newest refusal of a quote of a start; ErrNotFound:
// there is none. One without a judgement is no such refusal.
func (t *Tx) RefusedBundle(id string, start int) (verify.Parts, error) {
	sum := ""
	err := t.each("refusals", `SELECT digest FROM bundles WHERE reservation = $1 AND start = $2 AND accepted = 0 AND unjudged = 0 ORDER BY rowid DESC LIMIT 1`,
		func(row scanner) error { return row.Scan(&sum) }, id, start)
	if err != nil {
		return verify.Parts{}, err
	}
	if sum == "" {
		return verify.Parts{}, ErrNotFound
	}
	d, err := digest.Parse(sum)
	if err != nil {
		return verify.Parts{}, fmt.Errorf("digest of a refusal: %w", err)
	}
	return t.Bundle(id, d)
}

func scanLink(row scanner, more ...any) (r BundleRow, err error) {
	var sum, previous, record string
	var at int64
	if err := row.Scan(append([]any{&sum, &r.Reservation, &r.Start, &r.Role, &r.Host, &at, &r.Accepted, &previous, &record, &r.Unjudged, &r.Kept}, more...)...); err != nil {
		return r, err
	}
	r.At = instant(at)
	return r, errors.Join(r.Digest.UnmarshalText([]byte(sum)), r.Previous.UnmarshalText([]byte(previous)), r.Link.Record.UnmarshalText([]byte(record)))
}

// NewestBundle is the digest of the newest verdict of a start on a quote whose bundle is kept;
// zero: there is none.
func (t *Tx) NewestBundle(id string, start int) (sum digest.SHA256, err error) {
	err = t.each("evidence", `SELECT digest FROM bundles WHERE reservation = $1 AND start = $2 AND kept = 1 AND unjudged = 0 ORDER BY rowid DESC LIMIT 1`, func(row scanner) error {
		var text string
		if err := row.Scan(&text); err != nil {
			return err
		}
		return sum.UnmarshalText([]byte(text))
	}, id, start)
	return sum, err
}

// Bundle reads the evidence of one verdict of a VM. One that is not kept any more, like one
// that never was, gives ErrNotFound.
func (t *Tx) Bundle(id string, sum digest.SHA256) (p verify.Parts, err error) {
	docs := make([]string, 3)
	err = t.each("evidence", `SELECT digest, reservation, start, role, host, at, accepted, previous, record_sha256, unjudged, kept, record, logs, inventory, platform
		FROM bundles WHERE reservation = $1 AND digest = $2 AND kept = 1`, func(row scanner) error {
		r, err := scanLink(row, &p.Record, &docs[0], &docs[1], &docs[2])
		p.Link = r.Link
		return err
	}, id, sum.String())
	if err != nil {
		return p, err
	}
	if len(p.Record) == 0 {
		return p, ErrNotFound
	}
	for i, into := range []*verify.Document{&p.Logs, &p.Inventory, &p.Platform} {
		if docs[i] == "" {
			continue
		}
		err := t.each("parts of evidence", `SELECT data FROM evidence_parts WHERE sha256 = $1`, func(row scanner) error { return row.Scan(&into.Data) }, docs[i])
		if err != nil || into.Data == nil {
			return p, errors.Join(err, fmt.Errorf("read evidence: part %s is not there", docs[i]))
		}
		into.SHA256 = digest.Of(into.Data)
	}
	return p, nil
}
