package qemu

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"sync"

	"foothold/protocol/hostapi"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Frames counts what the bridge drops of each VM (OpenTap): the bridge itself tells nobody.
// The table
//
//	table bridge foothold {
//		set own         { type ifname . ether_addr }              # each tap with its VM's address
//		set vms         { type ether_addr }                       # the VMs' addresses
//		set othersource { type ifname; flags dynamic; counter }   # by tap, made by the first such frame
//		set neighbour   { type ifname; flags dynamic; counter }
//		chain count {
//			type filter hook prerouting priority -300; policy accept;
//			iifname != "fh-*" accept
//			iifname . ether saddr != @own update @othersource { iifname counter } accept
//			ether daddr @vms update @neighbour { iifname counter }
//		}
//	}
//
// sees each frame before the bridge decides, and decides nothing: without it the bridge
// drops the same. It is safe for concurrent use.
type Frames struct {
	table                         *nftables.Table
	own, vms, source, destination *nftables.Set

	mu   sync.Mutex
	taps map[string]net.HardwareAddr // guarded by mu
}

// TapPrefix begins the names of VMs' taps, and of no other interface of the host.
const TapPrefix = "fh-"

// maxTaps bounds the sets of counters.
const maxTaps = 4096

// CountFrames makes the table, in the place of a predecessor's. It needs CAP_NET_ADMIN.
func CountFrames() (*Frames, error) {
	t := &nftables.Table{Family: nftables.TableFamilyBridge, Name: "foothold"}
	f := &Frames{table: t, taps: map[string]net.HardwareAddr{},
		own: &nftables.Set{Table: t, Name: "own", ID: 1, Concatenation: true, KeyType: nftables.MustConcatSetType(nftables.TypeIFName, nftables.TypeEtherAddr)},
		vms: &nftables.Set{Table: t, Name: "vms", ID: 2, KeyType: nftables.TypeEtherAddr},
		// A counter comes with each element, from the rule that makes it.
		source:      &nftables.Set{Table: t, Name: "othersource", ID: 3, KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian, Dynamic: true, Size: maxTaps},
		destination: &nftables.Set{Table: t, Name: "neighbour", ID: 4, KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian, Dynamic: true, Size: maxTaps},
	}
	err := change(func(c *nftables.Conn) error {
		c.AddTable(t) // so that deleting it cannot fail
		c.DelTable(t)
		c.AddTable(t)
		for _, s := range []*nftables.Set{f.own, f.vms, f.source, f.destination} {
			if err := c.AddSet(s, nil); err != nil {
				return err
			}
		}
		accept := nftables.ChainPolicyAccept
		chain := c.AddChain(&nftables.Chain{Name: "count", Table: t, Type: nftables.ChainTypeFilter, Policy: &accept,
			Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw})
		for _, exprs := range f.rules() {
			c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: exprs})
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("count dropped frames: %w; the kernel needs nf_tables with the bridge family: modprobe nf_tables", err)
	}
	return f, nil
}

// Where an Ethernet header has its addresses, and how long they are, in bytes.
const (
	destinationAddress = 0
	sourceAddress      = 6
	addressLength      = 6
)

// rules are the chain's. Registers 1 to 4 hold a name, so what joins it begins behind it: in
// nftables' numbers of words of 4 bytes, in which register 1 is the words from NFT_REG32_00
// on (linux/netfilter/nf_tables.h).
func (f *Frames) rules() [][]expr.Any {
	const name, behind = 1, unix.NFT_REG32_00 + 4
	tap := &expr.Meta{Key: expr.MetaKeyIIFNAME, Register: name}
	accept := &expr.Verdict{Kind: expr.VerdictAccept}
	count := func(s *nftables.Set) expr.Any {
		return &expr.Dynset{SrcRegKey: name, SetID: s.ID, SetName: s.Name, Operation: unix.NFT_DYNSET_OP_UPDATE, Exprs: []expr.Any{&expr.Counter{}}}
	}
	return [][]expr.Any{
		{tap, &expr.Cmp{Op: expr.CmpOpNeq, Register: name, Data: []byte(TapPrefix)}, accept},
		{tap, &expr.Payload{DestRegister: behind, Base: expr.PayloadBaseLLHeader, Offset: sourceAddress, Len: addressLength},
			&expr.Lookup{SourceRegister: name, SetID: f.own.ID, SetName: f.own.Name, Invert: true}, count(f.source), accept},
		{&expr.Payload{DestRegister: behind, Base: expr.PayloadBaseLLHeader, Offset: destinationAddress, Len: addressLength},
			&expr.Lookup{SourceRegister: behind, SetID: f.vms.ID, SetName: f.vms.Name}, tap, count(f.destination)},
	}
}

