// Package ledger is the orchestrator's durable truth: reservations and their phases,
// tokens, nonces, verdicts, certificates, templates, hosts, and the journal.
//
// It is one SQLite database in WAL mode with synchronous=FULL: a weaker setting can
// give a spent token back after a power cut. secure_delete overwrites what is
// deleted. There is one writer connection, so write transactions are serial; each
// [Ledger.Write] is all or nothing and durable when it returns. Those that wait for their
// turn at the same time share one commit, each inside a savepoint of its own. Readers see
// the last committed state and never wait for the writer.
//
// What makes an act single is always one compare-and-swap in SQL: [Ledger.Spend] for
// a token, [Tx.Move] for a phase, [Tx.End] for the end, [Tx.UseNonce] for a nonce.
// Token and phase and journal entry change in the same transaction. The plain text of
// a token never comes here; only its digest does.
//
// On a full disk a write fails with [ErrFull] and has changed nothing, nor has any that
// shares its commit; reading goes on, and the next write that finds room succeeds.
package ledger

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"time"

	"github.com/pressly/goose/v3"
	_ "modernc.org/sqlite" // driver "sqlite"
)

//go:embed migrations/*.sql
var migrations embed.FS

// ErrNotFound is returned for a row that is not there.
var ErrNotFound = errors.New("not in the ledger")

const (
	busyTimeout = 5 * time.Second // another process (a backup) may hold the file for a moment
	readers     = 4               // connections
	// checkpointAt is how long the write-ahead log gets before its pages go to the database
	// file, 16 MiB. Many writes change the same pages, and of each the last state alone goes.
	checkpointAt = 4096
)

// Ledger is an open ledger. It is safe for concurrent use.
type Ledger struct {
	write *writer
	read  *pool
	now   func() time.Time
}

// Open opens the database file, making and migrating it as needed. It is its owner's alone,
// whatever the process's umask.
func Open(ctx context.Context, file string, now func() time.Time) (*Ledger, error) {
	if err := closeToOthers(file); err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	write, err := open(file, 1, fmt.Sprintf("wal_autocheckpoint(%d)", checkpointAt))
	if err != nil {
		return nil, err
	}
	if err := migrate(ctx, write); err != nil {
		write.Close()
		return nil, err
	}
	w, err := newWriter(ctx, write)
	if err != nil {
		write.Close()
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	read, err := open(file, readers)
	if err != nil {
		w.close()
		return nil, err
	}
	return &Ledger{write: w, read: newPool(read, readers), now: now}, nil
}

// closeToOthers makes the file where it is missing, and takes it and what SQLite keeps
// beside it from others. SQLite gives its further files the mode of the first. A file that
// exists is not opened: to close it would end this process's locks on it, see fcntl(2).
func closeToOthers(file string) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	switch {
	case err == nil:
		return f.Close()
	case !errors.Is(err, fs.ErrExist):
		return err
	}
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if err := os.Chmod(file+suffix, 0o600); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func open(file string, conns int, pragmas ...string) (*sql.DB, error) {
	q := url.Values{"_txlock": {"immediate"}, "_pragma": append(pragmas,
		fmt.Sprintf("busy_timeout(%d)", busyTimeout.Milliseconds()),
		"journal_mode(WAL)", "synchronous(FULL)", "secure_delete(ON)", "foreign_keys(ON)",
		"temp_store(MEMORY)", // else what undoes a savepoint is written to a file in /tmp
	)}
	db, err := sql.Open("sqlite", (&url.URL{Scheme: "file", Opaque: (&url.URL{Path: file}).EscapedPath(), RawQuery: q.Encode()}).String())
	if err != nil {
		return nil, fmt.Errorf("open ledger: %w", err)
	}
	db.SetMaxOpenConns(conns)
	db.SetMaxIdleConns(conns)
	return db, nil
}

func migrate(ctx context.Context, db *sql.DB) error {
	dir, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return fmt.Errorf("migrate ledger: %w", err)
	}
	p, err := goose.NewProvider(goose.DialectSQLite3, db, dir, goose.WithLogger(goose.NopLogger()))
	if err != nil {
		return fmt.Errorf("migrate ledger: %w", err)
	}
	done, err := p.Up(ctx)
	if err != nil {
		return fmt.Errorf("migrate ledger: %w", err)
	}
	for _, m := range done {
		slog.Debug("ledger migrated", "version", m.Source.Version)
	}
	return nil
}

// Close waits for the transactions that have begun, closes the database and truncates its
// write-ahead log.
func (l *Ledger) Close() error {
	return errors.Join(l.read.close(), l.write.close())
}

// Tx is one transaction. It is valid only inside the function that got it.
type Tx struct {
	tx *statements
	// Now is the transaction's time: deadlines are checked against it, history shows it.
	Now time.Time
}

// Write runs f in a write transaction, which it commits durably if f returns nil. f sees
// what all writes before it did. It runs once at most, and not if ctx ends before its
// turn; once it has returned, its outcome is waited for. An error, or a panic, of f
// undoes what f did and nothing else.
//
// Writes that come together share a commit: f must not wait for what another writer does
// after its own Write.
func (l *Ledger) Write(ctx context.Context, f func(*Tx) error) error {
	return told(l.write.write(ctx, l.tx(f)))
}

// Read runs f in a read transaction: everything it reads is of one moment.
func (l *Ledger) Read(ctx context.Context, f func(*Tx) error) error {
	return told(l.read.read(ctx, l.tx(f)))
}

func (l *Ledger) tx(f func(*Tx) error) func(*statements) error {
	return func(s *statements) error { return f(&Tx{tx: s, Now: l.now()}) }
}

// change runs a statement and returns how many rows it changed.
func (t *Tx) change(what, query string, args ...any) (int64, error) {
	res, err := t.tx.exec(query, args...)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", what, err)
	}
	n, err := res.RowsAffected()
	if err != nil {
		return 0, fmt.Errorf("%s: %w", what, err)
	}
	return n, nil
}

func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func instant(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n).UTC()
}

// Epoch is the ledger's epoch: it grows when a ledger that may lack commits is taken
// into use again.
func (t *Tx) Epoch() (int64, error) {
	var e int64
	if err := t.tx.queryRow("SELECT value FROM meta WHERE name = 'epoch'").Scan(&e); err != nil {
		return 0, fmt.Errorf("read epoch: %w", err)
	}
	return e, nil
}

// Rise records a number that must never fall, and refuses one below the highest seen.
func (t *Tx) Rise(name string, value int64) error {
	var highest int64
	err := t.tx.queryRow(`INSERT INTO meta (name, value) VALUES ($1, $2)
		ON CONFLICT (name) DO UPDATE SET value = max(value, excluded.value) RETURNING value`, name, value).Scan(&highest)
	if err != nil {
		return fmt.Errorf("record %s: %w", name, err)
	}
	if value < highest {
		return fmt.Errorf("%s %d is older than %d, which was seen before", name, value, highest)
	}
	return nil
}
