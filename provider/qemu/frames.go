package qemu

import (
	"errors"
	"fmt"
	"net"
	"sync"

	"foothold/protocol/hostapi"

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
	mu   sync.Mutex
	taps map[string]net.HardwareAddr // guarded by mu; nil once closed
}

// TapPrefix begins the names of VMs' taps, and of no other interface of the host.
const TapPrefix = "fh-"

// maxTaps bounds the sets of counters.
const maxTaps = 4096

const tableName = "foothold"

// Where an Ethernet header has its addresses, and how long they are, in bytes.
const (
	destinationAddress = 0
	sourceAddress      = 6
	addressLength      = 6
)

// The table's sets. Types are nft's numbers: 9 is ether_addr, 41 ifname.
var (
	ownAddresses = set{name: "own", id: 1, keyType: 41<<6 | 9, keyLen: unix.IFNAMSIZ + 8, flags: setConcat, fields: []int32{unix.IFNAMSIZ, addressLength}}
	vmAddresses  = set{name: "vms", id: 2, keyType: 9, keyLen: addressLength}
	otherSource  = set{name: "othersource", id: 3, keyType: 41, keyLen: unix.IFNAMSIZ, flags: unix.NFT_SET_EVAL, size: maxTaps, native: true}
	neighbour    = set{name: "neighbour", id: 4, keyType: 41, keyLen: unix.IFNAMSIZ, flags: unix.NFT_SET_EVAL, size: maxTaps, native: true}
)

// setConcat is NFT_SET_CONCAT.
const setConcat = 0x80

// CountFrames makes the table, in the place of a predecessor's. It needs CAP_NET_ADMIN.
func CountFrames() (*Frames, error) {
	f := &Frames{taps: map[string]net.HardwareAddr{}}
	if err := f.build(); err != nil {
		return nil, fmt.Errorf("count dropped frames: %w; the kernel needs nf_tables for bridges: modprobe nft_meta_bridge", err)
	}
	return f, nil
}

// build makes the table with the taps that are watched, its rules last: a rule that came
// before a VM's address would count all that this VM sends.
func (f *Frames) build() error {
	err := commit(func(b *batch) {
		table := text(unix.NFTA_TABLE_NAME, tableName)
		b.add(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, table) // so that deleting it cannot fail
		b.add(unix.NFT_MSG_DELTABLE, 0, table)
		b.add(unix.NFT_MSG_NEWTABLE, unix.NLM_F_CREATE, table)
		for _, s := range []set{ownAddresses, vmAddresses, otherSource, neighbour} {
			s.create(b, tableName)
		}
	})
	if err != nil {
		return err
	}
	for tap, addr := range f.taps { // each by itself: many answers at once would overflow
		err = errors.Join(err, watch(tap, addr))
	}
	if err == nil {
		err = commit(func(b *batch) {
			const chain, preRouting, priority, nfAccept = "count", 0, -300, 1 // NF_BR_PRE_ROUTING, NF_BR_PRI_NAT_DST_BRIDGED, NF_ACCEPT
			b.add(unix.NFT_MSG_NEWCHAIN, unix.NLM_F_CREATE, text(unix.NFTA_CHAIN_TABLE, tableName), text(unix.NFTA_CHAIN_NAME, chain),
				nested(unix.NFTA_CHAIN_HOOK, number(unix.NFTA_HOOK_HOOKNUM, preRouting), number(unix.NFTA_HOOK_PRIORITY, priority)),
				number(unix.NFTA_CHAIN_POLICY, nfAccept), text(unix.NFTA_CHAIN_TYPE, "filter"))
			for _, rule := range rules() {
				b.add(unix.NFT_MSG_NEWRULE, unix.NLM_F_CREATE|unix.NLM_F_APPEND, text(unix.NFTA_RULE_TABLE, tableName),
					text(unix.NFTA_RULE_CHAIN, chain), nested(unix.NFTA_RULE_EXPRESSIONS, rule...))
			}
		})
	}
	if err != nil {
		return errors.Join(err, remove()) // half a table would be taken for one
	}
	return nil
}

