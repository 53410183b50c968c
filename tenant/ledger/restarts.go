package ledger

import (
	"encoding/json"
	"fmt"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/tenant/reservation"
)

// Halt ends one start of id, not the reservation, and reports whether this call did it.
// In the same transaction its tokens become void and its certificates revoked; that the
// instance is gone is to be shown yet. due is when the next start is due, zero for never,
// restarts how many in a row that makes.
func (t *Tx) Halt(id string, start int, why event.Refusal, due time.Time, restarts int) (bool, error) {
	findings, err := json.Marshal(append([]event.FailedCheck{}, why.Findings...))
	if err != nil {
		return false, fmt.Errorf("halt: %w", err)
	}
	n, err := t.change("halt", `UPDATE reservations SET phase = 'stopped', reason = $3, detail = $4, deadline = $5, restarts = $6, findings = $7, wish = '', gone = 0
		WHERE id = $1 AND start = $2 AND phase IN ('booting','unlocking','connecting','computing')`, id, start, why.Reason, why.Detail, nanos(due), restarts, findings)
	if err != nil || n != 1 {
		return false, err
	}
	if err := t.withdraw(id); err != nil {
		return false, err
	}
	if err := t.endPhases(id); err != nil {
		return false, err
	}
	return true, t.beginPhase(id, start, string(reservation.Stopped))
}

// SetGone records that the host of a stopped VM has no instance of it.
func (t *Tx) SetGone(id string, start int) error {
	return t.one("record absence", `UPDATE reservations SET gone = 1 WHERE id = $1 AND start = $2 AND phase = 'stopped' AND gone = 0`, id, start)
}

// Again moves a stopped VM to booting with its next start: one swap, which needs that
// start to be due, and the last instance to be gone, so that two never share a volume.
func (t *Tx) Again(id string, start int, deadline time.Time) error {
	n, err := t.change("start again", `UPDATE reservations SET phase = 'booting', start = start + 1, deadline = $3, reason = '', detail = '', findings = CAST('[]' AS BLOB), gone = 0
		WHERE id = $1 AND start = $2 AND phase = 'stopped' AND gone = 1 AND deadline <> 0 AND deadline <= $4`, id, start, nanos(deadline), nanos(t.Now))
	if err != nil {
		return err
	}
	if n != 1 {
		return ErrMoved
	}
	if err := t.endPhases(id); err != nil {
		return err
	}
	return t.beginPhase(id, start+1, string(reservation.Booting))
}

// SetDue says when a stopped VM starts again, zero for not by itself, and why it is
// stopped meanwhile.
func (t *Tx) SetDue(id string, start int, why event.Refusal, due time.Time, restarts int) error {
	n, err := t.change("record next start", `UPDATE reservations SET reason = $3, detail = $4, deadline = $5, restarts = $6
		WHERE id = $1 AND start = $2 AND phase = 'stopped'`, id, start, why.Reason, why.Detail, nanos(due), restarts)
	if err == nil && n != 1 {
		err = ErrMoved
	}
	return err
}

// Hold takes a stopped VM's next start off for what was found since.
func (t *Tx) Hold(id string, start int, why event.Refusal) error {
	findings, err := json.Marshal(append([]event.FailedCheck{}, why.Findings...))
	if err != nil {
		return fmt.Errorf("hold: %w", err)
	}
	n, err := t.change("hold", `UPDATE reservations SET reason = $3, detail = $4, findings = $5, deadline = 0
		WHERE id = $1 AND start = $2 AND phase = 'stopped'`, id, start, why.Reason, why.Detail, findings)
	if err == nil && n != 1 {
		err = ErrMoved
	}
	return err
}

// SetWish records what an operator asks of a running VM; a later wish replaces an earlier.
func (t *Tx) SetWish(id string, start int, w Wish) error {
	n, err := t.change("record wish", `UPDATE reservations SET wish = $3, wished = $4
		WHERE id = $1 AND start = $2 AND phase IN ('booting','unlocking','connecting','computing')`, id, start, w, nanos(t.Now))
	if err == nil && n != 1 {
		err = ErrMoved
	}
	return err
}

// ComputedSince is when the latest start of id began to compute; zero if it has not.
func (t *Tx) ComputedSince(id string, start int) (time.Time, error) {
	phases, err := t.Phases(id, start)
	if err != nil {
		return time.Time{}, fmt.Errorf("look when it computed: %w", err)
	}
	for _, p := range phases {
		if p.Name == string(reservation.Computing) {
			return p.Began, nil
		}
	}
	return time.Time{}, nil
}

// SetWorkload gives a live VM another workload.
func (t *Tx) SetWorkload(id string, start int, w *api.Workload) error {
	data, err := json.Marshal(w)
	if err != nil {
		return fmt.Errorf("record workload: %w", err)
	}
	n, err := t.change("record workload", `UPDATE reservations SET workload = $3 WHERE id = $1 AND start = $2 AND phase NOT IN ('released','aborted')`, id, start, data)
	if err == nil && n != 1 {
		err = ErrMoved
	}
	return err
}

// RestartPart records that a part of a phase begins anew, or for the first time.
func (t *Tx) RestartPart(id string, start int, name string) error {
	_, err := t.change("begin part again", `INSERT INTO phases (reservation, start, name, began, ended) VALUES ($1,$2,$3,$4,0)
		ON CONFLICT (reservation, start, name) DO UPDATE SET began = excluded.began, ended = 0`, id, start, name, nanos(t.Now))
	return err
}
