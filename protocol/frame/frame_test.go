package frame

import (
	"bytes"
	"io"
	"strings"
	"testing"
)

func TestRoundTripAndLimits(t *testing.T) {
	type msg struct {
		A string `json:"a"`
	}
	var buf bytes.Buffer
	for _, a := range []string{"x", "", strings.Repeat("y", 100)} {
		if err := Write(&buf, 200, msg{a}); err != nil {
			t.Fatal(err)
		}
	}
	for _, a := range []string{"x", "", strings.Repeat("y", 100)} {
		var m msg
		if err := Read(&buf, 200, &m); err != nil || m.A != a {
			t.Fatalf("%q: %v", m.A, err)
		}
	}
	var m msg
	if err := Read(&buf, 200, &m); err != io.EOF {
		t.Fatalf("at the end: %v", err)
	}
	if err := Write(&buf, 10, msg{"0123456789"}); err == nil {
		t.Fatal("wrote over the limit")
	}
	if err := Read(strings.NewReader("\xff\xff\xff\xff"), 1<<20, &m); err == nil || err == io.EOF {
		t.Fatalf("length over the limit: %v", err)
	}
	if err := Read(strings.NewReader("\x00\x00\x00\x09{}"), 1<<20, &m); err == nil || err == io.EOF {
		t.Fatalf("cut frame: %v", err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte("\x00\x00\x00\x02{}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		var v map[string]string
		_ = Read(bytes.NewReader(data), 1<<16, &v)
	})
}
