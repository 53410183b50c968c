package secret

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

func TestSecretsDoNotPrint(t *testing.T) {
	s := New([]byte("swordfish"))
	type holder struct{ Password Bytes }
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "password", s, "holder", fmt.Sprint(holder{s}))
	for _, text := range []string{
		fmt.Sprint(s), fmt.Sprintf("%x %q %s %d %#v %+v", s, s, s, s, s, s),
		fmt.Sprintf("%v %+v %#v", holder{s}, holder{s}, &holder{s}), log.String(),
	} {
		if strings.Contains(text, "swordfish") || strings.Contains(text, "73776f7264") || strings.Contains(text, "115 119") {
			t.Errorf("a secret shows in %q", text)
		}
	}
}

func TestJSONRoundTripAndWipe(t *testing.T) {
	s := Random(32)
	out, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	var back Bytes
	if err := json.Unmarshal(out, &back); err != nil || !back.Equal(s) {
		t.Fatalf("round trip: %v", err)
	}
	kept := s.Reveal()
	s.Wipe()
	if s.Len() != 0 || !bytes.Equal(kept, make([]byte, 32)) {
		t.Fatal("Wipe left bytes behind")
	}
}

func TestUnmarshalErrorsAreSilentAboutTheInput(t *testing.T) {
	var s Bytes
	err := json.Unmarshal([]byte(`"swordfish!!"`), &s)
	if err == nil || strings.Contains(err.Error(), "sword") {
		t.Fatalf("error %v", err)
	}
}
