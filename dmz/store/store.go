package store

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"foothold/dmz/upstream"
	"foothold/internal/durable"
	"foothold/internal/mtls"
	"foothold/internal/serve"
	"foothold/protocol/digest"
	"foothold/protocol/event"
)

// Limits.
const (
	maxObject    = 4 << 30          // bytes of one object
	maxTransfer  = 10 * time.Minute // of one object, either way
	maxPuts      = 4                // at once
	maxGets      = 64               // at once
	minFree      = 256 << 20        // bytes left on the disk
	objectPrefix = "/v1/objects/"
)

// store serves one directory.
type store struct {
	dir     string
	puts    chan struct{} // a place for each transfer
	gets    chan struct{}
	refused refusals
}

// Run is the daemon.
func Run(ctx context.Context, c Config) error {
	conf, err := tlsConfig(c)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	client, err := upstream.New(c.Upstream)
	if err != nil {
		return fmt.Errorf("configuration: %w", err)
	}
	s, err := open(c.State)
	if err != nil {
		return err
	}
	l, err := net.Listen("tcp", c.Listen.String())
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	events := upstream.NewEvents(client)
	events.Emit(event.Event{Kind: "daemon.started"})
	slog.Info("serving", "listening", l.Addr().String())

	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	defer wg.Wait()
	defer cancel()
	wg.Go(func() { events.Run(ctx) })
	wg.Go(func() { s.refused.tell(ctx, events.Emit) })
	return serve.HTTPS(ctx, l, conf, s.handler(), serve.TellRefused(ctx, events.TLSRefused("store")))
}

// open makes the directory and removes what an interrupted transfer left.
func open(dir string) (*store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	left, err := filepath.Glob(filepath.Join(dir, ".*.new-*"))
	if err != nil {
		return nil, fmt.Errorf("open state: %w", err)
	}
	for _, f := range left {
		if err := os.Remove(f); err != nil {
			return nil, fmt.Errorf("remove interrupted transfer: %w", err)
		}
	}
	return &store{dir: dir, puts: make(chan struct{}, maxPuts), gets: make(chan struct{}, maxGets), refused: newRefusals()}, nil
}

// tlsConfig takes clients of both authorities, each for its own roles alone.
func tlsConfig(c Config) (*tls.Config, error) {
	cert, err := tls.LoadX509KeyPair(c.TLS.Cert, c.TLS.Key)
	if err != nil {
		return nil, fmt.Errorf("load certificate: %w", err)
	}
	dmz, err := authorities(c.TLS.CA)
	if err != nil {
		return nil, fmt.Errorf("tls.ca: %w", err)
	}
	vms, err := authorities(c.VMCA)
	if err != nil {
		return nil, fmt.Errorf("vm_ca: %w", err)
	}
	both := x509.NewCertPool()
	for _, a := range append(append([]*x509.Certificate(nil), dmz...), vms...) {
		both.AddCert(a)
	}
	conf := mtls.ServerConfig(cert, both, mtls.Orchestrator, mtls.BootServer, mtls.Gateway, mtls.VM)
	byRole := conf.VerifyConnection
	conf.VerifyConnection = func(cs tls.ConnectionState) error {
		if err := byRole(cs); err != nil {
			return err
		}
		id, err := mtls.Of(cs.PeerCertificates[0])
		if err != nil {
			return err
		}
		issuers := dmz
		if id.Role == mtls.VM {
			issuers = vms
		}
		if !issuedBy(cs.VerifiedChains, issuers) {
			return fmt.Errorf("%s is not of the authority for its role", id)
		}
		return nil
	}
	return conf, nil
}

// issuedBy: every way to verify the certificate ends at one of roots.
func issuedBy(chains [][]*x509.Certificate, roots []*x509.Certificate) bool {
	for _, chain := range chains {
		root, found := chain[len(chain)-1], false
		for _, r := range roots {
			found = found || r.Equal(root)
		}
		if !found {
			return false
		}
	}
	return len(chains) > 0
}

func authorities(file string) ([]*x509.Certificate, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("load authority: %w", err)
	}
	var out []*x509.Certificate
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("load authority: %w", err)
		}
		out = append(out, cert)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("load authority: %s holds no certificate", file)
	}
	return out, nil
}

func (s *store) handler() http.Handler {
	mux := http.NewServeMux()
	allow := func(h http.HandlerFunc, roles ...string) http.Handler {
		return mtls.AllowTold(h, func(r *http.Request, who mtls.Identity) {
			s.refused.count(who, refusal{call: r.Pattern, reason: event.NotPermitted, why: "its role may not make this call"})
		}, roles...)
	}
	all := []string{mtls.Orchestrator, mtls.BootServer, mtls.Gateway, mtls.VM}
	mux.Handle("PUT "+objectPrefix+"{sha256}", allow(s.put, mtls.Orchestrator))
	mux.Handle("GET "+objectPrefix+"{sha256}", allow(s.get, all...)) // HEAD as well
	mux.Handle("/", allow(func(w http.ResponseWriter, r *http.Request) {
		s.refuse(w, r, http.StatusNotFound, event.BadRequest, "no such call")
	}, all...))
	return mux
}

