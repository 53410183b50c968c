package docs

import (
	"bytes"
	"flag"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"foothold/protocol/event"
	"foothold/tenant/fsck"
)

var update = flag.Bool("update", false, "write errors.md and fsck.md")

// root is the clone's folder, above this one.
const root = ".."

func TestErrorsPageIsCurrent(t *testing.T) { current(t, "errors.md", errorsPage(), "protocol/event") }

func TestFsckPageIsCurrent(t *testing.T) { current(t, "fsck.md", fsckPage(), "tenant/fsck") }

// current holds a page to what its package says, or writes it.
func current(t *testing.T, name, page, source string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(name, []byte(page), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if string(have) != page {
		t.Errorf("%s is not what %s says; make it by: go test ./docs -update", name, source)
	}
}

// fsckPage is fsck.md.
func fsckPage() string {
	var b strings.Builder
	b.WriteString("# What fsck names\n\n" +
		"<!-- Made from tenant/fsck by: go test ./docs -update -->\n\n" +
		"`foothold fsck` names each thing that does not fit with one of these codes. They are stable. `under-way`, `clean-up`,\n" +
		"`start-pending`, `zone-behind` and a tunnel or a rule of the gateway that was just asked for are in motion until their time has\n" +
		"passed; `object-unused` and `template-unsent` are notes. [operations.md](operations.md#does-everything-fit) says when to run it.\n\n" +
		"| code | what it says | what to do |\n|---|---|---|\n")
	table := fsck.Codes()
	for _, code := range slices.Sorted(maps.Keys(table)) {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", code, table[code].What, table[code].Next)
	}
	return b.String()
}

// errorsPage is errors.md.
func errorsPage() string {
	var b strings.Builder
	b.WriteString("# Reasons\n\n" +
		"<!-- Made from protocol/event by: go test ./docs -update -->\n\n" +
		"Every refusal and failure carries one of these codes: in messages, `--json`, the journal and the counts of\n" +
		"`foothold status`. They are stable. `foothold vm explain NAME` gives the findings of the case at hand.\n\n" +
		"| reason | cause | what to do |\n|---|---|---|\n")
	table := event.Explanations()
	var reasons []string
	for r := range table {
		reasons = append(reasons, string(r))
	}
	slices.Sort(reasons)
	for _, r := range reasons {
		e := table[event.Reason(r)]
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", r, e.Cause, e.Next)
	}
	return b.String()
}

// pages are all Markdown files of the clone.
func pages(t *testing.T) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() && (e.Name() == ".git" || e.Name() == "build" || e.Name() == "bin" || e.Name() == "node_modules") {
			return fs.SkipDir
		}
		if filepath.Ext(path) != ".md" {
			return nil
		}
		text, err := os.ReadFile(path)
		found[path] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(found) < 8 {
		t.Fatalf("only %d pages found", len(found))
	}
	return found
}

var link = regexp.MustCompile(`\]\(([^)#]*)(#[^)]*)?\)`)

func TestLinksLeadSomewhere(t *testing.T) {
	for path, text := range pages(t) {
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			if m[1] == "" || strings.Contains(m[1], "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join(filepath.Dir(path), m[1])); err != nil {
				t.Errorf("%s links to %s: %v", path, m[1], err)
			}
		}
	}
}

// A test is named `folder.TestName`, a package or file by its path from the clone.
var (
	namedTest = regexp.MustCompile("`([a-z0-9/_-]+)\\.((?:Test|Fuzz)[A-Za-z0-9_]+)`")
	namedPath = regexp.MustCompile("`((?:protocol|tenant|dmz|provider|guest|internal|lab|client|e2e|cmd|docs)/[a-z0-9/_.-]+)`")
)

func TestNamedTestsExist(t *testing.T) {
	named := 0
	for path, text := range pages(t) {
		for _, m := range namedTest.FindAllStringSubmatch(text, -1) {
			named++
			if !declares(t, filepath.Join(root, m[1]), m[2]) {
				t.Errorf("%s names %s.%s, which does not exist", path, m[1], m[2])
			}
		}
	}
	if named < 20 {
		t.Errorf("only %d tests are named: the pages or this pattern changed", named)
	}
}

func TestNamedPlacesExist(t *testing.T) {
	for path, text := range pages(t) {
		for _, m := range namedPath.FindAllStringSubmatch(namedTest.ReplaceAllString(text, ""), -1) {
			if _, err := os.Stat(filepath.Join(root, strings.TrimSuffix(m[1], "/"))); err != nil {
				t.Errorf("%s names %s, which does not exist", path, m[1])
			}
		}
	}
}

// TestArchitectureNamesEveryPackage: a folder with code, but tests' own, is named in
// ARCHITECTURE.md, by the last element of its path or more of it.
func TestArchitectureNamesEveryPackage(t *testing.T) {
	page, err := os.ReadFile(filepath.Join(root, "ARCHITECTURE.md"))
	if err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, pattern := range []string{"[a-z]*/*/*.go", "[a-z]*/*/*/*.go"} {
		files, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			dir, err := filepath.Rel(root, filepath.Dir(f))
			if err != nil {
				t.Fatal(err)
			}
			if strings.HasSuffix(f, "_test.go") || strings.HasSuffix(dir, "test") || filepath.Base(filepath.Dir(dir)) == "plainboot" {
				continue
			}
			seen++
			name := filepath.Base(dir) + "`"
			if !bytes.Contains(page, []byte("`"+name)) && !bytes.Contains(page, []byte("/"+name)) {
				t.Errorf("ARCHITECTURE.md does not name %s", dir)
			}
		}
	}
	if seen < 100 {
		t.Errorf("only %d files found", seen)
	}
}

// declares reports whether a test file of the folder declares the function.
func declares(t *testing.T, dir, name string) bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(text), "\nfunc "+name+"(") {
			return true
		}
	}
	return false
}
