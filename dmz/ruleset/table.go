package ruleset

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"foothold/protocol/zone"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// Names in the kernel.
const (
	tableName    = "foothold"
	chainForward = "forward"
	chainInput   = "input"
	chainOutput  = "output"
)

const (
	minLife   = 10 * time.Millisecond  // less is not worth a rule
	slack     = 250 * time.Millisecond // two ends closer than this are the same
	attempts  = 5                      // of a transaction that races with an expiry
	logSnap   = 128                    // bytes of a dropped packet that are logged: its headers
	logBatch  = 32                     // packets a log message gathers (for at most a second)
	maxShapes = 128
)

// Table is the daemon's nftables table in its network namespace.
type Table struct {
	adjacent string
	tunnel   string
	inside   netip.Addr
	group    uint16
	now      func() time.Duration

	mu     sync.Mutex
	table  *nftables.Table
	sets   map[shape]*nftables.Set // guarded by mu; those in the kernel
	loaded bool                    // guarded by mu; the table is ours
	flows  []Flow                  // guarded by mu; last applied
	self   map[netip.Addr]bool     // guarded by mu; own addresses at that time
}

// Config says how the table is made.
type Config struct {
	Adjacent string               // interface on which VMs are neighbours; empty: none
	Tunnel   string               // interface of the tunnels; empty: none
	Inside   netip.Addr           // all that the tunnels reach of the machine itself
	LogGroup uint16               // NFLOG group of drops; 0: no log
	Now      func() time.Duration // boot-time clock
}

// New describes the table; the kernel is first touched by Apply.
func New(c Config) *Table {
	return &Table{
		adjacent: c.Adjacent, tunnel: c.Tunnel, inside: c.Inside, group: c.LogGroup, now: c.Now,
		table: &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet},
		sets:  map[shape]*nftables.Set{},
	}
}

// Apply makes the table permit exactly flows. The first call replaces whatever table a
// former process left, in one transaction; later ones change what differs, in one
// transaction as well unless it is larger than the socket's buffer: then what closes
// comes first.
func (t *Table) Apply(ctx context.Context, flows []Flow) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	self, err := ownAddresses()
	if err != nil {
		return err
	}
	isSelf := func(a netip.Addr) bool { return self[a] }
	for try := 1; ; try++ {
		want, err := desired(flows, isSelf, t.now())
		if err != nil {
			return err
		}
		err = t.change(want)
		if err == nil {
			t.flows, t.self = flows, self
			return nil
		}
		// An element that expired between our look and the transaction cannot be
		// deleted; the transaction had no effect.
		if try == attempts || !errors.Is(err, unix.ENOENT) || ctx.Err() != nil {
			return fmt.Errorf("change rules: %w", err)
		}
	}
}

// change brings the kernel from what it has to what it should.
func (t *Table) change(want map[element]want) error {
	tx, err := begin()
	if err != nil {
		return err
	}
	shapes := shapesOf(want)
	have := map[element]nftables.SetElement{}
	if t.loaded {
		if have, err = t.dump(); err != nil {
			return err
		}
	}
	sets := t.structure(tx, shapes)
	if len(sets) > maxShapes {
		return fmt.Errorf("%d pairs of prefix lengths; at most %d", len(sets), maxShapes)
	}
	gone, fresh := t.difference(have, want)
	if err := tx.delete(sets, gone); err != nil {
		return err
	}
	if err := tx.add(sets, fresh, t.now()); err != nil {
		return err
	}
	if err := tx.flush(); err != nil {
		return err
	}
	t.sets, t.loaded = sets, true
	return nil
}

