package host

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"foothold/internal/durable"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/hostapi"
	"foothold/protocol/vmspec"

	"golang.org/x/sys/unix"
)

// maxTemplate bounds a template image in bytes.
const maxTemplate = 64 << 30

// volumeSuffix completes a volume's id to its file's name.
const volumeSuffix = ".img"

// Each tenant's disks lie in folders of its own, so that none can name another's.

func (a *Agent) templatePath(tenant string, sum digest.SHA256) string {
	return filepath.Join(a.conf.State, "templates", tenant, sum.String())
}

func (a *Agent) volumePath(tenant, id string) string {
	return filepath.Join(a.conf.State, "volumes", tenant, id+volumeSuffix)
}

// putTemplate stores what r gives under its digest, whole or not at all.
func (a *Agent) putTemplate(tenant string, want digest.SHA256, r io.Reader) error {
	path := a.templatePath(tenant, want)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return diskFull("store template", err)
	}
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	err := durable.Write(path, 0o400, func(f *os.File) error {
		h := sha256.New()
		n, err := io.Copy(io.MultiWriter(f, h), io.LimitReader(r, maxTemplate+1))
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			return err
		}
		if err != nil {
			return event.Refuse(event.BadRequest, "the template's bytes did not arrive: %v", err)
		}
		if n > maxTemplate {
			return event.Refuse(event.BadRequest, "a template has at most %d bytes", int64(maxTemplate))
		}
		if got := digest.SHA256(h.Sum(nil)); got != want {
			return event.Refuse(event.DigestMismatch, "the template's bytes hash to %s", got)
		}
		return nil
	})
	return diskFull("store template", err)
}

// diskFull turns the failure of a write for want of space into a refusal that says so.
// What was being written has been removed by then.
func diskFull(doing string, err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC):
		return event.Refuse(event.DiskFull, "%s: the host's disk has no room for it", doing)
	case errors.Is(err, unix.EDQUOT):
		return event.Refuse(event.DiskFull, "%s: the host agent's disk quota has no room for it", doing)
	case err != nil:
		return fmt.Errorf("%s: %w", doing, err)
	}
	return nil
}

// listTemplates lists the tenant's templates and how many VMs have each attached.
func (a *Agent) listTemplates(tenant string) ([]hostapi.Template, error) {
	list := []hostapi.Template{}
	entries, err := os.ReadDir(filepath.Join(a.conf.State, "templates", tenant))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list templates: %w", err)
	}
	for _, e := range entries {
		sum, err := digest.Parse(e.Name())
		if err != nil {
			continue // one that is being written
		}
		info, err := e.Info()
		if err != nil {
			continue // deleted meanwhile
		}
		list = append(list, hostapi.Template{SHA256: sum, Size: info.Size(), Users: a.users(tenant, sum)})
	}
	return list, nil
}

// users counts the VMs that have the template attached or will have.
func (a *Agent) users(tenant string, sum digest.SHA256) int {
	n := 0
	for _, v := range a.list(tenant) {
		if v.spec.Template == sum && v.describe().State != hostapi.Stopped {
			n++
		}
	}
	return n
}

func (a *Agent) deleteTemplate(tenant string, sum digest.SHA256) error {
	if n := a.users(tenant, sum); n > 0 {
		return event.Refuse(event.InUse, "%d VMs have the template attached", n)
	}
	if err := os.Remove(a.templatePath(tenant, sum)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete template: %w", err)
	}
	return nil
}

func (a *Agent) openTemplate(tenant string, sum digest.SHA256) (*os.File, error) {
	f, err := os.Open(a.templatePath(tenant, sum))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, event.Refuse(event.UnknownTemplate, "this host has no template %s of this tenant", sum)
	}
	if err != nil {
		return nil, fmt.Errorf("open template: %w", err)
	}
	return f, nil
}

// makeVolume makes the volume if it is absent, with all its space allocated: a sparse
// file on a disk that fills up later would fail the guest's writes, and harm what it
// holds. Where the file system cannot allocate, it makes none. The tenant's guest
// formats it; the host never reads or writes it.
func (a *Agent) makeVolume(tenant string, vol vmspec.Volume) error {
	path := a.volumePath(tenant, vol.ID)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return diskFull("make volume", err)
	}
	info, err := os.Stat(path)
	if err == nil {
		return sameSize(info, vol)
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("make volume: %w", err)
	}
	err = durable.Write(path, 0o600, func(f *os.File) error { return allocate(f, int64(vol.SizeMiB)<<20) })
	return diskFull(fmt.Sprintf("make volume of %d MiB", vol.SizeMiB), err)
}

// allocate gives the empty file its size and blocks. A signal may interrupt it
// (fallocate(2)); what was allocated by then is kept.
func allocate(f *os.File, size int64) error {
	for {
		err := unix.Fallocate(int(f.Fd()), 0, 0, size)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return fmt.Errorf("allocate its space: %w", err)
		}
		return nil
	}
}

func sameSize(info fs.FileInfo, vol vmspec.Volume) error {
	if info.Size() != int64(vol.SizeMiB)<<20 {
		return event.Refuse(event.BadRequest, "volume %s has %d MiB", vol.ID, info.Size()>>20)
	}
	return nil
}

// openVolume opens and locks the volume. The lock belongs to the open file, so it
// lasts as long as the QEMU that inherits it, also beyond this agent.
func (a *Agent) openVolume(tenant string, vol vmspec.Volume) (*os.File, error) {
	f, err := os.OpenFile(a.volumePath(tenant, vol.ID), os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("open volume: %w", err)
	}
	if err := lock(f); err != nil {
		f.Close()
		return nil, err
	}
	info, err := f.Stat()
	if err == nil {
		err = sameSize(info, vol)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func lock(f *os.File) error {
	err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		return event.Refuse(event.InUse, "a running VM has the volume attached")
	}
	if err != nil {
		return fmt.Errorf("lock volume: %w", err)
	}
	return nil
}

// listVolumes lists the tenant's volumes and whether a VM has each attached.
func (a *Agent) listVolumes(tenant string) ([]hostapi.Volume, error) {
	list := []hostapi.Volume{}
	entries, err := os.ReadDir(filepath.Join(a.conf.State, "volumes", tenant))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("list volumes: %w", err)
	}
	for _, e := range entries {
		id, ok := strings.CutSuffix(e.Name(), volumeSuffix)
		if !ok || !vmspec.ValidID(id) {
			continue // one that is being made
		}
		info, err := e.Info()
		if err != nil {
			continue // deleted meanwhile
		}
		list = append(list, hostapi.Volume{ID: id, Size: info.Size(), Attached: a.holder(tenant, id) != nil})
	}
	return list, nil
}

// holder is the VM that has the volume attached or will have, or nil.
func (a *Agent) holder(tenant, volume string) *vm {
	for _, v := range a.list(tenant) {
		if v.spec.Volume.ID == volume && v.describe().State != hostapi.Stopped {
			return v
		}
	}
	return nil
}

// deleteVolume removes the volume's file; absent already is success.
func (a *Agent) deleteVolume(tenant, id string) error {
	if v := a.holder(tenant, id); v != nil {
		return event.Refuse(event.InUse, "VM %s has the volume attached", v.spec.Name)
	}
	path := a.volumePath(tenant, id)
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("delete volume: %w", err)
	}
	defer f.Close()
	if err := lock(f); err != nil {
		return err
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("delete volume: %w", err)
	}
	return nil
}
