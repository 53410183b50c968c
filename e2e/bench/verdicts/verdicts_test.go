package verdicts

import (
	"fmt"
	"net"
	"testing"
	"time"
)

// TestEvidenceIsJudged: all three judges take the evidence, and each refuses some of it
// that was altered; a nonce is spent once.
func TestEvidenceIsJudged(t *testing.T) {
	e, err := Make(t.Context(), t.TempDir(), 40)
	if err != nil {
		t.Fatal(err)
	}
	theirs, err := e.GoAttestation()
	if err != nil {
		t.Fatal(err)
	}
	bare, err := e.Bare()
	if err != nil {
		t.Fatal(err)
	}
	for name, judge := range map[string]Judge{"ours": e.Ours(), "go-attestation": theirs, "bare": bare} {
		o, err := e.Run(t.Context(), judge, Load{Clients: 4})
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if o.Rate <= 0 || o.CPU <= 0 || o.Percentile(99) < o.Percentile(50) {
			t.Errorf("%s: %+v", name, o)
		}
		bad := e.requests[0]
		bad.Evidence.Quote.Attest = append([]byte(nil), bad.Evidence.Quote.Attest...)
		bad.Evidence.Quote.Attest[20] ^= 1
		if err := judge(bad); err == nil {
			t.Errorf("%s: takes an altered quote", name)
		}
	}
	if each, err := e.Kept(t.Context(), 5); err != nil || each <= 0 {
		t.Errorf("stored in %s, %v", each, err)
	}
	if len(e.Held) != 40 || len(e.Own) == 0 {
		t.Errorf("the TPM was timed %d and %d times", len(e.Held), len(e.Own))
	}
	e.requests = append(e.requests, e.requests[0])
	if _, err := e.Run(t.Context(), bare, Load{Clients: 1}); err == nil {
		t.Error("a nonce was spent twice")
	}
}

// TestLatencyCountsFromWhenACallIsDue: neither a busy client nor a late alarm hides waiting.
func TestLatencyCountsFromWhenACallIsDue(t *testing.T) {
	l := Load{Clients: 1, Rate: 1000}
	clock, err := newAlarm()
	if err != nil {
		t.Fatal(err)
	}
	defer clock.close()
	for what, began := range map[string]time.Time{"ahead": time.Now(), "late": time.Now().Add(-time.Second)} {
		due := l.due(began, 20)
		if from := began.Add(20 * time.Millisecond); !from.Equal(due) {
			t.Errorf("%s: counted from %s after it was due", what, due.Sub(from))
		}
		if err := clock.wait(due); err != nil {
			t.Fatal(err)
		}
		if early := time.Until(due); early > 0 {
			t.Errorf("%s: begun %s early", what, early)
		}
	}
}

// TestABusyJudgeCountsAsLatency: calls that are due while the only client waits for an answer
// have that counted.
func TestABusyJudgeCountsAsLatency(t *testing.T) {
	e, err := Make(t.Context(), t.TempDir(), 10)
	if err != nil {
		t.Fatal(err)
	}
	const each = 20 * time.Millisecond
	slow := func(request) error { time.Sleep(each); return nil }
	o, err := e.Run(t.Context(), slow, Load{Clients: 1, Rate: 1000})
	if err != nil {
		t.Fatal(err)
	}
	// The last call is due 9 ms after the first, and answered after all ten.
	if last, want := o.Percentile(100), 10*each-9*time.Millisecond; last < want {
		t.Errorf("a latency of %s, want %s or more", last, want)
	}
}

func TestDelayIsARoundTrip(t *testing.T) {
	here, there := net.Pipe()
	const by = 50 * time.Millisecond
	d := delayed(here, by)
	defer d.Close()
	began := time.Now()
	for i := range 3 {
		if n, err := fmt.Fprint(d, i); n != 1 || err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(began); took >= by {
		t.Errorf("the writer waited %s", took)
	}
	got := make([]byte, 1)
	for i := range 3 {
		if _, err := there.Read(got); err != nil || string(got) != fmt.Sprint(i) {
			t.Fatalf("%q, %v", got, err)
		}
	}
	if took := time.Since(began); took < by {
		t.Errorf("it arrived after %s", took)
	}
}

// BenchmarkJudge is what the judging alone costs; to profile.
func BenchmarkJudge(b *testing.B) {
	e, err := Make(b.Context(), b.TempDir(), 20)
	if err != nil {
		b.Fatal(err)
	}
	theirs, err := e.GoAttestation()
	if err != nil {
		b.Fatal(err)
	}
	bare, err := e.Bare()
	if err != nil {
		b.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		judge Judge
	}{{"ours", e.Ours()}, {"go-attestation", theirs}, {"bare", bare}} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			before := processorTime()
			for i := 0; b.Loop(); i++ {
				if err := c.judge(e.requests[i%len(e.requests)]); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64((processorTime()-before).Nanoseconds())/float64(b.N), "cpu-ns/op")
		})
	}
}
