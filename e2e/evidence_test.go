//go:build system

package e2e

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"testing"

	"foothold/internal/config"
	"foothold/protocol/api"
	"foothold/tenant/orchestrator"
)

// evidence exports the decisions about the VM, and audits them with the public keys alone,
// in an environment without a context.
func (s *system) evidence(t *testing.T) {
	s.must(t, "vm", "attest", "web")
	dir, verify := s.exported(t, "web")
	r := verify(false)
	if r.code != 0 {
		t.Errorf("exit code %d\n%s%s", r.code, r.stdout, r.stderr)
	}
	t.Logf("audit:\n%s", r.stdout)
	if r := verify(true); r.code != 1 {
		t.Errorf("by another key: exit code %d\n%s", r.code, r.stdout)
	}
	files, err := filepath.Glob(filepath.Join(dir, "*-unlock-*.json"))
	if err != nil || len(files) != 1 {
		t.Fatalf("files of the unlock quote: %q, %v", files, err)
	}
	data, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(files[0], bytes.Replace(data, []byte(`"start":1`), []byte(`"start":2`), 1), 0o644); err != nil {
		t.Fatal(err)
	}
	if r := verify(false); r.code != 1 {
		t.Errorf("with an altered bundle: exit code %d\n%s", r.code, r.stdout)
	}
}

// exported writes the evidence of a VM's latest start, and returns its folder and what audits
// it: by the keys that the tenant pins, or by another in place of the inventory's.
func (s *system) exported(t *testing.T, name string) (dir string, verify func(otherKey bool) result) {
	t.Helper()
	var conf orchestrator.Config
	if err := config.Read(filepath.Join(s.state, "tenant", "orchestrator.yaml"), &conf); err != nil {
		t.Fatal(err)
	}
	dir = t.TempDir()
	var e api.Evidence
	if err := json.Unmarshal([]byte(s.must(t, "vm", "evidence", name, "--out", dir, "--json")), &e); err != nil {
		t.Fatal(err)
	}
	if len(e.Verdicts) < 4 {
		t.Fatalf("%d verdicts: want boot, unlock, connect and the one that was asked for", len(e.Verdicts))
	}
	return dir, func(otherKey bool) result {
		inventoryKey := conf.InventoryKey
		if otherKey {
			inventoryKey = conf.PlatformKey
		}
		return s.run(t.Context(), "verify", dir, "--profile", conf.Profile, "--tpm-roots", conf.TPMRoots, "--inventory-key", inventoryKey,
			"--platform-key", conf.PlatformKey, "--last", e.Verdicts[len(e.Verdicts)-1].Digest.String())
	}
}
