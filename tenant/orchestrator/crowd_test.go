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
	most := w.watchBooting()
	reserved := w.rush(event.QuotaExceeded, "40 of 40 VMs")
	w.fits("just reserved")
	var guests sync.WaitGroup
	for i, id := range reserved {
		guests.Go(func() { w.passInTurn(id, netip.AddrFrom4([4]byte{10, 84, 1, byte(i + 1)})) })
	}
	guests.Wait()
	if n := most(); n != crowdBoots {
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
func (w *world) passInTurn(id string, tunnel netip.Addr) {
	w.await(id, func(r ledger.Reservation, s ledger.Start) bool { return !s.HostStarted.IsZero() })
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
	w.await(id, func(r ledger.Reservation, _ ledger.Start) bool { return r.Phase == reservation.Connecting })
	did("admit", g.admit())
	_, why := g.say()
	did("first message", why)
	_, why = g.say(g.withAudit)
	did("audit", why)
	w.await(id, func(r ledger.Reservation, _ ledger.Start) bool { return r.Phase == reservation.Computing })
}

// await looks at the ledger until a VM is as wanted: forty that ask the API each
// hundredth of a second would be the load that they wait for.
func (w *world) await(id string, ok func(ledger.Reservation, ledger.Start) bool) {
	w.t.Helper()
	for end := time.Now().Add(crowdPatience); ; {
		r, s, err := w.o.row(context.Background(), id)
		if err == nil && ok(r, s) {
			return
		}
		if err != nil || !r.Live() || time.Now().After(end) {
			w.t.Fatalf("VM %s is %s %s: %v", r.Name, r.Phase, r.Reason, err)
		}
		pause(w.t.Context(), 50*time.Millisecond)
	}
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

// watchBooting counts the VMs in phase booting until most is called, which returns the
// highest count.
func (w *world) watchBooting() (most func() int) {
	ctx, stop := context.WithCancel(w.t.Context())
	result := make(chan int)
	go func() {
		high := 0
		for pause(ctx, 10*time.Millisecond) == nil {
			w.o.ledger.Read(ctx, func(tx *ledger.Tx) error {
				live, err := tx.Live()
				n := 0
				for _, r := range live {
					if r.Phase == reservation.Booting {
						n++
					}
				}
				high = max(high, n)
				return err
			})
		}
		result <- high
	}()
	return func() int {
		stop()
		return <-result
	}
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
	w := newWorld(t, func(c *Config) { c.Limits.BootsAtOnce, c.Limits.Reserved = 1, 3*time.Second })
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
