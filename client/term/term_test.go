package term

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func TestCleanLeavesNothingThatSteersATerminal(t *testing.T) {
	for in, want := range map[string]string{
		"plain\n\ttext":        "plain\n\ttext",
		"\x1b[2Jgone":          "[2Jgone",
		"title\x1b]0;x\x07end": "title]0;xend",
		"csi\u009b31m":         "csi31m",
		"bidi\u202eevil":       "bidievil",
		"back\b\rspace\x7f":    "backspace",
		"Grüße → ok":           "Grüße → ok",
	} {
		if got := Clean(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

func TestCleanerDropsInvalidUTF8(t *testing.T) {
	var b bytes.Buffer
	n, err := Cleaner{&b}.Write([]byte("a\xff\x9b2Jb"))
	if err != nil || n != 6 || b.String() != "a2Jb" {
		t.Errorf("%q, %d, %v", b.String(), n, err)
	}
}

func TestStepsOffATerminalAreLines(t *testing.T) {
	var b bytes.Buffer
	s := New(&b).Steps()
	s.Begin("booting", time.Now())
	s.End("booting", 1250*time.Millisecond)
	s.Begin("unlocking", time.Now())
	s.Fail("unlocking", time.Second)
	s.Close()
	want := "  booting ...\n✓ booting                        1.2 s\n  unlocking ...\n✗ unlocking                      1.0 s\n"
	if b.String() != want {
		t.Errorf("got\n%s", b.String())
	}
}

func TestTableOffATerminalIsPlainColumns(t *testing.T) {
	var b bytes.Buffer
	New(&b).Table([]string{"name", "phase"}, [][]string{{"web", "ready"}, {"longer-name", "booting"}})
	lines := strings.Split(strings.TrimSpace(b.String()), "\n")
	if len(lines) != 3 || strings.Index(lines[0], "PHASE") != strings.Index(lines[1], "ready") || strings.Contains(b.String(), "\x1b") {
		t.Errorf("got\n%s", b.String())
	}
}

func FuzzClean(f *testing.F) {
	f.Add("\x1b[31m\u202e")
	f.Fuzz(func(t *testing.T, in string) {
		for _, r := range Clean(in) {
			if r < 0x20 && r != '\n' && r != '\t' || r >= 0x7f && r < 0xa0 {
				t.Fatalf("control character %U stays", r)
			}
		}
	})
}
