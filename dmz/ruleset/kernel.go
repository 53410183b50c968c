package ruleset

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

const (
	socketBuffer = 8 << 20  // asked for; without privilege the kernel grants less
	readBuffer   = 32 << 10 // bytes; the kernel fills at most so much at once, and begins at the set's start each time
	perRequest   = 64       // elements asked for at once: their answers fit any socket's buffer
	minBudget    = 64 << 10
)

// errInterrupted says that the kernel's tables changed during a dump, which may have left
// elements out.
var errInterrupted = errors.New("rules changed while they were read")

// kernel is two sockets to nftables in the namespace that they were opened in. They
// stay open: to close one behind a deletion waits until the kernel has freed the
// elements, an RCU grace period of ten milliseconds and more (nft_rcv_nl_event in
// net/netfilter/nf_tables_api.c). After an error they are closed, since answers may be
// left in them.
type kernel struct {
	write  *nftables.Conn
	budget int // bytes of one transaction
	*reader
}

// reader is the socket for questions.
type reader struct {
	conn *netlink.Conn
	now  func() time.Duration // boot-time clock
}

func openKernel(now func() time.Duration) (*kernel, error) {
	k := &kernel{budget: minBudget}
	var err error
	k.write, err = nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		if err := errors.Join(c.SetWriteBuffer(socketBuffer), c.SetReadBuffer(socketBuffer)); err != nil {
			return err
		}
		granted, err := c.WriteBuffer()
		k.budget = max(minBudget, granted/2)
		return err
	}))
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	if k.reader, err = openReader(now); err != nil {
		_ = k.write.CloseLasting()
		return nil, err
	}
	return k, nil
}

func (k *kernel) close() {
	_ = k.write.CloseLasting()
	k.reader.close()
}

func openReader(now func() time.Duration) (*reader, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{MessageBufferSize: readBuffer})
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	return &reader{conn, now}, nil
}

func (r *reader) close() { _ = r.conn.Close() }

// held is an element as the kernel has it.
type held struct {
	id      string
	until   time.Duration // boot-time clock; Forever: no end
	packets uint64
}

// get reads the named elements; those that the kernel has not are left out.
func (r *reader) get(t *nftables.Table, elements []element) (map[element]held, error) {
	out := make(map[element]held, len(elements))
	for part := range slices.Chunk(elements, perRequest) {
		var asks []netlink.Message
		for _, e := range part {
			ask, err := request(t, e.shape, e.key)
			if err != nil {
				return nil, err
			}
			asks = append(asks, ask)
		}
		if _, err := r.conn.SendMessages(asks); err != nil {
			return nil, fmt.Errorf("read elements: %w", err)
		}
		for _, e := range part { // one answer each, in order
			msgs, err := r.conn.Receive()
			if errors.Is(err, unix.ENOENT) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("read elements: %w", err)
			}
			for _, m := range msgs {
				if err := r.decode(m, e.shape, out); err != nil {
					return nil, fmt.Errorf("read elements: %w", err)
				}
			}
		}
	}
	return out, nil
}

// all reads every element of the sets. The walk through a hash that grows meanwhile can
// leave some out, and while this process waits for a processor their times run: what is
// not met as expected is asked for again by its key.
func (r *reader) all(t *nftables.Table, sets map[shape]*nftables.Set, expected map[element]want) (map[element]held, error) {
	have := map[element]held{}
	for s := range sets {
		if err := r.dump(t, s, have); err != nil {
			return nil, fmt.Errorf("read set %s: %w", s.name(), err)
		}
	}
	var doubtful []element
	for e, w := range expected {
		if h, ok := have[e]; !ok || !matches(h, w) {
			doubtful = append(doubtful, e)
			delete(have, e)
		}
	}
	again, err := r.get(t, doubtful)
	if err != nil {
		return nil, err
	}
	maps.Copy(have, again)
	return have, nil
}

// dump reads what a walk through a set meets.
func (r *reader) dump(t *nftables.Table, s shape, out map[element]held) error {
	ask, err := request(t, s, "")
	if err != nil {
		return err
	}
	if _, err := r.conn.Send(ask); err != nil {
		return err
	}
	interrupted := false
	for m, err := range r.conn.ReceiveIter() { // to the end: nothing may be left in the socket
		if err != nil {
			return err
		}
		if err := r.decode(m, s, out); err != nil {
			return err
		}
		interrupted = interrupted || m.Header.Flags&unix.NLM_F_DUMP_INTR != 0
	}
	if interrupted {
		return errInterrupted
	}
	return nil
}