// Watch counts from now on what the tap's VM, which has the address mac, sends for nothing.
func (f *Frames) Watch(tap, mac string) error {
	addr, err := net.ParseMAC(mac)
	if err != nil {
		return fmt.Errorf("count frames of %s: %w", tap, err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	err = change(func(c *nftables.Conn) error {
		return errors.Join(c.SetAddElements(f.own, f.ownKey(tap, addr)), c.SetAddElements(f.vms, []nftables.SetElement{{Key: addr}}))
	})
	if err != nil {
		return fmt.Errorf("count frames of %s: %w", tap, err)
	}
	f.taps[tap] = addr
	return nil
}

// Dropped is what was dropped so far, by tap. A tap of which nothing was is not in it.
func (f *Frames) Dropped() (map[string]hostapi.Dropped, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.dropped()
}

// dropped needs mu.
func (f *Frames) dropped() (map[string]hostapi.Dropped, error) {
	c, err := nftables.New()
	if err != nil {
		return nil, fmt.Errorf("read dropped frames: %w", err)
	}
	all := map[string]hostapi.Dropped{}
	for _, s := range []*nftables.Set{f.source, f.destination} {
		elements, err := c.GetSetElements(s)
		if err != nil {
			return nil, fmt.Errorf("read dropped frames: %w", err)
		}
		for _, e := range elements {
			tap := string(bytes.TrimRight(e.Key, "\x00"))
			if e.Counter == nil || f.taps[tap] == nil {
				continue
			}
			d := all[tap]
			if s == f.source {
				d.OtherSource = e.Counter.Packets
			} else {
				d.Neighbour = e.Counter.Packets
			}
			all[tap] = d
		}
	}
	return all, nil
}

// Forget ends the counting of a tap that is gone, and returns what it came to.
func (f *Frames) Forget(tap string) (hostapi.Dropped, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	addr := f.taps[tap]
	if addr == nil {
		return hostapi.Dropped{}, nil
	}
	all, err := f.dropped()
	if err != nil {
		return hostapi.Dropped{}, err
	}
	d := all[tap]
	err = change(func(c *nftables.Conn) error {
		err := errors.Join(c.SetDeleteElements(f.own, f.ownKey(tap, addr)), c.SetDeleteElements(f.vms, []nftables.SetElement{{Key: addr}}))
		if d.OtherSource > 0 {
			err = errors.Join(err, c.SetDeleteElements(f.source, []nftables.SetElement{{Key: interfaceName(tap)}}))
		}
		if d.Neighbour > 0 {
			err = errors.Join(err, c.SetDeleteElements(f.destination, []nftables.SetElement{{Key: interfaceName(tap)}}))
		}
		return err
	})
	if err != nil {
		return d, fmt.Errorf("end the count of %s: %w", tap, err)
	}
	delete(f.taps, tap)
	return d, nil
}

// Close removes the table.
func (f *Frames) Close() error {
	return change(func(c *nftables.Conn) error { c.DelTable(f.table); return nil })
}

// change carries out one transaction.
func change(gather func(*nftables.Conn) error) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	if err := gather(c); err != nil {
		return err
	}
	return c.Flush()
}

// interfaceName is a name as the kernel compares it.
func interfaceName(name string) []byte {
	return append([]byte(name), make([]byte, unix.IFNAMSIZ-len(name))...)
}

// ownKey joins tap and address, each padded to words of 4 bytes.
func (f *Frames) ownKey(tap string, mac net.HardwareAddr) []nftables.SetElement {
	return []nftables.SetElement{{Key: append(append(interfaceName(tap), mac...), 0, 0)}}
}
