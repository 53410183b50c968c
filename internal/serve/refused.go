package serve

import (
	"context"
	"log"
	"log/slog"
	"net/http"
	"net/netip"
	"strings"
	"time"

	"foothold/internal/tally"
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
	r := newRefused()
	go r.counts.Run(ctx, tellEvery, func(k refusal, n int) { tell(k.from, k.why, n) })
	return func(srv *http.Server) { srv.ErrorLog = log.New(r, "", 0) }
}

type refusal struct {
	from netip.Addr
	why  string
}

// refused takes a server's error log.
type refused struct{ counts *tally.Tally[refusal] }

func newRefused() refused {
	return refused{tally.New(maxKinds, func(refusal) refusal { return refusal{why: "others"} })}
}

// Write takes one line of the server's error log.
func (r refused) Write(line []byte) (int, error) {
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
	r.counts.Count(k)
	return len(line), nil
}
