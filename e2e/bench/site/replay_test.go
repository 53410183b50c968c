package site

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/client"
	"foothold/internal/mtls/mtlstest"
	"foothold/protocol/bootmsg"
	"foothold/protocol/event"
	"foothold/protocol/hostapi"
	"foothold/protocol/pcr"
	"foothold/tenant/ledger"
	"foothold/tenant/orchestrator"
	"foothold/tenant/reservation"

	"github.com/google/go-tpm/tpm2"
)

// compute boots the VM, and has the ledger say that it went all the way to computing: its
// host is quoted for it from then on.
func (a attack) compute() {
	a.t.Helper()
	if err := a.opened("").Attest(a.t.Context(), a.s); err != nil {
		a.t.Fatal(err)
	}
	l, err := a.s.ledger(a.t.Context())
	if err != nil {
		a.t.Fatal(err)
	}
	defer l.Close()
	if err := l.Write(a.t.Context(), func(t *ledger.Tx) error {
		way := []reservation.Phase{reservation.Booting, reservation.Unlocking, reservation.Connecting, reservation.Computing}
		for i := range way[1:] {
			if err := t.Move(a.vm.spec.Reservation, 1, way[i], way[i+1], time.Now().Add(phaseLimit)); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		a.t.Fatal(err)
	}
}

// attest has the VM's host quoted, by an operator's wish.
func (a attack) attest() error {
	_, err := operator(a.t, a.s).Attest(a.t.Context(), a.vm.spec.Reservation)
	return err
}

// staticRefused demands that a static quote is refused and ends the VM.
func (a attack) staticRefused(says string) {
	a.t.Helper()
	var refusal *client.Refusal
	if err := a.attest(); !errors.As(err, &refusal) || refusal.Reason != event.QuoteRefused {
		a.t.Errorf("the host's quote: %v", err)
	}
	a.ended(event.QuoteRefused, says)
}

// answer exchanges who answers for static quotes.
func (h *host) answer(quotes func(context.Context, hostapi.QuoteRequest) (hostapi.QuoteResponse, error)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.quotes = quotes
}

// anew ends the orchestrator and starts another on its state, until that answers.
func anew(t *testing.T, s *Site) {
	t.Helper()
	s.stopOrchestrator()
	if err := s.startOrchestrator(t.Context()); err != nil {
		t.Fatal(err)
	}
	c := operator(t, s)
	for limit := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		_, err := c.Status(t.Context())
		if err == nil {
			return
		}
		if time.Now().After(limit) {
			t.Fatal(err)
		}
	}
}

// good is a good quote of the VM's host.
func (e evil) good(c *claim) {
	e.t.Helper()
	aik, _ := e.vm.host.broker.Keys()
	var err error
	if c.Quote, err = quoteBy(e.measure(e.vm.host, *c), aik, keysScheme, c.binding(), part(tpm2.TPMAlgSHA256, pcr.BootSelection()...)); err != nil {
		e.t.Fatal(err)
	}
}

// TestReplays: what was used once serves no second time, also after the orchestrator was
// started anew.
func TestReplays(t *testing.T) {
	s := openSite(t, 1)
	vms := reserve(t, s, 12)
	take := func() attack { vm := vms[0]; vms = vms[1:]; return attack{t, s, vm, nil} }
	e := take().evil()
	refused := func(t *testing.T, vm *VM, c claim, says string) {
		t.Helper()
		if out, err := e.client.BootVerdict(t.Context(), c.VerdictRequest); event.ReasonOf(err) != event.QuoteRefused || len(out.Unique) > 0 {
			t.Errorf("it is answered %v", err)
		}
		attack{t, s, vm, nil}.ended(event.QuoteRefused, says)
	}
	accepted := func(t *testing.T, c claim) {
		t.Helper()
		if _, err := e.client.BootVerdict(t.Context(), c.VerdictRequest); err != nil {
			t.Fatal(err)
		}
	}

	t.Run("a quote twice", func(t *testing.T) {
		e.vm = take().vm
		c := e.claim(e.vm, nil)
		e.good(&c)
		accepted(t, c)
		refused(t, e.vm, c, "judged before")
	})
	t.Run("a quote many times at once", func(t *testing.T) {
		e.vm = take().vm
		c := e.claim(e.vm, nil)
		e.good(&c)
		answers := make(chan error, 8)
		for range cap(answers) {
			go func() {
				_, err := e.client.BootVerdict(t.Context(), c.VerdictRequest)
				answers <- err
			}()
		}
		won := 0
		for range cap(answers) {
			if <-answers == nil {
				won++
			}
		}
		if won > 1 {
			t.Errorf("%d were accepted", won)
		}
		attack{t, s, e.vm, nil}.ended(event.QuoteRefused, "")
	})
	t.Run("a token from another address", func(t *testing.T) {
		thief, owner := take(), take()
		stolen := *thief.vm
		stolen.t1 = owner.vm.t1
		l, err := s.Dial(t.Context(), &stolen)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if err := l.Open(); err == nil {
			t.Error("it is taken")
		}
		owner.ended(event.TokenWrongAddress, "")
		thief.ended(event.TokenWrongAddress, "")
	})

	// Before the restart: one whose quote is accepted, one whose T1 is spent, one that is all
	// on its way, one whose host is quoted again and again, and two that begin afterwards.
	judged, spent, under, computing, later, last := take(), take(), take(), take(), take(), take()
	e.vm = judged.vm
	first := e.claim(e.vm, nil)
	e.good(&first)
	accepted(t, first)
	e.vm = under.vm
	way := e.claim(e.vm, nil)
	e.good(&way)
	open := spent.opened("")
	computing.compute()
	var recorded hostapi.QuoteResponse
	h := computing.vm.host
	h.answer(func(ctx context.Context, in hostapi.QuoteRequest) (hostapi.QuoteResponse, error) {
		var err error
		recorded, err = h.quote(ctx, in)
		return recorded, err
	})
	if err := computing.attest(); err != nil {
		t.Fatal(err)
	}

	if o, err := orchestrator.New(t.Context(), s.conf); err == nil {
		o.Close()
		t.Error("a second orchestrator on the same state")
	}
	anew(t, s)

	t.Run("a quote again after a restart", func(t *testing.T) { refused(t, judged.vm, first, "judged before") })
	t.Run("a token again after a restart", func(t *testing.T) {
		again, err := s.Dial(t.Context(), spent.vm)
		if err != nil {
			t.Fatal(err)
		}
		defer again.Close()
		if err := again.Open(); err == nil {
			t.Error("T1 is spent twice")
		}
		attack{t, s, spent.vm, nil}.ended(event.TokenSpent, "presented again")
		if err := open.Attest(t.Context(), s); err == nil {
			t.Error("the first to present it boots on")
		}
	})
	t.Run("a nonce of before, with a good quote, once", func(t *testing.T) {
		e.vm = under.vm
		accepted(t, way)
		refused(t, under.vm, way, "judged before")
	})
	t.Run("a nonce of before for a VM after", func(t *testing.T) {
		e.vm = later.vm
		c := e.claim(e.vm, nil)
		other := c
		other.nonce = way.nonce
		e.good(&other)
		refused(t, later.vm, other, "binding: ")
	})
	t.Run("a static quote of before", func(t *testing.T) {
		computing.t = t
		replay := recorded
		h.answer(func(context.Context, hostapi.QuoteRequest) (hostapi.QuoteResponse, error) { return replay, nil })
		computing.staticRefused("binding: ")
	})
	h.answer(h.quote)
	// What was refused bars the host: who answers with an old quote is suspect.
	t.Run("a VM on that host", func(t *testing.T) {
		last.t = t
		if err := last.opened("").Attest(t.Context(), s); err == nil || !strings.Contains(err.Error(), "403") {
			t.Errorf("it gets its components: %v", err)
		}
		last.ended(event.HostLost, "refused")
	})
}

// TestTunnelsAreFresh: a tunnel that is resumed, or carries data before its handshake's
// end, is none; and a message that says two things ends the VM in the middle of its quote.
func TestTunnelsAreFresh(t *testing.T) {
	s := openSite(t, 1)
	vms := reserve(t, s, 4)
	t.Run("resumed", func(t *testing.T) {
		a := attack{t, s, vms[0], nil}
		cache := tls.NewLRUClientSessionCache(4)
		// A middle of the same name gives the loader a ticket, as our boot server never does.
		ticket := a.ticketing()
		first, err := s.dialWith(t.Context(), a.vm, ticket, func(c *tls.Config) { c.ClientSessionCache = cache })
		if err != nil {
			t.Fatal(err)
		}
		first.conn.Read(make([]byte, 1)) // the ticket comes with what is read
		first.Close()
		if _, ok := cache.Get(bootDNS); !ok {
			t.Fatal("no ticket was given")
		}
		l, err := s.dialWith(t.Context(), a.vm, s.boot.String(), func(c *tls.Config) { c.ClientSessionCache = cache })
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		if l.conn.ConnectionState().DidResume {
			t.Error("resumed from another's ticket")
		}
		if err := errors.Join(l.Open(), l.Attest(t.Context(), s)); err != nil {
			t.Fatal(err)
		}
		// The tunnel stands, and its VM is admitted. Whoever wants to go on in it from elsewhere:
		thief, err := s.dialWith(t.Context(), a.vm, s.boot.String(), func(c *tls.Config) { c.ClientSessionCache = cache })
		if err != nil {
			t.Fatal(err)
		}
		defer thief.Close()
		if thief.conn.ConnectionState().DidResume {
			t.Error("resumed")
		}
		if n, err := thief.Fetch(bootmsg.PathUnique); err == nil {
			t.Errorf("%d bytes over a second connection", n)
		}
		a.waitJournal("", "the second connection", func(e event.Event) bool {
			return e.Kind == "boot.refused" && e.Reason == event.BadRequest && e.Detail["from"] == a.vm.from.String() && strings.Contains(e.Detail["error"], "before admission")
		})
		if _, err := l.Fetch(bootmsg.PathUnique); err != nil {
			t.Errorf("the VM itself: %v", err)
		}
	})
	t.Run("early data", func(t *testing.T) {
		a := attack{t, s, vms[1], nil}
		answer, err := a.early()
		if err == nil && slices.Contains(strings.Fields(answer), "200") {
			t.Errorf("it is answered: %q", answer)
		}
		a.waitJournal("", "early data", func(e event.Event) bool {
			return e.Kind == "tls.refused" && e.Detail["from"] == a.vm.from.String() && strings.Contains(e.Detail["why"], "early data")
		})
		if err := a.opened("").Attest(t.Context(), s); err != nil { // T1 was not spent by it
			t.Errorf("the VM itself: %v", err)
		}
	})
	for i, c := range []struct {
		name string
		make func(string) string
	}{
		{"a duplicate key in the quote's answer", func(s string) string { return strings.Replace(s, `{`, `{"response":"AAAA",`, 1) }},
		{"data behind the quote's answer", func(s string) string { return s + "{}" }},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := attack{t, s, vms[2+i], nil}
			l := a.opened("")
			at, err := a.vm.host.broker.Attest(tenantName, a.measured(), a.tunnel(l))
			if err != nil {
				t.Fatal(err)
			}
			defer at.Release()
			answers := 0
			l.alter = func(path string, body []byte) []byte {
				if answers++; path == bootmsg.PathAttest && answers == 3 { // the poll, the session, and this
					return []byte(c.make(string(body)))
				}
				return body
			}
			err = l.session(func(command []byte) ([]byte, error) { return at.Forward(t.Context(), command) })
			if err == nil || !strings.Contains(err.Error(), "403") || answers != 3 || !at.Quoted() {
				t.Errorf("after %d messages: %v", answers, err)
			}
			a.ended(event.BootServerFailed, "as the boot server reports")
			a.waitJournal(a.vm.spec.Reservation, "the message", func(e event.Event) bool { return e.Kind == "boot.refused" && e.Reason == event.BadRequest })
		})
	}
}

