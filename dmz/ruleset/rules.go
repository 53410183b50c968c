package ruleset

import (
	"net"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Registers: the first 16-byte one for comparisons, then the 4-byte ones in which a
// concatenated key is put together (include/uapi/linux/netfilter/nf_tables.h).
const (
	regCompare = unix.NFT_REG_1
	regKey     = unix.NFT_REG32_00
)

// Offsets in headers.
const (
	etherSource   = 6  // of the Ethernet header
	ipSource      = 12 // of the IPv4 header (RFC 791)
	ipDestination = 16
	sourcePort    = 0 // of the TCP and UDP headers
	destPort      = 2
	tcpFlags      = 13 // RFC 9293
)

// TCP flags.
const (
	fin = 1
	syn = 2
	rst = 4
)

var keyTypes = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService)
var vmKeyTypes = nftables.MustConcatSetType(nftables.TypeIPAddr, nftables.TypeEtherAddr, nftables.TypeIPAddr, nftables.TypeInetProto, nftables.TypeInetService)

// newSet describes the set of a shape.
func newSet(t *nftables.Table, s shape) *nftables.Set {
	set := &nftables.Set{Table: t, Name: s.name(), HasTimeout: true, Concatenation: true, Counter: true, KeyType: keyTypes, KeyByteOrder: binaryutil.BigEndian}
	if s.kind.vm() {
		set.KeyType = vmKeyTypes
	}
	return set
}

// chain is a base chain of the table with policy drop.
func chain(t *nftables.Table, name string, hook *nftables.ChainHook) *nftables.Chain {
	drop := nftables.ChainPolicyDrop
	return &nftables.Chain{Name: name, Table: t, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityFilter, Policy: &drop}
}

// rules lists a chain's rules for the sets in use, in order.
func (t *Table) rules(c *nftables.Chain, order []shape, sets map[shape]*nftables.Set) [][]expr.Any {
	local := c.Name != chainForward
	var out [][]expr.Any
	if local {
		key := expr.MetaKeyIIFNAME
		if c.Name == chainOutput {
			key = expr.MetaKeyOIFNAME
		}
		out = append(out, append(ifname(key, "lo", expr.CmpOpEq), accept()))
	}
	out = append(out,
		[]expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: regCompare},
			&expr.Cmp{Op: expr.CmpOpNeq, Register: regCompare, Data: []byte{unix.NFPROTO_IPV4}}, &expr.Counter{}, drop()},
		append(ctState(expr.CtStateBitINVALID), t.logDrop(c.Name+" invalid")...),
		append(flagsAll(fin|syn), t.logDrop(c.Name+" flags")...),
		append(flagsAll(syn|rst), t.logDrop(c.Name+" flags")...),
		append(flagsNone(), t.logDrop(c.Name+" flags")...),
	)
	if t.tunnel != "" && c.Name == chainInput {
		inside := t.inside.As4()
		other := append(ifname(expr.MetaKeyIIFNAME, t.tunnel, expr.CmpOpEq), address(regCompare, ipDestination, 32)...)
		other = append(other, &expr.Cmp{Op: expr.CmpOpNeq, Register: regCompare, Data: inside[:]})
		out = append(out, append(other, t.logDrop(c.Name+" tunnel")...))
	}
	for _, s := range order {
		if s.kind.self() == local {
			out = append(out, t.lookup(s, sets[s]))
		}
	}
	return append(out, t.logDrop(c.Name))
}

// lookup accepts what is in the set of a shape.
func (t *Table) lookup(s shape, set *nftables.Set) []expr.Any {
	var e []expr.Any
	if t.adjacent != "" && !s.kind.self() {
		op := expr.CmpOpNeq
		if s.kind.vm() {
			op = expr.CmpOpEq
		}
		e = append(e, ifname(expr.MetaKeyIIFNAME, t.adjacent, op)...)
	}
	direction, states, port := byte(0), expr.CtStateBitNEW|expr.CtStateBitESTABLISHED, uint32(destPort)
	if s.kind.answer() {
		direction, states, port = 1, expr.CtStateBitESTABLISHED, sourcePort
	}
	e = append(e, &expr.Ct{Key: expr.CtKeyDIRECTION, Register: regCompare},
		&expr.Cmp{Op: expr.CmpOpEq, Register: regCompare, Data: []byte{direction}})
	e = append(e, ctState(states)...)

	reg := uint32(regKey)
	e = append(e, address(reg, ipSource, s.src)...)
	reg++
	if s.kind.vm() {
		e = append(e, &expr.Payload{DestRegister: reg, Base: expr.PayloadBaseLLHeader, Offset: etherSource, Len: 6})
		reg += 2
	}
	e = append(e, address(reg, ipDestination, s.dst)...)
	e = append(e,
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg + 1},
		&expr.Payload{DestRegister: reg + 2, Base: expr.PayloadBaseTransportHeader, Offset: port, Len: 2},
		&expr.Lookup{SourceRegister: regKey, SetName: set.Name, SetID: set.ID})
	return append(e, accept())
}

// address loads an IPv4 address and cuts it to its prefix.
func address(reg, offset uint32, bits int) []expr.Any {
	e := []expr.Any{&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4}}
	if bits < 32 {
		e = append(e, &expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: net.CIDRMask(bits, 32), Xor: make([]byte, 4)})
	}
	return e
}

// ifname compares an interface's name.
func ifname(key expr.MetaKey, name string, op expr.CmpOp) []expr.Any {
	data := make([]byte, unix.IFNAMSIZ)
	copy(data, name)
	return []expr.Any{&expr.Meta{Key: key, Register: regCompare}, &expr.Cmp{Op: op, Register: regCompare, Data: data}}
}

// ctState passes packets whose conntrack state is one of bits.
func ctState(bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: regCompare},
		&expr.Bitwise{SourceRegister: regCompare, DestRegister: regCompare, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: regCompare, Data: make([]byte, 4)},
	}
}

// flagsAll passes TCP segments that carry all of the flags, which no honest one does.
func flagsAll(flags byte) []expr.Any { return tcpFlagsAre(flags, flags) }

// flagsNone passes TCP segments without any flag.
func flagsNone() []expr.Any { return tcpFlagsAre(0x3f, 0) }

func tcpFlagsAre(mask, value byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: regCompare},
		&expr.Cmp{Op: expr.CmpOpEq, Register: regCompare, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: regCompare, Base: expr.PayloadBaseTransportHeader, Offset: tcpFlags, Len: 1},
		&expr.Bitwise{SourceRegister: regCompare, DestRegister: regCompare, Len: 1, Mask: []byte{mask}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: regCompare, Data: []byte{value}},
	}
}

// logDrop sends the packet's head to the log group and drops it.
func (t *Table) logDrop(prefix string) []expr.Any {
	e := []expr.Any{&expr.Counter{}}
	if t.group != 0 {
		e = append(e, &expr.Log{
			Key:        1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_PREFIX | 1<<unix.NFTA_LOG_SNAPLEN | 1<<unix.NFTA_LOG_QTHRESHOLD,
			Group:      t.group,
			Snaplen:    logSnap,
			QThreshold: logBatch,
			Data:       []byte(prefix),
		})
	}
	return append(e, drop())
}

func accept() expr.Any { return &expr.Verdict{Kind: expr.VerdictAccept} }
func drop() expr.Any   { return &expr.Verdict{Kind: expr.VerdictDrop} }

// estimate is the bytes of an element in a netlink message, roughly and not too few.
func estimate(key, id string) int { return 104 + len(key) + len(id) }
