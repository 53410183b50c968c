package docs

import (
	"os"
	"strings"
	"testing"
)

// TestEachAttackIsMade: each row of attestation.md's tables names a test in its last cell.
// That it exists, TestNamedTestsExist says.
func TestEachAttackIsMade(t *testing.T) {
	page, err := os.ReadFile("attestation.md")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	lines := strings.Split(string(page), "\n")
	for i, line := range lines {
		if !strings.HasPrefix(line, "| ") || strings.HasPrefix(lines[i+1], "|---") {
			continue
		}
		n++
		cells := strings.Split(strings.Trim(line, "|"), " | ")
		if len(cells) != 3 || !namedTest.MatchString(cells[len(cells)-1]) {
			t.Errorf("no test in %q", line)
		}
	}
	if n < 40 {
		t.Errorf("only %d rows: the page or this test changed", n)
	}
}
