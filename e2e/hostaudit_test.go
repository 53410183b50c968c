//go:build system

package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"foothold/protocol/api"
)

// TestHostAudit audits the lab's host as an operator would: a medium is made, the host goes
// down and boots from it under UEFI firmware with its TPM, and what its console printed is
// held against the inventory. A TPM of another machine's is told apart.
func TestHostAudit(t *testing.T) {
	s := newSystem(t)
	dir := t.TempDir()
	medium := filepath.Join(dir, "medium")
	s.must(t, "inventory", "audit", "prepare", "host-1", "--out", medium, "--cache", filepath.Join(s.build, "cache"), "--program", filepath.Join(s.bin, "foothold-audit"))
	entries, err := os.ReadDir(medium)
	if err != nil || len(entries) != 3 {
		t.Fatalf("the medium has %d files, %v", len(entries), err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err != nil || strings.Contains(e.Name(), "initramfs") && info.Mode().Perm() != 0o600 || e.Name() == "audit.efi" && info.Mode().Perm() != 0o600 {
			t.Errorf("%s, which holds a key, has mode %v, %v", e.Name(), info.Mode(), err)
		}
	}
	if r := s.run(t.Context(), "lab", "audit", medium, "--state", s.state); r.code == 0 || !strings.Contains(r.stderr, "the host must be down") {
		t.Errorf("the audit of a host that is up: %d %s", r.code, r.stderr)
	}
	s.must(t, "lab", "down", "--state", s.state)
	began := time.Now()
	console := s.must(t, "lab", "audit", medium, "--state", s.state, "--cache", filepath.Join(s.build, "cache"))
	t.Logf("booted, asked and off after %.1f s", time.Since(began).Seconds())
	file := filepath.Join(dir, "console.txt")
	if err := os.WriteFile(file, []byte(console), 0o600); err != nil {
		t.Fatal(err)
	}
	s.must(t, "lab", "up", "--state", s.state)
	var a api.HostAudit
	r := s.run(t.Context(), "inventory", "audit", "check", "host-1", file, "--json")
	if err := json.Unmarshal([]byte(r.stdout), &a); err != nil || r.code != 0 || !a.Good || a.Asset != a.Inventory {
		t.Fatalf("exit code %d, %v\n%s%s\n%s", r.code, err, r.stdout, r.stderr, console)
	}
	if r := s.run(t.Context(), "inventory", "audit", "check", "host-1", file); r.code != 3 || !strings.Contains(r.stderr, "has had its report") {
		t.Errorf("the same report again: %d %s", r.code, r.stderr)
	}
	if list := s.must(t, "inventory", "audit", "list", "host-1"); !strings.Contains(list, "good") {
		t.Errorf("the list:\n%s", list)
	}
	s.must(t, "fsck")
}
