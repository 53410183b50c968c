package ledger

import "fmt"

// strangers is the name under which a new epoch leaves word that hosts may run what this
// ledger does not know.
const strangers = "strangers"

// NewEpoch begins an epoch: for a ledger that may lack commits, since it was put back
// from a copy. In it no token is open, no certificate good, no nonce unused, and of no
// stopped VM it is known that its instance is gone. The number is at least the time in
// seconds, so that two ledgers put back from one copy do not begin the same epoch.
func (t *Tx) NewEpoch() (int64, error) {
	var epoch int64
	err := t.tx.queryRow(`UPDATE meta SET value = max(value + 1, $1) WHERE name = 'epoch' RETURNING value`, t.Now.Unix()).Scan(&epoch)
	if err != nil {
		return 0, fmt.Errorf("begin epoch: %w", err)
	}
	for _, s := range []struct {
		what, query string
		args        []any
	}{
		{"void tokens", `UPDATE tokens SET state = 'void' WHERE state = 'open'`, nil},
		{"revoke certificates", `UPDATE certificates SET revoked = $1 WHERE revoked = 0`, []any{nanos(t.Now)}},
		{"use nonces", `UPDATE nonces SET used = $1 WHERE used = 0`, []any{nanos(t.Now)}},
		{"doubt absences", `UPDATE reservations SET gone = 0 WHERE phase = 'stopped'`, nil},
		{"expect strangers", `INSERT INTO meta (name, value) VALUES ($1, 1) ON CONFLICT (name) DO UPDATE SET value = 1`, []any{strangers}},
	} {
		if _, err := t.change(s.what, s.query, s.args...); err != nil {
			return 0, err
		}
	}
	return epoch, nil
}

// Strangers reports whether hosts may run what this ledger does not know.
func (t *Tx) Strangers() (bool, error) {
	var n int
	if err := t.tx.queryRow(`SELECT count(*) FROM meta WHERE name = $1 AND value = 1`, strangers).Scan(&n); err != nil {
		return false, fmt.Errorf("look for strangers: %w", err)
	}
	return n == 1, nil
}

// NoStrangers records that every host was looked at since the epoch began.
func (t *Tx) NoStrangers() error {
	_, err := t.change("forget strangers", `DELETE FROM meta WHERE name = $1`, strangers)
	return err
}
