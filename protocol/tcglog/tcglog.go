// Package tcglog reads the log that a host's firmware and boot loader kept of what they
// measured (TCG PC Client Platform Firmware Profile, section 10, "Event Logging"), and
// replays it.
//
//	log     header, then events to the end
//	header  one event of the SHA-1 form; its data names the digests' algorithms and sizes
//	event   register u32 | type u32 | count u32 | count x (algorithm u16, digest) | size u32 | data
//
// All integers are little endian. A log without such a header has the older, SHA-1 form:
//
//	event   register u32 | type u32 | SHA-1 [20] | size u32 | data
//
// Nothing in a log is to be believed because it is there. What replays to quoted registers
// is the sequence of digests, and nothing else: an event's type and number are anyone's
// claim, and its data count only where [Event.Authentic] says that the digest is theirs
// (for most types that measure code it never is: their data name what was measured).
//
// Logs come from hosts that may be hostile: every size and count has a limit that is
// checked before it is used, and what the format does not allow is an error.
package tcglog

import (
	"bytes"
	"crypto"
	_ "crypto/sha1" // legacy logs are read, and never replayed
	_ "crypto/sha256"
	_ "crypto/sha512"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
)

// Limits. The largest public logs of servers have some 600 events in 200 KiB.
const (
	MaxSize   = 1 << 20 // bytes of a log
	MaxEvents = 4096
	maxBanks  = 16  // algorithms in a header
	usualSize = 128 // bytes of an event; where they are smaller, room is made on the way
	registers = 24  // of a PC's TPM
)

// A Bank is an algorithm of registers (TCG Algorithm Registry, "TPM_ALG_ID").
type Bank uint16

// The banks that we replay. A log's other digests are skipped.
const (
	SHA256 Bank = 0x000b
	SHA384 Bank = 0x000c
)

const sha1Bank Bank = 0x0004

// sizes are the digests' sizes of algorithms that the registry has; headers cannot say otherwise.
var sizes = map[Bank]int{sha1Bank: 20, SHA256: 32, SHA384: 48, 0x000d: 64, 0x0012: 32, 0x0027: 32, 0x0028: 48, 0x0029: 64}

// Hash is the bank's function; false for a bank that we do not replay.
func (b Bank) Hash() (crypto.Hash, bool) {
	switch b {
	case SHA256:
		return crypto.SHA256, true
	case SHA384:
		return crypto.SHA384, true
	}
	return 0, false
}

func (b Bank) String() string {
	switch b {
	case sha1Bank:
		return "SHA-1"
	case SHA256:
		return "SHA-256"
	case SHA384:
		return "SHA-384"
	}
	return fmt.Sprintf("algorithm %#04x", uint16(b))
}

// Event is one entry. Its slices are parts of the log that was parsed.
type Event struct {
	Number int    // from 1; the header does not count
	PCR    int    // register, below 24
	Type   Type   // a claim
	Data   []byte // a claim, but see Authentic

	sha256, sha384 []byte // nil where the event has none
}

// Digest is what was extended in that bank; nil if the log does not say.
func (e Event) Digest(b Bank) []byte {
	switch b {
	case SHA256:
		return e.sha256
	case SHA384:
		return e.sha384
	}
	return nil
}

// Authentic reports whether the digest that was extended in that bank is the digest of the
// event's data, so that the register proves the data and not the digest alone.
func (e Event) Authentic(b Bank) bool {
	h, ok := b.Hash()
	if !ok {
		return false
	}
	sum := h.New()
	sum.Write(e.Data)
	return subtle.ConstantTimeCompare(sum.Sum(nil), e.Digest(b)) == 1
}

// Log is a parsed log.
type Log struct {
	// Events are those that extend a register, in their order.
	Events []Event
	// Banks are the algorithms that the header names, in its order.
	Banks []Bank

	locality byte // in which the TPM was started; register 0 begins with it
	startup  bool // an event said so
}

