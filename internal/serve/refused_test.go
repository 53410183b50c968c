package serve

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"
)

// told is what tell was called with, as "ADDRESS WHY" → times.
type told struct {
	mu    sync.Mutex
	times map[string]int
}

func (t *told) tell(from netip.Addr, why string, count int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.times == nil {
		t.times = map[string]int{}
	}
	t.times[from.String()+" "+why] += count
}

func (t *told) all() map[string]int {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.times
}

// TestRefusedHandshakesAreTold holds the text of net/http's error log, which nothing else
// promises.
func TestRefusedHandshakesAreTold(t *testing.T) {
	cert := certificate(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var seen told
	ended := make(chan error, 1)
	conf := &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{cert}, ClientAuth: tls.RequireAnyClientCert}
	go func() { ended <- HTTPS(ctx, l, conf, http.NotFoundHandler(), TellRefused(ctx, seen.tell)) }()

	for range 3 {
		if c, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12}); err == nil {
			c.Close()
			t.Error("TLS 1.2 is accepted")
		}
	}
	c, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{InsecureSkipVerify: true})
	if err == nil { // in TLS 1.3 the client learns of its refusal with the first read
		_, err = c.Read(make([]byte, 1))
		c.Close()
	}
	if err == nil {
		t.Error("no certificate is accepted")
	}
	looked, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	looked.Close()
	good, err := tls.Dial("tcp", l.Addr().String(), &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{cert}})
	if err != nil {
		t.Fatal(err)
	}
	io.WriteString(good, "GET / HTTP/1.0\r\n\r\n")
	io.ReadAll(good)
	good.Close()
	for end := time.Now().Add(10 * time.Second); len(seen.all()) < 2 && time.Now().Before(end); {
		time.Sleep(20 * time.Millisecond)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	got, want := seen.all(), map[string]int{"version": 3, "certificate": 1}
	for what, n := range want {
		found := 0
		for text, times := range got {
			if strings.HasPrefix(text, "127.0.0.1 tls: ") && strings.Contains(text, what) {
				found += times
			}
		}
		if found != n {
			t.Errorf("%d tellings of a wrong %s, want %d: %v", found, what, n, got)
		}
	}
	if len(got) != 2 {
		t.Errorf("told of more than was refused: %v", got)
	}
}

// TestAFloodOfHandshakesStaysSmall: whatever comes between two tellings, they are few.
func TestAFloodOfHandshakesStaysSmall(t *testing.T) {
	old := slog.Default()
	slog.SetDefault(slog.New(slog.DiscardHandler))
	defer slog.SetDefault(old)
	r := newRefused()
	for i := range 5000 {
		fmt.Fprintf(r, "%s10.82.%d.%d:4000: tls: bad certificate\n", handshakeFailed, i/250, i%250)
	}
	fmt.Fprintf(r, "%s[::ffff:10.82.0.1]:4000: tls: bad certificate\n", handshakeFailed)
	fmt.Fprintf(r, "http: panic serving 10.82.0.1:4000: no handshake\n")
	n, counts := 0, r.counts.Take()
	for _, times := range counts {
		n += times
	}
	if len(counts) != maxKinds+1 || n != 5001 || counts[refusal{netip.MustParseAddr("10.82.0.1"), "tls: bad certificate"}] != 2 {
		t.Errorf("%d kinds, %d in all", len(counts), n)
	}
}
