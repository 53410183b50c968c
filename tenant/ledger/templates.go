package ledger

import (
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/signed"
)

// Template is one version of a registered template. Its volume key is in the vault.
type Template struct {
	Name       string
	Version    int // from 1
	SHA256     digest.SHA256
	Size       int64
	RootHash   digest.SHA256
	HashOffset int64
	Release    string
	Components signed.Envelope
	Audit      []byte
	Created    time.Time
	Withdrawn  time.Time // when its withdrawal began; zero: it is in use
	Gone       bool      // its withdrawal is over: it is no more than a digest that does not come back
	Hosts      []string  // where its ciphertext lies
}

// Label names a version: "debian", "debian.2".
func (tpl Template) Label() string {
	if tpl.Version <= 1 {
		return tpl.Name
	}
	return tpl.Name + "." + strconv.Itoa(tpl.Version)
}

// AddTemplate registers a version.
func (t *Tx) AddTemplate(tpl Template) error {
	components, err := json.Marshal(tpl.Components)
	if err != nil {
		return fmt.Errorf("store template: %w", err)
	}
	return t.one("store template", `INSERT INTO templates (name, version, sha256, size, root_hash, hash_offset, release, components, audit, created, withdrawn, gone)
		VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9,$10,0,0)`, tpl.Name, tpl.Version, tpl.SHA256.String(), tpl.Size, tpl.RootHash.String(), tpl.HashOffset,
		tpl.Release, components, tpl.Audit, nanos(tpl.Created))
}

// RenewTemplate gives a registered version other components and expectations; its
// image stays.
func (t *Tx) RenewTemplate(tpl Template) error {
	components, err := json.Marshal(tpl.Components)
	if err != nil {
		return fmt.Errorf("renew template: %w", err)
	}
	return t.one("renew template", `UPDATE templates SET release = $3, components = $4, audit = $5, created = $6 WHERE name = $1 AND version = $2 AND sha256 = $7`,
		tpl.Name, tpl.Version, tpl.Release, components, tpl.Audit, nanos(tpl.Created), tpl.SHA256.String())
}

const templateColumns = `name, version, sha256, size, root_hash, hash_offset, release, components, audit, created, withdrawn, gone,
	(SELECT json_group_array(host) FROM template_hosts h WHERE h.template = templates.name AND h.version = templates.version)`

func scanTemplate(row scanner) (Template, error) {
	var tpl Template
	var sum, root string
	var components, hosts []byte
	var created, withdrawn int64
	err := row.Scan(&tpl.Name, &tpl.Version, &sum, &tpl.Size, &root, &tpl.HashOffset, &tpl.Release, &components, &tpl.Audit, &created, &withdrawn, &tpl.Gone, &hosts)
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
	tpl.Created, tpl.Withdrawn = instant(created), instant(withdrawn)
	return tpl, nil
}

// Template reads the newest version by name; "" means the template that was made last.
func (t *Tx) Template(name string) (Template, error) {
	return scanTemplate(t.tx.queryRow(`SELECT `+templateColumns+` FROM templates
		WHERE name = CASE $1 WHEN '' THEN (SELECT name FROM templates WHERE withdrawn = 0 ORDER BY created DESC, name LIMIT 1) ELSE $1 END
		AND withdrawn = 0 ORDER BY version DESC LIMIT 1`, name))
}

// TemplateOf reads the version that the latest start of a reservation is of; before its
// first start, the newest.
func (t *Tx) TemplateOf(r Reservation) (Template, error) {
	if r.Version == 0 {
		return t.Template(r.Template)
	}
	return scanTemplate(t.tx.queryRow(`SELECT `+templateColumns+` FROM templates WHERE name = $1 AND version = $2`, r.Template, r.Version))
}

// TemplateAt reads the newest version whose ciphertext lies at a host: what a VM that
// starts there next gets.
func (t *Tx) TemplateAt(name, host string) (Template, error) {
	return scanTemplate(t.tx.queryRow(`SELECT `+templateColumns+` FROM templates
		WHERE name = $1 AND withdrawn = 0 AND EXISTS (SELECT 1 FROM template_hosts h WHERE h.template = templates.name AND h.version = templates.version AND h.host = $2)
		ORDER BY version DESC LIMIT 1`, name, host))
}

// TemplateHosts lists where any version of a template lies that may be started.
func (t *Tx) TemplateHosts(name string) ([]string, error) {
	var list []string
	err := t.each("template's hosts", `SELECT DISTINCT h.host FROM template_hosts h JOIN templates t ON t.name = h.template AND t.version = h.version
		WHERE t.name = $1 AND t.withdrawn = 0 ORDER BY h.host`, func(row scanner) error {
		list = append(list, "")
		return row.Scan(&list[len(list)-1])
	}, name)
	return list, err
}

