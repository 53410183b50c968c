package serve

import (
	"context"
	"log"
	"log/slog"
	"maps"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"
)

const (
	tellEvery = 2 * time.Second // so that a flood of handshakes stays a few lines
	maxKinds  = 64              // different ones between two tellings
)

// handshakeFailed is how net/http begins the line of its error log about a TLS handshake
// that failed; the peer's address, a colon and the cause follow.
const handshakeFailed = "http: TLS handshake error from "

// TellRefused has tell called with the connections that ended in their TLS handshake -
// a wrong authority, name, usage or version - counted by source and cause, until ctx
// ends; each is in the log at once. Connections that merely ended are not told: a port
// that is only looked at was asked nothing.
func TellRefused(ctx context.Context, tell func(from netip.Addr, why string, count int)) func(*http.Server) {
	r := &refused{counts: map[refusal]int{}}
	go r.run(ctx, tell)
	return func(srv *http.Server) { srv.ErrorLog = log.New(r, "", 0) }
}

type refusal struct {
	from netip.Addr
	why  string
}

type refused struct {
	mu     sync.Mutex
	counts map[refusal]int // guarded by mu; since the last telling
}

// Write takes one line of the server's error log.
func (r *refused) Write(line []byte) (int, error) {
	text := strings.TrimSuffix(string(line), "\n")
	slog.Warn(text)
	about, ok := strings.CutPrefix(text, handshakeFailed)
	peer, why, found := strings.Cut(about, ": ")
	if !ok || !found || why == "EOF" || strings.HasSuffix(why, "connection reset by peer") {
		return len(line), nil
	}
	k := refusal{why: why}
	if from, err := netip.ParseAddrPort(peer); err == nil {
		k.from = from.Addr().Unmap()
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, known := r.counts[k]; !known && len(r.counts) >= maxKinds {
		k = refusal{why: "others"}
	}
	r.counts[k]++
	return len(line), nil
}

func (r *refused) run(ctx context.Context, tell func(netip.Addr, string, int)) {
	tick := time.NewTicker(tellEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		r.mu.Lock()
		counts := maps.Clone(r.counts)
		clear(r.counts)
		r.mu.Unlock()
		for k, n := range counts {
			tell(k.from, k.why, n)
		}
	}
}
