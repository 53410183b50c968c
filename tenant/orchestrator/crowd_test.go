package orchestrator

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// How many want a VM at once, have one, and boot at the host at once.
const (
	crowd         = 50
	crowdVMs      = 40
	crowdBoots    = 8
	crowdPatience = 5 * time.Minute
)

// crowdConfig lets a crowd take its time: how long a busy machine needs for it is no
// matter here.
func crowdConfig(c *Config) {
	c.Network.Last = netip.MustParseAddr("10.82.0.200")
	c.Limits = Limits{Reserved: crowdPatience, Booting: crowdPatience, Unlocking: crowdPatience, Connecting: crowdPatience, Lease: crowdPatience,
		VMs: 100, MemoryMiB: 100 << 10, BootsAtOnce: crowdBoots, AttestEvery: time.Minute, AttestWithin: 5 * time.Minute}
}

// TestCrowd: of fifty creations at once on one host, those within the limit all come to
// computing, in the order in which they were reserved and never more than boots_at_once
// booting at a time; the others are refused at once. Nothing is out of place meanwhile
// or afterwards.
func TestCrowd(t *testing.T) {
	w := newWorld(t, crowdConfig, func(c *Config) { c.Limits.VMs = crowdVMs })
	w.template("debian")
	look := w.lookOn()
	reserved := w.rush(event.QuotaExceeded, "40 of 40 VMs")
	w.fits("just reserved")
	var guests sync.WaitGroup
	for i, id := range reserved {
		guests.Go(func() { w.passInTurn(look, id, netip.AddrFrom4([4]byte{10, 84, 1, byte(i + 1)})) })
	}
	guests.Wait()
	if n := look.most(); n != crowdBoots {
		t.Errorf("%d VMs booted at once, want %d", n, crowdBoots)
	}
	w.inOrder()
	w.fits("afterwards")
}

// TestCrowdPastTheCapacity: whichever limit a crowd runs into, it is named, with the next
// step, and exactly what is within it is reserved.
func TestCrowdPastTheCapacity(t *testing.T) {
	for name, limit := range map[string]struct {
		set    func(*Config)
		reason event.Reason
		names  string
	}{
		"memory":    {func(c *Config) { c.Limits.MemoryMiB = crowdVMs * 1024 }, event.QuotaExceeded, "40960 of 40960 MiB"},
		"addresses": {func(c *Config) { c.Network.Last = netip.MustParseAddr("10.82.0.49") }, event.PoolEmpty, "all 40 addresses"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, crowdConfig, limit.set)
			w.template("debian")
			w.rush(limit.reason, limit.names)
			w.fits("just reserved")
		})
	}
}

// passInTurn takes a VM to computing, when its turn comes.
func (w *world) passInTurn(look *onlooker, id string, tunnel netip.Addr) {
	look.await(id, func(_ ledger.Reservation, started bool) bool { return started })
	g := w.take(id)
	g.tunnel = tunnel
	did := func(what string, why event.Reason) {
		if why != "" {
			w.t.Errorf("%s: %s: %s", id, what, why)
		}
	}
	did("boot", g.boot())
	g.door()
	did("ready", g.ready())
	look.await(id, func(r ledger.Reservation, _ bool) bool { return r.Phase == reservation.Connecting })
	did("admit", g.admit())
	_, why := g.say()
	did("first message", why)
	_, why = g.say(g.withAudit)
	did("audit", why)
	look.await(id, func(r ledger.Reservation, _ bool) bool { return r.Phase == reservation.Computing })
}

