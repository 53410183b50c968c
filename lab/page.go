package lab

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"
)

const intranetPage = `<!doctype html>
<title>Intranet</title>
<h1>The tenant's intranet</h1>
<p>Only the tenant's own network and computing VMs reach this page.</p>
`

// ServePage serves the intranet's page until ctx ends.
func ServePage(ctx context.Context) error {
	address := net.JoinHostPort(Address(Intranet, TenantLAN).String(), "80")
	l, err := net.Listen("tcp", address)
	if err != nil {
		return fmt.Errorf("serve intranet page: %w", err)
	}
	srv := &http.Server{
		ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 10 * time.Second, MaxHeaderBytes: 8 << 10,
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			fmt.Fprint(w, intranetPage)
		}),
	}
	stop := context.AfterFunc(ctx, func() { srv.Close() })
	defer stop()
	slog.New(slog.NewJSONHandler(os.Stderr, nil)).Info("serving", "listening", address)
	if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve intranet page: %w", err)
	}
	return nil
}