// ticketing listens with a certificate of the boot servers' authority and name, and gives
// tickets.
func (a attack) ticketing() string {
	a.t.Helper()
	l, err := tls.Listen("tcp", "127.0.0.1:0", &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{a.evil().cert}, ClientAuth: tls.RequireAnyClientCert})
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			conn.Write([]byte{0})
			conn.Close()
		}
	}()
	return l.Addr().String()
}

// early sends T1 as TLS 1.3 early data, from the VM's address, and returns what is answered.
func (a attack) early() (string, error) {
	a.t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: a.vm.from.AsSlice()}}
	conn, err := d.DialContext(a.t.Context(), "tcp", a.s.boot.String())
	if err != nil {
		a.t.Fatal(err)
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(10 * time.Second)) // an open socket takes a deadline
	body, err := json.Marshal(bootmsg.OpenRequest{Token: a.vm.t1, VMKey: make([]byte, 32)})
	if err != nil {
		a.t.Fatal(err)
	}
	request := fmt.Appendf(nil, "POST %s HTTP/1.1\r\nHost: %s\r\nContent-Length: %d\r\n\r\n%s", bootmsg.PathOpen, bootDNS, len(body), body)
	record := append([]byte{23, 3, 3, byte(len(request) >> 8), byte(len(request))}, request...) // application data, RFC 8446, section 5.1
	if _, err := conn.Write(append(mtlstest.EarlyHello(a.t, bootDNS), record...)); err != nil {
		a.t.Fatal(err)
	}
	answer, err := io.ReadAll(conn)
	return string(answer), err
}
