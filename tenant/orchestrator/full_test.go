package orchestrator

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/internal/nstest"
	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/hostapi"
	"foothold/protocol/token"
	"foothold/tenant/hostclient"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
	"foothold/tenant/verify"
)

// atOnce is how many tests run side by side where -parallel does not say: each waits
// more than it computes.
const atOnce = "4"

func TestMain(m *testing.M) {
	if err := flag.Set("test.parallel", atOnce); err != nil {
		panic(err)
	}
	os.Exit(nstest.Main(m))
}

// ontoDisk moves the orchestrator's state to a small disk.
func (w *world) ontoDisk() *nstest.Disk {
	w.t.Helper()
	disk := nstest.SmallDisk(w.t, "size=16m")
	w.stop()
	w.t.Cleanup(func() { w.stop() }) // before the disk goes
	old := w.conf.State
	w.conf.State = filepath.Join(disk.Path, "tenant")
	w.putBack(old)
	w.start()
	return disk
}

// fillUp fills the disk, and what the ledger has allocated on it.
func (w *world) fillUp(disk *nstest.Disk) {
	w.t.Helper()
	disk.Fill(w.t)
	for range 2000 {
		err := w.o.ledger.Write(w.t.Context(), func(t *ledger.Tx) error {
			return t.Journal(event.Event{Kind: "test.entry", Detail: map[string]string{"text": strings.Repeat("x", 4096)}})
		})
		if errors.Is(err, ledger.ErrFull) {
			return
		}
		check(w.t, err)
	}
	w.t.Fatal("the disk does not get full")
}

// stateFiles lists the files of the state beside the ledger.
func (w *world) stateFiles() (names []string) {
	w.t.Helper()
	check(w.t, filepath.WalkDir(w.conf.State, func(path string, e os.DirEntry, err error) error {
		if err == nil && !e.IsDir() && !strings.Contains(e.Name(), "ledger") {
			names = append(names, path)
		}
		return err
	}))
	return names
}

// quotes counts the accepted ones of a VM's host.
func (w *world) quotes(name string) (n int) {
	w.t.Helper()
	for _, kind := range w.events(name) {
		if kind == "quote.accepted" {
			n++
		}
	}
	return n
}

// TestDiskFull: while the orchestrator's disk is full, new work is refused by that name
// and leaves nothing, no token is spent or honoured, and a VM that computes stays; with
// room again everything goes on.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config) { c.Limits.Booting, c.Limits.Lease = time.Minute, time.Minute })
	w.template("debian")
	w.watchEvery = 100 * time.Millisecond
	disk := w.ontoDisk()
	running := w.computing("web")
	starting := w.take(w.create(api.CreateVM{Name: "next"}).ID)
	w.fits("before the disk is full")
	another, _ := w.registration("another")
	registered := must[[]byte](t)(json.Marshal(another))
	files := w.stateFiles()
	w.fillUp(disk)

	wish := must[[]byte](t)(json.Marshal(api.CreateVM{Name: "late"}))
	for range 3 {
		if status, p := w.call("POST", "/v1/vms", wish, nil); status != http.StatusInsufficientStorage || p.Reason != event.DiskFull || p.Next == "" {
			t.Errorf("a wish: %d %+v", status, p)
		}
	}
	if status, p := w.call("POST", "/v1/templates", registered, nil); status != http.StatusInsufficientStorage || p.Reason != event.DiskFull {
		t.Errorf("a template: %d %+v", status, p)
	}
	if status, p := w.call("DELETE", "/v1/vms/next", nil, nil); status != http.StatusInsufficientStorage || p.Reason != event.DiskFull {
		t.Errorf("a deletion: %d %+v", status, p)
	}
	if opened, why := starting.open(starting.vm.t1); why != event.DiskFull || opened.Reservation != "" || len(opened.Nonce) != 0 {
		t.Errorf("T1: %q, %+v", why, opened)
	}
	if _, why := running.say(); why != event.DiskFull {
		t.Errorf("a heartbeat: %q", why)
	}
	pause(t.Context(), 5*w.watchEvery) // the watch over its host finds no room, more than once
	if vm := w.vm("web"); vm.Phase != string(reservation.Computing) || vm.Start != 1 || !w.host.has(vm.ID) {
		t.Errorf("the VM that runs: %+v", vm)
	}
	if vm := w.vm("next"); vm.Phase != string(reservation.Booting) {
		t.Errorf("the VM that boots: %+v", vm)
	}
	if got := w.stateFiles(); !slices.Equal(got, files) {
		t.Errorf("files of the state: %q, there were %q", got, files)
	}
	w.fits("on a full disk")

	disk.Free(t)
	w.fits("with room again")
	if _, why := running.say(); why != "" {
		t.Errorf("a heartbeat with room: %q", why)
	}
	quotes := w.quotes("web")
	for end := time.Now().Add(20 * time.Second); w.quotes("web") == quotes; pause(t.Context(), 20*time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the host of the VM that runs is not watched any more")
		}
	}
	starting.tunnel = starting.tunnel.Next()
	starting.pass()
	if _, why := starting.open(starting.own(token.T1)); why != event.TokenSpent {
		t.Errorf("T1 again: %q", why)
	}
	late := w.take(w.create(api.CreateVM{Name: "late"}).ID)
	late.tunnel = late.tunnel.Next().Next()
	late.pass()
	if vm := w.vm("web"); vm.Phase != string(reservation.Computing) || vm.Start != 1 {
		t.Errorf("the VM that ran: %+v", vm)
	}
	check(t, w.o.ledger.Read(t.Context(), func(tx *ledger.Tx) error { return tx.VerifyJournal() }))
	w.fits("in the end")
	w.restart()
	w.fits("after a restart")
}

