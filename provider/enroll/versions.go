package enroll

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"foothold/internal/durable"
	"foothold/internal/strictjson"
	"foothold/protocol/digest"
	"foothold/protocol/inventory"
	"foothold/protocol/signed"
	"foothold/protocol/vmspec"
)

const (
	maxEntry   = 64 << 10         // bytes of one host's entry
	maxVersion = 16 << 20         // bytes of one signed inventory
	lockWait   = 10 * time.Second // for another publishing into the same folder
)

// versionFile is how a folder keeps its versions: inventory-000012.json.
var versionFile = regexp.MustCompile(`^inventory-([0-9]{6,})\.json$`)

// Version is one published inventory.
type Version struct {
	inventory.Inventory
	Digest digest.SHA256 // of the signed payload: what is compared over another way
	File   string        // where the folder keeps it
	Signed []byte        // that file's bytes, as hosts serve them
}

// Change is one host that a version has otherwise than the one before.
type Change struct {
	Host string `json:"host"`
	What string `json:"what"` // "new", "gone" or "changed"
}

// ReadEntry reads a host's entry as [Enroll] made it.
func ReadEntry(file string) (h inventory.Host, err error) {
	f, err := os.Open(file)
	if err != nil {
		return h, fmt.Errorf("host's entry: %w", err)
	}
	defer f.Close()
	if err := strictjson.Read(f, maxEntry, &h); err != nil {
		return h, fmt.Errorf("host's entry %s: %w", file, err)
	}
	if !vmspec.ValidName(h.Name) || !h.API.IsValid() || len(h.EK) == 0 || len(h.AIK) == 0 || len(h.Session) == 0 {
		return h, fmt.Errorf("host's entry %s: it lacks a name, an address or a key; `foothold-host enroll` on the host makes it", file)
	}
	return h, nil
}

// Newest reads the newest version in a folder and checks that key signed it. The zero
// version stands for an empty folder.
func Newest(dir string, key ed25519.PublicKey) (Version, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Version{}, fmt.Errorf("earlier inventories: %w", err)
	}
	highest, file := 0, ""
	for _, e := range entries {
		m := versionFile.FindStringSubmatch(e.Name())
		if m == nil {
			continue
		}
		n, err := strconv.Atoi(m[1])
		if err != nil {
			return Version{}, fmt.Errorf("earlier inventories: %s: %w", e.Name(), err)
		}
		if n > highest {
			highest, file = n, filepath.Join(dir, e.Name())
		}
	}
	if highest == 0 {
		return Version{}, nil
	}
	v, err := readVersion(file, key)
	if err == nil && v.Version != highest {
		err = fmt.Errorf("earlier inventory %s: it holds version %d", file, v.Version)
	}
	return v, err
}

func readVersion(file string, key ed25519.PublicKey) (Version, error) {
	f, err := os.Open(file)
	if err != nil {
		return Version{}, fmt.Errorf("earlier inventory: %w", err)
	}
	defer f.Close()
	var env signed.Envelope
	if err := strictjson.Read(f, maxVersion, &env); err != nil {
		return Version{}, fmt.Errorf("earlier inventory %s: %w", file, err)
	}
	v := Version{Digest: digest.Of(env.Payload), File: file}
	if err := env.Open(key, signed.Inventory, &v.Inventory); err != nil {
		return Version{}, fmt.Errorf("earlier inventory %s: %w", file, err)
	}
	v.Signed, err = encode(env)
	return v, err
}

// PublishNext signs the next version of the folder's inventory, one more than the newest
// in it, and keeps it beside the others. If the hosts are those of the newest, and at least
// half of its time is left, the newest stays and fresh is false. A crash leaves either the
// old newest or the new one.
func PublishNext(ctx context.Context, dir string, key ed25519.PrivateKey, provider string, now time.Time, valid time.Duration, hosts []inventory.Host) (v Version, changes []Change, fresh bool, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return v, nil, false, fmt.Errorf("publish inventory: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, lockWait)
	defer cancel()
	unlock, err := durable.Lock(ctx, filepath.Join(dir, "lock"))
	if err != nil {
		return v, nil, false, fmt.Errorf("publish inventory: somebody else publishes into %s: %w", dir, err)
	}
	defer unlock()
	old, err := Newest(dir, key.Public().(ed25519.PublicKey))
	if err != nil {
		return v, nil, false, err
	}
	hosts = slices.SortedFunc(slices.Values(hosts), func(a, b inventory.Host) int { return strings.Compare(a.Name, b.Name) })
	if changes, err = Compare(old.Hosts, hosts); err != nil {
		return v, nil, false, err
	}
	if old.Version > 0 && old.Provider != provider {
		return v, nil, false, fmt.Errorf("publish inventory: the versions in %s are of provider %q", dir, old.Provider)
	}
	if old.Version > 0 && len(changes) == 0 && old.Expires.Sub(now) >= valid/2 {
		return old, nil, false, nil
	}
	env, err := Publish(key, provider, old.Version+1, now, valid, hosts)
	if err != nil {
		return v, nil, false, err
	}
	v.Digest, v.File = digest.Of(env.Payload), filepath.Join(dir, fmt.Sprintf("inventory-%06d.json", old.Version+1))
	if err := strictjson.Unmarshal(env.Payload, &v.Inventory); err != nil {
		return v, nil, false, fmt.Errorf("publish inventory: %w", err)
	}
	if v.Signed, err = encode(env); err != nil {
		return v, nil, false, err
	}
	return v, changes, true, durable.WriteFile(v.File, v.Signed, 0o644)
}

// Compare lists the hosts in which two versions differ, by name.
func Compare(before, after []inventory.Host) ([]Change, error) {
	was := map[string][]byte{}
	for _, h := range before {
		data, err := json.Marshal(h)
		if err != nil {
			return nil, fmt.Errorf("compare hosts: %w", err)
		}
		was[h.Name] = data
	}
	changes := []Change{}
	for _, h := range after {
		data, err := json.Marshal(h)
		if err != nil {
			return nil, fmt.Errorf("compare hosts: %w", err)
		}
		switch old, ok := was[h.Name]; {
		case !ok:
			changes = append(changes, Change{h.Name, "new"})
		case !bytes.Equal(old, data):
			changes = append(changes, Change{h.Name, "changed"})
		}
		delete(was, h.Name)
	}
	for name := range was {
		changes = append(changes, Change{name, "gone"})
	}
	slices.SortFunc(changes, func(a, b Change) int { return strings.Compare(a.Host, b.Host) })
	return changes, nil
}

func encode(env signed.Envelope) ([]byte, error) {
	data, err := json.MarshalIndent(env, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encode inventory: %w", err)
	}
	return append(data, '\n'), nil
}
