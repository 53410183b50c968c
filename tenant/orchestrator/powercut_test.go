package orchestrator

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/zone"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// Orchestrators are started from so many copies, or from as many as fit into the time.
const (
	powerCuts    = 40
	powerCutTime = 45 * time.Second
)

// cut is the world at one moment between two transactions: the orchestrator's state, and
// what its host and the DMZ's daemons have, which a power cut at the orchestrator leaves
// as it is.
type cut struct {
	dir     string
	vms     map[string]*hostedVM
	volumes map[string]int64
	docs    map[string]zone.Document
	phase   reservation.Phase // of the VM; "" where there is none
	spent   map[digest.SHA256]bool
}

// cuts copies the world between transactions until stop is called.
func (w *world) cuts() (stop func() []cut) {
	root := w.t.TempDir()
	end, copies := make(chan struct{}), make(chan []cut)
	go func() {
		var taken []cut
		for {
			select {
			case <-end:
				copies <- taken
				return
			default:
			}
			c := cut{dir: filepath.Join(root, strconv.Itoa(len(taken)))}
			err := w.o.ledger.Write(context.Background(), func(*ledger.Tx) error { // nobody else commits meanwhile
				if err := os.CopyFS(c.dir, os.DirFS(w.conf.State)); err != nil {
					return err
				}
				c.vms, c.volumes = w.host.copies()
				w.mu.Lock()
				c.docs = maps.Clone(w.docs)
				w.mu.Unlock()
				return nil
			})
			if err == nil { // else a file of the vault went away under the copying
				taken = append(taken, c)
			} else {
				check(w.t, os.RemoveAll(c.dir))
			}
		}
	}()
	return func() []cut {
		close(end)
		return <-copies
	}
}

// copies is what the host has.
func (h *fakeHost) copies() (map[string]*hostedVM, map[string]int64) {
	h.mu.Lock()
	defer h.mu.Unlock()
	vms := map[string]*hostedVM{}
	for id, v := range h.vms {
		same := *v
		vms[id] = &same
	}
	return vms, maps.Clone(h.volumes)
}

// goBack makes the world what it was at the cut. Its orchestrator does not run.
func (w *world) goBack(c cut) {
	w.t.Helper()
	w.putBack(c.dir)
	w.host.mu.Lock()
	w.host.vms, w.host.volumes = map[string]*hostedVM{}, maps.Clone(c.volumes)
	for id, v := range c.vms {
		same := *v
		w.host.vms[id] = &same
	}
	w.host.mu.Unlock()
	w.mu.Lock()
	w.docs = maps.Clone(c.docs)
	w.mu.Unlock()
}

// look opens the copy's ledger, verifies its journal, and reads what it says.
func (c *cut) look(t *testing.T) {
	t.Helper()
	file := filepath.Join(c.dir, ledgerFile)
	l, err := ledger.Open(t.Context(), file, time.Now)
	check(t, err)
	check(t, l.Read(t.Context(), func(tx *ledger.Tx) error {
		rows, err := tx.Reservations()
		for _, r := range rows {
			c.phase = r.Phase
		}
		return errors.Join(err, tx.VerifyJournal())
	}))
	check(t, l.Close())
	db := must[*sql.DB](t)(sql.Open("sqlite", "file:"+file))
	defer db.Close()
	rows := must[*sql.Rows](t)(db.QueryContext(t.Context(), `SELECT digest FROM tokens WHERE state <> 'open'`))
	defer rows.Close()
	c.spent = map[digest.SHA256]bool{}
	for rows.Next() {
		var text string
		check(t, rows.Scan(&text))
		c.spent[must[digest.SHA256](t)(digest.Parse(text))] = true
	}
	check(t, rows.Err())
}

