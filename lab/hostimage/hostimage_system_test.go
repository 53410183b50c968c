//go:build system

package hostimage_test

import (
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"foothold/internal/tpm/swtpm"
	"foothold/lab/hostimage"
	"foothold/protocol/digest"
	"foothold/protocol/hostapi"
)

func cacheDir(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv("FOOTHOLD_CACHE"); dir != "" {
		return dir
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "foothold")
}

// program builds a static program of the module.
func program(t *testing.T, pkg string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), "program")
	cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if text, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v\n%s", pkg, err, text)
	}
	return out
}

func TestHost(t *testing.T) {
	o := hostimage.Options{CacheDir: cacheDir(t), Dir: t.TempDir(), Init: program(t, "foothold/lab/hostimage/init"), Agent: program(t, "foothold/cmd/foothold-host"),
		Modules: []string{"drivers/net/tun.ko"}, Progress: func(s string) { t.Log(s) }}
	image, err := hostimage.Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	tpmDir := filepath.Join(t.TempDir(), "tpm")
	if err := swtpm.Manufacture(t.Context(), tpmDir); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 150*time.Second)
	defer cancel()
	run, err := hostimage.Boot(ctx, image, tpmDir, digest.Of([]byte("nonce")))
	t.Logf("%v\n%s", run.Took, run.Console)
	if err != nil {
		t.Fatal(err)
	}
	var q hostapi.QuoteResponse
	if err := json.Unmarshal(run.Answer.Quote, &q); err != nil {
		t.Fatal(err)
	}
	os.MkdirAll("/tmp/hb/good", 0o755)
	os.WriteFile("/tmp/hb/good/firmware", q.Platform.Firmware, 0o644)
	os.WriteFile("/tmp/hb/good/kernel", q.Platform.Kernel, 0o644)
	os.WriteFile("/tmp/hb/good/quote.json", run.Answer.Quote, 0o644)
	os.WriteFile("/tmp/hb/good/entry.json", run.Answer.Entry, 0o644)
}