// rush creates a crowd of VMs at once and returns the ids of those within the limit.
func (w *world) rush(want event.Reason, names string) (ids []string) {
	w.t.Helper()
	var mu sync.Mutex
	var all sync.WaitGroup
	refused := 0
	began := time.Now()
	for i := range crowd {
		all.Go(func() {
			var vm api.VM
			body, err := json.Marshal(api.CreateVM{Name: fmt.Sprintf("vm-%d", i), Restart: string(reservation.Never)})
			if err != nil {
				w.t.Error(err)
			}
			status, p := w.call("POST", "/v1/vms", body, &vm)
			mu.Lock()
			defer mu.Unlock()
			if status == http.StatusCreated {
				ids = append(ids, vm.ID)
				return
			}
			refused++
			if p.Reason != want || !strings.Contains(p.Detail, names) || p.Next == "" {
				w.t.Errorf("refused: %d %+v", status, p)
			}
		})
	}
	all.Wait()
	if len(ids) != crowdVMs || refused != crowd-crowdVMs {
		w.t.Fatalf("%d reserved, %d refused", len(ids), refused)
	}
	w.t.Logf("answered within %v", time.Since(began).Round(time.Millisecond))
	return ids
}

// onlooker looks at the ledger for all who wait for a VM: forty that look for themselves
// would be the load that they wait for.
type onlooker struct {
	w      *world
	stop   func()
	ended  chan struct{}
	mu     sync.Mutex
	live   map[string]ledger.Reservation // guarded by mu
	waits  map[string]bool               // guarded by mu; those booting that the host has not started yet
	high   int                           // guarded by mu; most in phase booting at once
	looked chan struct{}                 // guarded by mu; closed and replaced with each look
}

func (w *world) lookOn() *onlooker {
	ctx, stop := context.WithCancel(w.t.Context())
	o := &onlooker{w: w, stop: stop, ended: make(chan struct{}), looked: make(chan struct{})}
	go func() {
		defer close(o.ended)
		for pause(ctx, 10*time.Millisecond) == nil {
			w.o.ledger.Read(ctx, o.look)
		}
	}()
	return o
}

func (o *onlooker) look(tx *ledger.Tx) error {
	rows, err := tx.Live()
	if err != nil {
		return err
	}
	live, waits, booting := map[string]ledger.Reservation{}, map[string]bool{}, 0
	for _, r := range rows {
		live[r.ID] = r
		if r.Phase == reservation.Booting {
			booting++
			s, err := tx.Start(r.ID, r.Start)
			if err != nil {
				return err
			}
			waits[r.ID] = s.HostStarted.IsZero()
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.live, o.waits, o.high = live, waits, max(o.high, booting)
	close(o.looked)
	o.looked = make(chan struct{})
	return nil
}

// await returns when a VM, which has been reserved, is as wanted.
func (o *onlooker) await(id string, ok func(r ledger.Reservation, started bool) bool) {
	o.w.t.Helper()
	late := time.After(crowdPatience)
	for looks := 0; ; looks++ {
		o.mu.Lock()
		r, live := o.live[id]
		started := r.Phase != reservation.Reserved && !o.waits[id]
		looked := o.looked
		o.mu.Unlock()
		switch {
		case live && ok(r, started):
			return
		case !live && looks > 1: // an earlier look may be older than the VM
			o.w.t.Fatalf("VM %s is not live any more: %+v", id, o.w.vm(id))
		}
		select {
		case <-looked:
		case <-late:
			o.w.t.Fatalf("VM %s is still %s", id, r.Phase)
		}
	}
}

// most ends the looking and returns how many were in phase booting at once.
func (o *onlooker) most() int {
	o.stop()
	<-o.ended
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.high
}

// inOrder wants that hosts were asked for VMs in the order of the reservations, but for
// those who had a place at the same time.
func (w *world) inOrder() {
	w.t.Helper()
	var list []api.JournalEntry
	w.call("GET", "/v1/events?limit=10000", nil, &list)
	var reserved, asked []string
	for _, e := range list {
		switch e.Event.Kind {
		case "vm.reserved":
			reserved = append(reserved, e.Event.Reservation)
		case "vm.create-asked":
			asked = append(asked, e.Event.Reservation)
		}
	}
	if len(reserved) != crowdVMs || len(asked) != crowdVMs {
		w.t.Fatalf("%d reserved, %d asked for", len(reserved), len(asked))
	}
	for i, id := range asked {
		if at := slices.Index(reserved, id); at-i >= crowdBoots {
			w.t.Errorf("the VM that was reserved as number %d went as number %d", at, i)
		}
	}
}

// TestTurnThatDoesNotCome: a VM that waits for its turn longer than it may be reserved
// ends then, and says what it waited for; one whose turn comes within that goes on.
func TestTurnThatDoesNotCome(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Limits.BootsAtOnce, c.Limits.Reserved = 1, 8*time.Second })
	w.template("debian")
	first := w.take(w.create(api.CreateVM{Name: "first"}).ID)
	second := w.create(api.CreateVM{Name: "second"})
	var e api.Explanation
	w.call("GET", "/v1/vms/second/explain", nil, &e)
	if e.Phase != string(reservation.Reserved) || !strings.Contains(e.Awaited, "boots_at_once") {
		t.Errorf("while it waits: %+v", e)
	}
	if vm := w.waitPhase(second.ID, reservation.Aborted); vm.Reason != event.DeadlinePassed || !strings.Contains(vm.Explanation, "boots_at_once") {
		t.Errorf("ended as %+v", vm)
	}
	third := w.create(api.CreateVM{Name: "third"})
	w.fits("one waits")
	if why := first.boot(); why != "" {
		t.Fatal(why)
	}
	first.door()
	first.ready()
	w.take(third.ID)
}

