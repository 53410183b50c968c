package strictjson

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
)

type sample struct {
	Name  string            `json:"name"`
	Inner struct{ A int }   `json:"inner"`
	Tags  []string          `json:"tags"`
	Map   map[string]string `json:"map"`
}

func TestUnmarshal(t *testing.T) {
	for name, tc := range map[string]struct{ in, want string }{
		"plain":          {`{"name":"x","inner":{"A":1},"tags":["a","a"],"map":{"k":"v","l":"v"}}`, ""},
		"duplicate":      {`{"name":"x","name":"y"}`, "duplicate key"},
		"case duplicate": {`{"name":"x","Name":"y"}`, "duplicate key"},
		"nested":         {`{"inner":{"A":1,"A":2}}`, "duplicate key"},
		"escaped":        {`{"name":"x","n\u0061me":"y"}`, "duplicate key"},
		"behind quotes":  {`{"name":"\\\"{[,","tags":["\\"],"name":"y"}`, "duplicate key"},
		"in map":         {`{"map":{"k":"1","k":"2"}}`, "duplicate key"},
		"after object":   {`{"inner":{"A":1},"inner":{"A":2}}`, "duplicate key"},
		"after array":    {`{"tags":[],"tags":[]}`, "duplicate key"},
		"unknown":        {`{"colour":"x"}`, "unknown field"},
		"trailing":       {`{"name":"x"} {}`, "trailing"},
		"trailing junk":  {`{"name":"x"} x`, ""},
		"type":           {`{"name":42}`, "wrong type"},
		"empty":          {``, "ends early"},
		"cut":            {`{"name":"x"`, "ends early"},
		"deep":           {strings.Repeat("[", 40) + strings.Repeat("]", 40), "too deep"},
	} {
		t.Run(name, func(t *testing.T) {
			var v sample
			err := Unmarshal([]byte(tc.in), &v)
			switch {
			case name == "trailing junk":
				if err == nil {
					t.Fatal("accepted")
				}
			case tc.want == "" && err != nil:
				t.Fatal(err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Fatalf("got %v, want %q", err, tc.want)
			}
		})
	}
}

func TestErrorsDoNotEchoValues(t *testing.T) {
	var v sample
	err := Unmarshal([]byte(`{"inner":{"A":"fht1_swordfish"}}`), &v)
	if err == nil || strings.Contains(err.Error(), "swordfish") {
		t.Fatalf("error %v", err)
	}
}

func TestReadRefusesOverLimit(t *testing.T) {
	var v sample
	if err := Read(strings.NewReader(`{"name":"0123456789"}`), 10, &v); err != ErrTooLarge {
		t.Fatalf("got %v", err)
	}
}

// What is accepted has no key twice, as a walk over the decoder's own tokens sees it.
func FuzzUnmarshal(f *testing.F) {
	f.Add([]byte(`{"name":"x","inner":{"A":1},"tags":["a"],"map":{"k":"v"}}`))
	f.Add([]byte(`[{"a":[{}]}]`))
	f.Add([]byte(`{"map":{"\\\"":"\\","b":"{\""},"name":"\u0041"}`))
	f.Add([]byte(`{"map":{"a":"1","\u0061":"2"}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var v sample
		var any map[string]map[string]any
		if Unmarshal(data, &v) == nil && twice(data) {
			t.Errorf("accepted %q", data)
		}
		if Unmarshal(data, &any) == nil && twice(data) {
			t.Errorf("accepted %q", data)
		}
	})
}

// twice reports whether an object of a well-formed document has a key twice.
func twice(data []byte) bool {
	type frame struct {
		keys    map[string]bool
		wantKey bool
	}
	var stack []frame
	for dec := json.NewDecoder(bytes.NewReader(data)); ; {
		tok, err := dec.Token()
		if err != nil {
			return false
		}
		top := len(stack) - 1
		if key, ok := tok.(string); ok && top >= 0 && stack[top].wantKey {
			if stack[top].keys[strings.ToLower(key)] {
				return true
			}
			stack[top].keys[strings.ToLower(key)], stack[top].wantKey = true, false
			continue
		}
		switch tok {
		case json.Delim('{'):
			stack = append(stack, frame{map[string]bool{}, true})
			continue
		case json.Delim('['):
			stack = append(stack, frame{})
			continue
		case json.Delim('}'), json.Delim(']'):
			stack, top = stack[:top], top-1
		}
		if top >= 0 && stack[top].keys != nil {
			stack[top].wantKey = true
		}
	}
}
