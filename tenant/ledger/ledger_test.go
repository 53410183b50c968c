package ledger

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"foothold/protocol/event"
	"foothold/protocol/token"
	"foothold/tenant/reservation"
)

// clock is a test's time, set by hand.
type clock struct{ ns atomic.Int64 }

func newClock() *clock {
	c := &clock{}
	c.ns.Store(time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC).UnixNano())
	return c
}
func (c *clock) Now() time.Time      { return time.Unix(0, c.ns.Load()).UTC() }
func (c *clock) Add(d time.Duration) { c.ns.Add(int64(d)) }
func (c *clock) In(s int) time.Time  { return c.Now().Add(time.Duration(s) * time.Second) }
func address(i int) netip.Addr       { return netip.AddrFrom4([4]byte{10, 82, byte(i >> 8), byte(i)}) }
func identifier(i int) string        { return fmt.Sprintf("00000000-0000-4000-8000-%012d", i) }
func allow(*Tx, Reservation) error   { return nil }
func present(tok token.Token, k token.Kind, from netip.Addr) Presentation {
	return Presentation{Kind: k, Digest: tok.Digest(), Source: from}
}

func openAt(t *testing.T, file string, c *clock) *Ledger {
	t.Helper()
	l, err := Open(t.Context(), file, c.Now)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func openTest(t *testing.T) (*Ledger, *clock) {
	t.Helper()
	c := newClock()
	l := openAt(t, filepath.Join(t.TempDir(), "ledger.db"), c)
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l, c
}

func must(t *testing.T, l *Ledger, f func(*Tx) error) {
	t.Helper()
	if err := l.Write(context.Background(), f); err != nil {
		t.Fatal(err)
	}
}

// reserve stores reservation i, 30 s to go, and an open T1 for phase booting.
func reserve(t *testing.T, l *Ledger, c *clock, i int) token.Token {
	t.Helper()
	tok := token.New(token.T1)
	must(t, l, func(tx *Tx) error {
		r := Reservation{ID: identifier(i), Name: fmt.Sprintf("vm%d", i), Template: "debian", Size: "small", MemoryMiB: 1024, Start: 1,
			Deadline: c.In(30), Address: address(i), MAC: "02:00:00:00:00:01", Volume: identifier(1000 + i), Restart: reservation.OnFailure}
		return errors.Join(tx.AddReservation(r), tx.PutStart(r.ID, 1, Start{}),
			tx.AddToken(Token{tok.Digest(), token.T1, r.ID, 1, reservation.Booting, r.Address}))
	})
	return tok
}

func move(t *testing.T, l *Ledger, c *clock, i int, from, to reservation.Phase) {
	t.Helper()
	must(t, l, func(tx *Tx) error { return tx.Move(identifier(i), 1, from, to, c.In(60)) })
}

func get(t *testing.T, l *Ledger, i int) Reservation {
	t.Helper()
	var r Reservation
	if err := l.Read(context.Background(), func(tx *Tx) (err error) { r, err = tx.Reservation(identifier(i)); return err }); err != nil {
		t.Fatal(err)
	}
	return r
}

// rejections counts the journal's entries of one reason.
func rejections(t *testing.T, l *Ledger, why event.Reason) int {
	t.Helper()
	n := 0
	err := l.Read(context.Background(), func(tx *Tx) error {
		list, err := tx.JournalAfter(0, "", 10000)
		for _, e := range list {
			if e.Event.Kind == "token.rejected" && e.Event.Reason == why {
				n++
			}
		}
		return errors.Join(err, tx.VerifyJournal())
	})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestRacingSpendsHaveOneWinner(t *testing.T) {
	l, c := openTest(t)
	tok := reserve(t, l, c, 1)
	move(t, l, c, 1, reservation.Reserved, reservation.Booting)
	var won, again atomic.Int32
	var wg sync.WaitGroup
	for range 100 {
		wg.Go(func() {
			r, err := l.Spend(context.Background(), present(tok, token.T1, address(1)), allow)
			switch {
			case err == nil && r.ID == identifier(1):
				won.Add(1)
			case event.ReasonOf(err) == event.TokenSpent && r.ID == "":
				again.Add(1)
			default:
				t.Errorf("spend: %v %v", r.ID, err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 || again.Load() != 99 {
		t.Fatalf("%d won, %d came again", won.Load(), again.Load())
	}
	if n := rejections(t, l, event.TokenSpent); n != 99 {
		t.Errorf("%d rejections are in the journal", n)
	}
	if r := get(t, l, 1); r.Phase != reservation.Booting {
		t.Errorf("second presentations ended the reservation: %s", r.Phase)
	}
}

// TestRejections gives each rejection its own reason, and shows that a wrong use of an
// open token burns it.
func TestRejections(t *testing.T) {
	cases := []struct {
		name  string
		set   func(t *testing.T, l *Ledger, c *clock)
		from  netip.Addr
		check func(*Tx, Reservation) error
		want  event.Reason
		burnt bool
	}{
		{name: "wrong phase", set: func(*testing.T, *Ledger, *clock) {}, from: address(1), want: event.TokenWrongPhase, burnt: true},
		{name: "wrong address", from: address(2), want: event.TokenWrongAddress, burnt: true},
		{name: "late", set: func(t *testing.T, l *Ledger, c *clock) {
			move(t, l, c, 1, reservation.Reserved, reservation.Booting)
			c.Add(time.Minute)
		}, from: address(1), want: event.TokenExpired, burnt: true},
		{name: "void", set: func(t *testing.T, l *Ledger, c *clock) {
			must(t, l, func(tx *Tx) error {
				_, err := tx.End(identifier(1), reservation.Aborted, event.Refusal{Reason: event.VMStopped})
				return err
			})
		}, from: address(1), want: event.TokenExpired},
		{name: "refused by the act", from: address(1), want: event.ReportRefused, burnt: true,
			check: func(*Tx, Reservation) error { return event.Refuse(event.ReportRefused, "no") }},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			l, c := openTest(t)
			tok := reserve(t, l, c, 1)
			if tc.set == nil {
				tc.set = func(t *testing.T, l *Ledger, c *clock) { move(t, l, c, 1, reservation.Reserved, reservation.Booting) }
			}
			if tc.check == nil {
				tc.check = allow
			}
			tc.set(t, l, c)
			r, err := l.Spend(t.Context(), present(tok, token.T1, tc.from), tc.check)
			if event.ReasonOf(err) != tc.want || (r.ID != "") != tc.burnt {
				t.Fatalf("spend: %q %v, want %s, burnt %v", r.ID, err, tc.want, tc.burnt)
			}
			if n := rejections(t, l, tc.want); n != 1 {
				t.Errorf("%d such rejections are in the journal", n)
			}
			_, err = l.Spend(t.Context(), present(tok, token.T1, address(1)), allow)
			if got := event.ReasonOf(err); tc.burnt && got != event.TokenSpent || !tc.burnt && got != tc.want {
				t.Errorf("a second use: %v", err)
			}
		})
	}
	l, _ := openTest(t)
	if r, err := l.Spend(t.Context(), present(token.New(token.T2), token.T2, address(1)), allow); event.ReasonOf(err) != event.TokenUnknown || r.ID != "" {
		t.Errorf("an unknown token: %v %v", r.ID, err)
	}
}

// TestKindIsPartOfTheToken shows that T1's digest presented as T2 neither passes nor burns.
func TestKindIsPartOfTheToken(t *testing.T) {
	l, c := openTest(t)
	tok := reserve(t, l, c, 1)
	move(t, l, c, 1, reservation.Reserved, reservation.Booting)
	if _, err := l.Spend(t.Context(), present(tok, token.T2, address(1)), allow); event.ReasonOf(err) != event.TokenUnknown {
		t.Fatalf("T1 as T2: %v", err)
	}
	if _, err := l.Spend(t.Context(), present(tok, token.T1, address(1)), allow); err != nil {
		t.Fatal(err)
	}
}

// TestInternalErrorUndoesTheSpending shows that a fault of ours burns nothing.
func TestInternalErrorUndoesTheSpending(t *testing.T) {
	l, c := openTest(t)
	tok := reserve(t, l, c, 1)
	move(t, l, c, 1, reservation.Reserved, reservation.Booting)
	fault := errors.New("disk full")
	if _, err := l.Spend(t.Context(), present(tok, token.T1, address(1)), func(*Tx, Reservation) error { return fault }); !errors.Is(err, fault) {
		t.Fatalf("spend: %v", err)
	}
	if _, err := l.Spend(t.Context(), present(tok, token.T1, address(1)), allow); err != nil {
		t.Fatal(err)
	}
}

func TestRestartKeepsSpentSpent(t *testing.T) {
	c := newClock()
	file := filepath.Join(t.TempDir(), "a b%?#.db") // a path that needs escaping
	l := openAt(t, file, c)
	tok := reserve(t, l, c, 1)
	move(t, l, c, 1, reservation.Reserved, reservation.Booting)
	if _, err := l.Spend(t.Context(), present(tok, token.T1, address(1)), allow); err != nil {
		t.Fatal(err)
	}
	// No Close: the second opening finds the file as a crash would leave it.
	again := openAt(t, file, c)
	defer again.Close()
	defer l.Close()
	if _, err := again.Spend(t.Context(), present(tok, token.T1, address(1)), allow); event.ReasonOf(err) != event.TokenSpent {
		t.Fatalf("spent token after a restart: %v", err)
	}
	if r := get(t, again, 1); r.Phase != reservation.Booting || !r.Deadline.Equal(c.In(60)) {
		t.Errorf("after a restart: %+v", r)
	}
}

func TestMoveRefuses(t *testing.T) {
	l, c := openTest(t)
	reserve(t, l, c, 1)
	try := func(start int, from, to reservation.Phase) error {
		return l.Write(t.Context(), func(tx *Tx) error { return tx.Move(identifier(1), start, from, to, c.In(60)) })
	}
	if err := try(1, reservation.Booting, reservation.Unlocking); !errors.Is(err, ErrMoved) {
		t.Errorf("from a phase that it is not in: %v", err)
	}
	if err := try(2, reservation.Reserved, reservation.Booting); !errors.Is(err, ErrMoved) {
		t.Errorf("of another start: %v", err)
	}
	if err := try(1, reservation.Reserved, reservation.Computing); err == nil || errors.Is(err, ErrMoved) {
		t.Errorf("a move that the table lacks: %v", err)
	}
	if err := try(1, reservation.Reserved, reservation.Aborted); err == nil {
		t.Error("Move ended a reservation")
	}
	c.Add(30 * time.Second)
	if err := try(1, reservation.Reserved, reservation.Booting); !errors.Is(err, ErrMoved) {
		t.Errorf("after the deadline: %v", err)
	}
}

func TestEndHappensOnceAndWithdraws(t *testing.T) {
	l, c := openTest(t)
	reserve(t, l, c, 1)
	must(t, l, func(tx *Tx) error {
		return tx.AddCertificate(Certificate{Serial: "7", Reservation: identifier(1), Start: 1, DER: []byte("der"), Expires: c.In(600)})
	})
	must(t, l, func(tx *Tx) error { return tx.CheckCertificate("7", []byte("der"), identifier(1), 1) })
	for i, want := range []bool{true, false} {
		must(t, l, func(tx *Tx) error {
			won, err := tx.End(identifier(1), reservation.Aborted, event.Refusal{Reason: event.AuditFailed, Findings: []event.FailedCheck{{Check: "process", Detail: "one too many"}}})
			if won != want {
				t.Errorf("call %d ended it: %v", i, won)
			}
			return err
		})
	}
	r := get(t, l, 1)
	if r.Phase != reservation.Aborted || r.Reason != event.AuditFailed || len(r.Findings) != 1 || r.Cleanup != CleanupPending || !r.Deadline.IsZero() {
		t.Errorf("ended: %+v", r)
	}
	err := l.Read(t.Context(), func(tx *Tx) error { return tx.CheckCertificate("7", []byte("der"), identifier(1), 1) })
	if event.ReasonOf(err) != event.CertificateRevoked {
		t.Errorf("certificate of an ended VM: %v", err)
	}
}

func TestNonceServesOnce(t *testing.T) {
	l, c := openTest(t)
	reserve(t, l, c, 1)
	reserve(t, l, c, 2)
	var nonce []byte
	must(t, l, func(tx *Tx) (err error) { nonce, err = tx.NewNonce(identifier(1), 1, "boot"); return err })
	useFor := func(id, role string, start int) event.Reason {
		return event.ReasonOf(l.Write(t.Context(), func(tx *Tx) error { return tx.UseNonce(nonce, id, start, role, time.Minute) }))
	}
	use := func(role string, start int) event.Reason { return useFor(identifier(1), role, start) }
	if use("unlock", 1) == "" || use("boot", 2) == "" || useFor(identifier(2), "boot", 1) == "" {
		t.Error("nonce served another role, start or VM")
	}
	if why := use("boot", 1); why != "" {
		t.Errorf("first use: %s", why)
	}
	if use("boot", 1) != event.QuoteRefused {
		t.Error("nonce served twice")
	}
	must(t, l, func(tx *Tx) (err error) { nonce, err = tx.NewNonce(identifier(1), 1, "boot"); return err })
	c.Add(time.Minute)
	if use("boot", 1) != event.QuoteRefused {
		t.Error("an old nonce served")
	}
}

// TestNonceServesOnceAcrossRestartsAndReplicas: of many racing uses, by orchestrators that
// share one ledger, one wins; and none after a restart.
func TestNonceServesOnceAcrossRestartsAndReplicas(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ledger.db")
	c := newClock()
	replicas := []*Ledger{openAt(t, file, c), openAt(t, file, c), openAt(t, file, c)}
	reserve(t, replicas[0], c, 1)
	var nonce, unused []byte
	must(t, replicas[0], func(tx *Tx) (err error) {
		if nonce, err = tx.NewNonce(identifier(1), 1, "boot"); err != nil {
			return err
		}
		unused, err = tx.NewNonce(identifier(1), 1, "boot")
		return err
	})
	use := func(l *Ledger, nonce []byte) error {
		return l.Write(t.Context(), func(tx *Tx) error { return tx.UseNonce(nonce, identifier(1), 1, "boot", time.Minute) })
	}
	var wg sync.WaitGroup
	var won atomic.Int32
	for i := range 30 {
		wg.Go(func() {
			switch err := use(replicas[i%len(replicas)], nonce); {
			case err == nil:
				won.Add(1)
			case event.ReasonOf(err) != event.QuoteRefused:
				t.Errorf("use %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		t.Errorf("%d uses won", won.Load())
	}
	for _, l := range replicas {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	again := openAt(t, file, c)
	if err := use(again, nonce); event.ReasonOf(err) != event.QuoteRefused {
		t.Errorf("after a restart: %v", err)
	}
	if err := use(again, unused); err != nil {
		t.Errorf("one that was not used, after a restart: %v", err)
	}
}

func TestJournalShowsTampering(t *testing.T) {
	l, _ := openTest(t)
	for range 3 {
		must(t, l, func(tx *Tx) error { return tx.Journal(event.Event{Kind: "test.done"}) })
	}
	must(t, l, (*Tx).VerifyJournal)
	for name, harm := range map[string]string{
		"changed": `UPDATE journal SET entry = CAST(replace(CAST(entry AS TEXT), 'test.done', 'test.none') AS BLOB) WHERE seq = 2`,
		"removed": `DELETE FROM journal WHERE seq = 2`,
	} {
		undo := errors.New("undo")
		err := l.Write(t.Context(), func(tx *Tx) error {
			if n, err := tx.change("harm", harm); err != nil || n != 1 {
				return fmt.Errorf("harm changed %d: %w", n, err)
			}
			if err := tx.VerifyJournal(); !errors.Is(err, ErrBroken) {
				t.Errorf("an entry was %s and the chain still verifies: %v", name, err)
			}
			return undo
		})
		if !errors.Is(err, undo) {
			t.Fatal(err)
		}
	}
}

func TestEventFromOutsideEntersOnce(t *testing.T) {
	l, c := openTest(t)
	e := event.Event{Seq: 4, Time: c.Now(), Source: "gateway/gateway", Kind: "peer.added"}
	for range 2 {
		must(t, l, func(tx *Tx) error { return tx.JournalFrom(e) })
	}
	err := l.Read(t.Context(), func(tx *Tx) error {
		list, err := tx.JournalAfter(0, "", 10)
		if len(list) != 1 || list[0].Event.Source != "gateway/gateway" || list[0].Event.Seq != 4 {
			t.Errorf("journal: %+v", list)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
