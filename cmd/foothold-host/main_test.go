package main

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestEnrollWantsAllItsFlags: an entry that lacks a field is not begun.
func TestEnrollWantsAllItsFlags(t *testing.T) {
	dir := t.TempDir()
	full := []string{"--tpm=" + filepath.Join(dir, "absent"), "--name=alpha", "--api=10.83.0.10:8443", "--location=hall 1",
		"--asset=A-1", "--software=2026-11", "--out=" + filepath.Join(dir, "alpha.json")}
	if err := enrollHost(t.Context(), full); err == nil || errors.Is(err, errUsage) {
		t.Errorf("with all of them it wants the TPM: %v", err)
	}
	for i, arg := range full[1:] {
		name, _, _ := strings.Cut(arg, "=")
		for _, value := range []string{"", "="} {
			args := slices.Delete(slices.Clone(full), i+1, i+2)
			if value == "=" {
				args = append(args, name+"=")
			}
			if err := enrollHost(t.Context(), args); !errors.Is(err, errUsage) {
				t.Errorf("%s%s: %v", name, value, err)
			}
		}
	}
	if err := enrollHost(t.Context(), append(slices.Clone(full), "--location= ")); !errors.Is(err, errUsage) {
		t.Errorf("a blank location: %v", err)
	}
	chain := filepath.Join(dir, "chain.pem")
	if err := os.WriteFile(chain, []byte("no certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := enrollHost(t.Context(), append(slices.Clone(full), "--ek-chain="+chain)); err == nil || !strings.Contains(err.Error(), "PEM certificate") {
		t.Errorf("a chain that is none: %v", err)
	}
}
