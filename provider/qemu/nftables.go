package qemu

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// This file speaks nftables' netlink (linux/netfilter/nf_tables.h) as far as [Frames] needs
// it. The agent is measured: a library would be five more authors whom every tenant trusts.

// attr, text, number and nested make attributes; numbers are of 32 bits, in network order.
func attr(kind int, data []byte) *nl.RtAttr { return nl.NewRtAttr(kind, data) }
func text(kind int, s string) *nl.RtAttr    { return attr(kind, nl.ZeroTerminated(s)) }
func number(kind int, n int32) *nl.RtAttr   { return attr(kind, nl.BEUint32Attr(uint32(n))) }
func nested(kind int, in ...*nl.RtAttr) *nl.RtAttr {
	a := attr(kind|unix.NLA_F_NESTED, nil)
	for _, child := range in {
		a.AddChild(child)
	}
	return a
}

// batch is a transaction: all of it happens, or nothing.
type batch struct {
	data bytes.Buffer
	n    uint32 // messages so far, each of which is answered
}

// add adds a message of nftables about the bridge family.
func (b *batch) add(kind, flags int, attrs ...*nl.RtAttr) {
	b.message(unix.NFNL_SUBSYS_NFTABLES<<8|kind, flags|unix.NLM_F_ACK, unix.NFPROTO_BRIDGE, 0, attrs)
	b.n++
}

// message writes the header of netlink, that of netfilter and the attributes.
func (b *batch) message(kind, flags int, family byte, resource uint16, attrs []*nl.RtAttr) {
	var body []byte
	for _, a := range attrs {
		body = append(body, a.Serialize()...)
	}
	h := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+nl.SizeofNfgenmsg+len(body)))
	h = binary.NativeEndian.AppendUint16(h, uint16(kind))
	h = binary.NativeEndian.AppendUint16(h, uint16(flags|unix.NLM_F_REQUEST))
	h = binary.NativeEndian.AppendUint32(h, b.n+1)
	h = binary.NativeEndian.AppendUint32(h, 0)
	h = append(h, family, unix.NFNETLINK_V0)
	h = binary.BigEndian.AppendUint16(h, resource)
	b.data.Write(h)
	b.data.Write(body)
}

