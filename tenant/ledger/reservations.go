package ledger

import (
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/bootmsg"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/vmspec"
	"foothold/tenant/reservation"
)

// Clean-up of an ended reservation.
const (
	CleanupNone    = "none"    // it has not ended
	CleanupPending = "pending" // VM and rules may still be there
	CleanupDone    = "done"    // the VM is proven gone
)

// Reservation is one VM over all its starts.
type Reservation struct {
	ID        string
	Name      string
	Template  string
	Version   int // of the template, that the latest start is of; 0 before the first
	Size      string
	MemoryMiB int
	Workload  *api.Workload
	Phase     reservation.Phase
	Start     int
	Deadline  time.Time // of the phase; zero once ended; of a stopped VM when its next start is due, or zero
	Reason    event.Reason
	Detail    string
	Findings  []event.FailedCheck
	Host      string
	Address   netip.Addr
	MAC       string
	Volume    string
	Formatted bool
	Created   time.Time
	Cleanup   string
	Erase     bool
	Deleted   time.Time
	Restart   reservation.Restart
	Restarts  int       // in a row, since it last computed for long
	Wish      Wish      // what an operator asked of the running VM
	Wished    time.Time // when
	Gone      bool      // it is stopped, and its host has confirmed that no instance is left
}

// Wish is what an operator asks of a running VM.
type Wish string

// The wishes.
const (
	WishNone    Wish = ""
	WishStop    Wish = "stop"
	WishRestart Wish = "restart"
)

// NextStart is when a stopped VM starts again; zero: not by itself.
func (r Reservation) NextStart() time.Time {
	if r.Phase != reservation.Stopped {
		return time.Time{}
	}
	return r.Deadline
}

// Live reports whether the reservation has not ended.
func (r Reservation) Live() bool { return !r.Phase.Terminal() }

// Closed reports whether a refused quote has stopped the VM and nobody has asked for anything
// of it since: its instance is kept where it is.
func (r Reservation) Closed() bool {
	return r.Phase == reservation.Stopped && r.Reason == event.QuoteRefused && !r.Gone
}

// Start is what is known of one start. It holds no secret: the password is a hash of
// 256 random bits.
type Start struct {
	Spec        vmspec.Spec     `json:"spec"`
	HostStarted time.Time       `json:"host_started,omitzero"` // the host reported the VM running
	TPMHeld     time.Duration   `json:"tpm_held,omitempty"`
	Opened      time.Time       `json:"opened,omitzero"`  // T1 spent
	VMKey       []byte          `json:"vm_key,omitempty"` // presented with T1, admitted by the verdict
	BootNonce   []byte          `json:"boot_nonce,omitempty"`
	Verdict     digest.SHA256   `json:"verdict"`           // last of this start's chain
	Clock       json.RawMessage `json:"clock,omitempty"`   // verify.Clock of that verdict
	Attested    time.Time       `json:"attested,omitzero"` // when it was made
	Manifest    digest.SHA256   `json:"manifest"`          // the reference values that it was judged by; zero: of before they were kept
	HostKeys    digest.SHA256   `json:"host_keys"`         // verify.Standing.Keys of its host when it was begun; zero, likewise
	Closed      time.Time       `json:"closed,omitzero"`   // a refused quote closed the VM; what an operator asks for since then holds

	Account    string              `json:"account,omitempty"` // that may log in
	Components []bootmsg.Component `json:"components,omitempty"`
	Cmdline    string              `json:"cmdline,omitempty"`
	Delivered  time.Time           `json:"delivered,omitzero"`

	User          string        `json:"user,omitempty"` // at the gateway
	PasswordHash  digest.SHA256 `json:"password_hash"`
	Serial        string        `json:"serial,omitempty"`
	WireGuardKey  []byte        `json:"wireguard_key,omitempty"`
	TunnelAddress netip.Addr    `json:"tunnel_address,omitzero"` // set once the tunnel is admitted

	AgentSeq   int            `json:"agent_seq,omitempty"` // of the last accepted message
	AgentLast  digest.SHA256  `json:"agent_last"`          // of its payload: the same one again is answered again
	AgentNonce []byte         `json:"agent_nonce,omitempty"`
	AuditNonce []byte         `json:"audit_nonce,omitempty"` // that the audit asked for must answer; empty: none is awaited
	Audited    time.Time      `json:"audited,omitzero"`      // last passed audit of the OS
	Workload   string         `json:"workload,omitempty"`    // state, as the guest says
	Ready      time.Time      `json:"ready,omitzero"`        // the workload answered through the tunnel; zero again once it has ended
	Answered   bool           `json:"answered,omitempty"`    // the workload was ready: its end ends nothing
	Former     []api.Workload `json:"former,omitempty"`      // that the workload replaces, until the guest runs the new one
	Replaced   bool           `json:"replaced,omitempty"`    // the workload is not the start's first: its failure ends nothing
}