// Parse reads a log of at most [MaxSize] bytes, and keeps no copy of it.
func Parse(data []byte) (*Log, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("firmware log: it has %d bytes, at most %d are read", len(data), MaxSize)
	}
	r := &reader{rest: data}
	first := r.legacy()
	if r.err != nil {
		return nil, fmt.Errorf("firmware log: header: %w", r.err)
	}
	l := &Log{Events: make([]Event, 0, min(len(data)/usualSize, MaxEvents))}
	next := (*reader).legacy
	if s := first.Data; first.Type == NoAction && bytes.HasPrefix(s, agile) {
		banks, err := specification(s)
		if err != nil {
			return nil, fmt.Errorf("firmware log: header: %w", err)
		}
		for _, b := range banks {
			l.Banks = append(l.Banks, b.id)
		}
		next = func(r *reader) Event { return r.event(banks) }
	} else {
		l.Banks = []Bank{sha1Bank}
		if err := l.take(first); err != nil {
			return nil, fmt.Errorf("firmware log: event 1: %w", err)
		}
	}
	for n := 1; len(r.rest) > 0; n++ {
		if n > MaxEvents {
			return nil, fmt.Errorf("firmware log: it has more than %d events", MaxEvents)
		}
		e := next(r)
		e.Number = n
		if r.err == nil {
			r.err = l.take(e)
		}
		if r.err != nil {
			return nil, fmt.Errorf("firmware log: event %d: %w", n, r.err)
		}
	}
	return l, nil
}

var (
	agile    = []byte("Spec ID Event03\x00")
	locality = []byte("StartupLocality\x00")
)

// take adds an event. Those of type EV_NO_ACTION extend nothing; the one that we
// understand says from where the TPM was started (section 10.4.5.3).
func (l *Log) take(e Event) error {
	if e.Type != NoAction {
		if e.PCR < 0 || e.PCR >= registers {
			return fmt.Errorf("there is no register %d", e.PCR)
		}
		l.Events = append(l.Events, e)
		return nil
	}
	if !bytes.HasPrefix(e.Data, locality) {
		return nil
	}
	from := e.Data[len(locality):]
	switch {
	case len(from) != 1 || e.PCR != 0:
		return errors.New("a startup locality in another form")
	case from[0] != 0 && from[0] != 3 && from[0] != 4:
		return fmt.Errorf("a TPM is not started from locality %d", from[0])
	case l.startup:
		return errors.New("a second startup locality")
	}
	for _, before := range l.Events {
		if before.PCR == 0 {
			return errors.New("a startup locality after register 0 was extended")
		}
	}
	l.locality, l.startup = from[0], true
	return nil
}

// Replay gives the registers that the log leads to in one bank. They begin with zeros,
// register 0 with the startup locality. So do 17 to 22: a log has events of those only
// after a dynamic launch, which resets all of them from ones to zeros, and extends 17 first.
// Registers without an event are absent, but those that the launch has reset. Every event
// must have a digest of the bank.
func (l *Log) Replay(b Bank) (map[int][]byte, error) {
	h, ok := b.Hash()
	if !ok {
		return nil, fmt.Errorf("firmware log: registers of %v are not replayed", b)
	}
	sum, values := h.New(), [registers][]byte{}
	for _, e := range l.Events {
		if isDynamic(e.PCR) && values[launchRegister] == nil {
			if e.PCR != launchRegister {
				return nil, fmt.Errorf("firmware log: event %d extends register %d before a dynamic launch, which extends %d", e.Number, e.PCR, launchRegister)
			}
			for i := launchRegister; isDynamic(i); i++ {
				values[i] = make([]byte, h.Size())
			}
		}
		d := e.Digest(b)
		if d == nil {
			return nil, fmt.Errorf("firmware log: event %d has no digest of %v", e.Number, b)
		}
		old := values[e.PCR]
		if old == nil {
			old = make([]byte, h.Size())
			if e.PCR == 0 {
				old[h.Size()-1] = l.locality
			}
		}
		sum.Reset()
		sum.Write(old)
		sum.Write(d)
		values[e.PCR] = sum.Sum(old[:0])
	}
	led := make(map[int][]byte, registers)
	for i, v := range values {
		if v != nil {
			led[i] = v
		}
	}
	return led, nil
}

// ByRegister are the events of each register that has any, in their order.
func (l *Log) ByRegister() map[int][]Event {
	var counts [registers]int
	for _, e := range l.Events {
		counts[e.PCR]++
	}
	list, by := make([]Event, len(l.Events)), make(map[int][]Event, registers)
	for i, n := range counts {
		if n > 0 {
			by[i], list = list[:0:n], list[n:]
		}
	}
	for _, e := range l.Events {
		by[e.PCR] = append(by[e.PCR], e)
	}
	return by
}

