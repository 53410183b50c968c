package enroll

import (
	"bytes"
	"crypto/ed25519"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/inventory"
	"foothold/protocol/signed"
)

// TestVersions: a change makes the next version and keeps the earlier ones as they were;
// the same hosts again make none until half of the time is over.
func TestVersions(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "published")
	public, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	a, b := inventory.Host{Name: "a", Software: "r1"}, inventory.Host{Name: "b"}
	publish := func(at time.Time, hosts ...inventory.Host) (Version, []Change, bool) {
		t.Helper()
		v, changes, fresh, err := PublishNext(t.Context(), dir, key, "hall", at, 10*time.Hour, hosts)
		if err != nil {
			t.Fatal(err)
		}
		return v, changes, fresh
	}
	steps := []struct {
		after   time.Duration
		hosts   []inventory.Host
		version int
		changes []Change
	}{
		{0, []inventory.Host{a}, 1, []Change{{"a", "new"}}},
		{time.Hour, []inventory.Host{a}, 1, nil},
		{2 * time.Hour, []inventory.Host{b, a}, 2, []Change{{"b", "new"}}},
		{3 * time.Hour, []inventory.Host{a, b}, 2, nil}, // in another order
		{8 * time.Hour, []inventory.Host{a, b}, 3, nil}, // less than half is left
		{9 * time.Hour, []inventory.Host{{Name: "a", Software: "r2"}}, 4, []Change{{"a", "changed"}, {"b", "gone"}}},
	}
	files := map[string][]byte{}
	last := 0
	for i, s := range steps {
		v, changes, fresh := publish(now.Add(s.after), s.hosts...)
		if v.Version != s.version || fresh != (s.version != last) || !slices.Equal(changes, s.changes) {
			t.Errorf("step %d: version %d, fresh %v, %v", i, v.Version, fresh, changes)
		}
		last = v.Version
		data, err := os.ReadFile(v.File)
		if err != nil || !bytes.Equal(data, v.Signed) {
			t.Errorf("step %d: the folder holds other bytes: %v", i, err)
		}
		if before, ok := files[v.File]; ok && !bytes.Equal(before, data) {
			t.Errorf("step %d: version %d was changed", i, v.Version)
		}
		files[v.File] = data
	}
	for file, data := range files {
		if now, err := os.ReadFile(file); err != nil || !bytes.Equal(now, data) {
			t.Errorf("%s was not kept: %v", file, err)
		}
	}
	if newest, err := Newest(dir, public); err != nil || newest.Version != 4 || len(newest.Hosts) != 1 {
		t.Errorf("newest: %+v, %v", newest, err)
	}
}

// TestVersionsOfAnotherAreNotContinued: by another key or provider, renamed, or cut short.
func TestVersionsOfAnotherAreNotContinued(t *testing.T) {
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	_, other, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	host := []inventory.Host{{Name: "a"}}
	for _, c := range []struct {
		what, says string
		change     func(file string) error
		key        ed25519.PrivateKey
		provider   string
	}{
		{"another key", signed.ErrSignature.Error(), func(string) error { return nil }, other, "hall"},
		{"another provider", `of provider "hall"`, func(string) error { return nil }, key, "cellar"},
		{"a renamed version", "it holds version 1", func(file string) error {
			return os.Rename(file, filepath.Join(filepath.Dir(file), "inventory-000007.json"))
		}, key, "hall"},
		{"a truncated version", "earlier inventory", func(file string) error { return os.Truncate(file, 100) }, key, "hall"},
	} {
		dir := t.TempDir()
		v, _, _, err := PublishNext(t.Context(), dir, key, "hall", time.Now(), time.Hour, host)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.change(v.File); err != nil {
			t.Fatal(err)
		}
		if _, _, _, err := PublishNext(t.Context(), dir, c.key, c.provider, time.Now(), time.Hour, append(host, inventory.Host{Name: "b"})); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", c.what, err)
		}
		if files, err := filepath.Glob(filepath.Join(dir, "inventory-*.json")); err != nil || len(files) != 1 {
			t.Errorf("%s: %v %v", c.what, files, err)
		}
	}
}

func TestReadEntryRefusesWhatEnrolDidNotMake(t *testing.T) {
	file := filepath.Join(t.TempDir(), "alpha.json")
	for _, text := range []string{"", "{}", `{"name":"alpha","api":"10.0.0.1:8443"}`, `{"name":"alpha","name":"beta"}`} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if h, err := ReadEntry(file); err == nil {
			t.Errorf("%q: %+v", text, h)
		}
	}
}