const reservationColumns = `id, name, template, size, memory_mib, workload, phase, start, deadline, reason, detail,
	findings, host, address, mac, volume, formatted, created, cleanup, erase, deleted, restart, restarts, wish, wished, gone, version`

type scanner interface{ Scan(...any) error }

func scanReservation(row scanner) (Reservation, error) {
	var r Reservation
	var workload, findings []byte
	var address string
	var deadline, created, deleted, wished int64
	err := row.Scan(&r.ID, &r.Name, &r.Template, &r.Size, &r.MemoryMiB, &workload, &r.Phase, &r.Start, &deadline, &r.Reason, &r.Detail,
		&findings, &r.Host, &address, &r.MAC, &r.Volume, &r.Formatted, &created, &r.Cleanup, &r.Erase, &deleted, &r.Restart, &r.Restarts, &r.Wish, &wished, &r.Gone, &r.Version)
	if errors.Is(err, sql.ErrNoRows) {
		return r, ErrNotFound
	}
	if err != nil {
		return r, fmt.Errorf("read reservation: %w", err)
	}
	r.Deadline, r.Created, r.Deleted, r.Wished = instant(deadline), instant(created), instant(deleted), instant(wished)
	if r.Address, err = netip.ParseAddr(address); err != nil {
		return r, fmt.Errorf("read reservation: %w", err)
	}
	if r.Findings, err = readFindings(findings); err == nil {
		err = json.Unmarshal(workload, &r.Workload)
	}
	if err != nil {
		return r, fmt.Errorf("read reservation: %w", err)
	}
	return r, nil
}

// readFindings also reads what was stored when findings were lines of text.
func readFindings(data []byte) ([]event.FailedCheck, error) {
	var list []event.FailedCheck
	err := json.Unmarshal(data, &list)
	if err == nil {
		return list, nil
	}
	var lines []string
	if json.Unmarshal(data, &lines) != nil {
		return nil, err
	}
	list = make([]event.FailedCheck, len(lines))
	for i, line := range lines {
		check, detail, ok := strings.Cut(line, ": ")
		if !ok {
			check, detail = "", line
		}
		list[i] = event.FailedCheck{Check: check, Component: check, Seen: detail, Detail: detail}
	}
	return list, nil
}

// AddReservation stores a new one in phase reserved with its first start.
func (t *Tx) AddReservation(r Reservation) error {
	workload, err := json.Marshal(r.Workload)
	if err != nil {
		return fmt.Errorf("store reservation: %w", err)
	}
	_, err = t.change("store reservation", `INSERT INTO reservations (`+reservationColumns+`)
		VALUES ($1,$2,$3,$4,$5,$6,$7,$8,$9,'','',$10,'',$11,$12,$13,0,$14,'none',0,0,$15,0,'',0,0,0)`,
		r.ID, r.Name, r.Template, r.Size, r.MemoryMiB, workload, reservation.Reserved, r.Start, nanos(r.Deadline),
		[]byte("[]"), r.Address.String(), r.MAC, r.Volume, nanos(t.Now), r.Restart)
	if err != nil {
		return err
	}
	return t.beginPhase(r.ID, r.Start, string(reservation.Reserved))
}

// Reservation reads one by id.
func (t *Tx) Reservation(id string) (Reservation, error) {
	return scanReservation(t.tx.queryRow(`SELECT `+reservationColumns+` FROM reservations WHERE id = $1`, id))
}

// Find reads one by id, or by the name of one that is not deleted.
func (t *Tx) Find(nameOrID string) (Reservation, error) {
	return scanReservation(t.tx.queryRow(`SELECT `+reservationColumns+` FROM reservations
		WHERE id = $1 OR (name = $1 AND deleted = 0) ORDER BY deleted LIMIT 1`, nameOrID))
}

// Reservations lists those that are not deleted, oldest first.
func (t *Tx) Reservations() ([]Reservation, error) {
	return t.reservations(`WHERE deleted = 0 ORDER BY created, id`)
}

// Live lists those that have not ended.
func (t *Tx) Live() ([]Reservation, error) {
	return t.reservations(`WHERE phase NOT IN ('released','aborted') ORDER BY created, id`)
}

// Expired lists live ones whose deadline has passed. A stopped one has none.
func (t *Tx) Expired() ([]Reservation, error) {
	return t.reservations(`WHERE phase NOT IN ('stopped','released','aborted') AND deadline <= $1 ORDER BY deadline`, nanos(t.Now))
}

// Due lists stopped ones whose next start is due and whose last instance is gone.
func (t *Tx) Due() ([]Reservation, error) {
	return t.reservations(`WHERE phase = 'stopped' AND gone = 1 AND deadline <> 0 AND deadline <= $1 ORDER BY deadline`, nanos(t.Now))
}

