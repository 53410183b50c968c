package ledger

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
)

// maxBatch bounds the writes that share a commit, and so how long the first of them waits
// for the others: each takes about 0.2 ms of the processor.
const maxBatch = 64

// writer is the one connection that writes. Whoever has the turn uses it: the turn goes
// round in the order in which it is asked for.
//
// Writes that wait for it at the same time share one transaction of SQLite and so one
// commit, see docs/decisions/017-group-commit.md. The first begins the transaction; each,
// when its turn comes, runs inside a savepoint of its own, passes the turn on, and asks
// for it again to commit. By then all have run that had asked before it. Whoever gets the
// second turn first commits for all, and nobody is answered before.
type writer struct {
	db   *sql.DB
	turn chan struct{} // capacity 1; full while somebody has it

	// Of whoever has the turn:
	conn   *connection
	batch  *batch // under way; nil: none
	closed bool
}

// batch is one transaction of SQLite.
type batch struct {
	writes int           // that have begun; of whoever has the turn
	ended  chan struct{} // closed at the end
	err    error         // why nothing of it was kept; not written after ended is closed
}

func newWriter(ctx context.Context, db *sql.DB) (*writer, error) {
	c, err := connect(ctx, db)
	return &writer{db: db, turn: make(chan struct{}, 1), conn: c}, err
}

// write runs f as a part of a batch, and returns when that is committed. An error of f
// undoes what f did, the end of the batch without a commit what all did. Then nobody is
// told what f said: it may rest on what another write of the batch had done.
func (w *writer) write(ctx context.Context, f func(*statements) error) error {
	select {
	case w.turn <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("begin transaction: %w", ctx.Err())
	}
	b, said := w.take(ctx, f)
	if b == nil {
		return said
	}
	select {
	case <-b.ended:
	case w.turn <- struct{}{}:
		if w.batch == b {
			w.commit()
		}
		<-w.turn
	}
	if b.err != nil {
		return b.err
	}
	return said
}

// take is one turn: it runs f inside the batch, which it begins if there is none, and
// passes the turn on. Without a batch f has not run.
func (w *writer) take(ctx context.Context, f func(*statements) error) (b *batch, said error) {
	defer func() { <-w.turn }()
	if w.closed {
		return nil, errClosed
	}
	if err := ctx.Err(); err != nil { // the turn came with the end
		return nil, fmt.Errorf("begin transaction: %w", err)
	}
	if err := w.begin(); err != nil {
		return nil, fmt.Errorf("begin transaction: %w", err)
	}
	b = w.batch
	b.writes++
	if _, err := w.conn.exec("SAVEPOINT one"); err != nil {
		w.lose(fmt.Errorf("begin transaction: %w", err))
		return b, nil
	}
	s, returned := &statements{conn: w.conn, ctx: ctx}, false
	defer func() {
		switch {
		case !returned: // it panics, and does not come back to commit
			w.undo(s)
			w.commit()
		case said != nil:
			w.undo(s)
		default:
			w.keep()
		}
		if b.writes >= maxBatch {
			w.commit()
		}
	}()
	said = s.run(f)
	returned = true
	return b, said
}

// begin begins a batch if none is under way.
func (w *writer) begin() error {
	if w.batch != nil {
		return nil
	}
	if _, err := w.conn.exec("BEGIN IMMEDIATE"); err != nil {
		return err
	}
	w.batch = &batch{ended: make(chan struct{})}
	return nil
}

// keep adds what one write did to the batch.
func (w *writer) keep() {
	if _, err := w.conn.exec("RELEASE one"); err != nil {
		w.lose(fmt.Errorf("end of a write: %w", err))
	}
}

// undo undoes what one write did. After some failures, of which a full disk is one, SQLite
// has rolled back the whole transaction: then there is no savepoint, and the batch is lost
// to all, for that failure.
func (w *writer) undo(s *statements) {
	_, err := w.conn.exec("ROLLBACK TO one")
	if err == nil {
		_, err = w.conn.exec("RELEASE one")
	}
	if err == nil {
		return
	}
	if s.failed != nil {
		err = s.failed
	}
	w.lose(fmt.Errorf("undone with another write of the same commit: %w", err))
}

// commit ends the batch that is under way, if one is. When it returns, what the batch's
// writes did is on the disk, or none of it ever was.
func (w *writer) commit() {
	if w.batch == nil {
		return
	}
	if _, err := w.conn.exec("COMMIT"); err != nil {
		w.lose(fmt.Errorf("commit: %w", err))
		return
	}
	w.end(nil)
}

// lose rolls the batch back, which SQLite may have done already.
func (w *writer) lose(cause error) {
	w.conn.exec("ROLLBACK")
	w.end(cause)
}

func (w *writer) end(err error) {
	w.batch.err = err
	close(w.batch.ended)
	w.batch = nil
}

// close commits what is under way, truncates the write-ahead log and ends the connection.
func (w *writer) close() error {
	w.turn <- struct{}{}
	defer func() { <-w.turn }()
	if w.closed {
		return errClosed
	}
	w.commit()
	w.closed = true
	_, err := w.conn.conn.ExecContext(context.Background(), "PRAGMA wal_checkpoint(TRUNCATE)")
	return errors.Join(err, w.conn.close(), w.db.Close())
}
