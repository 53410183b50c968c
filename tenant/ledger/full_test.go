package ledger

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"foothold/internal/nstest"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/token"
	"foothold/tenant/reservation"
	"foothold/tenant/verify"
)

func TestMain(m *testing.M) { os.Exit(nstest.Main(m)) }

// fillUp writes to the journal until the disk has no room for an entry.
func fillUp(t *testing.T, l *Ledger, d *nstest.Disk) {
	t.Helper()
	d.Fill(t)
	for range 1000 {
		err := l.Write(t.Context(), func(tx *Tx) error {
			return tx.Journal(event.Event{Kind: "test.entry", Detail: map[string]string{"text": strings.Repeat("x", 4096)}})
		})
		if errors.Is(err, ErrFull) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Fatal("the disk does not get full")
}

func entries(t *testing.T, l *Ledger) (n int) {
	t.Helper()
	if err := l.Read(t.Context(), func(tx *Tx) error {
		list, err := tx.JournalAfter(0, "", 10000)
		n = len(list)
		return errors.Join(err, tx.VerifyJournal())
	}); err != nil {
		t.Fatal(err)
	}
	return n
}

// TestDiskFull: a write that finds no room has changed nothing, a token that it would
// have spent is neither spent nor honoured, and with room all goes on.
func TestDiskFull(t *testing.T) {
	disk := nstest.SmallDisk(t, "size=8m")
	c := newClock()
	l := openAt(t, filepath.Join(disk.Path, "ledger.db"), c)
	t1 := reserve(t, l, c, 1)
	move(t, l, c, 1, reservation.Reserved, reservation.Booting)
	fillUp(t, l, disk)
	before := entries(t, l)

	p := present(t1, token.T1, address(1))
	for range 3 {
		r, err := l.Spend(context.Background(), p, func(tx *Tx, r Reservation) error {
			return tx.ChangeStart(r.ID, 1, func(s *Start) { s.VMKey = make([]byte, 64<<10) })
		})
		var refusal *event.Refusal
		if !errors.Is(err, ErrFull) || errors.As(err, &refusal) || r.ID != "" {
			t.Fatalf("spent on a full disk: %+v, %v", r, err)
		}
	}
	if r := get(t, l, 1); r.Phase != reservation.Booting {
		t.Errorf("the VM is %s", r.Phase)
	}
	if after := entries(t, l); after != before {
		t.Errorf("the journal has %d entries, it had %d", after, before)
	}
	disk.Free(t)
	if _, err := l.Spend(context.Background(), p, allow); err != nil {
		t.Errorf("with room: %v", err)
	}
	if _, err := l.Spend(context.Background(), p, allow); event.ReasonOf(err) != event.TokenSpent {
		t.Errorf("a second time: %v", err)
	}
	entries(t, l)
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

// largeEvidence is of VM 1, and more than SQLite keeps in memory.
func largeEvidence(at time.Time) verify.Parts {
	record := make([]byte, 4<<20)
	return verify.Parts{Link: verify.Link{Role: "boot", Reservation: identifier(1), Start: 1, Host: "host-1", At: at, Record: digest.Of(record)}, Record: record}
}

// TestNoStatementAfterAFailedOne: SQLite ends a transaction whose statement finds no
// room; what follows in it must not be kept on its own.
func TestNoStatementAfterAFailedOne(t *testing.T) {
	disk := nstest.SmallDisk(t, "size=32m")
	c := newClock()
	l := openAt(t, filepath.Join(disk.Path, "ledger.db"), c)
	reserve(t, l, c, 1)
	disk.Fill(t)
	before := entries(t, l)
	large := largeEvidence(c.Now())
	err := l.Write(t.Context(), func(tx *Tx) error {
		if err := tx.AddBundle(large); !errors.Is(told(err), ErrFull) {
			t.Errorf("the large statement: %v", err)
		}
		tx.Journal(event.Event{Kind: "test.entry"})
		return nil
	})
	if !errors.Is(err, ErrFull) {
		t.Errorf("the transaction: %v", err)
	}
	if after := entries(t, l); after != before {
		t.Errorf("the journal has %d entries, it had %d", after, before)
	}
	disk.Free(t)
	must(t, l, func(tx *Tx) error {
		return errors.Join(tx.AddBundle(large), tx.Journal(event.Event{Kind: "test.entry"}))
	})
	if after := entries(t, l); after != before+1 {
		t.Errorf("with room the journal has %d entries, it had %d", after, before)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}