// structure adds table, chains, missing sets and their rules to the transaction.
func (t *Table) structure(tx *transaction, shapes []shape) map[shape]*nftables.Set {
	sets := map[shape]*nftables.Set{}
	for s, set := range t.sets {
		sets[s] = set
	}
	var missing []shape
	for _, s := range shapes {
		if sets[s] == nil {
			missing = append(missing, s)
		}
	}
	if t.loaded && len(missing) == 0 {
		return sets
	}
	chains := []*nftables.Chain{
		chain(t.table, chainForward, nftables.ChainHookForward),
		chain(t.table, chainInput, nftables.ChainHookInput),
		chain(t.table, chainOutput, nftables.ChainHookOutput),
	}
	if !t.loaded {
		tx.conn.AddTable(t.table) // so that the deletion finds one
		tx.conn.DelTable(t.table)
		tx.conn.AddTable(t.table)
		for _, c := range chains {
			tx.conn.AddChain(c)
		}
	}
	for _, s := range missing {
		set := newSet(t.table, s)
		tx.note(tx.conn.AddSet(set, nil))
		sets[s] = set
	}
	all := make([]shape, 0, len(sets))
	for s := range sets {
		all = append(all, s)
	}
	slices.SortFunc(all, compareShapes)
	for _, c := range chains {
		if t.loaded {
			tx.conn.FlushChain(c)
		}
		for _, exprs := range t.rules(c, all, sets) {
			tx.conn.AddRule(&nftables.Rule{Table: t.table, Chain: c, Exprs: exprs})
		}
	}
	tx.size += 64 << 10
	return sets
}

// difference lists what must go and what must come; a changed end is both.
func (t *Table) difference(have map[element]nftables.SetElement, wants map[element]want) (gone []element, fresh map[element]want) {
	now := t.now()
	fresh = map[element]want{}
	for e, w := range wants {
		if h, ok := have[e]; !ok || !matches(h, w, now) {
			fresh[e] = w
		}
	}
	for e := range have {
		_, again := fresh[e]
		if _, stays := wants[e]; !stays || again {
			gone = append(gone, e)
		}
	}
	return gone, fresh
}

func matches(h nftables.SetElement, w want, now time.Duration) bool {
	if h.Comment != w.id || (w.until == Forever) != (h.Timeout == 0) {
		return false
	}
	return w.until == Forever || (now+h.Expires-w.until).Abs() < slack
}

// dump reads every set from the kernel.
func (t *Table) dump() (map[element]nftables.SetElement, error) {
	conn, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("read rules: %w", err)
	}
	out := map[element]nftables.SetElement{}
	for s, set := range t.sets {
		elems, err := conn.GetSetElements(set)
		if err != nil {
			return nil, fmt.Errorf("read set %s: %w", set.Name, err)
		}
		for _, e := range elems {
			out[element{s, string(e.Key)}] = e
		}
	}
	return out, nil
}

// Live reads back which flows are in effect: both of a flow's elements are in the
// kernel. What is in the kernel for no flow is listed by its element, as unexpected.
func (t *Table) Live() ([]zone.Live, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.loaded {
		return nil, nil
	}
	have, err := t.dump()
	if err != nil {
		return nil, err
	}
	known := map[element]bool{}
	var out []zone.Live
	for _, f := range t.flows {
		els := f.elements(func(a netip.Addr) bool { return t.self[a] })
		call, ok := have[els[0]]
		answer, both := have[els[1]]
		known[els[0]], known[els[1]] = true, true
		if !ok || !both {
			continue
		}
		l := zone.Live{ID: f.ID, Reservation: f.Reservation, Rule: f.String(), Packets: packets(call) + packets(answer)}
		if call.Timeout != 0 {
			l.Remaining = min(call.Expires, answer.Expires)
		}
		out = append(out, l)
	}
	for e, h := range have {
		if !known[e] {
			out = append(out, zone.Live{ID: "unexpected/" + h.Comment, Rule: fmt.Sprintf("%s %x", e.shape.name(), e.key), Remaining: h.Expires, Packets: packets(h)})
		}
	}
	return out, nil
}

func packets(e nftables.SetElement) uint64 {
	if e.Counter == nil {
		return 0
	}
	return e.Counter.Packets
}

// ownAddresses lists the namespace's IPv4 addresses.
func ownAddresses() (map[netip.Addr]bool, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list own addresses: %w", err)
	}
	out := map[netip.Addr]bool{}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() {
			out[p.Addr()] = true
		}
	}
	return out, nil
}
