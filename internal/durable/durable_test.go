package durable

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestWriteReplacesWholeOrNot(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	boom := errors.New("boom")
	err := Write(path, 0o600, func(f *os.File) error { f.WriteString("half"); return boom })
	if !errors.Is(err, boom) {
		t.Errorf("failure is lost: %v", err)
	}
	if data, _ := os.ReadFile(path); string(data) != "old" {
		t.Errorf("a failed write left %q", data)
	}
	if err := WriteFile(path, []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) != 1 {
		t.Errorf("files left behind: %v", left)
	}
}

func TestPublishRefusesATakenPlace(t *testing.T) {
	dir := t.TempDir()
	for _, sub := range []string{"new", "taken"} {
		os.Mkdir(filepath.Join(dir, sub), 0o755)
		os.WriteFile(filepath.Join(dir, sub, "x"), []byte(sub), 0o644)
	}
	if err := Publish(filepath.Join(dir, "new"), filepath.Join(dir, "taken")); err == nil {
		t.Error("a folder that is in use is replaced")
	}
	if err := Publish(filepath.Join(dir, "new"), filepath.Join(dir, "free")); err != nil {
		t.Error(err)
	}
	if data, _ := os.ReadFile(filepath.Join(dir, "free", "x")); string(data) != "new" {
		t.Errorf("published %q", data)
	}
}

func TestReplaceSwapsWhole(t *testing.T) {
	dir := t.TempDir()
	place := filepath.Join(dir, "place")
	for _, version := range []string{"first", "second"} {
		fresh := filepath.Join(dir, version)
		os.Mkdir(fresh, 0o755)
		os.WriteFile(filepath.Join(fresh, version), nil, 0o644)
		if err := Replace(fresh, place); err != nil {
			t.Fatal(err)
		}
		left, _ := os.ReadDir(place)
		if len(left) != 1 || left[0].Name() != version {
			t.Errorf("after the %s: %v", version, left)
		}
		if _, err := os.Stat(fresh); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the %s leaves its folder: %v", version, err)
		}
	}
}

func TestLockWaitsForItsHolder(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	unlock, err := Lock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*lockPoll)
	defer cancel()
	if _, err := Lock(ctx, path); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a held lock is given: %v", err)
	}
	got := make(chan error)
	go func() {
		again, err := Lock(t.Context(), path)
		if err == nil {
			again()
		}
		got <- err
	}()
	unlock()
	select {
	case err := <-got:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Error("the lock is not passed on")
	}
}
