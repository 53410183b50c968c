package ledger

import (
	"fmt"
	"strings"

	"foothold/protocol/api"
	"foothold/protocol/event"
)

const (
	// countPrefix begins the names under which meta holds the counts: it, source, kind and
	// reason, with spaces between. None of the three has one.
	countPrefix = "refused "
	// maxCounts bounds the names of one source. A daemon chooses kinds and reasons: what it
	// invents beyond counts under otherCount.
	maxCounts  = 200
	otherCount = "other"
)

// count counts an entry that carries a reason, in the entry's own transaction.
func (t *Tx) count(e event.Event) error {
	if e.Reason == "" {
		return nil
	}
	source := countPrefix + strings.ReplaceAll(e.Source, " ", "_") + " "
	name := source + e.Kind + " " + string(e.Reason)
	n, err := t.change("count refusal", `UPDATE meta SET value = value + 1 WHERE name = $1`, name)
	if err != nil || n == 1 {
		return err
	}
	var known int
	if err := t.tx.queryRow(`SELECT count(*) FROM meta WHERE substr(name, 1, length($1)) = $1`, source).Scan(&known); err != nil {
		return fmt.Errorf("count refusal: %w", err)
	}
	if known >= maxCounts {
		name = source + otherCount + " " + otherCount
	}
	return t.one("count refusal", `INSERT INTO meta (name, value) VALUES ($1, 1) ON CONFLICT (name) DO UPDATE SET value = value + 1`, name)
}

// Refusals lists how many entries of the journal carry which reason, by source and kind.
func (t *Tx) Refusals() ([]api.Refusals, error) {
	rows, err := t.tx.query(`SELECT name, value FROM meta WHERE substr(name, 1, length($1)) = $1 ORDER BY name`, countPrefix)
	if err != nil {
		return nil, fmt.Errorf("list refusals: %w", err)
	}
	defer rows.Close()
	list := []api.Refusals{}
	for rows.Next() {
		var name string
		var r api.Refusals
		if err := rows.Scan(&name, &r.Count); err != nil {
			return nil, fmt.Errorf("list refusals: %w", err)
		}
		f := strings.Fields(strings.TrimPrefix(name, countPrefix))
		if len(f) != 3 {
			return nil, fmt.Errorf("list refusals: %q is no count", name)
		}
		r.Source, r.Kind, r.Reason = f[0], f[1], event.Reason(f[2])
		list = append(list, r)
	}
	return list, rows.Err()
}
