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
	failed := make(chan error, 1)
	go func() { failed <- srv.Serve(tls.NewListener(l, conf)) }()
	select {
	case err := <-failed:
		return fmt.Errorf("serve %s: %w", l.Addr(), err)
	case <-ctx.Done():
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownPeriod)
	defer cancel()
	if err := srv.Shutdown(stop); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("shut down %s: %w", l.Addr(), err)
	}
	return srv.Close()
}