// TestEndOnAFullDisk: an end that finds no room is owed. The VM gets nothing more from then
// on, and ends for the first reason as soon as there is room.
func TestEndOnAFullDisk(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config) { c.Limits.Lease = time.Minute })
	w.template("debian")
	disk := w.ontoDisk()
	g := w.computing("web")
	admitted, err := w.o.attestAgain(t.Context(), g.id, evidence.RoleWatch)
	check(t, err)
	r, s, err := w.o.row(t.Context(), g.id)
	check(t, err)
	permitted := func() (why event.Reason) {
		check(t, w.o.ledger.Read(t.Context(), func(tx *ledger.Tx) error {
			_, err := w.o.permitted(tx, admitted, r, reservation.Computing)
			why = event.ReasonOf(err)
			return nil
		}))
		return why
	}
	if why := permitted(); why != "" {
		t.Fatalf("before its end: %q", why)
	}
	w.fillUp(disk)

	refused := event.Refuse(event.QuoteRefused, "test")
	refused.Findings = []event.FailedCheck{{Check: "log"}}
	w.o.abort(t.Context(), g.id, 1, event.Refuse(event.AttestationLate, "an outage before the judgement"))
	w.o.abort(t.Context(), g.id, 1, refused)
	w.o.abort(t.Context(), g.id, 1, event.Refuse(event.VMStopped, "news after it"))
	if vm := w.vm("web"); vm.Phase != string(reservation.Computing) {
		t.Fatalf("the disk is not full: %+v", vm)
	}
	// None is accepted, and the refusal is told: at the latest when no other write of the
	// same commit finds the disk full, which fails them all.
	told := func(what string, say func() event.Reason) {
		t.Helper()
		for end := time.Now().Add(20 * time.Second); ; {
			switch why := say(); {
			case why == event.QuoteRefused:
				return
			case why != event.DiskFull || time.Now().After(end):
				t.Errorf("%s: %q", what, why)
				return
			}
		}
	}
	told("a heartbeat", func() event.Reason { _, why := g.say(); return why })
	told("a heartbeat that was accepted before", func() event.Reason {
		_, err := w.o.hearComputing(t.Context(), accepted{r: r, s: s})
		if errors.Is(err, ledger.ErrFull) {
			return event.DiskFull
		}
		return event.ReasonOf(err)
	})
	if why := permitted(); why != event.QuoteRefused {
		t.Errorf("a release: %q", why)
	}

	disk.Free(t)
	if vm := w.waitPhase("web", reservation.Aborted); vm.Reason != event.QuoteRefused {
		t.Errorf("with room again: %+v", vm)
	}
	w.waitFlows(g.id)
	w.waitGone(g.id)
	for end := time.Now().Add(20 * time.Second); w.o.owesEnd(g.id, 1) != nil; pause(t.Context(), 10*time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("its end is owed still")
		}
	}
}

// TestRefusalOnAFullDisk: a refused quote whose evidence finds no room is refused all the
// same, not put off as disk-full, and ends the VM when there is room.
func TestRefusalOnAFullDisk(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config) { c.Limits.Lease = time.Minute })
	w.template("debian")
	disk := w.ontoDisk()
	g := w.computing("web")
	r, s, err := w.o.row(t.Context(), g.id)
	check(t, err)
	w.host.measureRogue()
	x := verify.StaticExpectation{Role: evidence.RoleWatch, Reservation: g.id, Start: 1, Host: r.Host, Previous: s.Verdict, Nonce: bytes.Repeat([]byte{1}, evidence.NonceLen)}
	h := must[*hostclient.Client](t)(w.o.host(r.Host))
	q := must[hostapi.QuoteResponse](t)(h.Quote(t.Context(), evidence.StaticBinding(x.Role, g.id, s.Verdict, x.Nonce)))
	w.fillUp(disk)
	w.o.drive(g.id, 1, "watch", func(ctx context.Context) error {
		err := w.o.judge(func(v *verify.Verifier) (*verify.Admitted, verify.Verdict) {
			return v.Static(x, verify.StaticEvidence{Quote: q.Quote, Platform: q.Platform})
		}, func(b *basis, _ *verify.Admitted, v verify.Verdict) error { return w.o.keepVerdict(ctx, r, b, v, nil) })
		if event.ReasonOf(err) != event.QuoteRefused {
			t.Errorf("the refusal: %v", err)
		}
		return err
	})
	for end := time.Now().Add(20 * time.Second); w.o.owesEnd(g.id, 1) == nil; pause(t.Context(), 10*time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("its end is not owed")
		}
	}
	disk.Free(t)
	vm := w.waitPhase("web", reservation.Aborted)
	if vm.Reason != event.QuoteRefused || len(vm.Findings) == 0 {
		t.Errorf("with room again: %+v", vm)
	}
	w.waitFlows(g.id)
	w.waitGone(g.id)
}
