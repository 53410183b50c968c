// Package secret holds values that must not be printed, logged or compared carelessly.
//
// A Bytes prints, formats and logs as "[secret]". It marshals to base64 in JSON,
// because secrets do travel inside encrypted channels; keep it out of any structure
// that is logged or stored in clear.
package secret

import (
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
)

const redacted = "[secret]"

// Bytes is a secret byte string. The zero value is empty.
type Bytes struct{ b []byte }

// New takes ownership of b: the caller must not use it afterwards.
func New(b []byte) Bytes { return Bytes{b} }

// Random returns n bytes from the system's random source, which does not fail.
func Random(n int) Bytes {
	b := make([]byte, n)
	rand.Read(b)
	return Bytes{b}
}

// Reveal returns the secret itself, shared, not copied.
func (s Bytes) Reveal() []byte { return s.b }

// Len is the length in bytes.
func (s Bytes) Len() int { return len(s.b) }

// Equal compares in time that depends on the lengths alone.
func (s Bytes) Equal(o Bytes) bool { return subtle.ConstantTimeCompare(s.b, o.b) == 1 }

// Wipe overwrites the secret. Copies that others made are theirs to wipe.
func (s *Bytes) Wipe() {
	clear(s.b)
	s.b = nil
}

func (s Bytes) String() string             { return redacted }
func (s Bytes) GoString() string           { return redacted }
func (s Bytes) Format(f fmt.State, _ rune) { f.Write([]byte(redacted)) }
func (s Bytes) LogValue() slog.Value       { return slog.StringValue(redacted) }

// MarshalJSON encodes the secret as base64 for an encrypted channel.
func (s Bytes) MarshalJSON() ([]byte, error) {
	return json.Marshal(base64.StdEncoding.EncodeToString(s.b))
}

// UnmarshalJSON is the inverse of MarshalJSON. Its errors carry no part of the input.
func (s *Bytes) UnmarshalJSON(data []byte) error {
	var text string
	if json.Unmarshal(data, &text) != nil {
		return fmt.Errorf("secret: not a JSON string")
	}
	b, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil {
		return fmt.Errorf("secret: not base64")
	}
	s.b = b
	return nil
}