// refuse answers with the status, to the orchestrator also with why, and counts it.
func (s *store) refuse(w http.ResponseWriter, r *http.Request, status int, reason event.Reason, why string) {
	who, _ := mtls.Caller(r.Context())
	s.refused.count(who, refusal{call: r.Pattern, reason: reason, why: why})
	if who.Role != mtls.Orchestrator {
		why = "refused"
	}
	http.Error(w, why, status)
}

// put stores an object under the digest that it has. One that is there is left alone.
func (s *store) put(w http.ResponseWriter, r *http.Request) {
	sum, err := digest.Parse(r.PathValue("sha256"))
	switch {
	case err != nil:
		s.refuse(w, r, http.StatusBadRequest, event.BadRequest, "no SHA-256")
		return
	case r.ContentLength < 1 || r.ContentLength > maxObject:
		s.refuse(w, r, http.StatusLengthRequired, event.BadRequest, "want a Content-Length of 1 to 4 GiB")
		return
	}
	if !take(s.puts) {
		busy(w)
		return
	}
	defer func() { <-s.puts }()
	path := filepath.Join(s.dir, sum.String())
	if _, err := os.Stat(path); err == nil {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	if err := room(s.dir, r.ContentLength); err != nil {
		slog.Error("object refused", "err", err)
		s.refuse(w, r, http.StatusInsufficientStorage, event.DiskFull, "no room")
		return
	}
	if err := http.NewResponseController(w).SetReadDeadline(time.Now().Add(maxTransfer)); err != nil {
		http.Error(w, "failed", http.StatusInternalServerError)
		return
	}
	err = durable.Write(path, 0o400, func(f *os.File) error { return receive(f, r.Body, r.ContentLength, sum) })
	switch {
	case errors.Is(err, errContent):
		slog.Warn("object refused", "sha256", sum.String(), "err", err)
		s.refuse(w, r, http.StatusUnprocessableEntity, event.DigestMismatch, "content is not what its name says")
	case err != nil:
		slog.Error("object not stored", "sha256", sum.String(), "err", err)
		http.Error(w, "failed", http.StatusInternalServerError)
	default:
		s.pack(path)
		slog.Info("object stored", "sha256", sum.String(), "bytes", r.ContentLength)
		w.WriteHeader(http.StatusCreated)
	}
}

var errContent = errors.New("content differs from its digest or size")

func receive(f *os.File, body io.Reader, size int64, want digest.SHA256) error {
	h := sha256.New()
	n, err := io.Copy(io.MultiWriter(f, h), io.LimitReader(body, size+1))
	if err != nil {
		return fmt.Errorf("receive: %w", err)
	}
	if n != size || digest.SHA256(h.Sum(nil)) != want {
		return errContent
	}
	return nil
}

// get sends an object.
func (s *store) get(w http.ResponseWriter, r *http.Request) {
	sum, err := digest.Parse(r.PathValue("sha256"))
	if err != nil {
		s.refuse(w, r, http.StatusNotFound, event.BadRequest, "no SHA-256")
		return
	}
	if !take(s.gets) {
		busy(w)
		return
	}
	defer func() { <-s.gets }()
	f, encoding, err := s.open(sum, r.Header.Get("Accept-Encoding"))
	if errors.Is(err, fs.ErrNotExist) {
		http.NotFound(w, r)
		return
	}
	if err != nil {
		slog.Error("object not readable", "sha256", sum.String(), "err", err)
		http.Error(w, "failed", http.StatusInternalServerError)
		return
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		http.Error(w, "failed", http.StatusInternalServerError)
		return
	}
	if err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(maxTransfer)); err != nil {
		http.Error(w, "failed", http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.FormatInt(info.Size(), 10))
	if encoding != "" {
		w.Header().Set("Content-Encoding", encoding)
	}
	if r.Method == http.MethodHead {
		return
	}
	if n, err := io.Copy(w, f); err != nil {
		slog.Warn("object cut off", "sha256", sum.String(), "sent", n, "err", err)
		return
	}
	if id, ok := mtls.Caller(r.Context()); ok {
		slog.Info("object sent", "sha256", sum.String(), "bytes", info.Size(), "to", id.String())
	}
}

func take(places chan struct{}) bool {
	select {
	case places <- struct{}{}:
		return true
	default:
		return false
	}
}

func busy(w http.ResponseWriter) {
	w.Header().Set("Retry-After", "1")
	http.Error(w, "busy", http.StatusServiceUnavailable)
}
