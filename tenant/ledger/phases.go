package ledger

import (
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"foothold/protocol/event"
	"foothold/tenant/reservation"
)

// ErrMoved is returned for a move whose reservation is no longer where it starts from,
// or whose deadline has passed.
var ErrMoved = errors.New("the reservation is no longer in that phase")

// PhaseTime is one phase of a start. Names other than the phases' are parts of them.
type PhaseTime struct {
	Name       string
	Began, End time.Time
}

// Move moves start of id from one phase to the next, if the table has the move, the
// reservation still is there and its deadline has not passed: one swap.
func (t *Tx) Move(id string, start int, from, to reservation.Phase, deadline time.Time) error {
	if !reservation.CanMove(from, to) || to.Terminal() {
		return fmt.Errorf("no move leads from %s to %s", from, to)
	}
	if from == reservation.Stopped || to == reservation.Stopped {
		return fmt.Errorf("Halt and Again move to and from %s", reservation.Stopped)
	}
	n, err := t.change("move phase", `UPDATE reservations SET phase = $5, deadline = $6
		WHERE id = $1 AND start = $2 AND phase = $3 AND deadline > $4`,
		id, start, from, nanos(t.Now), to, nanos(deadline))
	if err != nil {
		return err
	}
	if n != 1 {
		return ErrMoved
	}
	if err := t.endPhases(id); err != nil {
		return err
	}
	return t.beginPhase(id, start, string(to))
}

// End ends id with a reason and reports whether this call did it. In the same
// transaction its tokens become void and its certificates revoked.
func (t *Tx) End(id string, to reservation.Phase, why event.Refusal) (bool, error) {
	if !to.Terminal() {
		return false, fmt.Errorf("%s does not end a reservation", to)
	}
	findings, err := json.Marshal(append([]event.FailedCheck{}, why.Findings...))
	if err != nil {
		return false, fmt.Errorf("end reservation: %w", err)
	}
	n, err := t.change("end reservation", `UPDATE reservations SET phase = $2, reason = $3, detail = $4, findings = $5, deadline = 0, cleanup = 'pending', wish = ''
		WHERE id = $1 AND phase NOT IN ('released','aborted')`, id, to, why.Reason, why.Detail, findings)
	if err != nil || n != 1 {
		return false, err
	}
	return true, errors.Join(t.withdraw(id), t.endPhases(id))
}

// withdraw makes void what a start was given.
func (t *Tx) withdraw(id string) error {
	if _, err := t.change("void tokens", `UPDATE tokens SET state = 'void' WHERE reservation = $1 AND state = 'open'`, id); err != nil {
		return err
	}
	_, err := t.change("revoke certificates", `UPDATE certificates SET revoked = $2 WHERE reservation = $1 AND revoked = 0`, id, nanos(t.Now))
	return err
}

// Renew gives a computing reservation a new deadline, unless the old one has passed.
func (t *Tx) Renew(id string, start int, deadline time.Time) error {
	n, err := t.change("renew lease", `UPDATE reservations SET deadline = $4
		WHERE id = $1 AND start = $2 AND phase = 'computing' AND deadline > $3`, id, start, nanos(t.Now), nanos(deadline))
	if err == nil && n != 1 {
		err = ErrMoved
	}
	return err
}

// Grace gives every computing reservation at least this deadline. It is for the
// orchestrator's own start: while it was down, no heartbeat could reach it.
func (t *Tx) Grace(deadline time.Time) error {
	_, err := t.change("extend leases", `UPDATE reservations SET deadline = $1 WHERE phase = 'computing' AND deadline < $1`, nanos(deadline))
	return err
}

// BeginPart and EndPart record a part of a phase beside it.
func (t *Tx) BeginPart(id string, start int, name string) error { return t.beginPhase(id, start, name) }

// EndPart ends a part that was begun.
func (t *Tx) EndPart(id string, start int, name string) error {
	_, err := t.change("end part", `UPDATE phases SET ended = $4 WHERE reservation = $1 AND start = $2 AND name = $3 AND ended = 0`,
		id, start, name, nanos(t.Now))
	return err
}

func (t *Tx) beginPhase(id string, start int, name string) error {
	return t.one("begin phase", `INSERT INTO phases (reservation, start, name, began, ended) VALUES ($1,$2,$3,$4,0)`, id, start, name, nanos(t.Now))
}

func (t *Tx) endPhases(id string) error {
	_, err := t.change("end phase", `UPDATE phases SET ended = $2 WHERE reservation = $1 AND ended = 0`, id, nanos(t.Now))
	return err
}

// Phases lists the phases and parts of a start in order.
func (t *Tx) Phases(id string, start int) ([]PhaseTime, error) {
	rows, err := t.tx.query(`SELECT name, began, ended FROM phases WHERE reservation = $1 AND start = $2 ORDER BY began, rowid`, id, start)
	if err != nil {
		return nil, fmt.Errorf("list phases: %w", err)
	}
	defer rows.Close()
	var list []PhaseTime
	for rows.Next() {
		var p PhaseTime
		var began, ended int64
		if err := rows.Scan(&p.Name, &began, &ended); err != nil {
			return nil, fmt.Errorf("list phases: %w", err)
		}
		p.Began, p.End = instant(began), instant(ended)
		list = append(list, p)
	}
	return list, rows.Err()
}
