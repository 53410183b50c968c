// Package serve runs a daemon's HTTP servers until its context ends, with the time
// limits that every listener needs.
package serve

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// Limits of every listener.
const (
	headerTimeout  = 10 * time.Second // a peer that stalls in the header is cut off
	idleTimeout    = 2 * time.Minute
	shutdownPeriod = 5 * time.Second // in-flight calls at shutdown
	maxHeaderBytes = 16 << 10
)

// HTTPS serves h on l with conf until ctx ends; it returns nil after an orderly
// shutdown. The caller may adjust the server, for instance its ConnContext.
func HTTPS(ctx context.Context, l net.Listener, conf *tls.Config, h http.Handler, adjust ...func(*http.Server)) error {
	srv := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: headerTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		BaseContext:       func(net.Listener) context.Context { return ctx },
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelWarn),
	}
	for _, f := range adjust {
		f(srv)
	}
	var silent silent
	silent.watch(srv)
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(tls.NewListener(l, conf)) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	silent.end()
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownPeriod)
	defer cancel()
	if err := srv.Shutdown(stop); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("shut down %s: %w", l.Addr(), err)
	}
	return srv.Close()
}

// silent holds the connections on which nothing was asked yet: clients open some ahead
// of need, and a Server's Shutdown waits five seconds for the first call of each.
type silent struct {
	mu    sync.Mutex
	conns map[net.Conn]bool // guarded by mu; nil from end on
}

// watch keeps track of srv's connections, which has not begun to serve.
func (s *silent) watch(srv *http.Server) {
	s.conns = map[net.Conn]bool{}
	next := srv.ConnState
	srv.ConnState = func(c net.Conn, state http.ConnState) {
		s.moved(c, state)
		if next != nil {
			next(c, state)
		}
	}
}

func (s *silent) moved(c net.Conn, state http.ConnState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case state != http.StateNew:
		delete(s.conns, c)
	case s.conns == nil:
		c.Close()
	default:
		s.conns[c] = true
	}
}

// end closes them, and those that are still to come.
func (s *silent) end() {
	s.mu.Lock()
	conns := s.conns
	s.conns = nil
	s.mu.Unlock()
	for c := range conns {
		c.Close()
	}
}
