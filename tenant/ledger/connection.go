package ledger

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
)

var errClosed = errors.New("the ledger is closed")

// connection is one to the database, with the statements that were compiled on it: once
// each, and no more of them than this package's text has. It serves one goroutine at a time.
type connection struct {
	conn     *sql.Conn
	compiled map[string]*sql.Stmt
}

func connect(ctx context.Context, db *sql.DB) (*connection, error) {
	conn, err := db.Conn(ctx)
	if err != nil {
		return nil, err
	}
	return &connection{conn: conn, compiled: map[string]*sql.Stmt{}}, nil
}

// statement compiles a query where that is not done yet. SQLite by itself compiles one
// anew whose tables have changed.
func (c *connection) statement(query string) (*sql.Stmt, error) {
	if s, ok := c.compiled[query]; ok {
		return s, nil
	}
	s, err := c.conn.PrepareContext(context.Background(), query)
	if err == nil {
		c.compiled[query] = s
	}
	return s, err
}

// exec runs a statement for its effect. None gets a context that can end, here and in
// query: SQLite rolls back the whole transaction one of whose writes is interrupted.
func (c *connection) exec(query string, args ...any) (sql.Result, error) {
	s, err := c.statement(query)
	if err != nil {
		return nil, err
	}
	return s.ExecContext(context.Background(), args...)
}

// query runs one for its rows. While they are open, the same query must not run again.
func (c *connection) query(query string, args ...any) (*sql.Rows, error) {
	s, err := c.statement(query)
	if err != nil {
		return nil, err
	}
	return s.QueryContext(context.Background(), args...)
}

// close ends the connection.
func (c *connection) close() error {
	var errs []error
	for _, s := range c.compiled {
		errs = append(errs, s.Close())
	}
	return errors.Join(append(errs, c.conn.Close())...)
}

// pool is the readers' connections, each made when it is first needed.
type pool struct {
	db     *sql.DB
	free   chan *connection // nil: one that is not made yet
	closed chan struct{}
}

func newPool(db *sql.DB, n int) *pool {
	p := &pool{db: db, free: make(chan *connection, n), closed: make(chan struct{})}
	for range n {
		p.free <- nil
	}
	return p
}

// read runs f in a read transaction.
func (p *pool) read(ctx context.Context, f func(*statements) error) error {
	var c *connection
	select {
	case c = <-p.free:
	case <-p.closed:
		return errClosed
	case <-ctx.Done():
		return fmt.Errorf("begin transaction: %w", ctx.Err())
	}
	defer func() { p.free <- c }()
	if c == nil {
		made, err := connect(ctx, p.db)
		if err != nil {
			return fmt.Errorf("begin transaction: %w", err)
		}
		c = made
	}
	if _, err := c.exec("BEGIN"); err != nil {
		return fmt.Errorf("begin transaction: %w", err)
	}
	defer c.exec("ROLLBACK") // it wrote nothing; after some failures SQLite has done it
	return (&statements{conn: c, ctx: ctx}).run(f)
}

// close waits for those who read.
func (p *pool) close() error {
	close(p.closed)
	var errs []error
	for range cap(p.free) {
		if c := <-p.free; c != nil {
			errs = append(errs, c.close())
		}
	}
	return errors.Join(append(errs, p.db.Close())...)
}
