// Package token is the text form of the three single-use tokens of the boot story.
//
// A token is 256 random bits. Its text is
//
//	fht1_ (or fht2_, fht3_)  base64url(32 bytes, no padding)  8 hex digits of CRC-32
//
// The prefix names the kind and the checksum (IEEE, over all that stands before it)
// lets secret scanners and people tell a token from noise; neither is a security
// property. Only the SHA-256 of the text is ever stored.
//
// T1 authorises the boot request, T2 the report that the VM is ready to be unlocked,
// T3 the admission to the gateway.
package token

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"regexp"

	"foothold/protocol/digest"
)

// Kind says which act a token belongs to.
type Kind int

// The three kinds.
const (
	T1 Kind = 1 + iota
	T2
	T3
)

func (k Kind) String() string { return fmt.Sprintf("T%d", int(k)) }

const (
	secretLen = 32
	prefixLen = len("fht1_")
	bodyLen   = 43 // base64url of 32 bytes
	textLen   = prefixLen + bodyLen + 8
)

// ErrMalformed is returned for a text that is not a token of the wanted kind.
// It carries no part of the text.
var ErrMalformed = errors.New("not a token of this kind")

// Token is a token's text. It does not print; Reveal gives the text to the one
// channel that delivers it.
type Token struct{ text string }

// New makes a token of kind k.
func New(k Kind) Token {
	var s [secretLen]byte
	rand.Read(s[:])
	body := fmt.Sprintf("fht%d_", int(k)) + base64.RawURLEncoding.EncodeToString(s[:])
	return Token{body + checksum(body)}
}

// Parse checks form and kind of text.
func Parse(k Kind, text string) (Token, error) {
	if len(text) != textLen || text[:prefixLen] != fmt.Sprintf("fht%d_", int(k)) {
		return Token{}, ErrMalformed
	}
	body, sum := text[:prefixLen+bodyLen], text[prefixLen+bodyLen:]
	if _, err := base64.RawURLEncoding.Strict().DecodeString(body[prefixLen:]); err != nil || checksum(body) != sum {
		return Token{}, ErrMalformed
	}
	return Token{text}, nil
}

// inText is the form of a token within other bytes; kind and checksum are not looked at.
var inText = regexp.MustCompile(`fht[123]_[A-Za-z0-9_-]{43}[0-9a-f]{8}`)

// Within reports whether something that looks like a token stands anywhere in data.
func Within(data []byte) bool { return inText.Match(data) }

func checksum(body string) string { return fmt.Sprintf("%08x", crc32.ChecksumIEEE([]byte(body))) }

// Reveal returns the text.
func (t Token) Reveal() string { return t.text }

// IsZero reports whether the token is absent.
func (t Token) IsZero() bool { return t.text == "" }

// Digest is what the ledger stores and what PCR 16 carries of T1.
func (t Token) Digest() digest.SHA256 { return digest.Of([]byte(t.text)) }

const redacted = "[token]"

func (t Token) String() string             { return redacted }
func (t Token) GoString() string           { return redacted }
func (t Token) Format(f fmt.State, _ rune) { f.Write([]byte(redacted)) }
func (t Token) LogValue() slog.Value       { return slog.StringValue(redacted) }

// MarshalText writes the text, for the encrypted channel that delivers it.
func (t Token) MarshalText() ([]byte, error) { return []byte(t.text), nil }

// UnmarshalText accepts a well-formed token of any kind; the receiver then
// checks the kind with [Token.Is]. An empty text gives the zero token.
func (t *Token) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*t = Token{}
		return nil
	}
	for k := T1; k <= T3; k++ {
		if parsed, err := Parse(k, string(text)); err == nil {
			*t = parsed
			return nil
		}
	}
	return ErrMalformed
}

// Is reports whether the token is of kind k.
func (t Token) Is(k Kind) bool {
	return len(t.text) == textLen && t.text[:prefixLen] == fmt.Sprintf("fht%d_", int(k))
}
