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
//	/var /home /root /srv  the volume: ext4 on dm-crypt (on dm-integrity, if ordered) on vdb
//	/tmp                 tmpfs
package opener

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"

	"foothold/internal/command"
	"foothold/internal/devmapper"
	"foothold/internal/luks"
	"foothold/internal/secret"
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
	tagsName     = "tags" // of an authenticated volume, below it
)

// volumeDirs are the folders of the volume and their modes.
var volumeDirs = []struct {
	name string
	mode os.FileMode
}{{"var", 0o755}, {"home", 0o755}, {"root", 0o700}, {"srv", 0o755}}

// Volume is the opened volume.
var Volume = mapped(volumeName)

// Sizes that format asks for and clearForFormat knows: ext4's own defaults.
const (
	fsBlock = 4096  // bytes
	fsGroup = 32768 // blocks
)

var deviceForm = regexp.MustCompile(`^vd[ab]$`)

// Check refuses a handover whose disks are not what this VM has or this program opens.
func Check(h *unlockmsg.Handover) error {
	if h.Template.Device != "vda" || h.Volume.Device != "vdb" {
		return event.Refuse(event.DiskRefused, "the handover names other disks")
	}
	if h.Template.Format || h.Template.Authenticated {
		return event.Refuse(event.DiskRefused, "the handover orders the template to be formatted, or to have tags")
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
	if err := OpenVolume(ctx, h.Volume); err != nil {
		return event.Refuse(event.DiskRefused, "volume: %v", err)
	}
	if h.Volume.Format {
		say("volume formatted")
	}
	if err := bindVolume(h.Volume.Format); err != nil {
		return event.Refuse(event.DiskRefused, "volume: %v", err)
	}
	say("volume open")
	return memoryLayers()
}

func mapped(name string) string { return filepath.Join(devmapper.Dir, name) }

// OpenVolume opens the VM's own volume as [Volume], and makes a file system on it if
// that is ordered.
func OpenVolume(ctx context.Context, d unlockmsg.Disk) error {
	if !d.Authenticated {
		if err := crypt(d, volumeName, false); err != nil {
			return err
		}
	} else if err := authenticated(d); err != nil {
		return err
	}
	if !d.Format {
		return nil
	}
	if d.Authenticated {
		if err := clearForFormat(Volume); err != nil {
			return err
		}
	}
	return format(ctx, d.Authenticated)
}

// crypt opens one disk. The volume key exists for the time of one call to the kernel.
func crypt(d unlockmsg.Disk, name string, readOnly bool) error {
	key, err := volumeKey(d)
	if err != nil {
		return err
	}
	defer key.Wipe()
	return devmapper.Crypt(name, "/dev/"+d.Device, key, readOnly)
}

func volumeKey(d unlockmsg.Disk) (secret.Bytes, error) {
	if !deviceForm.MatchString(d.Device) {
		return secret.Bytes{}, errors.New("unknown device")
	}
	return luks.Unlock(d.Header, d.Passphrase)
}

// authenticated opens a volume with tags.
func authenticated(d unlockmsg.Disk) error {
	key, err := volumeKey(d)
	if err != nil {
		return err
	}
	defer key.Wipe()
	mac, err := luks.MACKey(key)
	if err != nil {
		return err
	}
	defer mac.Wipe()
	if err := devmapper.Integrity(tagsName, "/dev/"+d.Device, d.Format); err != nil {
		return err
	}
	return devmapper.CryptAuthenticated(volumeName, mapped(tagsName), key, mac)
}

// verity opens the template's content under the pinned root hash; a block that does
// not fit is an I/O error to whoever reads it.
func verity(v unlockmsg.Verity) error {
	return devmapper.Verity(rootName, mapped(templateName), v.RootHash, v.HashOffset)
}

// format makes the file system. What it leaves for later is cheap where any sector can be
// read; a sector with a tag has to be written before.
func format(ctx context.Context, authenticated bool) error {
	lazy := "1"
	if authenticated {
		lazy = "0"
	}
	return command.Run(ctx, "mkfs.ext4", "-q", "-m", "0", "-b", strconv.Itoa(fsBlock), "-g", strconv.Itoa(fsGroup),
		"-E", "nodiscard,lazy_itable_init="+lazy+",lazy_journal_init="+lazy, Volume)
}

// bindVolume puts the volume's folders over the template's, which fill a new one's. A
// volume that is not new has them, or is not the one that this VM left: a provider that
// puts an older state back gets no machine that starts afresh. The volume itself is
// mounted nowhere afterwards.
func bindVolume(isNew bool) error {
	if err := mount(Volume, staging, "ext4", unix.MS_NODEV|unix.MS_NOSUID, ""); err != nil {
		return err
	}
	for _, d := range volumeDirs {
		from, to := filepath.Join(staging, d.name), filepath.Join(Root, d.name)
		if err := provide(to, from, d.mode, isNew); err != nil {
			return fmt.Errorf("/%s of the volume: %w", d.name, err)
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

// provide fills a folder of a new volume from the template's, and refuses an older volume
// that lacks it.
func provide(template, volume string, mode os.FileMode, isNew bool) error {
	if isNew {
		return populate(template, volume, mode)
	}
	info, err := os.Lstat(volume)
	if err == nil && !info.IsDir() {
		err = errors.New("it is no folder")
	}
	return err
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
