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
	"unicode/utf8"
)

// maxDepth bounds nesting; the protocol's deepest document nests six.
const maxDepth = 16

// ErrTooLarge is returned for a document over the limit.
var ErrTooLarge = errors.New("document is larger than its limit")

// Read decodes at most limit bytes of r into v.
func Read(r io.Reader, limit int64, v any) error {
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return fmt.Errorf("read document: %w", err)
	}
	if int64(len(data)) > limit {
		return ErrTooLarge
	}
	return Unmarshal(data, v)
}

// Unmarshal decodes data into v. Errors name fields, never values.
func Unmarshal(data []byte, v any) error {
	if err := checkKeys(data); err != nil {
		return err
	}
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(v); err != nil {
		return describe(err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return errors.New("trailing data after the document")
	}
	return nil
}

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

// checkKeys walks the document once and refuses two keys of one object that differ at
// most in case. It looks for nothing else but depth: of a document that the decoder then
// takes it sees every key, and what it makes of any other does not matter.
func checkKeys(data []byte) error {
	type frame struct {
		keys    map[string]bool // nil in an array
		wantKey bool
	}
	var stack []frame
	for i := 0; i < len(data); i++ {
		top := len(stack) - 1
		switch data[i] {
		case '"':
			end := stringEnd(data, i)
			if end < 0 {
				return nil // the decoder says what is wrong
			}
			if top >= 0 && stack[top].wantKey {
				key, ok := unquote(data[i : end+1])
				if !ok {
					return nil
				}
				folded := strings.ToLower(key)
				if stack[top].keys[folded] {
					return fmt.Errorf("duplicate key %q", key)
				}
				stack[top].keys[folded] = true
				stack[top].wantKey = false
			}
			i = end
		case '{':
			stack = append(stack, frame{keys: map[string]bool{}, wantKey: true})
		case '[':
			stack = append(stack, frame{})
		case '}', ']':
			if top < 0 {
				return nil
			}
			stack = stack[:top]
		case ',':
			if top >= 0 && stack[top].keys != nil {
				stack[top].wantKey = true
			}
		}
		if len(stack) > maxDepth {
			return errors.New("document nests too deep")
		}
	}
	return nil
}

// stringEnd is where the string that begins at i has its closing quote, or -1.
func stringEnd(data []byte, i int) int {
	for at := i + 1; ; at++ {
		n := bytes.IndexByte(data[at:], '"')
		if n < 0 {
			return -1
		}
		at += n
		escapes := 0
		for data[at-1-escapes] == '\\' { // it ends at the opening quote
			escapes++
		}
		if escapes%2 == 0 {
			return at
		}
	}
}

// unquote decodes a string with its quotes, as the decoder will.
func unquote(quoted []byte) (s string, ok bool) {
	for _, c := range quoted {
		if c == '\\' || c < ' ' || c >= utf8.RuneSelf {
			return s, json.Unmarshal(quoted, &s) == nil
		}
	}
	return string(quoted[1 : len(quoted)-1]), true
}
