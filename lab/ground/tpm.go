package ground

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"runtime"
	"time"

	"foothold/internal/durable"
	"foothold/internal/tpm"
	"foothold/internal/tpm/swtpm"
	"foothold/protocol/inventory"
	"foothold/protocol/platform"
	"foothold/protocol/signed"
	"foothold/provider/enroll"
)

// inventoryLifetime is how long a published inventory holds; it is published anew
// when half of it is over.
const inventoryLifetime = 30 * 24 * time.Hour

// TPMDir is the folder of the host's TPM.
func (m *maker) tpmDir() string { return m.Provider("tpm") }

// makeTPM has the TPM manufactured: its state, endorsement key and certificate.
func (m *maker) makeTPM(ctx context.Context) error {
	if _, err := os.Stat(m.tpmDir()); err == nil {
		return nil
	}
	making := m.tpmDir() + ".new" // a crash may have left one
	if err := os.RemoveAll(making); err != nil {
		return fmt.Errorf("make TPM: %w", err)
	}
	if err := swtpm.Manufacture(ctx, making); err != nil {
		return err
	}
	return durable.Publish(making, m.tpmDir())
}

// publish enrols the host once, and publishes the inventory when there is none, when
// it is half over, or when the host's entry changed.
func (m *maker) publish(ctx context.Context) error {
	entry, err := m.entry(ctx)
	if err != nil {
		return err
	}
	if entry.Software, err = m.software(); err != nil {
		return err
	}
	if entry.EKChain, err = swtpm.Chain(m.tpmDir()); err != nil {
		return err
	}
	// The manufacturer's root is for the tenant to choose; the provider's word for it counts nothing elsewhere.
	if err := hand(filepath.Join(m.tpmDir(), swtpm.RootFile), m.Tenant("tpm-roots.pem")); err != nil {
		return err
	}
	old, have := m.published()
	version := 1
	if have {
		version = old.Version + 1
		was, ok := old.Find(HostName)
		if ok && reflect.DeepEqual(was, entry) && time.Until(old.Expires) > inventoryLifetime/2 {
			return hand(m.Provider("inventory.json"), m.Tenant("inventory.json"))
		}
	}
	env, err := enroll.Publish(m.inventoryKey, ProviderName, version, time.Now(), inventoryLifetime, []inventory.Host{entry})
	if err != nil {
		return err
	}
	if err := writeEnvelope(m.Provider("inventory.json"), env); err != nil {
		return err
	}
	return hand(m.Provider("inventory.json"), m.Tenant("inventory.json"))
}

// software is the name of the release that the host runs.
func (m *maker) software() (string, error) {
	data, err := os.ReadFile(m.Tenant("platform.json"))
	if err != nil {
		return "", fmt.Errorf("read platform: %w", err)
	}
	var env signed.Envelope
	if err := json.Unmarshal(data, &env); err != nil {
		return "", fmt.Errorf("read platform: %w", err)
	}
	var manifest platform.Manifest
	if err := env.Open(publicOf(m.platformKey), signed.Platform, &manifest); err != nil {
		return "", fmt.Errorf("read platform: %w", err)
	}
	return manifest.Name, nil
}

// published is the inventory that was published last.
func (m *maker) published() (inventory.Inventory, bool) {
	var inv inventory.Inventory
	var env signed.Envelope
	data, err := os.ReadFile(m.Provider("inventory.json"))
	if err != nil || json.Unmarshal(data, &env) != nil || env.Open(publicOf(m.inventoryKey), signed.Inventory, &inv) != nil {
		return inv, false
	}
	return inv, true
}

// entry is the host's inventory entry; the first time the host is enrolled for it.
func (m *maker) entry(ctx context.Context) (inventory.Host, error) {
	var entry inventory.Host
	file := m.Provider("host.json")
	data, err := os.ReadFile(file)
	if err == nil {
		if err := json.Unmarshal(data, &entry); err != nil {
			return entry, fmt.Errorf("read enrolment: %w", err)
		}
		return entry, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return entry, fmt.Errorf("read enrolment: %w", err)
	}
	entry = inventory.Host{Name: HostName, API: hostAddress(), Location: "lab, rack 1, unit 1", Asset: HostAsset}
	if entry, err = m.enrol(ctx, entry); err != nil {
		return entry, err
	}
	if data, err = json.MarshalIndent(entry, "", "  "); err != nil {
		return entry, fmt.Errorf("write enrolment: %w", err)
	}
	return entry, durable.WriteFile(file, append(data, '\n'), 0o644)
}

// enrol powers the TPM on for the enrolment alone.
func (m *maker) enrol(ctx context.Context, entry inventory.Host) (inventory.Host, error) {
	dir, err := os.MkdirTemp("", "foothold-") // sockets' paths are short
	if err != nil {
		return entry, fmt.Errorf("make socket folder: %w", err)
	}
	defer os.RemoveAll(dir)
	runtime.LockOSThread() // the TPM ends with the thread that starts it
	defer runtime.UnlockOSThread()
	proc, err := swtpm.Start(ctx, m.tpmDir(), filepath.Join(dir, "tpm"))
	if err != nil {
		return entry, err
	}
	defer proc.Stop()
	dev, err := tpm.Open(proc.Socket)
	if err != nil {
		return entry, err
	}
	defer dev.Close()
	return enroll.Enroll(dev, entry)
}
