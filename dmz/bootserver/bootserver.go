package bootserver

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"

	"foothold/dmz/upstream"
	"foothold/internal/serve"
	"foothold/protocol/bootmsg"
	"foothold/protocol/event"
	"foothold/protocol/zone"
)

// maxLeaf bounds a client certificate in bytes; the loader's has 300.
const maxLeaf = 4 << 10

// server is what all conversations share. It holds no key that could stand for a VM
// or sign what a VM believes: its own certificate names the boot server alone.
type server struct {
	leaf       []byte // DER of our certificate, part of the tunnel measurement
	client     *upstream.Client
	events     *upstream.Events
	components *cache
	keys       keyring
}

// Run is the daemon.
func Run(ctx context.Context, c Config) error {
	cert, err := tls.LoadX509KeyPair(c.Cert, c.Key)
	if err != nil {
		return fmt.Errorf("configuration: load certificate: %w", err)
	}
	client, err := upstream.New(c.Upstream)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	dir := filepath.Join(c.State, "components")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("open state: %w", err)
	}
	components, err := openCache(dir, c)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	events := upstream.NewEvents(client)
	gate := newGate(events.Emit)
	watcher, err := upstream.NewWatcher(ctx, client, events, zone.Boot, c.State, gate)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", c.Listen.String())
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	s := &server{leaf: cert.Certificate[0], client: client, events: events, components: components}
	events.Emit(event.Event{Kind: "daemon.started"})
	slog.Info("serving", "listening", l.Addr().String())

	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { events.Run(ctx) })
	wg.Go(func() { watcher.Run(ctx) })
	wg.Go(func() { gate.tellDropped(ctx) })
	return serve.HTTPS(ctx, gate.listener(ctx, l), tlsConfig(cert), s.handler(), func(srv *http.Server) {
		srv.ConnContext = s.begin
	}, serve.TellRefused(ctx, events.TLSRefused("boot")))
}

// tlsConfig takes any client certificate: it is made by the loader for this one
// connection, and what it proves is that the two ends of the tunnel are the same
// all along. The quote binds it to the VM.
func tlsConfig(cert tls.Certificate) *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		Certificates:           []tls.Certificate{cert},
		ClientAuth:             tls.RequireAnyClientCert,
		SessionTicketsDisabled: true,
		NextProtos:             []string{"http/1.1"},
		VerifyConnection: func(cs tls.ConnectionState) error {
			if cs.Version != tls.VersionTLS13 || cs.DidResume || len(cs.PeerCertificates) != 1 || len(cs.PeerCertificates[0].Raw) > maxLeaf {
				return errors.New("not a fresh TLS 1.3 connection with one small client certificate")
			}
			return nil
		},
	}
}

func (s *server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+bootmsg.PathOpen, s.step((*conversation).open))
	mux.HandleFunc("POST "+bootmsg.PathAttest, s.step((*conversation).attest))
	mux.HandleFunc("GET "+bootmsg.PathKernel, s.step((*conversation).kernel))
	mux.HandleFunc("GET "+bootmsg.PathInitramfs, s.step((*conversation).initramfs))
	mux.HandleFunc("GET "+bootmsg.PathUnique, s.step((*conversation).unique))
	mux.HandleFunc("POST "+bootmsg.PathDone, s.step((*conversation).done))
	mux.HandleFunc("POST "+bootmsg.PathReady, s.step((*conversation).ready))
	mux.HandleFunc("/", s.step(func(*conversation, http.ResponseWriter, *http.Request) error {
		return event.Refuse(event.BadRequest, "no such call")
	}))
	return mux
}