// commit carries out what gather adds.
func commit(gather func(*batch)) error {
	var b batch
	b.message(unix.NFNL_MSG_BATCH_BEGIN, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, nil)
	gather(&b)
	b.message(unix.NFNL_MSG_BATCH_END, 0, unix.AF_UNSPEC, unix.NFNL_SUBSYS_NFTABLES, nil)
	s, err := nl.Subscribe(unix.NETLINK_NETFILTER) // to no group: a socket
	if err != nil {
		return err
	}
	defer s.Close()
	if err := errors.Join(s.SetSendTimeout(&nl.SocketTimeoutTv), s.SetReceiveTimeout(&nl.SocketTimeoutTv)); err != nil {
		return err
	}
	if err := unix.Sendto(s.GetFd(), b.data.Bytes(), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	for answered := uint32(0); answered < b.n; {
		msgs, _, err := s.Receive()
		if err != nil {
			return err
		}
		for _, m := range msgs {
			if m.Header.Type != unix.NLMSG_ERROR || len(m.Data) < 4 {
				return fmt.Errorf("netlink answers with a message of type %d", m.Header.Type)
			}
			if errno := -int32(binary.NativeEndian.Uint32(m.Data)); errno != 0 {
				return fmt.Errorf("message %d: %w", m.Header.Seq, syscall.Errno(errno))
			}
			answered++
		}
	}
	return nil
}

// set is a set of nftables.
type set struct {
	name    string
	id      int32 // in the transaction that makes it
	keyType int32 // nft's number of the type, for people who list the table
	keyLen  int32 // bytes
	flags   int32
	fields  []int32 // lengths of what a key is joined of, in bytes
	size    int32   // most elements; 0 is any number
	native  bool    // the key is in the host's byte order, for people
}

func (s set) create(b *batch, table string) {
	desc := nested(unix.NFTA_SET_DESC)
	if s.size > 0 {
		desc.AddChild(number(unix.NFTA_SET_DESC_SIZE, s.size))
	}
	if len(s.fields) > 0 {
		const concat, fieldLength = 2, 1 // NFTA_SET_DESC_CONCAT, NFTA_SET_FIELD_LEN
		fields := nested(concat)
		for _, n := range s.fields {
			fields.AddChild(nested(unix.NFTA_LIST_ELEM, number(fieldLength, n)))
		}
		desc.AddChild(fields)
	}
	attrs := []*nl.RtAttr{text(unix.NFTA_SET_TABLE, table), text(unix.NFTA_SET_NAME, s.name), number(unix.NFTA_SET_ID, s.id),
		number(unix.NFTA_SET_KEY_TYPE, s.keyType), number(unix.NFTA_SET_KEY_LEN, s.keyLen), number(unix.NFTA_SET_FLAGS, s.flags), desc}
	if s.native {
		// libnftnl, NFTNL_UDATA_SET_KEYBYTEORDER: type, length, 1 for the host's.
		attrs = append(attrs, attr(unix.NFTA_SET_USERDATA, binary.NativeEndian.AppendUint32([]byte{0, 4}, 1)))
	}
	b.add(unix.NFT_MSG_NEWSET, unix.NLM_F_CREATE, attrs...)
}

// change adds or deletes an element: NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM.
func (s set) change(b *batch, table string, kind int, key []byte) {
	flags := 0
	if kind == unix.NFT_MSG_NEWSETELEM {
		flags = unix.NLM_F_CREATE
	}
	b.add(kind, flags, text(unix.NFTA_SET_ELEM_LIST_TABLE, table), text(unix.NFTA_SET_ELEM_LIST_SET, s.name),
		nested(unix.NFTA_SET_ELEM_LIST_ELEMENTS, nested(unix.NFTA_LIST_ELEM, nested(unix.NFTA_SET_ELEM_KEY, attr(unix.NFTA_DATA_VALUE, key)))))
}

// rereads bounds how often a set is read again because somebody changed the host's rules
// meanwhile.
const rereads = 10

// packets reads the set's counters, by key.
func (s set) packets(table string) (map[string]uint64, error) {
	req := nl.NewNetlinkRequest(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETSETELEM, unix.NLM_F_DUMP)
	req.AddData(&nl.Nfgenmsg{NfgenFamily: unix.NFPROTO_BRIDGE, Version: unix.NFNETLINK_V0})
	req.AddData(text(unix.NFTA_SET_ELEM_LIST_TABLE, table))
	req.AddData(text(unix.NFTA_SET_ELEM_LIST_SET, s.name))
	msgs, err := req.Execute(unix.NETLINK_NETFILTER, 0)
	for n := 0; n < rereads && errors.Is(err, nl.ErrDumpInterrupted); n++ {
		msgs, err = req.Execute(unix.NETLINK_NETFILTER, 0)
	}
	if err != nil {
		return nil, err
	}
	counts := map[string]uint64{}
	for _, m := range msgs {
		if len(m) < nl.SizeofNfgenmsg {
			return nil, errShort
		}
		elements, err := within(m[nl.SizeofNfgenmsg:], unix.NFTA_SET_ELEM_LIST_ELEMENTS)
		if err != nil {
			return nil, err
		}
		list, err := nl.ParseRouteAttr(elements)
		if err != nil {
			return nil, err
		}
		for _, e := range list {
			key, e1 := within(e.Value, unix.NFTA_SET_ELEM_KEY, unix.NFTA_DATA_VALUE)
			n, e2 := within(e.Value, unix.NFTA_SET_ELEM_EXPR, unix.NFTA_EXPR_DATA, unix.NFTA_COUNTER_PACKETS)
			if err := errors.Join(e1, e2); err != nil {
				return nil, err
			}
			if len(key) == 0 || len(n) != 8 {
				return nil, errShort
			}
			counts[string(key)] = binary.BigEndian.Uint64(n)
		}
	}
	return counts, nil
}

var errShort = errors.New("an answer of nftables is too short")

// within is the value of an attribute inside others, one kind for each level; empty if there is none.
func within(data []byte, path ...uint16) ([]byte, error) {
	for _, kind := range path {
		list, err := nl.ParseRouteAttr(data)
		if err != nil {
			return nil, err
		}
		data = nil
		for _, a := range list {
			if a.Attr.Type&^(unix.NLA_F_NESTED|unix.NLA_F_NET_BYTEORDER) == kind {
				data = a.Value
			}
		}
	}
	return data, nil
}

// part of a rule.
type part = *nl.RtAttr

func expression(name string, in ...*nl.RtAttr) part {
	return nested(unix.NFTA_LIST_ELEM, text(unix.NFTA_EXPR_NAME, name), nested(unix.NFTA_EXPR_DATA, in...))
}

func loadInterface(register int32) part {
	return expression("meta", number(unix.NFTA_META_DREG, register), number(unix.NFTA_META_KEY, unix.NFT_META_IIFNAME))
}

func loadEthernet(register, offset, length int32) part {
	return expression("payload", number(unix.NFTA_PAYLOAD_DREG, register), number(unix.NFTA_PAYLOAD_BASE, unix.NFT_PAYLOAD_LL_HEADER),
		number(unix.NFTA_PAYLOAD_OFFSET, offset), number(unix.NFTA_PAYLOAD_LEN, length))
}

func differs(register int32, data string) part {
	return expression("cmp", number(unix.NFTA_CMP_SREG, register), number(unix.NFTA_CMP_OP, unix.NFT_CMP_NEQ),
		nested(unix.NFTA_CMP_DATA, attr(unix.NFTA_DATA_VALUE, []byte(data))))
}

// lookup goes on if the set has the key, or, with NFT_LOOKUP_F_INV, if it has not.
func (s set) lookup(register, flags int32) part {
	return expression("lookup", text(unix.NFTA_LOOKUP_SET, s.name), number(unix.NFTA_LOOKUP_SREG, register), number(unix.NFTA_LOOKUP_FLAGS, flags))
}

// count counts under the key, whose element the first such packet makes.
func (s set) count(register int32) part {
	return expression("dynset", text(unix.NFTA_DYNSET_SET_NAME, s.name), number(unix.NFTA_DYNSET_OP, unix.NFT_DYNSET_OP_UPDATE),
		number(unix.NFTA_DYNSET_SREG_KEY, register), nested(unix.NFTA_DYNSET_EXPR, text(unix.NFTA_EXPR_NAME, "counter"), nested(unix.NFTA_EXPR_DATA)))
}

func accept() part {
	const nfAccept = 1 // NF_ACCEPT
	return expression("immediate", number(unix.NFTA_IMMEDIATE_DREG, unix.NFT_REG_VERDICT),
		nested(unix.NFTA_IMMEDIATE_DATA, nested(unix.NFTA_DATA_VERDICT, number(unix.NFTA_VERDICT_CODE, nfAccept))))
}
