//go:build system

package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"foothold/internal/durable"
	"foothold/lab/ground"
	"foothold/protocol/platform"
	"foothold/protocol/signed"
)

// asAgreed asks the lab's host what it runs, which must be what the reference values say.
func (s *system) asAgreed(t *testing.T) {
	t.Helper()
	if out := s.must(t, "platform", "diff", ground.HostName); !strings.Contains(out, "no component differs") {
		t.Errorf("the host's diff:\n%s", out)
	}
}

// measures asks the lab's host what it measures, and tries reference values on it that it
// satisfies and others, of another QEMU; the VM goes on all the while.
func (s *system) measures(t *testing.T) {
	s.asAgreed(t)
	inForce := filepath.Join(s.state, "tenant", "platform.json")
	if out := s.must(t, "platform", "manifest", "try", inForce); strings.Count(out, "accepted") != 2 { // asked now; of the VM's last quote
		t.Errorf("reference values that are in force, tried:\n%s", out)
	}
	var env signed.Envelope
	var doc platform.Manifest
	data, err := os.ReadFile(inForce)
	if err != nil || json.Unmarshal(data, &env) != nil || json.Unmarshal(env.Payload, &doc) != nil {
		t.Fatalf("reference values: %v", err)
	}
	for i := range doc.Files {
		if strings.Contains(doc.Files[i].Name, "qemu-system") {
			doc.Files[i].SHA256[0] ^= 1
		}
	}
	data, err = json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "other.json")
	if err := durable.WriteFile(other, data, 0o644); err != nil {
		t.Fatal(err)
	}
	r := s.run(t.Context(), "platform", "manifest", "try", other)
	if r.code != 1 || strings.Contains(r.stdout, "accepted") || !strings.Contains(r.stdout, "qemu-system") {
		t.Errorf("reference values of another QEMU, tried: exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	if out := s.must(t, "vm", "explain", "web"); !strings.Contains(out, "computing") {
		t.Errorf("the VM since:\n%s", out)
	}
}
