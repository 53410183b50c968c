package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"foothold/internal/signingkey"
)

// TestPublishWantsAPrivateKeyFile: an inventory key that others may read signs nothing.
func TestPublishWantsAPrivateKeyFile(t *testing.T) {
	dir := t.TempDir()
	key, out := filepath.Join(dir, "inventory.key"), filepath.Join(dir, "inventory.json")
	if _, err := signingkey.Ensure(key); err != nil {
		t.Fatal(err)
	}
	host := filepath.Join(dir, "alpha.json")
	if err := os.WriteFile(host, []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"--provider", "hall", "--key", key, "--version", "1", "--out", out, host}
	if err := os.Chmod(key, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := publish(t.Context(), args); err == nil || !strings.Contains(err.Error(), "others may read") {
		t.Errorf("a key that others may read: %v", err)
	}
	if _, err := os.Stat(out); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an inventory was written: %v", err)
	}
	if err := publish(t.Context(), args[:len(args)-1]); !errors.Is(err, errUsage) {
		t.Errorf("no hosts: %v", err)
	}
}
