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
)

// maxDepth bounds nesting; the protocol's deepest document nests six.
const maxDepth = 16

// ErrTooLarge is returned for a document over the limit.
var ErrTooLarge = errors.New("document is larger than its limit")

// Read decodes at most limit bytes of r into v.
func Read(r io.Reader, limit int64, v any) error {
	data, err := io.ReadAll(io.LimitReader(r, limit+1))
	defer clear(data) // it may hold secrets; what is decoded is copied
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

// checkKeys walks the tokens once and refuses two keys of one object that differ
// at most in case.
func checkKeys(data []byte) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	type frame struct {
		keys    map[string]bool // nil in an array
		wantKey bool
	}
	var stack []frame
	for {
		tok, err := dec.Token()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return describe(err)
		}
		top := len(stack) - 1
		if top >= 0 && stack[top].wantKey {
			if key, ok := tok.(string); ok {
				folded := strings.ToLower(key)
				if stack[top].keys[folded] {
					return fmt.Errorf("duplicate key %q", key)
				}
				stack[top].keys[folded] = true
				stack[top].wantKey = false
				continue
			}
		}
		switch tok {
		case json.Delim('{'):
			stack = append(stack, frame{keys: map[string]bool{}, wantKey: true})
		case json.Delim('['):
			stack = append(stack, frame{})
		case json.Delim('}'), json.Delim(']'):
			stack = stack[:top]
			if top--; top >= 0 && stack[top].keys != nil {
				stack[top].wantKey = true
			}
			continue
		default:
			if top >= 0 && stack[top].keys != nil {
				stack[top].wantKey = true
			}
		}
		if len(stack) > maxDepth {
			return errors.New("document nests too deep")
		}
		if len(stack) == 0 && dec.More() {
			return errors.New("trailing data after the document")
		}
	}
}
