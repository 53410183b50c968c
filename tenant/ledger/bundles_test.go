package ledger

import (
	"bytes"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/tenant/verify"
)

func doc(text string) verify.Document {
	return verify.Document{SHA256: digest.Of([]byte(text)), Data: []byte(text)}
}

// parts is a verdict of VM 1 after previous.
func parts(c *clock, role string, n int, previous digest.SHA256, accepted bool, logs string) verify.Parts {
	record := fmt.Appendf(nil, "record of %s %d", role, n)
	return verify.Parts{Link: verify.Link{Role: role, Reservation: identifier(1), Start: 1, Host: "host-1", At: c.Now(), Accepted: accepted,
		Previous: previous, Record: digest.Of(record)}, Record: record, Logs: doc(logs), Inventory: doc("inventory"), Platform: doc("platform")}
}

// TestBundlesAreBounded: of a VM that computes for long the newest evidence of its watch
// stays, with all of its way up and every refusal; of the rest, the links of one chain.
func TestBundlesAreBounded(t *testing.T) {
	l, c := openTest(t)
	reserve(t, l, c, 1)
	var all []verify.Parts
	last := digest.SHA256{}
	add := func(role string, accepted bool, logs string) {
		p := parts(c, role, len(all), last, accepted, logs)
		must(t, l, func(tx *Tx) error { return tx.AddBundle(p) })
		all, last = append(all, p), p.Link.Digest()
		c.Add(time.Minute)
	}
	add("boot", true, "logs before")
	add("unlock", true, "logs before")
	add("connect", true, "logs before")
	const more = 3
	for i := range KeepWatch + more {
		add("watch", true, map[bool]string{true: "logs of the first", false: "logs of the others"}[i < more])
	}
	add("watch", false, "logs of the refusal")
	var rows []BundleRow
	must(t, l, func(tx *Tx) (err error) { rows, err = tx.Bundles(identifier(1), 1); return err })
	if len(rows) != len(all) {
		t.Fatalf("%d links of %d", len(rows), len(all))
	}
	var links []verify.Link
	for i, r := range rows {
		links = append(links, r.Link)
		if r.Link != all[i].Link || r.Digest != r.Link.Digest() {
			t.Errorf("link %d: %+v, want %+v", i, r, all[i].Link)
		}
		if kept := i < 3 || i >= 3+more; r.Kept != kept {
			t.Errorf("link %d (%s): kept %v, want %v", i, r.Role, r.Kept, kept)
		}
		var p verify.Parts
		err := l.Read(t.Context(), func(tx *Tx) (err error) { p, err = tx.Bundle(identifier(1), r.Digest); return err })
		if r.Kept != (err == nil) || !r.Kept && !errors.Is(err, ErrNotFound) {
			t.Errorf("bundle %d: %v", i, err)
		}
		if r.Kept && (!bytes.Equal(p.Record, all[i].Record) || p.Logs.SHA256 != all[i].Logs.SHA256 || string(p.Inventory.Data) != "inventory" || string(p.Platform.Data) != "platform") {
			t.Errorf("bundle %d: %+v", i, p)
		}
	}
	if chain := verify.AuditChain(nil, links); !chain.Holds() || !chain.Complete || chain.Last != last {
		t.Errorf("chain %+v", chain)
	}
	var docs []string
	must(t, l, func(tx *Tx) error {
		return tx.each("documents", `SELECT CAST(data AS TEXT) FROM evidence_parts`, func(row scanner) error {
			var text string
			err := row.Scan(&text)
			docs = append(docs, text)
			return err
		})
	})
	slices.Sort(docs)
	if want := []string{"inventory", "logs before", "logs of the others", "logs of the refusal", "platform"}; !slices.Equal(docs, want) {
		t.Errorf("documents %q, want %q", docs, want)
	}
	err := l.Read(t.Context(), func(tx *Tx) error { _, err := tx.Bundle(identifier(2), last); return err })
	if !errors.Is(err, ErrNotFound) {
		t.Errorf("the bundle of another VM: %v", err)
	}
	if err := l.Write(t.Context(), func(tx *Tx) error { return tx.AddBundle(all[0]) }); err == nil {
		t.Error("one verdict was kept twice")
	}
}

// TestWaysUpAreBounded: of a VM that is started again and again the newest starts' evidence
// stays, and of the others the links and every refusal.
func TestWaysUpAreBounded(t *testing.T) {
	l, c := openTest(t)
	reserve(t, l, c, 1)
	const starts = KeepStarts/3 + 2
	var newest digest.SHA256
	for i := range starts {
		last := digest.SHA256{}
		for _, role := range []string{"boot", "unlock", "connect"} {
			p := parts(c, role, i, last, i != 0 || role != "unlock", "logs")
			p.Link.Start = i + 1
			must(t, l, func(tx *Tx) error { return tx.AddBundle(p) })
			last = p.Link.Digest()
			c.Add(time.Minute)
		}
		newest = last
	}
	for start := 1; start <= starts; start++ {
		var rows []BundleRow
		must(t, l, func(tx *Tx) (err error) { rows, err = tx.Bundles(identifier(1), start); return err })
		if len(rows) != 3 {
			t.Fatalf("start %d has %d links", start, len(rows))
		}
		for _, r := range rows {
			if want := start > 2 || !r.Accepted; r.Kept != want {
				t.Errorf("start %d, %s: kept %v", start, r.Role, r.Kept)
			}
		}
	}
	must(t, l, func(tx *Tx) error {
		have, err := tx.NewestBundle(identifier(1), starts)
		if err == nil && have != newest {
			t.Errorf("the newest is %s, want %s", have, newest)
		}
		none, err2 := tx.NewestBundle(identifier(1), 2)
		if !none.IsZero() {
			t.Errorf("start 2 has %s", none)
		}
		return errors.Join(err, err2)
	})
}

