package ledger

import (
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
// A Transaction"). So after the first failure none runs.
type statements struct {
	tx     *sql.Tx
	failed error
}

func (s *statements) ExecContext(ctx context.Context, query string, args ...any) (sql.Result, error) {
	if s.failed != nil {
		return nil, s.failed
	}
	res, err := s.tx.ExecContext(ctx, query, args...)
	return res, s.note(err)
}

func (s *statements) QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error) {
	if s.failed != nil {
		return nil, s.failed
	}
	rows, err := s.tx.QueryContext(ctx, query, args...)
	return rows, s.note(err)
}

func (s *statements) QueryRowContext(ctx context.Context, query string, args ...any) *row {
	if s.failed != nil {
		return &row{of: s}
	}
	return &row{of: s, sql: s.tx.QueryRowContext(ctx, query, args...)}
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
	sql *sql.Row // nil: it was not asked for
}

func (r *row) Scan(into ...any) error {
	if r.sql == nil {
		return r.of.failed
	}
	return r.of.note(r.sql.Scan(into...))
}

// told adds ErrFull to SQLite's ways of saying so: the one for its files, and the one for
// the shared memory beside them, which it may be the first to miss.
func told(err error) error {
	var broken *sqlite.Error
	if errors.As(err, &broken) && (broken.Code()&0xff == sqlite3.SQLITE_FULL || broken.Code() == sqlite3.SQLITE_IOERR_SHMSIZE) {
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	return err
}
