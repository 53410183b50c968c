package ledger

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"foothold/internal/nstest"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/token"
	"foothold/tenant/reservation"
)

// crowd has writes wait for the turn together, behind a first one that writes nothing.
type crowd struct {
	t       *testing.T
	l       *Ledger
	wg      sync.WaitGroup
	mu      sync.Mutex
	batches map[*batch]int // writes whose function ran, by batch
	errs    []error        // of all that were answered
}

// inCrowd runs f while the turn is taken. When all that f began waits, the turn is passed
// on, and when all is answered, inCrowd returns.
func inCrowd(t *testing.T, l *Ledger, f func(*crowd)) *crowd {
	c := &crowd{t: t, l: l, batches: map[*batch]int{}}
	first, pass := make(chan struct{}), make(chan struct{})
	c.wg.Go(func() {
		c.answer(l.Write(context.Background(), func(*Tx) error {
			c.here()
			close(first)
			<-pass
			return nil
		}))
	})
	<-first
	f(c)
	synctest.Wait()
	close(pass)
	c.wg.Wait()
	return c
}

// here notes in a function which batch it runs in.
func (c *crowd) here() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.batches[c.l.write.batch]++
}

func (c *crowd) answer(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.errs = append(c.errs, err)
}

// write has one more wait.
func (c *crowd) write(ctx context.Context, f func(*Tx) error) {
	c.wg.Go(func() {
		c.answer(c.l.Write(ctx, func(tx *Tx) error {
			c.here()
			return f(tx)
		}))
	})
}

func entry(kind string) func(*Tx) error {
	return func(tx *Tx) error { return tx.Journal(event.Event{Kind: kind}) }
}

// kinds counts the journal's entries by kind.
func kinds(t *testing.T, l *Ledger) map[string]int {
	t.Helper()
	n := map[string]int{}
	if err := l.Read(context.Background(), func(tx *Tx) error {
		list, err := tx.JournalAfter(0, "", 100000)
		for _, e := range list {
			n[e.Event.Kind]++
		}
		return errors.Join(err, tx.VerifyJournal())
	}); err != nil {
		t.Fatal(err)
	}
	return n
}

// bubble runs f with a ledger whose goroutines synctest knows.
func bubble(t *testing.T, f func(*testing.T, *Ledger, *clock)) {
	file := filepath.Join(t.TempDir(), "ledger.db")
	synctest.Test(t, func(t *testing.T) {
		c := newClock()
		l := openAt(t, file, c)
		defer func() {
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		}()
		f(t, l, c)
	})
}

// TestWaitingWritesShareACommit, and nobody sees or is told of any before it.
func TestWaitingWritesShareACommit(t *testing.T) {
	bubble(t, func(t *testing.T, l *Ledger, _ *clock) {
		c := inCrowd(t, l, func(c *crowd) {
			for i := range maxBatch - 1 {
				c.write(t.Context(), func(tx *Tx) error {
					list, err := tx.JournalAfter(0, "", maxBatch)
					if err != nil {
						return err
					}
					if n := kinds(t, l)["test.entry"]; n != 0 {
						t.Errorf("write %d: others read %d entries of a batch that is not committed", i, n)
					}
					c.mu.Lock()
					if len(c.errs) != 0 || len(list) != c.batches[l.write.batch]-2 {
						t.Errorf("write %d: %d are answered, it sees %d entries", i, len(c.errs), len(list))
					}
					c.mu.Unlock()
					return tx.Journal(event.Event{Kind: "test.entry"})
				})
			}
		})
		if err := errors.Join(c.errs...); err != nil {
			t.Error(err)
		}
		if len(c.batches) != 1 || kinds(t, l)["test.entry"] != maxBatch-1 {
			t.Errorf("%d batches, %v", len(c.batches), kinds(t, l))
		}
	})
}

func TestABatchIsBounded(t *testing.T) {
	bubble(t, func(t *testing.T, l *Ledger, _ *clock) {
		c := inCrowd(t, l, func(c *crowd) {
			for range 3 * maxBatch {
				c.write(t.Context(), entry("test.entry"))
			}
		})
		for _, n := range c.batches {
			if n > maxBatch {
				t.Errorf("%d writes in one batch", n)
			}
		}
		if err := errors.Join(c.errs...); err != nil || len(c.batches) != 4 || kinds(t, l)["test.entry"] != 3*maxBatch {
			t.Errorf("%d batches, %v, %v", len(c.batches), kinds(t, l), err)
		}
	})
}