// TestUnjudgedAreBounded: of a VM that starts again and again, and is refused each time before
// there is a quote to judge, the newest refusals stay, and of the others the links. None is
// taken for a quote.
func TestUnjudgedAreBounded(t *testing.T) {
	l, c := openTest(t)
	reserve(t, l, c, 1)
	const starts = KeepUnjudged + 2
	for i := range starts {
		p := parts(c, "boot", i, digest.SHA256{}, false, fmt.Sprint("logs of ", i))
		p.Link.Start, p.Link.Unjudged = i+1, true
		must(t, l, func(tx *Tx) error { return tx.AddBundle(p) })
		c.Add(time.Minute)
	}
	for start := 1; start <= starts; start++ {
		must(t, l, func(tx *Tx) error {
			rows, err := tx.Bundles(identifier(1), start)
			if len(rows) != 1 || !rows[0].Unjudged || rows[0].Digest != rows[0].Link.Digest() || rows[0].Kept != (start > 2) {
				t.Errorf("start %d: %+v", start, rows)
			}
			if newest, err := tx.NewestBundle(identifier(1), start); !newest.IsZero() || err != nil {
				t.Errorf("start %d: %s is taken for a quote's, %v", start, newest.Short(), err)
			}
			if _, err := tx.RefusedBundle(identifier(1), start); !errors.Is(err, ErrNotFound) {
				t.Errorf("start %d: it is taken for a refused quote: %v", start, err)
			}
			return err
		})
	}
	n := 0
	must(t, l, func(tx *Tx) error {
		return tx.each("documents", `SELECT count(*) FROM evidence_parts`, func(row scanner) error { return row.Scan(&n) })
	})
	if n != KeepUnjudged+2 { // logs, and inventory and reference values once
		t.Errorf("%d documents", n)
	}
}

// TestWhyANonceIsRefused: a nonce that is refused is named for what it is; one that is awaited
// still is known.
func TestWhyANonceIsRefused(t *testing.T) {
	l, c := openTest(t)
	reserve(t, l, c, 1)
	var nonce []byte
	awaited := func(want time.Time) {
		t.Helper()
		must(t, l, func(tx *Tx) error {
			since, err := tx.AwaitedQuote(identifier(1), 1, "boot")
			if !since.Equal(want) {
				t.Errorf("awaited since %v, want %v", since, want)
			}
			return err
		})
	}
	refused := func(n []byte, role string, most time.Duration, want string) {
		t.Helper()
		err := l.Write(t.Context(), func(tx *Tx) error { return tx.UseNonce(n, identifier(1), 1, role, most) })
		if event.ReasonOf(err) != event.QuoteRefused || !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
	awaited(time.Time{})
	made := c.Now()
	must(t, l, func(tx *Tx) (err error) { nonce, err = tx.NewNonce(identifier(1), 1, "boot"); return err })
	awaited(made)
	c.Add(time.Minute)
	refused(nonce, "boot", time.Second, "not fresh")
	refused(nonce, "watch", time.Hour, "not ours")
	refused(nonce[1:], "boot", time.Hour, "not ours")
	must(t, l, func(tx *Tx) error { return tx.UseNonce(nonce, identifier(1), 1, "boot", time.Hour) })
	awaited(time.Time{})
	refused(nonce, "boot", time.Hour, "used before")
}

// TestNonceOverARestart: a nonce that was used before the ledger was closed is used after
// it, one that was not still serves once, and one that was forgotten serves nobody.
func TestNonceOverARestart(t *testing.T) {
	file, c := filepath.Join(t.TempDir(), "ledger.db"), newClock()
	l := openAt(t, file, c)
	reserve(t, l, c, 1)
	var used, open []byte
	must(t, l, func(tx *Tx) (err error) { used, err = tx.NewNonce(identifier(1), 1, "watch"); return err })
	must(t, l, func(tx *Tx) (err error) { open, err = tx.NewNonce(identifier(1), 1, "watch"); return err })
	use := func(nonce []byte, age time.Duration) event.Reason {
		return event.ReasonOf(l.Write(t.Context(), func(tx *Tx) error { return tx.UseNonce(nonce, identifier(1), 1, "watch", age) }))
	}
	if why := use(used, time.Minute); why != "" {
		t.Fatal(why)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = openAt(t, file, c)
	defer l.Close()
	if why := use(used, time.Minute); why != event.QuoteRefused {
		t.Errorf("a nonce that was used before the restart: %q", why)
	}
	if why := use(open, time.Minute); why != "" {
		t.Errorf("an open one: %q", why)
	}
	c.Add(nonceKept + time.Second)
	must(t, l, func(tx *Tx) error { _, err := tx.NewNonce(identifier(1), 1, "watch"); return err })
	for _, nonce := range [][]byte{used, open} {
		if why := use(nonce, 100*24*time.Hour); why != event.QuoteRefused {
			t.Errorf("a forgotten one: %q", why)
		}
	}
	var left int
	must(t, l, func(tx *Tx) error {
		return tx.each("nonces", `SELECT count(*) FROM nonces`, func(row scanner) error { return row.Scan(&left) })
	})
	if left != 1 {
		t.Errorf("%d nonces are remembered", left)
	}
}
