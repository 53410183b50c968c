package ledger

import (
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/signed"
)

// Template is a registered template. Its volume key is in the vault.
type Template struct {
	Name       string
	SHA256     digest.SHA256
	Size       int64
	RootHash   digest.SHA256
	HashOffset int64
	Release    string
	Components signed.Envelope
	Audit      []byte
	Created    time.Time
	Hosts      []string // where its ciphertext lies
}

// AddTemplate registers one.
func (t *Tx) AddTemplate(tpl Template) error {
	components, err := json.Marshal(tpl.Components)
	if err != nil {
		return fmt.Errorf("store template: %w", err)
	}
	return t.one("store template", `INSERT INTO templates (name, sha256, size, root_hash, hash_offset, release, components, audit, created)
		VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9)`, tpl.Name, tpl.SHA256.String(), tpl.Size, tpl.RootHash.String(), tpl.HashOffset,
		tpl.Release, components, tpl.Audit, nanos(tpl.Created))
}

// RenewTemplate gives a registered template other components and expectations; its
// image stays.
func (t *Tx) RenewTemplate(tpl Template) error {
	components, err := json.Marshal(tpl.Components)
	if err != nil {
		return fmt.Errorf("renew template: %w", err)
	}
	return t.one("renew template", `UPDATE templates SET release = $2, components = $3, audit = $4, created = $5 WHERE name = $1 AND sha256 = $6`,
		tpl.Name, tpl.Release, components, tpl.Audit, nanos(tpl.Created), tpl.SHA256.String())
}

const templateColumns = `name, sha256, size, root_hash, hash_offset, release, components, audit, created,
	(SELECT json_group_array(host) FROM template_hosts WHERE template = name)`

func scanTemplate(row scanner) (Template, error) {
	var tpl Template
	var sum, root string
	var components, hosts []byte
	var created int64
	err := row.Scan(&tpl.Name, &sum, &tpl.Size, &root, &tpl.HashOffset, &tpl.Release, &components, &tpl.Audit, &created, &hosts)
	if errors.Is(err, sql.ErrNoRows) {
		return tpl, ErrNotFound
	}
	if err == nil {
		err = errors.Join(tpl.SHA256.UnmarshalText([]byte(sum)), tpl.RootHash.UnmarshalText([]byte(root)),
			json.Unmarshal(components, &tpl.Components), json.Unmarshal(hosts, &tpl.Hosts))
	}
	if err != nil {
		return tpl, fmt.Errorf("read template: %w", err)
	}
	tpl.Created = instant(created)
	return tpl, nil
}

// Template reads one by name; "" means the newest.
func (t *Tx) Template(name string) (Template, error) {
	return scanTemplate(t.tx.QueryRowContext(t.ctx, `SELECT `+templateColumns+` FROM templates
		WHERE $1 = '' OR name = $1 ORDER BY created DESC, name LIMIT 1`, name))
}

// Templates lists all, newest first.
func (t *Tx) Templates() ([]Template, error) {
	rows, err := t.tx.QueryContext(t.ctx, `SELECT `+templateColumns+` FROM templates ORDER BY created DESC, name`)
	if err != nil {
		return nil, fmt.Errorf("list templates: %w", err)
	}
	defer rows.Close()
	var list []Template
	for rows.Next() {
		tpl, err := scanTemplate(rows)
		if err != nil {
			return nil, err
		}
		list = append(list, tpl)
	}
	return list, rows.Err()
}

// AddTemplateHost records that a host holds the template's ciphertext.
func (t *Tx) AddTemplateHost(name, host string) error {
	_, err := t.change("record template's host", `INSERT INTO template_hosts (template, host) VALUES ($1,$2) ON CONFLICT DO NOTHING`, name, host)
	return err
}

// TemplateUsers counts the VMs of a template that are not deleted.
func (t *Tx) TemplateUsers(name string) (int, error) {
	var n int
	err := t.tx.QueryRowContext(t.ctx, `SELECT count(*) FROM reservations WHERE template = $1 AND deleted = 0`, name).Scan(&n)
	if err != nil {
		return 0, fmt.Errorf("count template's VMs: %w", err)
	}
	return n, nil
}

// DeleteTemplate forgets one.
func (t *Tx) DeleteTemplate(name string) error {
	return t.one("delete template", `DELETE FROM templates WHERE name = $1`, name)
}

// AddObject records an object of the DMZ's store.
func (t *Tx) AddObject(sum digest.SHA256, size int64) error {
	_, err := t.change("record object", `INSERT INTO objects (sha256, size, stored) VALUES ($1,$2,$3) ON CONFLICT DO NOTHING`, sum.String(), size, nanos(t.Now))
	return err
}

// Object returns an object's size.
func (t *Tx) Object(sum digest.SHA256) (int64, error) {
	var size int64
	err := t.tx.QueryRowContext(t.ctx, `SELECT size FROM objects WHERE sha256 = $1`, sum.String()).Scan(&size)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, ErrNotFound
	}
	if err != nil {
		return 0, fmt.Errorf("read object: %w", err)
	}
	return size, nil
}
