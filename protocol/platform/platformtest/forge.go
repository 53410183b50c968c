package platformtest

import (
	"bytes"
	"encoding/binary"

	"foothold/protocol/digest"
	"foothold/protocol/tcglog"
)

// The lies about an event of a firmware's log, whose digest is true. The event is the first that
// extends by the digest of data. An event is: register u32 | type u32 | count u32 |
// algorithm u16 | digest | size u32 | data.

// Relabel says that it is of another type.
func Relabel(log []byte, data string, to tcglog.Type) {
	binary.LittleEndian.PutUint32(log[find(log, data)-10:], uint32(to))
}

// Move says that it extends another register.
func Move(log []byte, data string, register int) {
	binary.LittleEndian.PutUint32(log[find(log, data)-14:], uint32(register))
}

// Resize says that its data have another size.
func Resize(log []byte, data string, size uint32) {
	binary.LittleEndian.PutUint32(log[find(log, data)+len(digest.SHA256{}):], size)
}

// Falsify gives it other data, of which as much counts as data have bytes.
func Falsify(log []byte, data, other string) {
	at := find(log, data) + len(digest.SHA256{}) + 4
	copy(log[at:at+len(data)], other)
}

// find is where the event's digest begins. It panics where there is no such event.
func find(log []byte, data string) int {
	sum := digest.Of([]byte(data))
	at := bytes.Index(log, sum[:])
	if at < 0 {
		panic("the log has no such event")
	}
	return at
}