// rules are the chain's. The register of a name is four words of 4 bytes long; what joins
// it lies in the next one.
func rules() [][]part {
	const name, behind = unix.NFT_REG32_00, unix.NFT_REG32_00 + unix.IFNAMSIZ/4
	return [][]part{
		{loadInterface(name), differs(name, TapPrefix), accept()},
		{loadInterface(name), loadEthernet(behind, sourceAddress, addressLength),
			ownAddresses.lookup(name, unix.NFT_LOOKUP_F_INV), otherSource.count(name), accept()},
		{loadEthernet(behind, destinationAddress, addressLength), vmAddresses.lookup(behind, 0), loadInterface(name), neighbour.count(name)},
	}
}

// Watch counts from now on what the tap's VM, which has the address mac, sends for nothing.
// A table that somebody removed, as whoever loads a host's firewall anew may do by flushing
// all rules, is made again.
func (f *Frames) Watch(tap, mac string) error {
	addr, err := net.ParseMAC(mac)
	if err != nil {
		return fmt.Errorf("count frames of %s: %w", tap, err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	err = watch(tap, addr)
	if errors.Is(err, unix.ENOENT) && f.taps != nil {
		if err = f.build(); err == nil {
			err = watch(tap, addr)
		}
	}
	if err != nil {
		return fmt.Errorf("count frames of %s: %w", tap, err)
	}
	f.taps[tap] = addr
	return nil
}

func watch(tap string, mac net.HardwareAddr) error {
	return commit(func(b *batch) {
		ownAddresses.change(b, tableName, unix.NFT_MSG_NEWSETELEM, ownKey(tap, mac))
		vmAddresses.change(b, tableName, unix.NFT_MSG_NEWSETELEM, mac)
	})
}

// Dropped is what was dropped so far, by tap. A tap of which nothing was is not in it.
func (f *Frames) Dropped() (map[string]hostapi.Dropped, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.dropped()
}

// dropped needs mu.
func (f *Frames) dropped() (map[string]hostapi.Dropped, error) {
	sources, e1 := otherSource.packets(tableName)
	neighbours, e2 := neighbour.packets(tableName)
	if err := errors.Join(e1, e2); err != nil {
		return nil, fmt.Errorf("read dropped frames: %w", err)
	}
	all := map[string]hostapi.Dropped{}
	for tap := range f.taps {
		key := string(interfaceName(tap))
		if d := (hostapi.Dropped{OtherSource: sources[key], Neighbour: neighbours[key]}); d != (hostapi.Dropped{}) {
			all[tap] = d
		}
	}
	return all, nil
}

// Forget ends the counting of a tap that is gone, and returns what it came to, as far as
// that is known.
func (f *Frames) Forget(tap string) (hostapi.Dropped, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	addr := f.taps[tap]
	if addr == nil {
		return hostapi.Dropped{}, nil
	}
	defer delete(f.taps, tap)
	all, err := f.dropped()
	if err != nil {
		return hostapi.Dropped{}, err
	}
	d := all[tap]
	err = commit(func(b *batch) {
		ownAddresses.change(b, tableName, unix.NFT_MSG_DELSETELEM, ownKey(tap, addr))
		vmAddresses.change(b, tableName, unix.NFT_MSG_DELSETELEM, addr)
		if d.OtherSource > 0 {
			otherSource.change(b, tableName, unix.NFT_MSG_DELSETELEM, interfaceName(tap))
		}
		if d.Neighbour > 0 {
			neighbour.change(b, tableName, unix.NFT_MSG_DELSETELEM, interfaceName(tap))
		}
	})
	if err != nil {
		return d, fmt.Errorf("end the count of %s: %w", tap, err)
	}
	return d, nil
}

// Close removes the table; nothing is counted any more.
func (f *Frames) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.taps = nil
	return remove()
}

func remove() error {
	return commit(func(b *batch) { b.add(unix.NFT_MSG_DELTABLE, 0, text(unix.NFTA_TABLE_NAME, tableName)) })
}

// interfaceName is a name as the kernel compares it.
func interfaceName(name string) []byte {
	return append([]byte(name), make([]byte, unix.IFNAMSIZ-len(name))...)
}

// ownKey joins tap and address, each padded to words of 4 bytes.
func ownKey(tap string, mac net.HardwareAddr) []byte {
	return append(append(interfaceName(tap), mac...), 0, 0)
}