// TestRacingSpendsInOneBatchHaveOneWinner: the same promise as without batches.
func TestRacingSpendsInOneBatchHaveOneWinner(t *testing.T) {
	bubble(t, func(t *testing.T, l *Ledger, clk *clock) {
		tok := reserve(t, l, clk, 1)
		move(t, l, clk, 1, reservation.Reserved, reservation.Booting)
		var mu sync.Mutex
		answers := map[event.Reason]int{}
		batches := map[*batch]bool{}
		inCrowd(t, l, func(c *crowd) {
			for range 100 {
				c.wg.Go(func() {
					r, err := l.Spend(t.Context(), present(tok, token.T1, address(1)), func(*Tx, Reservation) error { return nil })
					mu.Lock()
					defer mu.Unlock()
					answers[event.ReasonOf(err)]++
					if (err == nil) != (r.ID == identifier(1)) {
						t.Errorf("spend: %q, %v", r.ID, err)
					}
				})
			}
			c.write(t.Context(), func(*Tx) error { batches[l.write.batch] = true; return nil })
		})
		if answers[""] != 1 || answers[event.TokenSpent] != 99 {
			t.Errorf("answers: %v", answers)
		}
		if n := rejections(t, l, event.TokenSpent); n != 99 {
			t.Errorf("%d rejections are in the journal", n)
		}
	})
}

// TestAFailedWriteLeavesTheOthersWhole, whatever it did before it failed: its error, its
// panic and the end of its goroutine undo what it did and nothing else.
func TestAFailedWriteLeavesTheOthersWhole(t *testing.T) {
	refused := errors.New("refused")
	for name, fail := range map[string]func(*Tx) error{
		"error":      func(*Tx) error { return refused },
		"panic":      func(*Tx) error { panic(refused) },
		"exit":       func(*Tx) error { runtime.Goexit(); return nil },
		"constraint": func(tx *Tx) error { return tx.AddObject(digest.SHA256{}, 0) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, l *Ledger, clk *clock) {
				var panics, exits atomic.Int32
				failing := func(tx *Tx) error {
					if err := errors.Join(entry("test.undone")(tx), tx.Rise("inventory", 7)); err != nil {
						return err
					}
					if name == "constraint" { // a row that is there already
						_, err := tx.change("repeat", `INSERT INTO meta (name, value) VALUES ('inventory', 8)`)
						return err
					}
					return fail(tx)
				}
				c := inCrowd(t, l, func(c *crowd) {
					for i := range 20 {
						if i%4 != 1 {
							c.write(t.Context(), entry("test.kept"))
							continue
						}
						c.wg.Go(func() {
							answered := false
							defer func() {
								switch {
								case recover() != nil:
									panics.Add(1)
								case !answered:
									exits.Add(1)
								}
							}()
							err := l.Write(t.Context(), failing)
							answered = true
							if err == nil || name == "error" && !errors.Is(err, refused) {
								t.Errorf("a failing write: %v", err)
							}
						})
					}
				})
				if err := errors.Join(c.errs...); err != nil {
					t.Error(err)
				}
				if n := kinds(t, l); n["test.kept"] != 15 || n["test.undone"] != 0 {
					t.Errorf("kept: %v", n)
				}
				if want := map[string][2]int32{"panic": {5, 0}, "exit": {0, 5}}[name]; want != [2]int32{panics.Load(), exits.Load()} {
					t.Errorf("%d panics, %d exits reached their callers", panics.Load(), exits.Load())
				}
				must(t, l, func(tx *Tx) error { return tx.Rise("inventory", 1) }) // 7 was never recorded
				must(t, l, entry("test.after"))
			})
		})
	}
}

