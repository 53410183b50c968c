package vault

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"foothold/internal/secret"
)

func newVault(t *testing.T) (v *Vault, dir, kek string) {
	t.Helper()
	dir, kek = filepath.Join(t.TempDir(), "vault"), filepath.Join(t.TempDir(), "kek")
	v, err := Create(dir, kek)
	if err != nil {
		t.Fatal(err)
	}
	return v, dir, kek
}

func put(t *testing.T, v *Vault, name, value string) {
	t.Helper()
	if err := v.Put(name, secret.New([]byte(value))); err != nil {
		t.Fatal(err)
	}
}

func TestRoundTrip(t *testing.T) {
	v, dir, kek := newVault(t)
	put(t, v, "volume-1", "the volume key")
	if err := v.Put("volume-1", secret.New([]byte("other"))); !errors.Is(err, ErrExists) {
		t.Errorf("second Put: %v, want ErrExists", err)
	}
	again, err := Open(dir, kek)
	if err != nil {
		t.Fatal(err)
	}
	got, err := again.Get("volume-1")
	if err != nil || string(got.Reveal()) != "the volume key" {
		t.Errorf("Get = %q, %v", got.Reveal(), err)
	}
	if _, err := again.Get("volume-2"); !errors.Is(err, ErrAbsent) {
		t.Errorf("Get of an absent one: %v, want ErrAbsent", err)
	}
	names, err := again.Names()
	if err != nil || len(names) != 1 || names[0] != "volume-1" {
		t.Errorf("Names = %v, %v", names, err)
	}
	data, _ := os.ReadFile(filepath.Join(dir, "volume-1.sealed"))
	if bytes.Contains(data, []byte("volume key")) {
		t.Error("the secret lies in clear")
	}
}

func TestDestroy(t *testing.T) {
	v, dir, _ := newVault(t)
	put(t, v, "volume-1", "the volume key")
	file := filepath.Join(dir, "volume-1.sealed")
	// A second link shows what the blocks of the removed file hold.
	if err := os.Link(file, file+".watch"); err != nil {
		t.Fatal(err)
	}
	before, _ := os.ReadFile(file)
	for range 2 {
		if err := v.Destroy("volume-1"); err != nil {
			t.Fatal(err)
		}
	}
	if has, err := v.Has("volume-1"); has || err != nil {
		t.Errorf("Has = %v, %v after Destroy", has, err)
	}
	after, err := os.ReadFile(file + ".watch")
	if err != nil || len(after) != len(before) || bytes.Contains(after, before[len(magic):len(magic)+16]) {
		t.Error("the old content was not overwritten")
	}
	if err := v.Destroy(checkName); err == nil {
		t.Error("the vault's own check was destroyed")
	}
}

// Two clean-ups of one reservation may meet here.
func TestDestroyAtOnce(t *testing.T) {
	v, _, _ := newVault(t)
	for range 50 {
		put(t, v, "volume-1", "the volume key")
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if err := v.Destroy("volume-1"); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
}

func TestRefusals(t *testing.T) {
	v, dir, kek := newVault(t)
	put(t, v, "a", "secret of a")
	file := filepath.Join(dir, "a.sealed")
	good, _ := os.ReadFile(file)

	for _, name := range []string{"", "../a", "A", "-a", "a.sealed", "a/b", strings.Repeat("a", 128)} {
		if err := v.Put(name, secret.New([]byte("x"))); err == nil {
			t.Errorf("Put accepted the name %q", name)
		}
	}
	if err := v.Put("empty", secret.Bytes{}); err == nil {
		t.Error("Put accepted an empty secret")
	}
	for at := range good {
		bad := bytes.Clone(good)
		bad[at] ^= 1
		os.WriteFile(file, bad, 0o600)
		if _, err := v.Get("a"); !errors.Is(err, ErrSealed) {
			t.Fatalf("byte %d altered: %v, want ErrSealed", at, err)
		}
	}
	os.WriteFile(filepath.Join(dir, "b.sealed"), good, 0o600)
	if _, err := v.Get("b"); !errors.Is(err, ErrSealed) {
		t.Errorf("file under another name: %v, want ErrSealed", err)
	}

	if _, err := Create(dir, filepath.Join(t.TempDir(), "kek")); err == nil {
		t.Error("Create took a vault that exists")
	}
	if _, err := Create(filepath.Join(t.TempDir(), "v"), kek); err == nil {
		t.Error("Create took a key that exists")
	}
	other := filepath.Join(t.TempDir(), "other")
	os.WriteFile(other, make([]byte, kekSize), 0o600)
	if _, err := Open(dir, other); !errors.Is(err, ErrSealed) {
		t.Errorf("wrong key: %v, want ErrSealed", err)
	}
	os.WriteFile(other, make([]byte, kekSize-1), 0o600)
	if _, err := Open(dir, other); err == nil {
		t.Error("Open took a short key")
	}
	os.Chmod(kek, 0o640)
	if _, err := Open(dir, kek); err == nil {
		t.Error("Open took a key that the group may read")
	}
	os.Chmod(kek, 0o600)
	os.Chmod(dir, 0o755)
	if _, err := Open(dir, kek); err == nil {
		t.Error("Open took a folder that others may read")
	}
	os.Chmod(dir, 0o700)
	os.Symlink(kek, other+".link")
	if _, err := Open(dir, other+".link"); err == nil {
		t.Error("Open followed a link to the key")
	}
	if _, err := Open(dir, kek); err != nil {
		t.Errorf("Open with all in order: %v", err)
	}
}

func TestOnePutWins(t *testing.T) {
	v, _, _ := newVault(t)
	var won sync.Map
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			if v.Put("one", secret.New([]byte{byte(i + 1)})) == nil {
				won.Store(byte(i+1), true)
			}
		})
	}
	wg.Wait()
	winners := 0
	won.Range(func(_, _ any) bool { winners++; return true })
	got, err := v.Get("one")
	if err != nil || winners != 1 {
		t.Fatalf("%d winners, %v", winners, err)
	}
	if _, ok := won.Load(got.Reveal()[0]); !ok {
		t.Error("the stored secret is not the winner's")
	}
}