// uses are the tokens of a start with the calls that present them.
func (g *guest) uses() map[digest.SHA256]func() event.Reason {
	return map[digest.SHA256]func() event.Reason{
		g.vm.t1.Digest():     func() event.Reason { _, why := g.open(g.vm.t1); return why },
		g.unique.T2.Digest(): g.ready,
		g.hand.T3.Digest():   g.admit,
	}
}

// TestPowerCut: a copy of the state from between any two transactions of a VM's life is
// whole: the journal verifies, an orchestrator starts from it and gets along with what
// the host and the DMZ have by then, its fsck is clean, and no token that was spent can be
// spent again. From the copy the VM can be deleted, and then nothing of it is left. The
// same holds, for every token, if the copy is restored. (Within a transaction it is
// SQLite that keeps the promise, by its log.)
func TestPowerCut(t *testing.T) {
	w := newWorld(t)
	w.template("debian")
	stop := w.cuts()
	first := w.take(w.create(api.CreateVM{Name: "web"}).ID)
	first.pass()
	first.say()
	w.ask("restart", "web")
	w.host.stop(first.id, event.GuestPoweredOff)
	second := w.takeStart(first.id, 2)
	second.tunnel = second.tunnel.Next()
	second.pass()
	w.call("DELETE", "/v1/vms/web", nil, nil)
	taken := stop()
	w.stop()
	if len(taken) < 20 {
		t.Fatalf("only %d copies were taken", len(taken))
	}
	seen := map[reservation.Phase]int{}
	for i := range taken {
		taken[i].look(t)
		seen[taken[i].phase]++
	}
	tried, restored := 0, 0
	for end := time.Now().Add(powerCutTime); tried < min(len(taken), powerCuts) && time.Now().Before(end); tried++ {
		at := spread(tried, len(taken))
		restore := tried%5 == 4
		if restore {
			restored++
		}
		t.Run(fmt.Sprintf("%03d-%s-restored=%v", at, taken[at].phase, restore), func(t *testing.T) {
			w.t = t
			w.afterCut(taken[at], restore, first, second)
		})
	}
	w.t = t
	t.Logf("%d copies, %v; started from %d of them, %d restored", len(taken), seen, tried, restored)
	if tried < 5 {
		t.Errorf("only %d orchestrators were started from copies", tried)
	}
}

// spread is the i-th of n in an order that comes to every part of them early.
func spread(i, n int) int {
	stride := max(1, n*5/8)
	for gcd(stride, n) != 1 {
		stride++
	}
	return i * stride % n
}

func gcd(a, b int) int {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// afterCut starts an orchestrator from a copy and tries it.
func (w *world) afterCut(c cut, restore bool, guests ...*guest) {
	t := w.t
	w.goBack(c)
	if restore {
		_, err := Restore(t.Context(), w.conf.State)
		check(t, err)
		w.mu.Lock()
		clear(w.docs) // the daemons take a higher epoch with a lower revision
		w.mu.Unlock()
	}
	w.start()
	defer w.stop()
	w.fits("started from the copy")
	for _, g := range guests {
		for d, use := range g.uses() {
			if !restore && !c.spent[d] {
				continue
			}
			// One that is burnt, and not merely of no use any more: nothing ends by its use.
			if why := use(); why != event.TokenSpent && why != event.TokenExpired && (c.spent[d] || why != event.TokenUnknown) {
				t.Errorf("a token of start %d is presented again: %q", g.vm.spec.Start, why)
			}
		}
	}
	w.fits("after the tokens were tried again")
	w.call("DELETE", "/v1/vms/web", nil, nil)
	w.waitGone(guests[0].id)
	f := w.fsck()
	f.Motion = slices.DeleteFunc(f.Motion, func(m api.Finding) bool { return m.Code == "zone-behind" }) // daemons that have just come back
	if !f.Clean || len(f.Motion) != 0 || f.Looked.VMs != 0 || f.Looked.Instances != 0 || f.Looked.Volumes != 0 || f.Looked.Keys != 1 {
		t.Errorf("after the VM was deleted: %+v", f)
	}
}
