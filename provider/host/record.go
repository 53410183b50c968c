package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"foothold/internal/durable"
	"foothold/internal/strictjson"
	"foothold/protocol/event"
	"foothold/protocol/hostapi"
	"foothold/protocol/token"
	"foothold/protocol/vmspec"
)

// maxRecord bounds a VM's file in bytes.
const maxRecord = 256 << 10

// record is a VM as it lies on disk. T1 never does.
type record struct {
	Tenant string      `json:"tenant"`
	Spec   vmspec.Spec `json:"spec"`
	VM     hostapi.VM  `json:"vm"`
}

func (a *Agent) recordPath(id string) string { return filepath.Join(a.conf.State, "vms", id+".json") }

// write replaces the VM's file.
func (v *vm) write(info hostapi.VM) error {
	data, err := json.Marshal(record{v.tenant, v.spec, info})
	if err != nil {
		return fmt.Errorf("record vm: %w", err)
	}
	return diskFull("record vm", durable.WriteFile(v.agent.recordPath(v.spec.Reservation), data, 0o600))
}

// forget removes the VM's file.
func (v *vm) forget() error {
	if err := os.Remove(v.agent.recordPath(v.spec.Reservation)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("forget vm: %w", err)
	}
	return nil
}

// recover reads the VMs of this agent's predecessor. None of them lives: QEMU died
// with it, and T1 was never stored.
func (a *Agent) recover() error {
	dir := filepath.Join(a.conf.State, "vms")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("read VMs: %w", err)
	}
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || !vmspec.ValidID(id) {
			os.Remove(filepath.Join(dir, e.Name())) // what a crash left half written
			continue
		}
		v, err := a.readVM(filepath.Join(dir, e.Name()))
		if err != nil {
			return err
		}
		if v.info.State != hostapi.Stopped {
			slog.Warn("vm found stopped", "reservation", id, "was", v.info.State)
			v.finish(event.VMStopped, "the host agent started anew")
		}
		a.vms[id] = v
	}
	return nil
}

func (a *Agent) readVM(path string) (*vm, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read vm: %w", err)
	}
	defer f.Close()
	var r record
	if err := strictjson.Read(f, maxRecord, &r); err != nil {
		return nil, fmt.Errorf("read vm %s: %w", path, err)
	}
	v := a.newVM(r.Tenant, r.Spec, token.Token{})
	v.info = r.VM
	return v, nil
}