// Templates lists all versions: what was made last first, and of each template the newest.
func (t *Tx) Templates() ([]Template, error) {
	var list []Template
	err := t.each("templates", `SELECT `+templateColumns+` FROM templates
		ORDER BY (SELECT max(n.created) FROM templates n WHERE n.name = templates.name) DESC, name, version DESC`, func(row scanner) error {
		tpl, err := scanTemplate(row)
		list = append(list, tpl)
		return err
	})
	return list, err
}

// AddTemplateHost records that a host holds a version's ciphertext.
func (t *Tx) AddTemplateHost(tpl Template, host string) error {
	_, err := t.change("record template's host", `INSERT INTO template_hosts (template, version, host) VALUES ($1,$2,$3) ON CONFLICT DO NOTHING`, tpl.Name, tpl.Version, host)
	return err
}

// DropTemplateHost records that a host holds it no more.
func (t *Tx) DropTemplateHost(tpl Template, host string) error {
	_, err := t.change("forget template's host", `DELETE FROM template_hosts WHERE template = $1 AND version = $2 AND host = $3`, tpl.Name, tpl.Version, host)
	return err
}

// TemplateUsers counts the VMs of a template that are not deleted.
func (t *Tx) TemplateUsers(name string) (int, error) {
	return t.number(`SELECT count(*) FROM reservations WHERE template = $1 AND deleted = 0`, name)
}

// VersionUsers counts the VMs whose latest start is of a version and that are not deleted.
func (t *Tx) VersionUsers(tpl Template) (int, error) {
	return t.number(`SELECT count(*) FROM reservations WHERE template = $1 AND version = $2 AND deleted = 0`, tpl.Name, tpl.Version)
}

// Superseded lists the versions that nothing needs any more: each host that has one has a
// newer one too, which its VMs' next starts take, and of no start of it an instance may run.
func (t *Tx) Superseded() ([]Template, error) {
	var list []Template
	err := t.each("superseded templates", `SELECT `+templateColumns+` FROM templates WHERE withdrawn = 0
		AND EXISTS (SELECT 1 FROM templates n JOIN template_hosts h ON h.template = n.name AND h.version = n.version
			WHERE n.name = templates.name AND n.version > templates.version AND n.withdrawn = 0)
		AND NOT EXISTS (SELECT 1 FROM template_hosts o WHERE o.template = templates.name AND o.version = templates.version
			AND NOT EXISTS (SELECT 1 FROM templates n JOIN template_hosts h ON h.template = n.name AND h.version = n.version
				WHERE n.name = templates.name AND n.version > templates.version AND n.withdrawn = 0 AND h.host = o.host))
		AND NOT EXISTS (SELECT 1 FROM reservations r WHERE r.template = templates.name AND r.version = templates.version
			AND (r.phase IN ('booting','unlocking','connecting','computing') OR r.phase = 'stopped' AND r.gone = 0 OR r.cleanup = 'pending'))
		ORDER BY name, version`, func(row scanner) error {
		tpl, err := scanTemplate(row)
		list = append(list, tpl)
		return err
	})
	return list, err
}

// Withdraw begins a version's withdrawal: no start takes it from now on.
func (t *Tx) Withdraw(tpl Template) error {
	return t.one("withdraw template", `UPDATE templates SET withdrawn = $3 WHERE name = $1 AND version = $2 AND withdrawn = 0`, tpl.Name, tpl.Version, nanos(t.Now))
}

// WithdrawalDone records that key and ciphertexts of a version are gone.
func (t *Tx) WithdrawalDone(tpl Template) error {
	return t.one("end template's withdrawal", `UPDATE templates SET gone = 1 WHERE name = $1 AND version = $2 AND withdrawn <> 0 AND gone = 0`, tpl.Name, tpl.Version)
}

// DeleteTemplate forgets a template with all its versions.
func (t *Tx) DeleteTemplate(name string) error {
	n, err := t.change("delete template", `DELETE FROM templates WHERE name = $1`, name)
	if err == nil && n == 0 {
		err = ErrNotFound
	}
	return err
}

func (t *Tx) number(query string, args ...any) (n int, err error) {
	if err := t.tx.queryRow(query, args...).Scan(&n); err != nil {
		return 0, fmt.Errorf("count: %w", err)
	}
	return n, nil
}

// AddObject records an object of the DMZ's store.
func (t *Tx) AddObject(sum digest.SHA256, size int64) error {
	_, err := t.change("record object", `INSERT INTO objects (sha256, size, stored) VALUES ($1,$2,$3) ON CONFLICT DO NOTHING`, sum.String(), size, nanos(t.Now))
	return err
}

// Object returns an object's size.
func (t *Tx) Object(sum digest.SHA256) (int64, error) {
	var size int64
	err := t.tx.queryRow(`SELECT size FROM objects WHERE sha256 = $1`, sum.String()).Scan(&size)
	if errors.Is(err, sql.ErrNoRows) {
		return 0, ErrNotFound
	}
	if err != nil {
		return 0, fmt.Errorf("read object: %w", err)
	}
	return size, nil
}
