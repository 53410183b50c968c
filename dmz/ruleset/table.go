package ruleset

import (
	"context"
	"errors"
	"fmt"
	"maps"
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
	rereads   = 3                      // beside Apply, before it has to wait
	dumpShare = 4                      // one in so many elements changes: to dump all sets is quicker then
	logSnap   = 64                     // bytes of a dropped packet that are logged: its longest IPv4 header, and ports
	logBatch  = 32                     // packets a log message gathers (for at most a second)
	maxShapes = 128
)

// errDeviates says that a reading shows something else than was applied.
var errDeviates = errors.New("the kernel holds other rules than it was told")

// Table is the daemon's nftables table in its network namespace.
type Table struct {
	adjacent string
	tunnel   string
	inside   netip.Addr
	group    uint16
	now      func() time.Duration

	mu      sync.Mutex
	table   *nftables.Table
	kernel  *kernel                 // guarded by mu; nil: not open
	sets    map[shape]*nftables.Set // guarded by mu; those in the kernel, replaced rather than changed
	loaded  bool                    // guarded by mu; the table is ours
	applied applied                 // guarded by mu
	sure    bool                    // guarded by mu; the last readings showed what is applied
	seen    map[element]held        // guarded by mu; newest reading of each element
	changes int                     // guarded by mu; counts calls of Apply

	rereading sync.Mutex // taken before mu
	beside    *reader    // guarded by rereading; nil: not open
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
		sets:  map[shape]*nftables.Set{}, applied: applied{owners: map[element][]want{}},
	}
}

// Apply makes the table permit exactly flows and reads back what it changed. The first
// call replaces whatever table a former process left, in one transaction; later ones
// change what differs from the flows before, in one transaction as well unless it is
// larger than the socket's buffer: then what closes comes first. After an error, or when
// Reread has seen something else than what was applied, all of the kernel's sets are
// compared.
func (t *Table) Apply(ctx context.Context, flows []Flow) error {
	self, err := ownAddresses()
	if err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	former, whole := t.applied, !t.sure || !maps.Equal(self, t.applied.self)
	if whole {
		t.applied = applied{owners: map[element][]want{}, self: self}
	}
	touched, undo, err := t.applied.become(flows)
	if err != nil {
		t.applied = former
		return err
	}
	t.changes++
	if err := t.settle(ctx, touched, whole || len(touched) > max(perRequest, len(t.applied.owners)/dumpShare)); err != nil {
		if undo(); whole {
			t.applied = former
		}
		t.sure = false
		return fmt.Errorf("change rules: %w", err)
	}
	t.sure = true
	return nil
}

// settle makes the kernel what is applied. An element that expired between our look and
// the transaction cannot be deleted, a set that is gone cannot be read, and a walk
// through sets may miss something: the next try looks at everything.
func (t *Table) settle(ctx context.Context, touched []element, whole bool) error {
	for try := 1; ; try++ {
		err := t.change(touched, whole)
		again := errors.Is(err, unix.ENOENT) || errors.Is(err, errInterrupted) || errors.Is(err, errDeviates)
		if !again || try == attempts || ctx.Err() != nil {
			return err
		}
		touched, whole = t.applied.all(), true
	}
}

// change brings the touched elements, or the whole table, from what the kernel has to
// what it should have.
func (t *Table) change(touched []element, whole bool) (err error) {
	if t.kernel == nil {
		if t.kernel, err = openKernel(t.now); err != nil {
			return err
		}
	}
	defer func() {
		if err != nil {
			t.kernel.close()
			t.kernel = nil
		}
	}()
	have, err := t.read(touched, whole, false)
	if err != nil {
		return err
	}
	gone, fresh := t.difference(touched, have)
	tx := t.kernel.begin()
	sets := t.structure(tx, shapesOf(fresh))
	if len(sets) > maxShapes {
		return fmt.Errorf("%d pairs of prefix lengths; at most %d", len(sets), maxShapes)
	}
	if err := tx.delete(sets, gone); err != nil {
		return err
	}
	began := t.now()
	if err := tx.add(sets, fresh, began); err != nil {
		return err
	}
	if err := tx.flush(); err != nil {
		return err
	}
	late := t.now() - began // timeouts run from when the kernel gets them
	t.sets, t.loaded = sets, true
	if have, err = t.read(touched, whole, true); err != nil {
		return err
	}
	t.see(touched, have, whole)
	return t.deviation(touched, have, late)
}

// read asks the kernel for the touched elements, or for all of the table. A reading of
// all that is to confirm a change asks again for what is not met as wanted.
func (t *Table) read(touched []element, whole, confirm bool) (map[element]held, error) {
	if !t.loaded {
		return nil, nil
	}
	if !whole {
		return t.kernel.get(t.table, touched)
	}
	var wants map[element]want
	if confirm {
		wants = t.applied.wants(t.now())
	}
	have, err := t.kernel.all(t.table, t.sets, wants)
	if errors.Is(err, unix.ENOENT) {
		t.sets, t.loaded = map[shape]*nftables.Set{}, false // somebody deleted it: make it anew
	}
	return have, err
}

