package ledger

import (
	"context"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"foothold/protocol/event"
	"foothold/protocol/token"
	"foothold/tenant/reservation"

	"pgregory.net/rapid"
)

// model is what a test believes of one reservation.
type model struct {
	phase    reservation.Phase
	start    int
	gone     bool
	deadline time.Time
	tokens   map[token.Kind]token.Token
	state    map[token.Kind]string // open, spent, void
	phaseOf  map[token.Kind]reservation.Phase
}

func (m *model) void() {
	for k, s := range m.state {
		if s == "open" {
			m.state[k] = "void"
		}
	}
}

// TestStateMachine drives one reservation by random moves, spends, ends, restarts and
// the passing of time, and compares it with the model after each.
func TestStateMachine(t *testing.T) {
	dir := t.TempDir()
	n := 0
	rapid.Check(t, func(rt *rapid.T) {
		n++
		c := newClock()
		file := filepath.Join(dir, identifier(n))
		l := openAt(t, file, c)
		defer func() { l.Close() }()
		tok := reserve(t, l, c, 1)
		m := &model{phase: reservation.Reserved, start: 1, deadline: c.In(30), tokens: map[token.Kind]token.Token{token.T1: tok},
			state: map[token.Kind]string{token.T1: "open"}, phaseOf: map[token.Kind]reservation.Phase{token.T1: reservation.Booting}}
		phases := rapid.SampledFrom(reservation.Phases())
		rt.Repeat(map[string]func(*rapid.T){
			"move": func(rt *rapid.T) {
				from, to := m.phase, phases.Draw(rt, "to")
				if rapid.IntRange(0, 3).Draw(rt, "elsewhere") == 0 {
					from = phases.Draw(rt, "from")
				}
				stopped := from == reservation.Stopped || to == reservation.Stopped // for halt and again
				legal := reservation.CanMove(from, to) && !stopped && !to.Terminal() && m.phase == from && m.deadline.After(c.Now())
				err := l.Write(context.Background(), func(tx *Tx) error { return tx.Move(identifier(1), m.start, from, to, c.In(60)) })
				if (err == nil) != legal {
					rt.Fatalf("%s → %s from %s: %v", from, to, m.phase, err)
				}
				if legal {
					m.phase, m.deadline = to, c.In(60)
				}
			},
			"halt": func(rt *rapid.T) {
				start := m.start - rapid.IntRange(0, 1).Draw(rt, "late")
				want := m.phase.Running() && start == m.start
				var won bool
				if err := l.Write(context.Background(), func(tx *Tx) (err error) {
					won, err = tx.Halt(identifier(1), start, event.Refusal{Reason: event.VMStopped}, c.In(5), 1)
					return err
				}); err != nil || won != want {
					rt.Fatalf("halt start %d of %d in %s: %v %v", start, m.start, m.phase, won, err)
				}
				if won {
					m.phase, m.deadline, m.gone = reservation.Stopped, c.In(5), false
					m.void()
				}
			},
			"gone": func(rt *rapid.T) {
				err := l.Write(context.Background(), func(tx *Tx) error { return tx.SetGone(identifier(1), m.start) })
				if want := m.phase == reservation.Stopped && !m.gone; (err == nil) != want {
					rt.Fatalf("gone in %s: %v", m.phase, err)
				}
				m.gone = m.gone || err == nil
			},
			"again": func(rt *rapid.T) {
				var due []Reservation
				if err := l.Read(context.Background(), func(tx *Tx) (err error) { due, err = tx.Due(); return err }); err != nil {
					rt.Fatal(err)
				}
				may := m.phase == reservation.Stopped && m.gone && !m.deadline.After(c.Now())
				if (len(due) == 1) != may {
					rt.Fatalf("due: %d in %s, gone %v, at %v of %v", len(due), m.phase, m.gone, c.Now(), m.deadline)
				}
				err := l.Write(context.Background(), func(tx *Tx) error {
					if err := tx.Again(identifier(1), m.start, c.In(60)); err != nil {
						return err
					}
					return tx.PutStart(identifier(1), m.start+1, Start{})
				})
				if (err == nil) != may {
					rt.Fatalf("again in %s, gone %v: %v", m.phase, m.gone, err)
				}
				if err == nil {
					m.phase, m.start, m.deadline, m.gone = reservation.Booting, m.start+1, c.In(60), false
				}
			},
			"issue": func(rt *rapid.T) {
				k := rapid.SampledFrom([]token.Kind{token.T2, token.T3}).Draw(rt, "kind")
				if m.phase.Terminal() || m.phase == reservation.Stopped {
					return
				}
				m.tokens[k], m.state[k], m.phaseOf[k] = token.New(k), "open", m.phase
				if err := l.Write(context.Background(), func(tx *Tx) error {
					return tx.AddToken(Token{m.tokens[k].Digest(), k, identifier(1), m.start, m.phase, address(1)})
				}); err != nil {
					rt.Fatal(err)
				}
			},
			"spend": func(rt *rapid.T) {
				k := rapid.SampledFrom([]token.Kind{token.T1, token.T2, token.T3}).Draw(rt, "kind")
				tok, ok := m.tokens[k]
				if !ok {
					return
				}
				want := event.Reason("")
				switch {
				case m.state[k] == "spent":
					want = event.TokenSpent
				case m.state[k] == "void":
					want = event.TokenExpired
				case m.phase != m.phaseOf[k]:
					want = event.TokenWrongPhase
				case !m.deadline.After(c.Now()):
					want = event.TokenExpired
				}
				_, err := l.Spend(context.Background(), present(tok, k, address(1)), allow)
				if got := event.ReasonOf(err); got != want {
					rt.Fatalf("%s in %s: %q, want %q", k, m.phase, got, want)
				}
				if m.state[k] == "open" {
					m.state[k] = "spent"
				}
			},
			"end": func(rt *rapid.T) {
				to := rapid.SampledFrom([]reservation.Phase{reservation.Released, reservation.Aborted}).Draw(rt, "to")
				var won bool
				err := l.Write(context.Background(), func(tx *Tx) (err error) {
					won, err = tx.End(identifier(1), to, event.Refusal{Reason: event.DeadlinePassed})
					return err
				})
				if err != nil || won == m.phase.Terminal() {
					rt.Fatalf("end: %v %v in %s", won, err, m.phase)
				}
				if won {
					m.phase, m.deadline = to, time.Time{}
					m.void()
				}
			},
			"wait":    func(rt *rapid.T) { c.Add(time.Duration(rapid.IntRange(1, 40).Draw(rt, "s")) * time.Second) },
			"restart": func(*rapid.T) { err := l.Close(); l = openAt(t, file, c); must(t, l, func(*Tx) error { return err }) },
			"": func(rt *rapid.T) {
				r := get(t, l, 1)
				if r.Phase != m.phase || r.Start != m.start || !r.Deadline.Equal(m.deadline) {
					rt.Fatalf("ledger: %s until %v; model: %s until %v", r.Phase, r.Deadline, m.phase, m.deadline)
				}
				if err := l.Read(context.Background(), func(tx *Tx) error {
					list, err := tx.Phases(identifier(1), m.start)
					open := 0
					for _, p := range list {
						if p.End.IsZero() {
							open++
						}
					}
					if (open == 1) == m.phase.Terminal() {
						rt.Fatalf("%d open phases in %s", open, m.phase)
					}
					return errors.Join(err, tx.VerifyJournal())
				}); err != nil {
					rt.Fatal(err)
				}
			},
		})
	})
}
