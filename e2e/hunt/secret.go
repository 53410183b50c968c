// Package hunt looks for secrets where they must not be: in files, in the arguments,
// environments and memory of processes, in captured traffic.
//
// A [Matcher] knows each secret raw, in hexadecimal of both cases and in base64 of both
// alphabets, wherever in a longer base64 text it begins. It also knows every token of
// package token by its form, known or not. Command hunter runs it inside a lab.
package hunt

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
)

// Secret is a value to look for.
type Secret struct {
	Name  string `json:"name"`
	Value []byte `json:"value"`
	// Texts are further forms of it, looked for as they are.
	Texts [][]byte `json:"texts,omitempty"`
}

// minSecret is the shortest value that is looked for, in bytes: shorter ones are found by chance.
const minSecret = 16

// form is one way to write a secret.
type form struct {
	secret string
	name   string
	text   []byte
}

// forms lists all ways to write the secret.
func (s Secret) forms() ([]form, error) {
	if len(s.Value) < minSecret {
		return nil, fmt.Errorf("secret %s has %d bytes, want %d", s.Name, len(s.Value), minSecret)
	}
	lower := []byte(hex.EncodeToString(s.Value))
	list := []form{{s.Name, "raw", s.Value}, {s.Name, "hex", lower}}
	if upper := bytes.ToUpper(lower); !bytes.Equal(upper, lower) {
		list = append(list, form{s.Name, "HEX", upper})
	}
	for before := range 3 {
		std, url := aligned(base64.RawStdEncoding, s.Value, before), aligned(base64.RawURLEncoding, s.Value, before)
		list = append(list, form{s.Name, fmt.Sprintf("base64+%d", before), std})
		if !bytes.Equal(std, url) {
			list = append(list, form{s.Name, fmt.Sprintf("base64url+%d", before), url})
		}
	}
	for _, t := range s.Texts {
		if len(t) < minSecret {
			return nil, fmt.Errorf("secret %s: a text has %d bytes, want %d", s.Name, len(t), minSecret)
		}
		list = append(list, form{s.Name, "text", t})
	}
	return list, nil
}

// aligned is the part of a base64 text that depends on value alone, when so many bytes
// stand before it and others behind it.
func aligned(enc *base64.Encoding, value []byte, before int) []byte {
	text := enc.EncodeToString(append(make([]byte, before), value...))
	first := (before*8 + 5) / 6           // characters that hold a bit of what stands before
	last := (before + len(value)) * 8 / 6 // whole characters
	return []byte(text[first:last])
}

// PrivateKey makes a secret of a private key in PEM: the number that is the key, which
// every encoding of it holds, and the PEM's own lines, which break its base64.
func PrivateKey(name string, file []byte) (Secret, error) {
	block, _ := pem.Decode(file)
	if block == nil {
		return Secret{}, fmt.Errorf("%s is not PEM", name)
	}
	value, err := keyNumber(block.Bytes)
	if err != nil {
		return Secret{}, fmt.Errorf("%s: %w", name, err)
	}
	lines := bytes.TrimSpace(file)
	_, lines, _ = bytes.Cut(lines, []byte("\n"))
	if i := bytes.LastIndexByte(lines, '\n'); i > 0 {
		lines = lines[:i]
	}
	return Secret{Name: name, Value: value, Texts: [][]byte{lines}}, nil
}

// StoredKey makes a secret of what a vault holds: a PKCS #8 key, or bytes.
func StoredKey(name string, value []byte) Secret {
	if number, err := keyNumber(value); err == nil {
		return Secret{Name: name, Value: number}
	}
	return Secret{Name: name, Value: bytes.Clone(value)}
}

// keyNumber is an Ed25519 key's seed, or an ECDSA key's number.
func keyNumber(pkcs8 []byte) ([]byte, error) {
	parsed, err := x509.ParsePKCS8PrivateKey(pkcs8)
	if err != nil {
		return nil, errors.New("not PKCS #8") // the cause could quote key bytes
	}
	switch key := parsed.(type) {
	case ed25519.PrivateKey:
		return key.Seed(), nil
	case *ecdsa.PrivateKey:
		return key.Bytes()
	}
	return nil, fmt.Errorf("a key of kind %T", parsed)
}