// Registers that a dynamic launch resets (TCG PC Client Platform TPM Profile, "PCR
// Attributes"); it extends the first.
const launchRegister, lastDynamic = 17, 22

func isDynamic(register int) bool { return register >= launchRegister && register <= lastDynamic }

// bank is an algorithm of the header with its digests' size in bytes.
type bank struct {
	id   Bank
	size int
}

// specification reads TCG_EfiSpecIdEvent (section 10.4.5.1).
func specification(data []byte) ([]bank, error) {
	const fixed = 16 + 4 + 1 + 1 + 1 + 1 // signature, platform class, minor, major, errata, size of UINTN
	r := &reader{rest: data}
	head := r.take(fixed)
	count := r.u32()
	switch {
	case r.err != nil:
		return nil, r.err
	case head[21] != 2:
		return nil, fmt.Errorf("it is of version %d.%d, want 2", head[21], head[20])
	case count == 0 || count > maxBanks:
		return nil, fmt.Errorf("it names %d algorithms, want 1 to %d", count, maxBanks)
	}
	var list []bank
	for range count {
		b := bank{Bank(r.u16()), int(r.u16())}
		switch known, ok := sizes[b.id]; {
		case r.err != nil:
			return nil, r.err
		case ok && b.size != known, b.size == 0 || b.size > 64:
			return nil, fmt.Errorf("digests of %v have %d bytes", b.id, b.size)
		}
		for _, other := range list {
			if other.id == b.id {
				return nil, fmt.Errorf("it names %v twice", b.id)
			}
		}
		list = append(list, b)
	}
	vendor := r.take(1)
	if r.err == nil && len(r.rest) != int(vendor[0]) {
		r.err = fmt.Errorf("it has %d bytes of its vendor, and says %d", len(r.rest), vendor[0])
	}
	return list, r.err
}

// reader takes parts off the front of a log; after its first error it gives zeros.
type reader struct {
	rest []byte
	err  error
}

var errShort = errors.New("the log ends in the middle of it")

// take gives the next n bytes; nil after an error.
func (r *reader) take(n int) []byte {
	if r.err != nil || n > len(r.rest) {
		r.fail(errShort)
		return nil
	}
	part := r.rest[:n:n]
	r.rest = r.rest[n:]
	return part
}

func (r *reader) fail(err error) {
	if r.err == nil {
		r.err = err
	}
}

func (r *reader) u16() uint16 {
	if b := r.take(2); b != nil {
		return binary.LittleEndian.Uint16(b)
	}
	return 0
}

func (r *reader) u32() uint32 {
	if b := r.take(4); b != nil {
		return binary.LittleEndian.Uint32(b)
	}
	return 0
}

// sized gives as many bytes as the next integer says.
func (r *reader) sized() []byte {
	n := r.u32()
	if uint64(n) > uint64(len(r.rest)) {
		r.fail(errShort)
		return nil
	}
	return r.take(int(n))
}

// legacy reads TCG_PCClientPCREvent.
func (r *reader) legacy() Event {
	e := Event{Number: 1, PCR: int(r.u32()), Type: Type(r.u32())}
	r.take(20)
	e.Data = r.sized()
	return e
}

// event reads TCG_PCR_EVENT2.
func (r *reader) event(banks []bank) Event {
	e := Event{PCR: int(r.u32()), Type: Type(r.u32())}
	count := r.u32()
	if count > uint32(len(banks)) {
		r.fail(fmt.Errorf("it has %d digests, the header names %d algorithms", count, len(banks)))
		return e
	}
	var seen [maxBanks]bool
	for range count {
		id := Bank(r.u16())
		at := -1
		for i, b := range banks {
			if b.id == id {
				at = i
			}
		}
		if r.err != nil {
			return e
		}
		if at < 0 || seen[at] {
			r.fail(fmt.Errorf("a digest of %v that the header does not name, or a second one", id))
			return e
		}
		seen[at] = true
		switch d := r.take(banks[at].size); id {
		case SHA256:
			e.sha256 = d
		case SHA384:
			e.sha384 = d
		}
	}
	e.Data = r.sized()
	return e
}
