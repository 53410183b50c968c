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
	deadline time.Time
	tokens   map[token.Kind]token.Token
	state    map[token.Kind]string // open, spent, void
	phaseOf  map[token.Kind]reservation.Phase
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
		m := &model{phase: reservation.Reserved, deadline: c.In(30), tokens: map[token.Kind]token.Token{token.T1: tok},
			state: map[token.Kind]string{token.T1: "open"}, phaseOf: map[token.Kind]reservation.Phase{token.T1: reservation.Booting}}
		phases := rapid.SampledFrom(reservation.Phases())
		rt.Repeat(map[string]func(*rapid.T){
			"move": func(rt *rapid.T) {
				from, to := phases.Draw(rt, "from"), phases.Draw(rt, "to")
				if to == reservation.Booting && from == reservation.Computing {
					return // a restart begins another start; it has its own test
				}
				legal := reservation.CanMove(from, to) && !to.Terminal() && m.phase == from && m.deadline.After(c.Now())
				err := l.Write(context.Background(), func(tx *Tx) error { return tx.Move(identifier(1), 1, from, to, c.In(60)) })
				if (err == nil) != legal {
					rt.Fatalf("%s → %s from %s: %v", from, to, m.phase, err)
				}
				if legal {
					m.phase, m.deadline = to, c.In(60)
				}
			},
			"issue": func(rt *rapid.T) {
				k := rapid.SampledFrom([]token.Kind{token.T2, token.T3}).Draw(rt, "kind")
				if m.phase.Terminal() {
					return
				}
				m.tokens[k], m.state[k], m.phaseOf[k] = token.New(k), "open", m.phase
				if err := l.Write(context.Background(), func(tx *Tx) error {
					return tx.AddToken(Token{m.tokens[k].Digest(), k, identifier(1), 1, m.phase, address(1)})
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
					for k, s := range m.state {
						if s == "open" {
							m.state[k] = "void"
						}
					}
				}
			},
			"wait":    func(rt *rapid.T) { c.Add(time.Duration(rapid.IntRange(1, 40).Draw(rt, "s")) * time.Second) },
			"restart": func(*rapid.T) { err := l.Close(); l = openAt(t, file, c); must(t, l, func(*Tx) error { return err }) },
			"": func(rt *rapid.T) {
				r := get(t, l, 1)
				if r.Phase != m.phase || !r.Deadline.Equal(m.deadline) {
					rt.Fatalf("ledger: %s until %v; model: %s until %v", r.Phase, r.Deadline, m.phase, m.deadline)
				}
				if err := l.Read(context.Background(), func(tx *Tx) error {
					list, err := tx.Phases(identifier(1), 1)
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
