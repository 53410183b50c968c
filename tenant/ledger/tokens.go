package ledger

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/token"
	"foothold/tenant/reservation"
)

// Token is what the ledger knows of one.
type Token struct {
	Digest      digest.SHA256
	Kind        token.Kind
	Reservation string
	Start       int
	Phase       reservation.Phase // in which alone it may be spent
	Source      netip.Addr        // from which alone it may be presented
}

// AddToken stores an open token. Older open ones of the same kind become void.
func (t *Tx) AddToken(tok Token) error {
	if _, err := t.change("void token", `UPDATE tokens SET state = 'void' WHERE reservation = $1 AND kind = $2 AND state = 'open'`,
		tok.Reservation, int(tok.Kind)); err != nil {
		return err
	}
	return t.one("store token", `INSERT INTO tokens (digest, kind, reservation, start, phase, source, state, made, spent, spent_by)
		VALUES ($1,$2,$3,$4,$5,$6,'open',$7,0,'')`,
		tok.Digest.String(), int(tok.Kind), tok.Reservation, tok.Start, tok.Phase, tok.Source.String(), nanos(t.Now))
}

// Presentation is a token as somebody presents it.
type Presentation struct {
	Kind   token.Kind
	Digest digest.SHA256
	Source netip.Addr
}

// Spend spends a token. The swap from open to spent comes before every other check,
// so a wrong use burns the token; of any number of racing calls one wins it. Then, in
// the same transaction, phase, start, deadline and source are checked, and accept
// makes further checks and stores what follows from the spending.
//
// A refusal is an *event.Refusal and is journalled. With it comes the reservation
// only if this very call burnt its token: the caller then ends it. A token presented
// again, or an unknown one, comes without. accept must refuse before it writes: what
// it wrote is kept along with the burnt token. Another error than a refusal undoes
// everything, the spending too.
func (l *Ledger) Spend(ctx context.Context, p Presentation, accept func(*Tx, Reservation) error) (Reservation, error) {
	var r Reservation
	var refused *event.Refusal
	err := l.Write(ctx, func(t *Tx) error {
		r, refused = Reservation{}, nil
		got, won, err := t.spend(p)
		if won {
			r = got
		}
		if won && err == nil {
			err = accept(t, got)
		}
		if err != nil && !errors.As(err, &refused) {
			return err
		}
		return t.journalSpend(p, r, refused)
	})
	switch {
	case err != nil:
		return Reservation{}, err
	case refused != nil:
		return r, refused
	}
	return r, nil
}

// spend swaps and checks; won says that this call burnt the token.
func (t *Tx) spend(p Presentation) (r Reservation, won bool, err error) {
	var id, phase, source string
	var start int
	err = t.tx.queryRow(`UPDATE tokens SET state = 'spent', spent = $3, spent_by = $4
		WHERE digest = $1 AND kind = $2 AND state = 'open' RETURNING reservation, start, phase, source`,
		p.Digest.String(), int(p.Kind), nanos(t.Now), p.Source.String()).Scan(&id, &start, &phase, &source)
	if errors.Is(err, sql.ErrNoRows) {
		return r, false, t.whyNotOpen(p)
	}
	if err != nil {
		return r, false, fmt.Errorf("spend token: %w", err)
	}
	if r, err = t.Reservation(id); err != nil {
		return r, false, err
	}
	switch {
	case string(r.Phase) != phase || r.Start != start:
		return r, true, event.Refuse(event.TokenWrongPhase, "%s is for %s, the VM is %s", p.Kind, phase, r.Phase)
	case !r.Deadline.After(t.Now):
		return r, true, event.Refuse(event.TokenExpired, "%s came %v after the end of %s", p.Kind, t.Now.Sub(r.Deadline).Round(time.Millisecond), phase)
	case source != p.Source.String():
		return r, true, event.Refuse(event.TokenWrongAddress, "%s of %s came from %s", p.Kind, source, p.Source)
	}
	return r, true, nil
}

func (t *Tx) whyNotOpen(p Presentation) error {
	var state string
	err := t.tx.queryRow(`SELECT state FROM tokens WHERE digest = $1 AND kind = $2`, p.Digest.String(), int(p.Kind)).Scan(&state)
	switch {
	case errors.Is(err, sql.ErrNoRows):
		return event.Refuse(event.TokenUnknown, "%s from %s", p.Kind, p.Source)
	case err != nil:
		return fmt.Errorf("look up token: %w", err)
	case state == "void":
		return event.Refuse(event.TokenExpired, "%s from %s is void", p.Kind, p.Source)
	}
	return event.Refuse(event.TokenSpent, "%s was presented again from %s", p.Kind, p.Source)
}

func (t *Tx) journalSpend(p Presentation, r Reservation, refused *event.Refusal) error {
	e := event.Event{Kind: "token.spent", Reservation: r.ID, Detail: map[string]string{"token": p.Kind.String(), "from": p.Source.String()}}
	if refused != nil {
		e.Kind, e.Reason = "token.rejected", refused.Reason
		e.Detail["why"] = refused.Detail
		if r.ID == "" { // burnt before, or never ours: whose it was, if anyone's
			e.Reservation = t.tokenOwner(p.Digest)
		}
	}
	return t.Journal(e)
}

func (t *Tx) tokenOwner(d digest.SHA256) string {
	var id string
	if t.tx.queryRow(`SELECT reservation FROM tokens WHERE digest = $1`, d.String()).Scan(&id) != nil {
		return ""
	}
	return id
}
