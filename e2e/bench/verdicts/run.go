package verdicts

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"foothold/internal/mtls"
	"foothold/internal/strictjson"
	"foothold/protocol/evidence"
	"foothold/tenant/authority"
	"foothold/tenant/ledger"

	"golang.org/x/sys/unix"
)

const (
	maxCall  = 1 << 20 // bytes
	callPath = "/v1/verdict"
)

// Load is how the judge is called.
type Load struct {
	Calls     int           // how many, each with a quote of its own; 0: as many as there are quotes
	Clients   int           // connections, each with one call at a time
	RoundTrip time.Duration // added to each call
	Rate      float64       // calls a second that are begun; 0: each client's next at once
}

// due is when call i is due. A client that was busy then, or woke up too late, has that
// counted as its call's latency.
func (l Load) due(began time.Time, i int) time.Time {
	return began.Add(time.Duration(float64(i) / l.Rate * float64(time.Second)))
}

// Outcome is what came of it.
type Outcome struct {
	Rate    float64         // calls a second, from the first answer to the last
	CPU     time.Duration   // processor time of this process for each: clients, TLS, judge and ledger
	Latency []time.Duration // of each call, ascending; with a Rate from when it was due, begun or not
}

// Percentile of the latencies, p in 0 to 100.
func (o Outcome) Percentile(p int) time.Duration { return o.Latency[(len(o.Latency)-1)*p/100] }

// Run spends a nonce for each call, in a fresh copy of the ledger, and has its quote judged.
func (e *Evidence) Run(ctx context.Context, judge Judge, l Load) (o Outcome, err error) {
	db, err := os.ReadFile(e.path("nonces.db"))
	if err != nil {
		return o, err
	}
	dir, err := os.MkdirTemp(e.dir, "run-")
	if err != nil {
		return o, err
	}
	defer os.RemoveAll(dir)
	if err := os.WriteFile(dir+"/ledger.db", db, 0o600); err != nil {
		return o, err
	}
	nonces, err := ledger.Open(ctx, dir+"/ledger.db", time.Now)
	if err != nil {
		return o, err
	}
	defer func() { err = errors.Join(err, nonces.Close()) }()
	if err := fill(ctx, nonces); err != nil {
		return o, err
	}
	s, err := e.serve(nonces, judge)
	if err != nil {
		return o, err
	}
	defer s.close()
	return e.call(ctx, s, l)
}

// fill makes a ledger's log as long as it is for most of an orchestrator's life: what is
// written goes over what was written before. A log that grows makes each commit wait for the
// file system's own journal, too.
func fill(ctx context.Context, l *ledger.Ledger) error {
	return l.Write(ctx, func(t *ledger.Tx) error {
		return t.AddDocument(ledger.Document{Kind: ledger.PlatformDocument, Envelope: make([]byte, logLength)})
	})
}

// logLength is more bytes than the log is let grow to.
const logLength = 17 << 20

// server is the one call.
type server struct {
	address string
	client  *tls.Config
	http    *http.Server
	done    chan struct{}
}

func (e *Evidence) serve(nonces *ledger.Ledger, judge Judge) (*server, error) {
	files := func(role string, usage authority.Usage, dns ...string) (tls.Certificate, *x509.CertPool, error) {
		f, err := e.tenant.WriteFiles(e.dir, role, authority.DMZ, authority.Request{Identity: mtls.Identity{Role: role, Name: "bench"}, Usage: usage, Lifetime: day, DNS: dns})
		if err != nil {
			return tls.Certificate{}, nil, err
		}
		return f.Load()
	}
	cert, clients, err := files(mtls.Orchestrator, authority.Server, orchDNS)
	if err != nil {
		return nil, err
	}
	self, servers, err := files(mtls.BootServer, authority.Client)
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := one(r, nonces, judge); err != nil {
			http.Error(w, err.Error(), http.StatusForbidden)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, `{"good":true}`)
	})
	s := &server{address: l.Addr().String(), client: mtls.ClientConfig(self, servers, orchDNS, mtls.Orchestrator), done: make(chan struct{}),
		http: &http.Server{Handler: mtls.Allow(handler, mtls.BootServer), ErrorLog: log.New(io.Discard, "", 0)}}
	go func() {
		defer close(s.done)
		s.http.Serve(tls.NewListener(l, mtls.ServerConfig(cert, clients, mtls.BootServer)))
	}()
	return s, nil
}

func (s *server) close() {
	s.http.Close()
	<-s.done
}

// one decodes, spends the nonce, and judges.
func one(r *http.Request, nonces *ledger.Ledger, judge Judge) error {
	var in request
	if err := strictjson.Read(r.Body, maxCall, &in); err != nil {
		return err
	}
	err := nonces.Write(r.Context(), func(t *ledger.Tx) error {
		return t.UseNonce(in.Nonce, vmID, 1, evidence.RoleBoot, nonceAge)
	})
	if err != nil {
		return err
	}
	return judge(in)
}

// client is one kept-alive connection.
type client struct {
	conn *tls.Conn
	in   *bufio.Reader
}

