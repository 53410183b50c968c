package hunt

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"foothold/protocol/token"
)

const (
	chunk     = 1 << 20 // bytes searched at once
	keyLen    = 8       // bytes of a form by which it is found
	tokenHead = "fht"
	tokenLen  = 56 // bytes of a token's text, see package token
)

// Hit is a secret that was found.
type Hit struct {
	Secret string `json:"secret"`
	Form   string `json:"form"`
	Offset int64  `json:"offset"` // bytes from the beginning
}

// Matcher looks for many secrets at once. It may be used by many goroutines.
type Matcher struct {
	byKey   map[uint64][]form
	sieve   [1 << 10]uint64 // a bit for each hash of a form's first four bytes
	longest int
	zero    bool // a form begins with so many zeros that they must not be skipped
}

// NewMatcher prepares the search for the secrets.
func NewMatcher(secrets []Secret) (*Matcher, error) {
	m := &Matcher{byKey: map[uint64][]form{}, longest: tokenLen}
	for _, s := range secrets {
		forms, err := s.forms()
		if err != nil {
			return nil, err
		}
		for _, f := range forms {
			key := binary.LittleEndian.Uint64(f.text)
			m.byKey[key] = append(m.byKey[key], f)
			h := hash(uint32(key))
			m.sieve[h>>6] |= 1 << (h & 63)
			m.longest = max(m.longest, len(f.text))
			m.zero = m.zero || key == 0
		}
	}
	return m, nil
}

func hash(head uint32) uint32 { return head * 2654435761 >> 16 }

// Bytes searches data, which begins at an offset. hit is called for each secret in it.
func (m *Matcher) Bytes(data []byte, offset int64, hit func(Hit)) {
	for i := 0; i+keyLen <= len(data); i++ {
		key := binary.LittleEndian.Uint64(data[i:])
		if key == 0 && !m.zero {
			for i+2*keyLen <= len(data) && binary.LittleEndian.Uint64(data[i+keyLen:]) == 0 {
				i += keyLen
			}
			continue
		}
		h := hash(uint32(key))
		if m.sieve[h>>6]&(1<<(h&63)) == 0 {
			continue
		}
		for _, f := range m.byKey[key] {
			if bytes.HasPrefix(data[i:], f.text) {
				hit(Hit{f.secret, f.name, offset + int64(i)})
			}
		}
	}
	Tokens(data, func(t token.Token, kind token.Kind, at int) {
		hit(Hit{kind.String(), "form", offset + int64(at)})
	})
}

// Tokens calls f for each token in data.
func Tokens(data []byte, f func(t token.Token, kind token.Kind, at int)) {
	for at := 0; ; at++ {
		i := bytes.Index(data[at:], []byte(tokenHead))
		if i < 0 || at+i+tokenLen > len(data) {
			return
		}
		at += i
		for kind := token.T1; kind <= token.T3; kind++ {
			if t, err := token.Parse(kind, string(data[at:at+tokenLen])); err == nil {
				f(t, kind, at)
			}
		}
	}
}

// Reader searches all that r gives.
func (m *Matcher) Reader(r io.Reader, hit func(Hit)) error {
	buf := make([]byte, chunk+m.longest)
	kept, offset := 0, int64(0) // bytes kept from the last chunk; where the buffer begins
	seen := map[Hit]bool{}      // what lies in the kept bytes was found before
	for {
		n, err := io.ReadFull(r, buf[kept:kept+chunk])
		data := buf[:kept+n]
		if !zero(data) {
			m.Bytes(data, offset, func(h Hit) {
				if !seen[h] {
					seen[h] = true
					hit(h)
				}
			})
		}
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("search: %w", err)
		}
		keep := min(m.longest-1, len(data))
		copy(buf, data[len(data)-keep:])
		offset += int64(len(data) - keep)
		kept = keep
	}
}

// nothing is a chunk of a hole.
var nothing [64 << 10]byte

func zero(data []byte) bool {
	for len(data) > 0 {
		n := min(len(data), len(nothing))
		if !bytes.Equal(data[:n], nothing[:n]) {
			return false
		}
		data = data[n:]
	}
	return true
}
