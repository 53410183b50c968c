package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// command finds `foothold ...` and `bin/foothold ...` in inline code and in code blocks.
var documented = regexp.MustCompile("(?m)(?:^|`)(?:  *)?(?:bin/)?foothold ([a-z][^`\n]*)")

// TestDocumentedCommandsExist checks every command that a page or a command's own help
// shows: that it is there, and takes those flags.
func TestDocumentedCommandsExist(t *testing.T) {
	texts := map[string]string{}
	for _, pattern := range []string{"../../*.md", "../../docs/*.md"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			text, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			texts[f] = string(text)
		}
	}
	seen := 0
	for page, text := range texts {
		for _, m := range documented.FindAllStringSubmatch(text, -1) {
			seen++
			checkCommand(t, page, m[1])
		}
	}
	if seen < 30 {
		t.Errorf("only %d commands are shown: the pages or this pattern changed", seen)
	}
}

func TestExamplesAreCommands(t *testing.T) {
	pending := rootCommand().Commands()
	for len(pending) > 0 {
		c := pending[0]
		pending = append(pending[1:], c.Commands()...)
		for _, m := range documented.FindAllStringSubmatch(c.Example, -1) {
			checkCommand(t, c.CommandPath()+" --help", m[1])
		}
	}
}

// checkCommand resolves one command line, up to its comment, pipe or "--".
func checkCommand(t *testing.T, where, line string) {
	t.Helper()
	for _, end := range []string{" #", " | ", " -- "} {
		line, _, _ = strings.Cut(line, end)
	}
	words := strings.Fields(line)
	for i, w := range words {
		if w == "[--json]" || strings.HasPrefix(w, "[") {
			words = words[:i]
			break
		}
	}
	if len(words) == 0 || words[0] == "help" || words[0] == "COMMAND" || strings.HasSuffix(words[0], ".internal") {
		return
	}
	root := rootCommand()
	c, rest, err := root.Find(words)
	if err != nil {
		t.Errorf("%s shows `foothold %s`: %v", where, line, err)
		return
	}
	if err := c.ParseFlags(rest); err != nil {
		t.Errorf("%s shows `foothold %s`: %v", where, line, err)
		return
	}
	if c.HasSubCommands() && len(c.Flags().Args()) > 0 {
		t.Errorf("%s shows `foothold %s`: %s has no such command", where, line, c.CommandPath())
	}
}
