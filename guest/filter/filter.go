// Package filter is the VM's own packet filter: table inet foothold, three chains that
// drop, and for each phase exactly the traffic of the boot story's table, in both
// directions. The firewalls outside enforce the same; this one holds against a
// neighbour on the same wire, and after a firewall has failed.
//
// Every phase replaces the whole table in one netlink transaction, so there is no
// moment between two phases.
package filter

import (
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const tableName = "foothold"

// Protocols of a flow.
const (
	TCP = unix.IPPROTO_TCP
	UDP = unix.IPPROTO_UDP
)

// Flow is one kind of connection that may be made.
type Flow struct {
	Interface string         // "eth0", "wg0"
	Inbound   bool           // the other side opens it
	Proto     byte           // TCP or UDP
	Peer      netip.AddrPort // the other side; port 0: of any port (inbound), to any port (outbound); zero address: anyone
	Port      uint16         // inbound: our port
}

// Apply makes the flows the only traffic besides the loopback's.
func Apply(flows ...Flow) error {
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("set packet filter: %w", err)
	}
	if err := replace(c, flows); err != nil {
		return fmt.Errorf("set packet filter: %w", err)
	}
	if err := c.Flush(); err != nil {
		return fmt.Errorf("set packet filter: %w", err)
	}
	return nil
}

func replace(c *nftables.Conn, flows []Flow) error {
	table := &nftables.Table{Family: nftables.TableFamilyINet, Name: tableName}
	c.AddTable(table) // so that deleting it cannot fail
	c.DelTable(table)
	c.AddTable(table)
	drop := nftables.ChainPolicyDrop
	chain := func(name string, hook *nftables.ChainHook) *nftables.Chain {
		return c.AddChain(&nftables.Chain{Name: name, Table: table, Type: nftables.ChainTypeFilter, Hooknum: hook,
			Priority: nftables.ChainPriorityFilter, Policy: &drop})
	}
	in := chain("input", nftables.ChainHookInput)
	out := chain("output", nftables.ChainHookOutput)
	chain("forward", nftables.ChainHookForward)
	rule := func(chain *nftables.Chain, parts ...[]expr.Any) {
		var exprs []expr.Any
		for _, p := range parts {
			exprs = append(exprs, p...)
		}
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: append(exprs, &expr.Verdict{Kind: expr.VerdictAccept})})
	}
	rule(in, device(expr.MetaKeyIIFNAME, "lo"))
	rule(out, device(expr.MetaKeyOIFNAME, "lo"))
	for _, f := range flows {
		if f.Peer.Addr().IsValid() && !f.Peer.Addr().Is4() || f.Proto != TCP && f.Proto != UDP || f.Inbound && f.Port == 0 {
			return fmt.Errorf("flow %+v is malformed", f)
		}
		from, to := device(expr.MetaKeyIIFNAME, f.Interface), device(expr.MetaKeyOIFNAME, f.Interface)
		proto := protocol(f.Proto)
		theirs, ours := f.Peer.Port(), f.Port
		rule(in, from, proto, address(source, f.Peer.Addr()), port(source, theirs), port(destination, ours), established(!f.Inbound))
		rule(out, to, proto, address(destination, f.Peer.Addr()), port(destination, theirs), port(source, ours), established(f.Inbound))
	}
	return nil
}

// end of a packet.
type end int

const (
	source end = iota
	destination
)

func device(key expr.MetaKey, name string) []expr.Any {
	data := make([]byte, unix.IFNAMSIZ)
	copy(data, name)
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data}}
}

// protocol matches IPv4 and the transport.
func protocol(proto byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.NFPROTO_IPV4}},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
	}
}

// address matches bytes 12 or 16 of the IPv4 header.
func address(e end, a netip.Addr) []expr.Any {
	if !a.IsValid() {
		return nil
	}
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 12 + 4*uint32(e), Len: 4},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: a.AsSlice()},
	}
}

// port matches bytes 0 or 2 of the transport header; 0 is any port.
func port(e end, p uint16) []expr.Any {
	if p == 0 {
		return nil
	}
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2 * uint32(e), Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(p)},
	}
}

// established lets the answering side answer alone: it never opens.
func established(only bool) []expr.Any {
	if !only {
		return nil
	}
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}