// Wishes lists running ones of which an operator asked something before that time.
func (t *Tx) Wishes(before time.Time) ([]Reservation, error) {
	return t.reservations(`WHERE wish <> '' AND wished <= $1 ORDER BY wished`, nanos(before))
}

// Unclean lists ended ones whose clean-up is not done, and stopped ones whose last
// instance may still be there.
func (t *Tx) Unclean() ([]Reservation, error) {
	return t.reservations(`WHERE cleanup = 'pending' OR (phase = 'stopped' AND gone = 0) ORDER BY created, id`)
}

// Holding lists those that hold an address: live ones, and ended ones whose VM is not
// proven gone.
func (t *Tx) Holding() ([]Reservation, error) {
	return t.reservations(`WHERE cleanup <> 'done' ORDER BY created, id`)
}

func (t *Tx) reservations(where string, args ...any) ([]Reservation, error) {
	rows, err := t.tx.query(`SELECT `+reservationColumns+` FROM reservations `+where, args...)
	if err != nil {
		return nil, fmt.Errorf("list reservations: %w", err)
	}
	defer rows.Close()
	var list []Reservation
	for rows.Next() {
		r, err := scanReservation(rows)
		if err != nil {
			return nil, err
		}
		list = append(list, r)
	}
	return list, rows.Err()
}

// SetPlace records which host a start was asked of, and which version of its template it is of.
func (t *Tx) SetPlace(id, host string, version int) error {
	return t.one("record host and template's version", `UPDATE reservations SET host = $2, version = $3 WHERE id = $1`, id, host, version)
}

// SetFormatted records that the volume holds a file system.
func (t *Tx) SetFormatted(id string) error {
	return t.one("record volume", `UPDATE reservations SET formatted = 1 WHERE id = $1`, id)
}

// SetErase records the wish to crypto-erase; an ended reservation becomes unclean
// again until that is done.
func (t *Tx) SetErase(id string) error {
	return t.one("record erase", `UPDATE reservations SET erase = 1,
		cleanup = CASE WHEN cleanup = 'done' THEN 'pending' ELSE cleanup END WHERE id = $1 AND deleted = 0`, id)
}

// Cleaned records that an ended reservation's VM is gone and, if erase was wished,
// its volume's key destroyed.
func (t *Tx) Cleaned(r Reservation) error {
	deleted := int64(0)
	if r.Erase {
		deleted = nanos(t.Now)
	}
	return t.one("record clean-up", `UPDATE reservations SET cleanup = 'done', deleted = $2
		WHERE id = $1 AND cleanup = 'pending' AND erase = $3`, r.ID, deleted, r.Erase)
}

// one runs a statement that must change exactly one row.
func (t *Tx) one(what, query string, args ...any) error {
	n, err := t.change(what, query, args...)
	if err == nil && n != 1 {
		err = fmt.Errorf("%s: %w", what, ErrNotFound)
	}
	return err
}

// Start reads one start.
func (t *Tx) Start(id string, start int) (Start, error) {
	var s Start
	var facts []byte
	err := t.tx.queryRow(`SELECT facts FROM starts WHERE reservation = $1 AND start = $2`, id, start).Scan(&facts)
	if errors.Is(err, sql.ErrNoRows) {
		return s, ErrNotFound
	}
	if err == nil {
		err = json.Unmarshal(facts, &s)
	}
	if err != nil {
		return s, fmt.Errorf("read start: %w", err)
	}
	return s, nil
}

// PutStart stores a start's facts, replacing those before.
func (t *Tx) PutStart(id string, start int, s Start) error {
	facts, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("store start: %w", err)
	}
	return t.one("store start", `INSERT INTO starts (reservation, start, facts) VALUES ($1,$2,$3)
		ON CONFLICT (reservation, start) DO UPDATE SET facts = excluded.facts`, id, start, facts)
}

// ChangeStart reads, changes and stores a start's facts.
func (t *Tx) ChangeStart(id string, start int, f func(*Start)) error {
	s, err := t.Start(id, start)
	if err != nil {
		return err
	}
	f(&s)
	return t.PutStart(id, start, s)
}

// LastAddress is the address of the newest reservation, deleted ones too.
func (t *Tx) LastAddress() (netip.Addr, error) {
	var text string
	err := t.tx.queryRow(`SELECT address FROM reservations ORDER BY created DESC, rowid DESC LIMIT 1`).Scan(&text)
	if errors.Is(err, sql.ErrNoRows) {
		return netip.Addr{}, nil
	}
	if err != nil {
		return netip.Addr{}, fmt.Errorf("read last address: %w", err)
	}
	return netip.ParseAddr(text)
}