func dial(ctx context.Context, s *server, roundTrip time.Duration) (*client, error) {
	raw, err := new(net.Dialer).DialContext(ctx, "tcp", s.address)
	if err != nil {
		return nil, err
	}
	conn := tls.Client(delayed(raw, roundTrip), s.client)
	if err := conn.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, err
	}
	return &client{conn, bufio.NewReader(conn)}, nil
}

func (c *client) call(message []byte) error {
	if _, err := c.conn.Write(message); err != nil {
		return err
	}
	res, err := http.ReadResponse(c.in, nil)
	if err != nil {
		return err
	}
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", res.Status, body)
	}
	return err
}

// messages are the first n calls as they go over the wire; 0: all.
func (e *Evidence) messages(n int) (list [][]byte, err error) {
	if n == 0 {
		n = len(e.requests)
	}
	for _, r := range e.requests[:min(n, len(e.requests))] {
		body, err := json.Marshal(r)
		if err != nil {
			return nil, err
		}
		req, err := http.NewRequest(http.MethodPost, "https://"+orchDNS+callPath, bytes.NewReader(body))
		if err != nil {
			return nil, err
		}
		var wire bytes.Buffer
		if err := req.Write(&wire); err != nil {
			return nil, err
		}
		list = append(list, wire.Bytes())
	}
	return list, nil
}

func (e *Evidence) call(ctx context.Context, s *server, l Load) (o Outcome, err error) {
	messages, err := e.messages(l.Calls)
	if err != nil {
		return o, err
	}
	clients, refused := make([]*client, l.Clients), make([]error, l.Clients)
	var dialling sync.WaitGroup
	for i := range clients { // all at once: each handshake takes the round trip's time
		dialling.Go(func() { clients[i], refused[i] = dial(ctx, s, l.RoundTrip) })
	}
	dialling.Wait()
	for _, c := range clients {
		if c != nil {
			defer c.conn.Close()
		}
	}
	if err := errors.Join(refused...); err != nil {
		return o, err
	}
	o.Latency = make([]time.Duration, len(messages))
	answered := make([]time.Time, len(messages))
	var next atomic.Int64
	var failed error
	var once sync.Once
	fail := func(err error) {
		once.Do(func() { failed = err })
		next.Store(int64(len(messages)))
	}
	var wg sync.WaitGroup
	before, began := processorTime(), time.Now()
	for _, c := range clients {
		wg.Go(func() {
			var clock *alarm
			if l.Rate > 0 {
				var err error
				if clock, err = newAlarm(); err != nil {
					fail(err)
					return
				}
				defer clock.close()
			}
			for {
				i := int(next.Add(1)) - 1
				if i >= len(messages) || ctx.Err() != nil {
					return
				}
				from := time.Now()
				if l.Rate > 0 {
					from = l.due(began, i)
					if err := clock.wait(from); err != nil {
						fail(err)
						return
					}
				}
				if err := c.call(messages[i]); err != nil {
					fail(fmt.Errorf("call %d: %w", i, err))
					return
				}
				answered[i] = time.Now()
				o.Latency[i] = answered[i].Sub(from)
			}
		})
	}
	wg.Wait()
	if failed != nil || ctx.Err() != nil {
		return o, errors.Join(failed, ctx.Err())
	}
	n := len(messages)
	first, last := slices.MinFunc(answered, time.Time.Compare), slices.MaxFunc(answered, time.Time.Compare)
	o.Rate = float64(n-1) / last.Sub(first).Seconds()
	o.CPU = (processorTime() - before) / time.Duration(n)
	slices.Sort(o.Latency)
	return o, nil
}

// Alone is the processor time of the judge for one quote of n, without TLS, ledger and clients.
func (e *Evidence) Alone(judge Judge, n int) (time.Duration, error) {
	n = min(n, len(e.requests))
	before := processorTime()
	for _, r := range e.requests[:n] {
		if err := judge(r); err != nil {
			return 0, err
		}
	}
	return (processorTime() - before) / time.Duration(n), nil
}

// Kept is how long it takes to store the evidence of a verdict, durably, one at a time.
func (e *Evidence) Kept(ctx context.Context, n int) (each time.Duration, err error) {
	dir, err := os.MkdirTemp(e.dir, "kept-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	db, err := os.ReadFile(e.path("nonces.db"))
	if err != nil {
		return 0, err
	}
	if err := os.WriteFile(dir+"/ledger.db", db, 0o600); err != nil {
		return 0, err
	}
	l, err := ledger.Open(ctx, dir+"/ledger.db", time.Now)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, l.Close()) }()
	began := time.Now()
	n = min(n, len(e.requests))
	for _, r := range e.requests[:n] {
		verdict := e.judged(r)
		if err := verdict.Err(); err != nil {
			return 0, err
		}
		err := l.Write(ctx, func(t *ledger.Tx) error {
			return t.AddBundle(verdict.Parts)
		})
		if err != nil {
			return 0, err
		}
	}
	return time.Since(began) / time.Duration(n), nil
}

// processorTime is what this process has taken so far, on all processors.
func processorTime() time.Duration {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		panic(err) // it fails for no valid argument (getrusage(2))
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
