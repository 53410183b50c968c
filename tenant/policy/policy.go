// Package policy says what is allowed: sizes and quotas of VMs, addresses, and which
// traffic each phase permits. It is pure; [Network.Documents] is the one place where a
// phase becomes rules.
package policy

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"foothold/protocol/event"
)

// Size is a kind of VM.
type Size struct {
	Name      string
	VCPUs     int
	MemoryMiB int
	VolumeMiB int
}

// DefaultSize is taken when a request names none.
const DefaultSize = "small"

// Sizes lists what can be asked for, smallest first.
func Sizes() []Size {
	return []Size{
		{"small", 1, 1024, 1024},
		{"medium", 2, 2048, 4096},
		{"large", 4, 4096, 16384},
	}
}

// SizeOf finds a size by name; "" is the default.
func SizeOf(name string) (Size, error) {
	if name == "" {
		name = DefaultSize
	}
	for _, s := range Sizes() {
		if s.Name == name {
			return s, nil
		}
	}
	return Size{}, event.Refuse(event.UnknownSize, "size: there are small, medium and large")
}

// Quota bounds what live VMs may use together.
type Quota struct{ VMs, MemoryMiB int }

// Check refuses one more VM of size s beside those in use.
func (q Quota) Check(vms, memoryMiB int, s Size) error {
	switch {
	case vms+1 > q.VMs:
		return event.Refuse(event.QuotaExceeded, "%d of %d VMs are live", vms, q.VMs)
	case memoryMiB+s.MemoryMiB > q.MemoryMiB:
		return event.Refuse(event.QuotaExceeded, "%d of %d MiB are in use, %s takes %d", memoryMiB, q.MemoryMiB, s.Name, s.MemoryMiB)
	}
	return nil
}

// Pool is a range of addresses on the cloud network, bounds included.
type Pool struct{ First, Last netip.Addr }

// Pick returns the address behind last (in a circle) that is not taken. An address is
// reused as late as possible, so that what was meant for its former holder finds
// nobody there.
func (p Pool) Pick(last netip.Addr, taken map[netip.Addr]bool) (netip.Addr, error) {
	size := number(p.Last) - number(p.First) + 1
	at := uint32(0)
	if last.Is4() && last.Compare(p.First) >= 0 && last.Compare(p.Last) <= 0 {
		at = number(last) - number(p.First) + 1
	}
	for i := range size {
		a := address(number(p.First) + (at+i)%size)
		if !taken[a] {
			return a, nil
		}
	}
	return netip.Addr{}, event.Refuse(event.PoolEmpty, "all %d addresses from %s to %s are held", size, p.First, p.Last)
}

// Validate refuses bounds that are no range of a prefix.
func (p Pool) Validate(in netip.Prefix) error {
	if !p.First.Is4() || !p.Last.Is4() || p.Last.Less(p.First) || !in.Contains(p.First) || !in.Contains(p.Last) {
		return fmt.Errorf("addresses %s to %s are no range within %s", p.First, p.Last, in)
	}
	return nil
}

func number(a netip.Addr) uint32 { b := a.As4(); return binary.BigEndian.Uint32(b[:]) }

func address(n uint32) netip.Addr {
	return netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, n)))
}

// MAC derives a locally administered unicast address from an IPv4 address, so that two
// VMs of one pool never have the same.
func MAC(a netip.Addr) string {
	b := a.As4()
	return fmt.Sprintf("02:f0:%02x:%02x:%02x:%02x", b[0], b[1], b[2], b[3])
}
