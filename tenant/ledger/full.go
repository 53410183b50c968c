package ledger

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"

	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"
)

// ErrFull is returned for a write that found no room on the disk. Nothing of it is kept.
var ErrFull = errors.New("the disk of the orchestrator's state is full")

// statements runs those of one transaction. After some failures, of which a full disk
// is one, SQLite rolls the transaction back by itself; a further statement would then
// stand alone, and be kept (sqlite.org/lang_transaction.html, "Response To Errors Within
// A Transaction"). So after the first failure none runs, nor after the end of ctx.
type statements struct {
	conn   *connection
	ctx    context.Context
	failed error // of SQLite
	ended  error // of ctx
}

// run runs f, whose answer fails if one of the statements did.
func (s *statements) run(f func(*statements) error) error {
	err := f(s)
	if err == nil {
		err = cmp.Or(s.failed, s.ended) // of one whose error f took for an answer
	}
	return err
}

// over is why no further statement may run.
func (s *statements) over() error {
	if s.ended == nil {
		s.ended = s.ctx.Err()
	}
	return cmp.Or(s.failed, s.ended)
}

func (s *statements) exec(query string, args ...any) (sql.Result, error) {
	if err := s.over(); err != nil {
		return nil, err
	}
	res, err := s.conn.exec(query, args...)
	return res, s.note(err)
}

func (s *statements) query(query string, args ...any) (*rows, error) {
	if err := s.over(); err != nil {
		return nil, err
	}
	list, err := s.conn.query(query, args...)
	return &rows{Rows: list, of: s}, s.note(err)
}

func (s *statements) queryRow(query string, args ...any) *row {
	if err := s.over(); err != nil {
		return &row{err: err}
	}
	stmt, err := s.conn.statement(query)
	if err != nil {
		return &row{err: s.note(err)}
	}
	return &row{of: s, sql: stmt.QueryRowContext(context.Background(), args...)}
}

// note keeps the first failure of SQLite itself; that there is no such row is none, and
// a broken constraint undoes its own statement alone.
func (s *statements) note(err error) error {
	var broken *sqlite.Error
	if s.failed == nil && errors.As(err, &broken) && broken.Code()&0xff != sqlite3.SQLITE_CONSTRAINT {
		s.failed = err
	}
	return err
}

// row is a sql.Row whose failure is noted.
type row struct {
	of  *statements
	sql *sql.Row
	err error // why it was not asked for
}

func (r *row) Scan(into ...any) error {
	if r.err != nil {
		return r.err
	}
	return r.of.note(r.sql.Scan(into...))
}

// rows are sql.Rows that end with the transaction's context, and whose failure is noted.
type rows struct {
	*sql.Rows
	of *statements
}

func (r *rows) Next() bool { return r.of.over() == nil && r.Rows.Next() }

func (r *rows) Err() error { return cmp.Or(r.of.note(r.Rows.Err()), r.of.over()) }

// told adds ErrFull to SQLite's ways of saying so: the one for its files, and the one for
// the shared memory beside them, which it may be the first to miss.
func told(err error) error {
	var broken *sqlite.Error
	if errors.As(err, &broken) && (broken.Code()&0xff == sqlite3.SQLITE_FULL || broken.Code() == sqlite3.SQLITE_IOERR_SHMSIZE) {
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	return err
}
