// Package opener opens a VM's disks from what the unlock channel handed over, and
// builds the OS's root from them.
//
// Headers come from memory and are checked against this program's own constants
// (package luks): a header that names another cipher, another sector size or a second
// key slot is refused, whoever sent it. The verity root hash comes from the handover,
// never from the disk. A file system is made only on explicit order. Passphrases,
// headers and keys stay in this process; the kernel is asked directly (package
// devmapper).
//
// What stands afterwards, below [Root]:
//
//	/                    erofs on dm-verity on dm-crypt on vda, read-only
//	/etc                 overlay over it, upper layer in memory
//	/var /home /root /srv  the volume: ext4 on dm-crypt on vdb
//	/tmp                 tmpfs
package opener

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"

	"foothold/internal/command"
	"foothold/internal/devmapper"
	"foothold/internal/luks"
	"foothold/protocol/event"
	"foothold/protocol/unlockmsg"

	"golang.org/x/sys/unix"
)

// Places.
const (
	Root    = "/sysroot"          // where the OS's root is built
	EtcUp   = "/run/foothold/etc" // upper layer of /etc, below it "upper" and "work"
	staging = "/volume"           // the volume, until its folders are bound
)

// Device-mapper names.
const (
	templateName = "template"
	rootName     = "os"
	volumeName   = "volume"
)

// volumeDirs are the folders of the volume and their modes.
var volumeDirs = []struct {
	name string
	mode os.FileMode
}{{"var", 0o755}, {"home", 0o755}, {"root", 0o700}, {"srv", 0o755}}

var deviceForm = regexp.MustCompile(`^vd[ab]$`)

// Check refuses a handover whose disks are not what this VM has or this program opens.
func Check(h *unlockmsg.Handover) error {
	if h.Template.Device != "vda" || h.Volume.Device != "vdb" {
		return event.Refuse(event.DiskRefused, "the handover names other disks")
	}
	if h.Template.Format {
		return event.Refuse(event.DiskRefused, "the handover orders the template to be formatted")
	}
	for _, d := range []unlockmsg.Disk{h.Template, h.Volume} {
		if err := luks.Check(d.Header); err != nil {
			return event.Refuse(event.DiskRefused, "%s: %v", d.Device, err)
		}
		if d.Passphrase.Len() < 32 {
			return event.Refuse(event.DiskRefused, "%s: the passphrase is too short", d.Device)
		}
	}
	if h.Verity.RootHash.IsZero() || h.Verity.HashOffset <= 0 || h.Verity.HashOffset%luks.SectorSize != 0 {
		return event.Refuse(event.DiskRefused, "the handover pins no template content")
	}
	return nil
}

// Open opens both disks and builds the root.
func Open(ctx context.Context, h *unlockmsg.Handover, say func(string, ...any)) error {
	if err := Check(h); err != nil {
		return err
	}
	if err := crypt(h.Template, templateName, true); err != nil {
		return event.Refuse(event.DiskRefused, "template: %v", err)
	}
	if err := verity(h.Verity); err != nil {
		return event.Refuse(event.DiskRefused, "template: %v", err)
	}
	if err := mount(mapped(rootName), Root, "erofs", unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOSUID, ""); err != nil {
		return event.Refuse(event.DiskRefused, "template: %v", err)
	}
	say("template open")
	if err := crypt(h.Volume, volumeName, false); err != nil {
		return event.Refuse(event.DiskRefused, "volume: %v", err)
	}
	if h.Volume.Format {
		if err := format(ctx); err != nil {
			return event.Refuse(event.DiskRefused, "volume: %v", err)
		}
		say("volume formatted")
	}
	if err := bindVolume(); err != nil {
		return event.Refuse(event.DiskRefused, "volume: %v", err)
	}
	say("volume open")
	return memoryLayers()
}

func mapped(name string) string { return filepath.Join(devmapper.Dir, name) }

// crypt opens one disk. The volume key exists for the time of one call to the kernel.
func crypt(d unlockmsg.Disk, name string, readOnly bool) error {
	if !deviceForm.MatchString(d.Device) {
		return errors.New("unknown device")
	}
	key, err := luks.Unlock(d.Header, d.Passphrase)
	if err != nil {
		return err
	}
	defer key.Wipe()
	return devmapper.Crypt(name, "/dev/"+d.Device, key, readOnly)
}

// verity opens the template's content under the pinned root hash; a block that does
// not fit is an I/O error to whoever reads it.
func verity(v unlockmsg.Verity) error {
	return devmapper.Verity(rootName, mapped(templateName), v.RootHash, v.HashOffset)
}

func format(ctx context.Context) error {
	return command.Run(ctx, "mkfs.ext4", "-q", "-m", "0", "-E", "nodiscard,lazy_itable_init=1,lazy_journal_init=1", mapped(volumeName))
}

// bindVolume puts the volume's folders over the template's, which fill them on the
// first start. The volume itself is mounted nowhere afterwards.
func bindVolume() error {
	if err := mount(mapped(volumeName), staging, "ext4", unix.MS_NODEV|unix.MS_NOSUID, ""); err != nil {
		return err
	}
	for _, d := range volumeDirs {
		from, to := filepath.Join(staging, d.name), filepath.Join(Root, d.name)
		if _, err := os.Lstat(from); os.IsNotExist(err) {
			if err := populate(to, from, d.mode); err != nil {
				return fmt.Errorf("fill /%s: %w", d.name, err)
			}
		}
		if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind /%s: %w", d.name, err)
		}
	}
	if err := unix.Unmount(staging, 0); err != nil {
		return fmt.Errorf("let go of the volume: %w", err)
	}
	return os.Remove(staging)
}

// memoryLayers are what of the OS's root lies in memory.
func memoryLayers() error {
	upper, work := filepath.Join(EtcUp, "upper"), filepath.Join(EtcUp, "work")
	for _, dir := range []string{upper, work} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return fmt.Errorf("make /etc's layer: %w", err)
		}
	}
	if err := os.Chmod(filepath.Dir(EtcUp), 0o711); err != nil { // workloads' own user passes through
		return fmt.Errorf("make /etc's layer: %w", err)
	}
	if err := os.Chmod(EtcUp, 0o700); err != nil {
		return fmt.Errorf("make /etc's layer: %w", err)
	}
	if err := os.Chmod(upper, 0o755); err != nil {
		return fmt.Errorf("make /etc's layer: %w", err)
	}
	etc := filepath.Join(Root, "etc")
	if err := unix.Mount("overlay", etc, "overlay", unix.MS_NODEV|unix.MS_NOSUID, "lowerdir="+etc+",upperdir="+upper+",workdir="+work); err != nil {
		return fmt.Errorf("mount /etc: %w", err)
	}
	return mount("tmpfs", filepath.Join(Root, "tmp"), "tmpfs", unix.MS_NODEV|unix.MS_NOSUID, "mode=1777,size=25%")
}

func mount(source, target, kind string, flags uintptr, data string) error {
	if err := os.MkdirAll(target, 0o755); err != nil {
		return fmt.Errorf("mount %s: %w", target, err)
	}
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		return fmt.Errorf("mount %s: %w", target, err)
	}
	return nil
}
