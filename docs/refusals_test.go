package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"foothold/protocol/event"
)

// A function or method is named `folder.Name()`.
var namedFunction = regexp.MustCompile("`([a-z0-9/_-]+)\\.([A-Za-z][A-Za-z0-9]*)\\(\\)`")

func TestNamedFunctionsExist(t *testing.T) {
	named := 0
	for path, text := range pages(t) {
		for _, m := range namedFunction.FindAllStringSubmatch(text, -1) {
			named++
			if !defines(t, filepath.Join(root, m[1]), m[2]) {
				t.Errorf("%s names %s.%s(), which does not exist", path, m[1], m[2])
			}
		}
	}
	if named < 50 {
		t.Errorf("only %d functions are named: the pages or this pattern changed", named)
	}
}

// defines reports whether the folder's product code defines a function or method.
func defines(t *testing.T, dir, name string) bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	form := regexp.MustCompile(`(?m)^func (\([^)]*\) )?` + name + `[\[(]`)
	for _, f := range files {
		if strings.HasSuffix(f, "_test.go") {
			continue
		}
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if form.Match(text) {
			return true
		}
	}
	return false
}

// rows are the lines of refusals.md's tables with so many cells, without their heads.
func rows(t *testing.T, cells int) (list [][]string) {
	t.Helper()
	page, err := os.ReadFile("refusals.md")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(page), "\n")
	for i, line := range lines {
		head := i+1 < len(lines) && strings.HasPrefix(lines[i+1], "|---")
		row := strings.Split(strings.Trim(line, "|"), " | ")
		if strings.HasPrefix(line, "| ") && !head && len(row) == cells {
			list = append(list, row)
		}
	}
	return list
}

// TestRefusalsArePlacedExplainedAndShown: each row of refusals.md names where the check is,
// a reason that errors.md explains, and a test. That these exist, other tests say.
func TestRefusalsArePlacedExplainedAndShown(t *testing.T) {
	const refused, checked, reason, shown = 0, 1, 2, 4
	known := event.Explanations()
	code := regexp.MustCompile("`([^`]*)`")
	list := rows(t, 5)
	for _, row := range list {
		if !namedFunction.MatchString(row[checked]) {
			t.Errorf("%s: no place of the check in %q", row[refused], row[checked])
		}
		if !namedTest.MatchString(row[shown]) {
			t.Errorf("%s: no test in %q", row[refused], row[shown])
		}
		for _, m := range code.FindAllStringSubmatch(row[reason], -1) {
			if _, ok := known[event.Reason(m[1])]; !ok {
				t.Errorf("%s: %q is no reason", row[refused], m[1])
			}
		}
	}
	if len(list) < 60 {
		t.Errorf("only %d refusals: the page or this test changed", len(list))
	}
}

// TestTakenOutChecksAreTen: each command runs a test that exists.
func TestTakenOutChecksAreTen(t *testing.T) {
	command := regexp.MustCompile("^ ?`go test \\./([a-z/]+) -run (Test[A-Za-z0-9]+)` ?$")
	n := 0
	for _, row := range rows(t, 3) {
		m := command.FindStringSubmatch(row[2])
		if m == nil {
			continue
		}
		n++
		if !declares(t, filepath.Join(root, m[1]), m[2]) {
			t.Errorf("%s: there is no %s in %s", row[0], m[2], m[1])
		}
	}
	if n != 10 {
		t.Errorf("%d commands, want ten", n)
	}
}