// TestAPanicAloneLeavesNothing: nobody else is there to end the batch.
func TestAPanicAloneLeavesNothing(t *testing.T) {
	l, _ := openTest(t)
	func() {
		defer func() {
			if recover() != "fault" {
				t.Error("the panic did not reach its caller")
			}
		}()
		l.Write(t.Context(), func(tx *Tx) error {
			must := entry("test.undone")(tx)
			panic(map[bool]any{true: "fault", false: must}[must == nil])
		})
	}()
	if l.write.batch != nil {
		t.Error("its transaction holds other processes up")
	}
	must(t, l, entry("test.after"))
	if n := kinds(t, l); n["test.undone"] != 0 || n["test.after"] != 1 {
		t.Errorf("kept: %v", n)
	}
}

// TestEndOfAContext: before its turn a write does not begin, in its turn it is undone,
// and after it its outcome is told as it is. None of it touches the others.
func TestEndOfAContext(t *testing.T) {
	bubble(t, func(t *testing.T, l *Ledger, _ *clock) {
		waiting, cancelWaiting := context.WithCancel(t.Context())
		inside, cancelInside := context.WithCancel(t.Context())
		late, cancelLate := context.WithCancel(t.Context())
		reading, cancelReading := context.WithCancel(t.Context())
		want := func(what string, err, want error) {
			if !errors.Is(err, want) || want == nil && err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}
		c := inCrowd(t, l, func(c *crowd) {
			c.write(t.Context(), entry("test.kept"))
			c.wg.Go(func() {
				want("before its turn", l.Write(waiting, func(*Tx) error { t.Error("it ran"); return nil }), context.Canceled)
			})
			synctest.Wait()
			cancelWaiting()
			c.wg.Go(func() {
				want("in its turn", l.Write(inside, func(tx *Tx) error {
					err := entry("test.undone")(tx)
					cancelInside()
					tx.Journal(event.Event{Kind: "test.undone"}) // that it fails is not looked at
					return err
				}), context.Canceled)
			})
			c.wg.Go(func() {
				want("in the reading", l.Write(reading, func(tx *Tx) error {
					defer cancelReading()
					return tx.each("journal", `SELECT 1 UNION ALL SELECT 2`, func(scanner) error { cancelReading(); return nil })
				}), context.Canceled)
			})
			c.wg.Go(func() {
				want("after its turn", l.Write(late, func(tx *Tx) error { defer cancelLate(); return entry("test.kept")(tx) }), nil)
			})
			c.write(t.Context(), entry("test.kept"))
		})
		if err := errors.Join(c.errs...); err != nil {
			t.Error(err)
		}
		if n := kinds(t, l); n["test.kept"] != 3 || n["test.undone"] != 0 {
			t.Errorf("kept: %v", n)
		}
	})
}

