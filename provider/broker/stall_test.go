package broker

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"foothold/protocol/digest"

	"github.com/google/go-tpm/tpm2/transport"
)

// counted counts a TPM's commands: time that no busy machine stretches.
type counted struct {
	transport.TPM
	n *atomic.Int64
}

func (c counted) Send(command []byte) ([]byte, error) {
	c.n.Add(1)
	return c.TPM.Send(command)
}

// stalling gives a broker with room for so many sessions, and what counts its commands.
func stalling(t *testing.T, most int) (*Broker, func(do func() error) int64) {
	t.Helper()
	b, _ := newBroker(t, time.Hour)
	n := new(atomic.Int64)
	b.dev = counted{b.dev, n}
	b.sessions.most = most
	return b, func(do func() error) int64 {
		t.Helper()
		before := n.Load()
		if err := do(); err != nil {
			t.Fatal(err)
		}
		return n.Load() - before
	}
}

// stall opens a VM's session and says nothing more.
func (b *Broker) stall(t *testing.T, tenant, name string) *Attestation {
	t.Helper()
	a := b.begin(t, tenant, name)
	if _, _, err := bootSession(b, commands(t, a)); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return a
}

// TestStalledVMsDelayNobody: VMs that hold their sessions open and never quote, as many as
// a tenant may have and of as many tenants as there is room for, cost another tenant's boot
// no more than the commands of one quote, and a static quote none. The time limit, an hour
// here, is not what ends them.
func TestStalledVMsDelayNobody(t *testing.T) {
	const most = 6
	b, count := stalling(t, most)
	boot := func(tenant, name string) func() error {
		return func() error { return attest(b, commands(t, b.begin(t, tenant, name)), name) }
	}
	static := func() error {
		_, err := b.StaticQuote(t.Context(), "b", digest.Of(nil))
		return err
	}
	alone, staticAlone := count(boot("b", "alone")), count(static)
	quoting := alone - 3 // without opening a session: start, saving, and closing it
	var stalled []*Attestation
	for i := range most {
		stalled = append(stalled, b.stall(t, "a", fmt.Sprintf("a%d", i)))
	}
	if n := count(boot("b", "behind")); n > alone+quoting {
		t.Errorf("behind a tenant that stalls a boot takes %d TPM commands, alone %d", n, alone)
	}
	if n := count(static); n != staticAlone {
		t.Errorf("behind a tenant that stalls a static quote takes %d TPM commands, alone %d", n, staticAlone)
	}
	if <-stalled[0].Ended(); !errors.Is(stalled[0].Cause(), ErrEvicted) {
		t.Errorf("the oldest that stalls ended with %v", stalled[0].Cause())
	}
	for _, a := range stalled[1:] { // they may still come
		if a.Cause() != nil {
			t.Errorf("a second one had to go: %v", a.Cause())
		}
		a.Release()
	}
	for i := range most {
		b.stall(t, fmt.Sprintf("t%d", i), "stalls")
	}
	if n := count(boot("b", "behind all")); n > alone+quoting {
		t.Errorf("behind %d tenants that stall a boot takes %d TPM commands, alone %d", most, n, alone)
	}
}

// TestATenantWaitsForItself: who has as many sessions as anybody waits until one ends,
// and takes none away from those who have fewer.
func TestATenantWaitsForItself(t *testing.T) {
	b, _ := stalling(t, 3)
	first := b.stall(t, "a", "a1")
	b.stall(t, "a", "a2")
	other := b.stall(t, "b", "b1")
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	more := b.begin(t, "a", "a3")
	if _, _, err := bootSession(b, send(func(c []byte) ([]byte, error) { return more.Forward(ctx, c) })); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("a tenant's session too many: %v", err)
	}
	next, done := b.begin(t, "a", "a4"), make(chan error)
	go func() { done <- attest(b, commands(t, next), "a4") }()
	first.Release()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if other.Cause() != nil {
		t.Errorf("another tenant's only session had to go: %v", other.Cause())
	}
}

// TestPlacesGoRound: those who wait are woken by whatever makes room, in turn.
func TestPlacesGoRound(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := &sessions{most: 2, changed: make(chan struct{})}
		take := func(tenant string) *session {
			a := &Attestation{tenant: tenant}
			a.mu.Lock() // it is being worked on all the time: nobody is evicted
			s, err := p.take(t.Context(), a)
			if err != nil {
				t.Error(err)
			}
			return s
		}
		one, two := take("a"), take("b")
		got := make(chan *session, 3)
		for _, tenant := range []string{"c", "a", "b"} {
			go func() { got <- take(tenant) }()
			synctest.Wait()
		}
		if len(got) != 0 {
			t.Fatal("more places than there are")
		}
		p.leave(one)
		synctest.Wait()
		if s := <-got; s.of.tenant != "c" {
			t.Errorf("%s went first", s.of.tenant)
		}
		p.leave(two)
		synctest.Wait()
		if s := <-got; s.of.tenant != "a" {
			t.Errorf("%s went second", s.of.tenant)
		}
		p.leave(p.open[0])
		synctest.Wait()
		if s := <-got; s.of.tenant != "b" {
			t.Errorf("%s went third", s.of.tenant)
		}
	})
}

// TestOldSessionsStayGood: a session that waits while many others come and go is saved anew
// in time, and its quote is good.
func TestOldSessionsStayGood(t *testing.T) {
	b, count := stalling(t, 10)
	b.gap = 4
	var commandsOf send
	slow := b.begin(t, "a", "slow")
	commandsOf = func(c []byte) ([]byte, error) {
		if req, err := parse(c); err == nil && req.kind == quote {
			alone := count(func() error { return attest(b, commands(t, b.begin(t, "b", "0")), "0") })
			most := alone
			for i := range 10 {
				name := fmt.Sprint(i)
				most = max(most, count(func() error { return attest(b, commands(t, b.begin(t, "b", name)), name) }))
			}
			if most != alone+2 { // load and save
				t.Errorf("a boot took %d commands at most, want %d", most, alone+2)
			}
		}
		return slow.Forward(t.Context(), c)
	}
	if err := attest(b, commandsOf, "slow"); err != nil {
		t.Error(err)
	}
	clean(t, b)
}
