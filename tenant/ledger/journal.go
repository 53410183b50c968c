package ledger

import (
	"database/sql"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"

	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/transcript"
)

// self is the source of the orchestrator's own entries.
const self = "orchestrator"

// Journal appends an entry of the orchestrator's own.
func (t *Tx) Journal(e event.Event) error {
	e.Source, e.Time, e.Seq = self, t.Now.UTC(), 0
	return t.append(e, nil)
}

// JournalFrom appends an event of a daemon, whose source the caller has set from its
// certificate. The same event sent twice is one entry.
func (t *Tx) JournalFrom(e event.Event) error {
	data, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	origin := digest.Of(data).String()
	var seen int
	err = t.tx.queryRow(`SELECT 1 FROM journal WHERE origin = $1`, origin).Scan(&seen)
	if err == nil {
		return nil
	}
	if !errors.Is(err, sql.ErrNoRows) {
		return fmt.Errorf("journal: %w", err)
	}
	return t.append(e, &origin)
}

// append chains an entry: its hash covers its number, the hash before it and its bytes.
// An entry with a reason counts under it.
func (t *Tx) append(e event.Event, origin *string) error {
	var seq int64
	var text string
	err := t.tx.queryRow(`SELECT seq, hash FROM journal ORDER BY seq DESC LIMIT 1`).Scan(&seq, &text)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return fmt.Errorf("journal: %w", err)
	}
	var previous digest.SHA256
	if err := previous.UnmarshalText([]byte(text)); err != nil {
		return fmt.Errorf("journal: entry %d: %w", seq, err)
	}
	seq++
	if e.Source == self {
		e.Seq = seq
	}
	data, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	if err := t.one("journal", `INSERT INTO journal (seq, hash, reservation, origin, entry) VALUES ($1,$2,$3,$4,$5)`,
		seq, chain(seq, previous, data).String(), e.Reservation, origin, data); err != nil {
		return err
	}
	return t.count(e)
}

func chain(seq int64, previous digest.SHA256, entry []byte) digest.SHA256 {
	return transcript.Sum("foothold/journal/v1", binary.BigEndian.AppendUint64(nil, uint64(seq)), previous[:], entry)
}

// JournalAfter lists at most limit entries behind seq, of one reservation or, for "",
// of all.
func (t *Tx) JournalAfter(seq int64, reservation string, limit int) ([]api.JournalEntry, error) {
	rows, err := t.tx.query(`SELECT j.seq, j.hash, j.entry, COALESCE(r.name, '') FROM journal j
		LEFT JOIN reservations r ON r.id = j.reservation
		WHERE j.seq > $1 AND ($2 = '' OR j.reservation = $2) ORDER BY j.seq LIMIT $3`, seq, reservation, limit)
	if err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	defer rows.Close()
	list := []api.JournalEntry{}
	for rows.Next() {
		var entry api.JournalEntry
		var hash string
		var data []byte
		if err := rows.Scan(&entry.Seq, &hash, &data, &entry.VM); err != nil {
			return nil, fmt.Errorf("read journal: %w", err)
		}
		if err := errors.Join(entry.Hash.UnmarshalText([]byte(hash)), json.Unmarshal(data, &entry.Event)); err != nil {
			return nil, fmt.Errorf("read journal entry %d: %w", entry.Seq, err)
		}
		list = append(list, entry)
	}
	return list, rows.Err()
}

// ErrBroken is returned for a journal whose chain does not verify.
var ErrBroken = errors.New("does not continue the chain")

// VerifyJournal walks the whole chain and names the first entry that does not fit, with
// [ErrBroken].
func (t *Tx) VerifyJournal() error {
	rows, err := t.tx.query(`SELECT seq, hash, entry FROM journal ORDER BY seq`)
	if err != nil {
		return fmt.Errorf("read journal: %w", err)
	}
	defer rows.Close()
	var previous digest.SHA256
	for want := int64(1); rows.Next(); want++ {
		var seq int64
		var hash string
		var data []byte
		if err := rows.Scan(&seq, &hash, &data); err != nil {
			return fmt.Errorf("read journal: %w", err)
		}
		next := chain(seq, previous, data)
		if seq != want || next.String() != hash {
			return fmt.Errorf("journal: entry %d %w", want, ErrBroken)
		}
		previous = next
	}
	return rows.Err()
}