// TestPowerCutInABatch: what lies on the disk before the commit has nothing of the batch,
// and what lies there when the first of it is answered has all.
func TestPowerCutInABatch(t *testing.T) {
	dir := t.TempDir()
	bubble(t, func(t *testing.T, l *Ledger, clk *clock) {
		copied := func(name string) map[string]int {
			file := filepath.Join(dir, name)
			var main string
			row := func(tx *Tx) error {
				return tx.tx.queryRow(`SELECT file FROM pragma_database_list WHERE name = 'main'`).Scan(&main)
			}
			if err := l.Read(context.Background(), row); err != nil {
				t.Fatal(err)
			}
			for _, suffix := range []string{"", "-wal"} { // the shared memory is made anew after a crash
				data, err := os.ReadFile(main + suffix)
				if err == nil {
					err = os.WriteFile(file+suffix, data, 0o600)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			again := openAt(t, file, clk)
			defer again.Close()
			return kinds(t, again)
		}
		must(t, l, entry("test.before"))
		first := sync.OnceValue(func() map[string]int { return copied("answered") })
		inCrowd(t, l, func(c *crowd) {
			for range 20 {
				c.wg.Go(func() {
					if err := l.Write(t.Context(), entry("test.entry")); err != nil {
						t.Error(err)
					}
					first()
				})
			}
			synctest.Wait()
			c.write(t.Context(), func(*Tx) error {
				if n := copied("cut"); n["test.before"] != 1 || n["test.entry"] != 0 {
					t.Errorf("cut before the commit: %v", n)
				}
				return nil
			})
		})
		if n := first(); n["test.entry"] != 20 {
			t.Errorf("cut after the first answer: %v", n)
		}
	})
}

// TestCloseEndsTheBatch: those in it are answered, those behind it refused.
func TestCloseEndsTheBatch(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ledger.db")
	synctest.Test(t, func(t *testing.T) {
		clk := newClock()
		l := openAt(t, file, clk)
		inCrowd(t, l, func(c *crowd) {
			for range 5 {
				c.write(t.Context(), entry("test.entry"))
			}
			synctest.Wait()
			c.wg.Go(func() {
				if err := l.Close(); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
			c.wg.Go(func() {
				if err := l.Write(t.Context(), entry("test.late")); !errors.Is(err, errClosed) {
					t.Errorf("behind the end: %v", err)
				}
			})
			c.wg.Go(func() {
				if err := l.Read(t.Context(), func(*Tx) error { return nil }); !errors.Is(err, errClosed) {
					t.Errorf("read behind the end: %v", err)
				}
			})
		})
		l = openAt(t, file, clk)
		defer l.Close()
		if n := kinds(t, l); n["test.entry"] != 5 || n["test.late"] != 0 {
			t.Errorf("kept: %v", n)
		}
	})
}

// TestFullDiskFailsTheWholeBatch, be it at the commit or in the midst of it, where SQLite
// rolls back what the others had done. Nobody is told what rests on something undone: the
// loser of a race for a token has not lost it.
func TestFullDiskFailsTheWholeBatch(t *testing.T) {
	large := func(tx *Tx) error { return tx.AddBundle(largeEvidence(tx.Now)) }
	for name, more := range map[string]func(*Tx) error{"at the commit": entry("test.entry"), "in its midst": large} {
		t.Run(name, func(t *testing.T) {
			disk := nstest.SmallDisk(t, "size=32m")
			synctest.Test(t, func(t *testing.T) {
				clk := newClock()
				l := openAt(t, filepath.Join(disk.Path, "ledger.db"), clk)
				defer l.Close()
				tok := reserve(t, l, clk, 1)
				move(t, l, clk, 1, reservation.Reserved, reservation.Booting)
				fillUp(t, l, disk)
				before := kinds(t, l)
				batches := 0
				c := inCrowd(t, l, func(c *crowd) {
					for range 2 {
						c.wg.Go(func() {
							r, err := l.Spend(t.Context(), present(tok, token.T1, address(1)), func(tx *Tx, r Reservation) error {
								return tx.ChangeStart(r.ID, 1, func(s *Start) { s.VMKey = make([]byte, 64<<10) })
							})
							if !errors.Is(err, ErrFull) || event.ReasonOf(err) != event.InternalError || r.ID != "" {
								t.Errorf("spent on a full disk: %q, %v", r.ID, err)
							}
						})
					}
					for range 3 {
						c.write(t.Context(), func(*Tx) error { return event.Refuse(event.NotPermitted, "it saw the token spent") })
					}
					synctest.Wait()
					c.write(t.Context(), func(tx *Tx) error {
						err := more(tx)
						if (name == "in its midst") != errors.Is(told(err), ErrFull) {
							t.Errorf("the statement: %v", err)
						}
						return err
					})
					synctest.Wait()
					for range 3 {
						c.write(t.Context(), func(tx *Tx) error {
							return tx.Journal(event.Event{Kind: "test.large", Detail: map[string]string{"text": strings.Repeat("x", 64<<10)}})
						})
					}
				})
				batches = len(c.batches)
				for i, err := range c.errs {
					var refusal *event.Refusal
					if !errors.Is(err, ErrFull) || errors.As(err, &refusal) {
						t.Errorf("answer %d: %v", i, err)
					}
				}
				if batches > 2 {
					t.Errorf("%d batches", batches)
				}
				if after := kinds(t, l); fmt.Sprint(after) != fmt.Sprint(before) {
					t.Errorf("kept: %v, there were %v", after, before)
				}
				disk.Free(t)
				if _, err := l.Spend(t.Context(), present(tok, token.T1, address(1)), allow); err != nil {
					t.Errorf("with room: %v", err)
				}
				must(t, l, more)
			})
		})
	}
}
