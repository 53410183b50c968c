package strictjson

import (
	"bytes"
	"encoding/base64"
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
		"plain":           {`{"name":"x","inner":{"A":1},"tags":["a","a"],"map":{"k":"v","l":"v"}}`, ""},
		"duplicate":       {`{"name":"x","name":"y"}`, "duplicate key"},
		"case duplicate":  {`{"name":"x","Name":"y"}`, "duplicate key"},
		"nested":          {`{"inner":{"A":1,"A":2}}`, "duplicate key"},
		"in map":          {`{"map":{"k":"1","k":"2"}}`, "duplicate key"},
		"after object":    {`{"inner":{"A":1},"inner":{"A":2}}`, "duplicate key"},
		"after array":     {`{"tags":[],"tags":[]}`, "duplicate key"},
		"escaped":         {`{"name":"x","na\u006de":"y"}`, "duplicate key"},
		"spaced":          {"{\"name\" \t\r\n:\"x\",\"name\":\"y\"}", "duplicate key"},
		"folded to ASCII": {`{"sha256":"x","ſha256":"y"}`, "duplicate key"},
		"not UTF-8":       {"{\"map\":{\"\xff\":\"1\",\"\xfe\":\"2\"}}", "duplicate key"}, // both are read as U+FFFD
		"beyond ASCII":    {`{"map":{"É":"1","é":"2"}}`, "duplicate key"},
		"inside strings":  {`{"map":{"a":"\":{[,","\":{":"}","]":"a\\"}}`, ""},
		"key as value":    {`{"name":"name","tags":["name","tags"]}`, ""},
		"unbalanced":      {`{"name":"x"}}`, "trailing"},
		"deep enough":     {`{"tags":` + strings.Repeat("[", 15) + strings.Repeat("]", 15) + `}`, "wrong type"},
		"unknown":         {`{"colour":"x"}`, "unknown field"},
		"trailing":        {`{"name":"x"} {}`, "trailing"},
		"trailing junk":   {`{"name":"x"} x`, ""},
		"type":            {`{"name":42}`, "wrong type"},
		"empty":           {``, "ends early"},
		"cut":             {`{"name":"x"`, "ends early"},
		"deep":            {strings.Repeat("[", 40) + strings.Repeat("]", 40), "too deep"},
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

// TestRefusedBeforeDecoding: what is refused for its form leaves no trace in the value.
func TestRefusedBeforeDecoding(t *testing.T) {
	for _, text := range []string{`{"name":"x","Name":"y"}`, `{"name":"x"}{}`, `{"name":"x"}}`, `{"name":"x"} "`, `{"name":"x"`, `{"name":"x","tags":` + strings.Repeat("[", maxDepth)} {
		v := sample{Name: "before"}
		if err := Unmarshal([]byte(text), &v); err == nil || v.Name != "before" {
			t.Errorf("%s: %v, and decoded %q", text, err, v.Name)
		}
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

// FuzzUnmarshal: what is taken is one JSON text, no deeper than allowed, in which a tokenizer
// finds no key twice; and all such texts are taken.
func FuzzUnmarshal(f *testing.F) {
	for _, text := range []string{
		`{"name":"x","inner":{"A":1},"tags":["a"],"map":{"k":"v"}}`, `[{"a":[{}]}]`, `{"a\\":1,"a\"":[2,"\u007b"]}`, `{"a":1} `, `{"a":1}{`, `{"a":1}}`, `{"a":1} "`,
		`{"a":1}{"b":1}`, `1 2`, `1 {}`, `"a" {} 1`, `[] 1`, `1`, ` "a" `, `"a`, `"a\"`, `]`, `[}`, `["a":1,"a":1]`, `{"a":1,"A":2}`, `{"a":{},"b":{"a":[]},"a":1}`, `{"s":1,"ſ":1}`, ``, ` `,
		strings.Repeat("[", maxDepth) + strings.Repeat("]", maxDepth), strings.Repeat("[", maxDepth+1) + strings.Repeat("]", maxDepth+1),
	} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var v sample
		_ = Unmarshal(data, &v)
		var all json.RawMessage
		err := Unmarshal(data, &all)
		if want := json.Valid(data) && distinct(json.NewDecoder(bytes.NewReader(data)), maxDepth); want != (err == nil) {
			t.Fatalf("%q: %v, want it taken: %v", data, err, want)
		}
	})
}

// distinct reads one value of a JSON text.
func distinct(dec *json.Decoder, depth int) bool {
	dec.UseNumber()
	token, err := dec.Token()
	open, nests := token.(json.Delim)
	if err != nil || !nests {
		return err == nil
	}
	keys, good := map[string]bool{}, depth > 0
	for dec.More() {
		if open == '{' {
			key, err := dec.Token()
			if err != nil {
				return false
			}
			folded := strings.ToLower(strings.ToUpper(key.(string)))
			good = good && !keys[folded]
			keys[folded] = true
		}
		good = distinct(dec, depth-1) && good
	}
	_, err = dec.Token()
	return good && err == nil
}

// TestReadsDoNotMix: what was read stays, though the next document takes its place in memory.
func TestReadsDoNotMix(t *testing.T) {
	type document struct {
		Text string          `json:"text"`
		Raw  json.RawMessage `json:"raw"`
		Data []byte          `json:"data"`
	}
	read := func(c string) (d document) {
		t.Helper()
		data := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte(c), 3000))
		text := `{"text": "` + strings.Repeat(c, 3000) + `", "raw": ["` + c + `"], "data": "` + data + `"}`
		if err := Read(strings.NewReader(text), 1<<20, &d); err != nil {
			t.Fatal(err)
		}
		return d
	}
	first := read("a")
	for range 100 {
		read("b")
	}
	if first.Text != strings.Repeat("a", 3000) || string(first.Raw) != `["a"]` || !bytes.Equal(first.Data, bytes.Repeat([]byte("a"), 3000)) {
		t.Error("another document shows in the first")
	}
	for range 10 { // some of them those that were read into
		if b := buffers.Get().(*bytes.Buffer); bytes.ContainsAny(b.AvailableBuffer()[:b.Available()], "ab") {
			t.Fatal("a buffer was put back as it was")
		}
	}
}
