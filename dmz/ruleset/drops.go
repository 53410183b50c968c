package ruleset

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"foothold/internal/nflog"
	"foothold/protocol/event"

	"golang.org/x/sys/unix"
)

// LogGroup is the NFLOG group of drops in the daemon's namespace.
const LogGroup = 7

// Bounds of what a flood of dropped packets may become.
const (
	dropPeriod  = time.Second
	quietFor    = 10 * time.Second // one kind of drop is told at most so often
	maxKinds    = 512              // kinds of drops that are told apart; the rest is counted together
	maxPerFlush = 16               // events a period
	maxWaiting  = 1024             // packets between reader and counter
)

// dropKey is what makes two drops the same for the journal. Source ports differ with
// each try and are left out.
type dropKey struct {
	chain    string
	in       int
	src, dst netip.Addr
	proto    uint8
	port     uint16
}

type dropCount struct {
	packets int
	mac     string
	told    time.Time
}

// WatchDrops reads the drop log and emits "firewall.dropped" events: who tried what,
// how often since the last such event. It returns when ctx ends or the log fails.
func WatchDrops(ctx context.Context, emit func(event.Event)) error {
	reader, err := nflog.Open(LogGroup)
	if err != nil {
		return err
	}
	packets := make(chan nflog.Packet, maxWaiting)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	failed := make(chan error, 1)
	var missed atomic.Int64
	go func() {
		defer cancel()
		failed <- reader.Run(ctx, func(p nflog.Packet) {
			select {
			case packets <- p:
			default:
				missed.Add(1)
			}
		})
	}()
	c := newDropCounter(emit, interfaceName)
	tick := time.NewTicker(dropPeriod)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return <-failed
		case p := <-packets:
			c.count(p)
		case now := <-tick.C:
			c.flush(now)
			c.unseen(missed.Swap(0), reader.Lost())
		}
	}
}

type dropCounter struct {
	emit  func(event.Event)
	name  func(int) string
	kinds map[dropKey]*dropCount
	other int   // packets of kinds beyond maxKinds
	lost  int64 // overflows of the log's socket that were told
}

func newDropCounter(emit func(event.Event), name func(int) string) *dropCounter {
	return &dropCounter{emit: emit, name: name, kinds: map[dropKey]*dropCount{}}
}

func (d *dropCounter) count(p nflog.Packet) {
	k := dropKey{p.Prefix, p.In, p.Src, p.Dst, p.Proto, p.DstPort}
	c := d.kinds[k]
	if c == nil {
		if len(d.kinds) >= maxKinds {
			d.other++
			return
		}
		c = &dropCount{}
		d.kinds[k] = c
	}
	c.packets++
	c.mac = p.MAC.String()
}

// flush tells what is due, the most frequent first, and forgets what has been quiet.
func (d *dropCounter) flush(now time.Time) {
	var due []dropKey
	for k, c := range d.kinds {
		switch {
		case now.Sub(c.told) < quietFor:
		case c.packets == 0:
			delete(d.kinds, k)
		default:
			due = append(due, k)
		}
	}
	slices.SortFunc(due, func(a, b dropKey) int { return d.kinds[b].packets - d.kinds[a].packets })
	for i, k := range due {
		if i == maxPerFlush {
			break
		}
		c := d.kinds[k]
		d.tell(k, c)
		c.packets, c.told = 0, now
	}
	if d.other > 0 {
		d.emit(event.Event{Kind: kindDropped, Reason: event.TrafficRefused, Detail: map[string]string{"packets": strconv.Itoa(d.other), "rule": "various"}})
		d.other = 0
	}
}

// unseen tells of drops that came too fast to be counted: missed packets, and how often
// the kernel's queue overflowed so far. Their number is in the rule's counter alone.
func (d *dropCounter) unseen(missed, lost int64) {
	if missed == 0 && lost == d.lost {
		return
	}
	d.emit(event.Event{Kind: kindUnseen, Reason: event.TrafficRefused, Detail: map[string]string{
		"packets": strconv.FormatInt(missed, 10), "overflows": strconv.FormatInt(lost-d.lost, 10)}})
	d.lost = lost
}

// Kinds of events.
const (
	kindDropped = "firewall.dropped"
	kindUnseen  = "firewall.drops-unseen"
)

func (d *dropCounter) tell(k dropKey, c *dropCount) {
	detail := map[string]string{"rule": k.chain, "packets": strconv.Itoa(c.packets)}
	add := func(key, value string) {
		if value != "" {
			detail[key] = value
		}
	}
	add("interface", d.name(k.in))
	add("mac", c.mac)
	if k.src.IsValid() {
		add("from", k.src.String())
		add("to", k.dst.String())
		add("protocol", protocolName(k.proto))
	}
	if k.port != 0 {
		add("port", strconv.Itoa(int(k.port)))
	}
	slog.Info("dropped", "rule", k.chain, "from", k.src.String(), "to", k.dst.String(), "protocol", detail["protocol"], "port", k.port, "packets", c.packets)
	d.emit(event.Event{Kind: kindDropped, Reason: event.TrafficRefused, Detail: detail})
}

func protocolName(p uint8) string {
	switch p {
	case unix.IPPROTO_TCP:
		return "tcp"
	case unix.IPPROTO_UDP:
		return "udp"
	case unix.IPPROTO_ICMP:
		return "icmp"
	}
	return strconv.Itoa(int(p))
}

func interfaceName(index int) string {
	if index == 0 {
		return ""
	}
	if i, err := net.InterfaceByIndex(index); err == nil {
		return i.Name
	}
	return strconv.Itoa(index)
}
