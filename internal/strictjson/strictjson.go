// Package strictjson decodes JSON from outside: bounded, one value, no unknown
// field, no duplicate key, nothing behind the value, no excess depth.
//
// encoding/json accepts duplicate keys (the last wins) and matches names without
// regard to case, so two readers of one document could see different values. Here
// both are refused before the decoder sees the document.
package strictjson

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
)

// maxDepth bounds nesting; the protocol's deepest document nests six.
const maxDepth = 16

// ErrTooLarge is returned for a document over the limit.
var ErrTooLarge = errors.New("document is larger than its limit")

// buffers are for one document each at a time, and empty and erased in between. A daemon that
// hears the same few messages thousands of times a second would else make garbage of each.
var buffers = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// mostKept bounds a buffer that is kept, in bytes.
const mostKept = 128 << 10

// Read decodes at most limit bytes of r into v.
func Read(r io.Reader, limit int64, v any) error {
	b := buffers.Get().(*bytes.Buffer)
	defer func() {
		clear(b.Bytes()) // it may hold secrets; what is decoded is copied
		b.Reset()
		if b.Cap() <= mostKept {
			buffers.Put(b)
		}
	}()
	if _, err := b.ReadFrom(io.LimitReader(r, limit+1)); err != nil {
		return fmt.Errorf("read document: %w", err)
	}
	if int64(b.Len()) > limit {
		return ErrTooLarge
	}
	return Unmarshal(b.Bytes(), v)
}

// Unmarshal decodes data into v. Errors name fields, never values; with one of the decoder's,
// v may hold a part of the document.
func Unmarshal(data []byte, v any) error {
	if err := checkKeys(data); err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return describe(err)
	}
	return nothing(data[dec.InputOffset():]) // behind a number or text; [checkKeys] looked behind all else
}

// nothing refuses what follows the document.
func nothing(rest []byte) error {
	if len(bytes.TrimLeft(rest, space)) > 0 {
		return errors.New("trailing data after the document")
	}
	return nil
}

// space is what may stand between JSON's parts (RFC 8259, section 2).
const space = " \t\r\n"

// describe rewrites decoder errors that would echo input values.
func describe(err error) error {
	var typ *json.UnmarshalTypeError
	if errors.As(err, &typ) {
		return fmt.Errorf("field %q has the wrong type, want %s", typ.Field, typ.Type)
	}
	if strings.HasPrefix(err.Error(), "json: unknown field") {
		return errors.New(strings.TrimPrefix(err.Error(), "json: "))
	}
	var syntax *json.SyntaxError
	if errors.As(err, &syntax) {
		return fmt.Errorf("malformed JSON at byte %d", syntax.Offset)
	}
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return errors.New("malformed JSON: it ends early")
	}
	return errors.New("document does not fit its type")
}

// checkKeys refuses two keys of one object that differ at most in case, excess depth, and what
// follows an object or array. It walks the bytes once: in a JSON text, brackets, colons and
// quotes outside of strings are what they look like. Of what is none it may see a part; the
// decoder refuses that.
func checkKeys(data []byte) error {
	var stack []map[string]bool // keys of each open object; nil for an array
	for i := 0; i < len(data); i++ {
		switch data[i] {
		case '{', '[':
			if len(stack) == maxDepth {
				return errors.New("document nests too deep")
			}
			stack = append(stack, nil)
			if data[i] == '{' {
				stack[len(stack)-1] = map[string]bool{}
			}
		case '}', ']':
			if len(stack) == 0 {
				return nil // no JSON text
			}
			if stack = stack[:len(stack)-1]; len(stack) == 0 {
				return nothing(data[i+1:])
			}
		case '"':
			end := stringEnd(data, i)
			if end < 0 {
				return nil // no JSON text
			}
			if len(stack) > 0 && stack[len(stack)-1] != nil && isKey(data[end:]) {
				if err := addKey(stack[len(stack)-1], data[i:end]); err != nil {
					return err
				}
			}
			i = end - 1
		}
	}
	return nil
}

// stringEnd is behind the closing quote of the string that begins at i; negative without one.
func stringEnd(data []byte, i int) int {
	i++
	n := bytes.IndexByte(data[i:], '"')
	if n < 0 {
		return -1
	}
	if bytes.IndexByte(data[i:i+n], '\\') < 0 { // nearly always, and it may be long
		return i + n + 1
	}
	for ; i < len(data); i++ {
		switch data[i] {
		case '"':
			return i + 1
		case '\\':
			i++
		}
	}
	return -1
}

// isKey reports whether a colon comes next behind a string.
func isKey(rest []byte) bool {
	rest = bytes.TrimLeft(rest, space)
	return len(rest) > 0 && rest[0] == ':'
}

// addKey refuses a key that is there already.
func addKey(keys map[string]bool, quoted []byte) error {
	var key, folded string
	if plain := quoted[1 : len(quoted)-1]; isPlain(plain) {
		key = string(plain)
		folded = strings.ToLower(key)
	} else if err := json.Unmarshal(quoted, &key); err != nil {
		return describe(err)
	} else {
		folded = strings.ToLower(strings.ToUpper(key)) // encoding/json takes ſ for s, and the Kelvin sign for k
	}
	if keys[folded] {
		return fmt.Errorf("duplicate key %q", key)
	}
	keys[folded] = true
	return nil
}

// isPlain reports whether a string means its own bytes, and is ASCII.
func isPlain(s []byte) bool {
	for _, c := range s {
		if c == '\\' || c >= 0x80 {
			return false
		}
	}
	return true
}