// request asks for one element, or for a whole set without a key.
func request(t *nftables.Table, s shape, key string) (netlink.Message, error) {
	flags := netlink.Request
	attrs := netlink.NewAttributeEncoder()
	attrs.String(unix.NFTA_SET_ELEM_LIST_TABLE, t.Name)
	attrs.String(unix.NFTA_SET_ELEM_LIST_SET, s.name())
	if key == "" {
		flags |= netlink.Dump
	} else {
		nest(attrs, []byte(key), unix.NFTA_SET_ELEM_LIST_ELEMENTS, unix.NFTA_LIST_ELEM, unix.NFTA_SET_ELEM_KEY, unix.NFTA_DATA_VALUE)
	}
	data, err := attrs.Encode()
	if err != nil {
		return netlink.Message{}, fmt.Errorf("encode request: %w", err)
	}
	head := []byte{byte(t.Family), unix.NFNETLINK_V0, 0, 0} // struct nfgenmsg
	return netlink.Message{Header: netlink.Header{Type: unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETSETELEM, Flags: flags}, Data: append(head, data...)}, nil
}

// nest writes a value inside attributes of the given types, the outermost first.
func nest(attrs *netlink.AttributeEncoder, value []byte, types ...uint16) {
	if len(types) == 1 {
		attrs.Bytes(types[0], value)
		return
	}
	attrs.Nested(types[0], func(inner *netlink.AttributeEncoder) error {
		nest(inner, value, types[1:]...)
		return nil
	})
}

// decode reads the elements of an answer (include/uapi/linux/netfilter/nf_tables.h).
// The kernel counts their times from when it wrote the answer, so decode them at once.
func (r *reader) decode(m netlink.Message, s shape, out map[element]held) error {
	if len(m.Data) < 4 {
		return errors.New("answer is too short")
	}
	now := r.now()
	return each(m.Data[4:], func(list *netlink.AttributeDecoder) {
		if list.Type() != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
			return
		}
		list.Nested(func(ad *netlink.AttributeDecoder) error {
			for ad.Next() {
				ad.Nested(func(ad *netlink.AttributeDecoder) error {
					key, h := elementOf(ad, now)
					out[element{s, key}] = h
					return nil
				})
			}
			return nil
		})
	})
}

// each calls f at every attribute.
func each(data []byte, f func(*netlink.AttributeDecoder)) error {
	ad, err := netlink.NewAttributeDecoder(data)
	if err != nil {
		return err
	}
	ad.ByteOrder = binary.BigEndian
	for ad.Next() {
		f(ad)
	}
	return ad.Err()
}

func elementOf(ad *netlink.AttributeDecoder, now time.Duration) (key string, h held) {
	h.until = Forever
	timed, left := false, time.Duration(0)
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_SET_ELEM_KEY:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					key = string(ad.Bytes())
				}
				return nil
			})
		case unix.NFTA_SET_ELEM_TIMEOUT: // milliseconds
			timed = ad.Uint64() != 0
		case unix.NFTA_SET_ELEM_EXPIRATION: // milliseconds
			left = time.Duration(ad.Uint64()) * time.Millisecond
		case unix.NFTA_SET_ELEM_USERDATA:
			h.id, _ = userdata.GetString(ad.Bytes(), userdata.NFTNL_UDATA_SET_ELEM_COMMENT)
			h.id = strings.TrimRight(h.id, "\x00")
		case unix.NFTA_SET_ELEM_EXPR:
			h.packets = counter(ad)
		}
	}
	if timed {
		h.until = now + left
	}
	return key, h
}

// counter reads the packets of an element's counter, the one expression that ours have.
func counter(ad *netlink.AttributeDecoder) (packets uint64) {
	ad.Nested(func(ad *netlink.AttributeDecoder) error {
		for ad.Next() {
			if ad.Type() != unix.NFTA_EXPR_DATA {
				continue
			}
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					if ad.Type() == unix.NFTA_COUNTER_PACKETS {
						packets = ad.Uint64()
					}
				}
				return nil
			})
		}
		return nil
	})
	return packets
}