// see keeps a reading.
func (t *Table) see(touched []element, have map[element]held, whole bool) {
	if whole {
		t.seen = have
		return
	}
	for _, e := range touched {
		if h, ok := have[e]; ok {
			t.seen[e] = h
		} else {
			delete(t.seen, e)
		}
	}
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
func (t *Table) difference(touched []element, have map[element]held) (gone []element, fresh map[element]want) {
	now := t.now()
	fresh = map[element]want{}
	for _, e := range touched {
		w, ok := t.applied.want(e, now)
		if h, there := have[e]; ok && !(there && matches(h, w)) {
			fresh[e] = w
		}
	}
	for e := range have {
		_, again := fresh[e]
		if _, stays := t.applied.want(e, now); !stays || again {
			gone = append(gone, e)
		}
	}
	return gone, fresh
}

func matches(h held, w want) bool { return h.id == w.id && sameEnd(h.until, w.until) }

// deviation says what the kernel has otherwise than applied, ends aside that came late
// by the time a transaction took. What ends just now may be there or not.
func (t *Table) deviation(touched []element, have map[element]held, late time.Duration) error {
	now := t.now()
	ending := func(until time.Duration) bool { return until != Forever && until-now < slack }
	for _, e := range touched {
		w, ok := t.applied.want(e, now)
		if !ok || ending(w.until) {
			continue
		}
		h, there := have[e]
		if w.until != Forever {
			w.until += min(late, max(0, h.until-w.until))
		}
		if !there {
			return fmt.Errorf("%w: it lacks %s %x for flow %q", errDeviates, e.shape.name(), e.key, w.id)
		}
		if !matches(h, w) {
			return fmt.Errorf("%w: %s %x is for flow %q until %s, not for %q until %s", errDeviates, e.shape.name(), e.key, h.id, h.until, w.id, w.until)
		}
	}
	for e, h := range have {
		if _, ok := t.applied.want(e, now); !ok && !ending(h.until) {
			return fmt.Errorf("%w: %s %x of %q is for no flow", errDeviates, e.shape.name(), e.key, h.id)
		}
	}
	return nil
}

// Reread reads the whole table from the kernel, so that changes that others made show
// in Live, and the next Apply mends them. Apply goes on meanwhile; when that has spoilt
// the reading a few times, it has to wait for one.
func (t *Table) Reread() error {
	t.rereading.Lock()
	defer t.rereading.Unlock()
	for range rereads {
		if err := t.rereadBeside(); !errors.Is(err, errInterrupted) {
			return err
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	have, err := t.readBeside(t.sets, t.applied.wants(t.now()))
	return t.judge(have, err)
}

// rereadBeside reads without holding mu.
func (t *Table) rereadBeside() error {
	t.mu.Lock()
	sets, expected, changes := t.sets, t.applied.wants(t.now()), t.changes
	t.mu.Unlock()
	have, err := t.readBeside(sets, expected)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.changes != changes {
		return errInterrupted
	}
	return t.judge(have, err)
}

// readBeside reads over a socket of its own. The caller holds rereading.
func (t *Table) readBeside(sets map[shape]*nftables.Set, expected map[element]want) (_ map[element]held, err error) {
	if t.beside == nil {
		if t.beside, err = openReader(t.now); err != nil {
			return nil, err
		}
	}
	have, err := t.beside.all(t.table, sets, expected)
	if err != nil {
		t.beside.close()
		t.beside = nil
	}
	return have, err
}

// judge keeps a reading of everything. The caller holds mu.
func (t *Table) judge(have map[element]held, err error) error {
	if err != nil {
		t.sure = false
		return err
	}
	t.seen = have
	if t.deviation(t.applied.all(), have, 0) != nil {
		t.sure = false // Live shows how
	}
	return nil
}

// Live lists which flows were in effect at their newest reading and have not ended
// since: both of a flow's elements are in the kernel. What is in the kernel for no flow
// is listed by its element, as unexpected.
func (t *Table) Live() ([]zone.Live, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	known := map[element]bool{}
	var out []zone.Live
	for _, f := range t.applied.flows {
		els := f.elements(t.applied.isSelf)
		known[els[0]], known[els[1]] = true, true
		call, ok := t.inEffect(els[0], now)
		answer, both := t.inEffect(els[1], now)
		if !ok || !both {
			continue
		}
		l := zone.Live{ID: f.ID, Reservation: f.Reservation, Rule: f.String(), Packets: call.packets + answer.packets}
		if call.until != Forever {
			l.Remaining = min(call.until, answer.until) - now
		}
		out = append(out, l)
	}
	for e := range t.seen {
		if h, ok := t.inEffect(e, now); ok && !known[e] {
			out = append(out, zone.Live{ID: "unexpected/" + h.id, Rule: fmt.Sprintf("%s %x", e.shape.name(), e.key), Remaining: max(0, h.until-now), Packets: h.packets})
		}
	}
	return out, nil
}

func (t *Table) inEffect(e element, now time.Duration) (held, bool) {
	h, ok := t.seen[e]
	return h, ok && (h.until == Forever || h.until > now)
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
