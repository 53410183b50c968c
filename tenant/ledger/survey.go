package ledger

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/token"
)

// Survey is what the ledger holds, of one moment, as far as its parts and the world
// outside must fit it.
type Survey struct {
	Reservations []Reservation // deleted ones too, oldest first
	Starts       []StartKey    // that have a row
	// Latest has the facts of the latest start of each reservation that is not deleted, if there are any.
	Latest       map[string]Start
	Open         []OpenPhase   // phases and parts that have not ended
	Tokens       []Token       // open ones
	Certificates []Certificate // that are not revoked, without their bytes
	Nonces       []NonceCount
	Templates    []Template
	Objects      []digest.SHA256 // of the DMZ's store
	Entries      int64           // of the journal
}

// StartKey names one start of a reservation.
type StartKey struct {
	Reservation string
	Start       int
}

// OpenPhase is a phase or part that has not ended.
type OpenPhase struct {
	StartKey
	Name string
}

// NonceCount sums up a start's nonces: how many there are, and how many say that they
// were used before they were issued.
type NonceCount struct {
	StartKey
	Issued, Odd int
}

// Survey reads all of it.
func (t *Tx) Survey() (Survey, error) {
	s := Survey{Latest: map[string]Start{}}
	var err error
	if s.Reservations, err = t.reservations(`ORDER BY created, id`); err != nil {
		return s, err
	}
	for _, r := range s.Reservations {
		if !r.Deleted.IsZero() {
			continue
		}
		facts, err := t.Start(r.ID, r.Start)
		if errors.Is(err, ErrNotFound) {
			continue
		}
		if err != nil {
			return s, err
		}
		s.Latest[r.ID] = facts
	}
	if s.Templates, err = t.Templates(); err != nil {
		return s, err
	}
	return s, errors.Join(
		t.surveyStarts(&s), t.surveyPhases(&s), t.surveyTokens(&s), t.surveyCertificates(&s), t.surveyNonces(&s), t.surveyObjects(&s),
		t.each("journal", `SELECT COALESCE(max(seq), 0) FROM journal`, func(row scanner) error { return row.Scan(&s.Entries) }))
}

// each runs a query and hands each row to f.
func (t *Tx) each(what, query string, f func(scanner) error, args ...any) error {
	rows, err := t.tx.query(query, args...)
	if err != nil {
		return fmt.Errorf("list %s: %w", what, err)
	}
	defer rows.Close()
	for rows.Next() {
		if err := f(rows); err != nil {
			return fmt.Errorf("list %s: %w", what, err)
		}
	}
	return rows.Err()
}

func (t *Tx) surveyStarts(s *Survey) error {
	return t.each("starts", `SELECT reservation, start FROM starts ORDER BY reservation, start`, func(row scanner) error {
		var k StartKey
		err := row.Scan(&k.Reservation, &k.Start)
		s.Starts = append(s.Starts, k)
		return err
	})
}

func (t *Tx) surveyPhases(s *Survey) error {
	return t.each("phases", `SELECT reservation, start, name FROM phases WHERE ended = 0 ORDER BY reservation, start, began`, func(row scanner) error {
		var p OpenPhase
		err := row.Scan(&p.Reservation, &p.Start, &p.Name)
		s.Open = append(s.Open, p)
		return err
	})
}

func (t *Tx) surveyTokens(s *Survey) error {
	return t.each("tokens", `SELECT digest, kind, reservation, start, phase FROM tokens WHERE state = 'open' ORDER BY made`, func(row scanner) error {
		var tok Token
		var sum string
		var kind int
		if err := row.Scan(&sum, &kind, &tok.Reservation, &tok.Start, &tok.Phase); err != nil {
			return err
		}
		tok.Kind = token.Kind(kind)
		s.Tokens = append(s.Tokens, tok)
		return s.Tokens[len(s.Tokens)-1].Digest.UnmarshalText([]byte(sum))
	})
}

func (t *Tx) surveyCertificates(s *Survey) error {
	return t.each("certificates", `SELECT serial, reservation, start, expires FROM certificates WHERE revoked = 0 ORDER BY expires`, func(row scanner) error {
		var c Certificate
		var expires int64
		err := row.Scan(&c.Serial, &c.Reservation, &c.Start, &expires)
		c.Expires = instant(expires)
		s.Certificates = append(s.Certificates, c)
		return err
	})
}

func (t *Tx) surveyNonces(s *Survey) error {
	return t.each("nonces", `SELECT reservation, start, count(*), total(used <> 0 AND used < issued) FROM nonces GROUP BY reservation, start`, func(row scanner) error {
		var n NonceCount
		var odd float64
		err := row.Scan(&n.Reservation, &n.Start, &n.Issued, &odd)
		n.Odd = int(odd)
		s.Nonces = append(s.Nonces, n)
		return err
	})
}

func (t *Tx) surveyObjects(s *Survey) error {
	return t.each("objects", `SELECT sha256 FROM objects ORDER BY stored`, func(row scanner) error {
		var text string
		if err := row.Scan(&text); err != nil {
			return err
		}
		s.Objects = append(s.Objects, digest.SHA256{})
		return s.Objects[len(s.Objects)-1].UnmarshalText([]byte(text))
	})
}

// LastEntry is when the newest of the orchestrator's own entries of one of these kinds
// was made about a reservation; zero if there is none.
func (t *Tx) LastEntry(id string, kinds ...string) (time.Time, error) {
	rows, err := t.tx.query(`SELECT entry FROM journal WHERE reservation = $1 AND origin IS NULL ORDER BY seq DESC`, id)
	if err != nil {
		return time.Time{}, fmt.Errorf("read journal: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var data []byte
		var e event.Event
		if err := rows.Scan(&data); err != nil {
			return time.Time{}, fmt.Errorf("read journal: %w", err)
		}
		if err := json.Unmarshal(data, &e); err != nil {
			return time.Time{}, fmt.Errorf("read journal: %w", err)
		}
		for _, k := range kinds {
			if e.Kind == k {
				return e.Time, nil
			}
		}
	}
	return time.Time{}, rows.Err()
}
