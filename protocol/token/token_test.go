package token

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
)

func TestRoundTrip(t *testing.T) {
	for k := T1; k <= T3; k++ {
		tok := New(k)
		back, err := Parse(k, tok.Reveal())
		if err != nil || back.Digest() != tok.Digest() || !back.Is(k) {
			t.Fatalf("%v: %v", k, err)
		}
		for other := T1; other <= T3; other++ {
			if _, err := Parse(other, tok.Reveal()); (err == nil) != (other == k) {
				t.Errorf("a %v parsed as %v: %v", k, other, err)
			}
		}
	}
}

func TestTokensDoNotPrint(t *testing.T) {
	tok := New(T1)
	for _, text := range []string{fmt.Sprint(tok), fmt.Sprintf("%s %q %x %#v %+v", tok, tok, tok, tok, tok), fmt.Sprintf("%v", struct{ T Token }{tok})} {
		if strings.Contains(text, tok.Reveal()[6:20]) {
			t.Errorf("a token shows in %q", text)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(New(T1).Reveal())
	f.Add("fht1_")
	f.Fuzz(func(t *testing.T, text string) {
		tok, err := Parse(T1, text)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Fatal(err)
			}
			return
		}
		if tok.Reveal() != text {
			t.Fatal("a token that parses is not the text that was parsed")
		}
	})
}

func TestEveryFlippedCharacterIsMalformed(t *testing.T) {
	text := New(T2).Reveal()
	for i := range text {
		b := []byte(text)
		if b[i] == 'A' {
			b[i] = 'B'
		} else {
			b[i] = 'A'
		}
		if _, err := Parse(T2, string(b)); err == nil {
			t.Errorf("accepted with character %d changed", i)
		}
	}
}

func TestJSON(t *testing.T) {
	type msg struct {
		Token Token `json:"token"`
	}
	in := msg{New(T3)}
	data, _ := json.Marshal(in)
	var out msg
	if err := json.Unmarshal(data, &out); err != nil || out.Token.Reveal() != in.Token.Reveal() {
		t.Fatal(err)
	}
	if err := json.Unmarshal([]byte(`{"token":"fht9_x"}`), &out); err == nil {
		t.Fatal("accepted a malformed token")
	}
}

func TestWithin(t *testing.T) {
	text := New(T2).Reveal()
	for data, want := range map[string]bool{text: true, "x" + text + "y": true, text[1:]: false, text[:len(text)-1]: false, "fht2_": false, "": false} {
		if Within([]byte(data)) != want {
			t.Errorf("%d bytes: want %v", len(data), want)
		}
	}
}
