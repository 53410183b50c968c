package ruleset

import (
	"errors"
	"slices"
	"time"

	"github.com/google/nftables"
)

const perMessage = 128 // elements a message; a netlink attribute holds 64 KiB

// transaction gathers messages of one batch and cuts it when it grows over what the
// socket can send at once.
type transaction struct {
	conn   *nftables.Conn
	budget int // bytes a batch
	size   int
	err    error
}

func (k *kernel) begin() *transaction { return &transaction{conn: k.write, budget: k.budget} }

func (tx *transaction) note(err error) { tx.err = errors.Join(tx.err, err) }

func (tx *transaction) delete(sets map[shape]*nftables.Set, gone []element) error {
	bySet := map[shape][]nftables.SetElement{}
	for _, e := range gone {
		bySet[e.shape] = append(bySet[e.shape], nftables.SetElement{Key: []byte(e.key)})
	}
	for s, list := range bySet {
		for part := range slices.Chunk(list, perMessage) {
			tx.note(tx.conn.SetDeleteElements(sets[s], part))
			if err := tx.grow(len(part) * estimate(string(part[0].Key), "")); err != nil {
				return err
			}
		}
	}
	return nil
}

func (tx *transaction) add(sets map[shape]*nftables.Set, fresh map[element]want, now time.Duration) error {
	bySet := map[shape][]nftables.SetElement{}
	for e, w := range fresh {
		el := nftables.SetElement{Key: []byte(e.key), Comment: w.id}
		if w.until != Forever {
			el.Timeout = max(w.until-now, time.Millisecond)
		}
		bySet[e.shape] = append(bySet[e.shape], el)
	}
	for s, list := range bySet {
		for part := range slices.Chunk(list, perMessage) {
			tx.note(tx.conn.SetAddElements(sets[s], part))
			size := 0
			for _, e := range part {
				size += estimate(string(e.Key), e.Comment)
			}
			if err := tx.grow(size); err != nil {
				return err
			}
		}
	}
	return nil
}

// grow counts what was gathered and sends it when it is time.
func (tx *transaction) grow(n int) error {
	if tx.size += n; tx.size < tx.budget {
		return nil
	}
	return tx.flush()
}

func (tx *transaction) flush() error {
	if tx.err != nil {
		return tx.err
	}
	tx.size = 0
	return tx.conn.Flush()
}
