package ledger

import (
	"database/sql"
	"errors"
	"fmt"
	"time"

	"foothold/protocol/digest"
)

// Kinds of signed documents.
const (
	InventoryDocument = "inventory"
	PlatformDocument  = "platform"
)

// Document is a signed document that was taken into use.
type Document struct {
	Kind        string
	SHA256      digest.SHA256 // of the signed payload
	Version     int           // of an inventory
	Envelope    []byte        // the file, byte for byte
	Imported    time.Time
	ImportedBy  string
	Withdrawn   time.Time
	WithdrawnBy string
	Why         string
}

const documentColumns = `kind, sha256, version, envelope, imported, imported_by, withdrawn, withdrawn_by, why`

func scanDocument(row scanner) (Document, error) {
	var d Document
	var sum string
	var imported, withdrawn int64
	if err := row.Scan(&d.Kind, &sum, &d.Version, &d.Envelope, &imported, &d.ImportedBy, &withdrawn, &d.WithdrawnBy, &d.Why); err != nil {
		return d, err
	}
	d.Imported, d.Withdrawn = instant(imported), instant(withdrawn)
	return d, d.SHA256.UnmarshalText([]byte(sum))
}

// AddDocument stores one. Two inventories of one version are refused.
func (t *Tx) AddDocument(d Document) error {
	return t.one("store document", `INSERT INTO documents (`+documentColumns+`) VALUES ($1,$2,$3,$4,$5,$6,0,'','')`,
		d.Kind, d.SHA256.String(), d.Version, d.Envelope, nanos(t.Now), d.ImportedBy)
}

// Documents lists those of a kind, newest first, withdrawn ones too.
func (t *Tx) Documents(kind string) ([]Document, error) {
	var list []Document
	err := t.each("documents", `SELECT `+documentColumns+` FROM documents WHERE kind = $1 ORDER BY version DESC, imported DESC, rowid DESC`, func(row scanner) error {
		d, err := scanDocument(row)
		list = append(list, d)
		return err
	}, kind)
	return list, err
}

// NewestInventory reads the inventory of the highest version.
func (t *Tx) NewestInventory() (Document, error) {
	return t.document(`kind = $1 ORDER BY version DESC LIMIT 1`, InventoryDocument)
}

// Inventory reads one version.
func (t *Tx) Inventory(version int) (Document, error) {
	return t.document(`kind = $1 AND version = $2`, InventoryDocument, version)
}

// Document reads one by its digest.
func (t *Tx) Document(kind string, sum digest.SHA256) (Document, error) {
	return t.document(`kind = $1 AND sha256 = $2`, kind, sum.String())
}

func (t *Tx) document(where string, args ...any) (Document, error) {
	d, err := scanDocument(t.tx.queryRow(`SELECT `+documentColumns+` FROM documents WHERE `+where, args...))
	if errors.Is(err, sql.ErrNoRows) {
		return d, ErrNotFound
	}
	if err != nil {
		return d, fmt.Errorf("read document: %w", err)
	}
	return d, nil
}

// WithdrawDocument makes a document count no more. It reports whether this call did.
func (t *Tx) WithdrawDocument(kind string, sum digest.SHA256, by, why string) (bool, error) {
	n, err := t.change("withdraw document", `UPDATE documents SET withdrawn = $3, withdrawn_by = $4, why = $5 WHERE kind = $1 AND sha256 = $2 AND withdrawn = 0`,
		kind, sum.String(), nanos(t.Now), by, why)
	return n == 1, err
}

// States of a host's keys.
const (
	KeysUnproved  = "unproved"  // well-formed and certified; the TPM has not been challenged
	KeysValidated = "validated" // and its TPM has proved that it holds them
	KeysFailed    = "failed"
)

// HostKeys is what was found of one host's keys.
type HostKeys struct {
	Host      string
	Keys      digest.SHA256 // verify.Standing.Keys
	AIK       digest.SHA256
	API       string // ADDRESS:PORT
	Inventory int    // version that named them last
	State     string
	Reason    string // why not validated
	Checked   time.Time
}

// PutHostKeys stores what was found now.
func (t *Tx) PutHostKeys(k HostKeys) error {
	return t.one("store host's keys", `INSERT INTO host_keys (host, keys, aik, api, inventory, state, reason, checked) VALUES ($1,$2,$3,$4,$5,$6,$7,$8)
		ON CONFLICT (host, keys) DO UPDATE SET api = excluded.api, inventory = excluded.inventory, state = excluded.state, reason = excluded.reason, checked = excluded.checked`,
		k.Host, k.Keys.String(), k.AIK.String(), k.API, k.Inventory, k.State, k.Reason, nanos(t.Now))
}

// HostKeys reads what was found of one host's keys of that digest.
func (t *Tx) HostKeys(host string, keys digest.SHA256) (HostKeys, error) {
	list, err := t.hostKeys(`host = $1 AND keys = $2`, host, keys.String())
	if err == nil && len(list) == 0 {
		return HostKeys{}, ErrNotFound
	}
	if err != nil {
		return HostKeys{}, err
	}
	return list[0], nil
}

// AllHostKeys lists all that were ever found, by host, those named last first.
func (t *Tx) AllHostKeys() ([]HostKeys, error) { return t.hostKeys(`TRUE`) }

func (t *Tx) hostKeys(where string, args ...any) ([]HostKeys, error) {
	var list []HostKeys
	err := t.each("hosts' keys", `SELECT host, keys, aik, api, inventory, state, reason, checked FROM host_keys WHERE `+where+
		` ORDER BY host, inventory DESC, checked DESC`, func(row scanner) error {
		var k HostKeys
		var keys, aik string
		var checked int64
		if err := row.Scan(&k.Host, &keys, &aik, &k.API, &k.Inventory, &k.State, &k.Reason, &checked); err != nil {
			return err
		}
		k.Checked = instant(checked)
		list = append(list, k)
		last := &list[len(list)-1]
		return errors.Join(last.Keys.UnmarshalText([]byte(keys)), last.AIK.UnmarshalText([]byte(aik)))
	}, args...)
	return list, err
}