// TestPlaces: who came first goes first, whichever looks first, and a start that is due
// again stands in the same line.
func TestPlaces(t *testing.T) {
	now := time.Now()
	row := func(id, host string, phase reservation.Phase, age time.Duration) ledger.Reservation {
		r := ledger.Reservation{ID: id, Host: host, Phase: phase, Created: now.Add(-age), Gone: phase == reservation.Stopped}
		if phase == reservation.Stopped {
			r.Created, r.Deadline = now.Add(-time.Hour), now.Add(-age)
		}
		return r
	}
	one, two := row("1", "", reservation.Reserved, 3*time.Second), row("2", "", reservation.Reserved, time.Second)
	again, later := row("3", "a", reservation.Stopped, 2*time.Second), row("4", "a", reservation.Stopped, -time.Second)
	boots := func(host string) ledger.Reservation { return row("b", host, reservation.Booting, time.Minute) }
	for _, c := range []struct {
		name  string
		who   ledger.Reservation
		live  []ledger.Reservation
		hosts []string
		room  []string
		err   error
	}{
		{"alone", one, []ledger.Reservation{one}, []string{"a", "b"}, []string{"a", "b"}, nil},
		{"one host is full", one, []ledger.Reservation{one, boots("a"), boots("a")}, []string{"a", "b"}, []string{"b"}, nil},
		{"all are full", one, []ledger.Reservation{one, boots("a"), boots("a")}, []string{"a"}, nil, errNoPlace},
		{"the first of two", one, []ledger.Reservation{one, two, boots("a")}, []string{"a"}, []string{"a"}, nil},
		{"the second of two", two, []ledger.Reservation{one, two, boots("a")}, []string{"a"}, nil, errNoPlace},
		{"a place for each", two, []ledger.Reservation{one, two}, []string{"a"}, []string{"a"}, nil},
		{"behind a further start", two, []ledger.Reservation{again, two, boots("a")}, []string{"a"}, nil, errNoPlace},
		{"a further start elsewhere", two, []ledger.Reservation{again, two, boots("b")}, []string{"b"}, []string{"b"}, nil},
		{"a further start in its turn", again, []ledger.Reservation{again, two, boots("a")}, []string{"a"}, []string{"a"}, nil},
		{"before one that is not due", two, []ledger.Reservation{later, two, boots("a")}, []string{"a"}, []string{"a"}, nil},
		{"not due", later, []ledger.Reservation{later}, []string{"a"}, nil, ledger.ErrMoved},
	} {
		if room, err := placesFor(c.who, c.live, c.hosts, 2, now); err != c.err || !slices.Equal(room, c.room) {
			t.Errorf("%s: %q, %v", c.name, room, err)
		}
	}
}
