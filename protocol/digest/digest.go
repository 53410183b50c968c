// Package digest is the SHA-256 value that the protocol's documents carry, as
// 64 lower-case hexadecimal digits in text and JSON.
package digest

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
)

// SHA256 is a SHA-256 value. The zero value means "absent".
type SHA256 [sha256.Size]byte

// Of hashes data.
func Of(data []byte) SHA256 { return sha256.Sum256(data) }

// Parse reads 64 lower-case hexadecimal digits.
func Parse(text string) (SHA256, error) {
	var d SHA256
	if len(text) != 2*sha256.Size {
		return d, errors.New("a SHA-256 has 64 hexadecimal digits")
	}
	for _, c := range []byte(text) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return d, errors.New("a SHA-256 has lower-case hexadecimal digits alone")
		}
	}
	_, err := hex.Decode(d[:], []byte(text))
	return d, err
}

func (d SHA256) String() string { return hex.EncodeToString(d[:]) }

// Short is the first 12 digits, for people.
func (d SHA256) Short() string { return d.String()[:12] }

// IsZero reports whether the value is absent.
func (d SHA256) IsZero() bool { return d == SHA256{} }

// MarshalText writes 64 digits, or nothing for the zero value.
func (d SHA256) MarshalText() ([]byte, error) {
	if d.IsZero() {
		return []byte{}, nil
	}
	return []byte(d.String()), nil
}

// UnmarshalText is the inverse of MarshalText.
func (d *SHA256) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*d = SHA256{}
		return nil
	}
	v, err := Parse(string(text))
	if err == nil {
		*d = v
	}
	return err
}
