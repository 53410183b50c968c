// Package devmapper makes device-mapper devices by the kernel's own interface
// (include/uapi/linux/dm-ioctl.h), without libdevmapper, udev or any program: the
// decrypted and the verified disks of a VM.
//
// A device NAME appears as /dev/mapper/NAME. The key of a crypt device exists in this
// process's buffer and in the kernel, and the kernel wipes its copy of the message.
package devmapper

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"unsafe"

	"foothold/internal/secret"

	"golang.org/x/sys/unix"
)

// Dir is where devices appear.
const Dir = "/dev/mapper"

// Commands of /dev/mapper/control, _IOWR(0xfd, n, struct dm_ioctl).
const (
	devCreate  = 0xc138fd03
	devRemove  = 0xc138fd04
	devSuspend = 0xc138fd06 // without the suspend flag: resume, which makes a loaded table live
	tableLoad  = 0xc138fd09
)

// Layout of struct dm_ioctl and struct dm_target_spec, offsets in bytes.
const (
	headSize   = 312
	offSize    = 12
	offStart   = 16
	offTargets = 20
	offFlags   = 28
	offDev     = 40
	offName    = 48

	specSize   = 40
	offLength  = 8
	offNext    = 20
	offType    = 24
	typeLength = 16
)

const (
	flagReadOnly = 1 << 0
	flagSecure   = 1 << 15 // wipe the message
)

// unit is what tables count in, in bytes, whatever the disk's sector size.
const unit = 512

var validName = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,62}$`)

// Crypt opens a disk that package luks encrypted (dm-crypt, table of
// admin-guide/device-mapper/dm-crypt): the whole of device, in 4096-byte sectors.
func Crypt(name, device string, key secret.Bytes, readOnly bool) error {
	return crypt(name, device, "aes-xts-plain64", "2 sector_size:4096 no_read_workqueue", readOnly, key)
}

// CryptAuthenticated opens a device of Integrity's, or a new one: encrypted as by
// Crypt, each sector with its number under HMAC-SHA-256 by the 32-byte key mac. A sector
// that was altered, moved or never written is an I/O error to whoever reads it; that an
// older state of a sector came back with its tag is not seen.
func CryptAuthenticated(name, device string, key, mac secret.Bytes) error {
	// The kernel takes the one key apart: encryption first (crypt_copy_authenckey of
	// drivers/md/dm-crypt.c).
	return crypt(name, device, "capi:authenc(hmac(sha256),xts(aes))-plain64", fmt.Sprintf("2 integrity:%d:aead sector_size:4096", TagSize), false, key, mac)
}

func crypt(name, device, cipher, options string, readOnly bool, keys ...secret.Bytes) error {
	size, err := deviceSize(device)
	if err != nil {
		return fmt.Errorf("open %s as %s: %w", device, name, err)
	}
	params := make([]byte, 0, 512)
	defer func() { clear(params[:cap(params)]) }()
	params = append(params, cipher+" "...)
	for _, key := range keys {
		params = hex.AppendEncode(params, key.Reveal())
	}
	params = fmt.Appendf(params, " 0 %s 0 %s", device, options)
	if err := create(name, "crypt", size/unit, params, readOnly); err != nil {
		return fmt.Errorf("open %s as %s: %w", device, name, err)
	}
	return nil
}

// Remove removes a device that nothing uses.
func Remove(name string) error {
	m, err := newMessage(name, 0)
	if err != nil {
		return err
	}
	if err := m.send(devRemove); err != nil {
		return fmt.Errorf("remove device %s: %w", name, err)
	}
	if err := os.Remove(filepath.Join(Dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove device %s: %w", name, err)
	}
	return nil
}

// target is one target of a table, over length units from start.
type target struct {
	kind          string
	start, length uint64
	params        []byte
}

// create makes a device of one target over length units, and its node.
func create(name, kind string, length uint64, params []byte, readOnly bool) error {
	return createTable(name, []target{{kind, 0, length, params}}, readOnly)
}

// createTable makes a device of targets that follow each other, and its node. Where a later
// step fails the device is removed again.
func createTable(name string, table []target, readOnly bool) (err error) {
	var flags uint32 = flagSecure
	if readOnly {
		flags |= flagReadOnly
	}
	m, err := newMessage(name, flags)
	if err != nil {
		return err
	}
	if err := m.send(devCreate); err != nil {
		return fmt.Errorf("create device: %w", err)
	}
	dev := binary.NativeEndian.Uint64(m.buf[offDev:])
	defer func() {
		if err != nil {
			err = errors.Join(err, Remove(name))
		}
	}()
	load, err := newMessage(name, flags)
	if err != nil {
		return err
	}
	for _, t := range table {
		load.addTarget(t)
	}
	defer clear(load.buf)
	if err := load.send(tableLoad); err != nil {
		return fmt.Errorf("load %s table: %w", table[0].kind, err)
	}
	resume, err := newMessage(name, flags)
	if err != nil {
		return err
	}
	if err := resume.send(devSuspend); err != nil {
		return fmt.Errorf("start device: %w", err)
	}
	if err := unix.Mknod(filepath.Join(Dir, name), unix.S_IFBLK|0o600, int(dev)); err != nil {
		return fmt.Errorf("make device node: %w", err)
	}
	return nil
}

// message is a struct dm_ioctl with what follows it.
type message struct{ buf []byte }

func newMessage(name string, flags uint32) (*message, error) {
	if !validName.MatchString(name) {
		return nil, fmt.Errorf("device name %q", name)
	}
	m := &message{buf: make([]byte, headSize)}
	binary.NativeEndian.PutUint32(m.buf, 4) // version 4.0.0: nothing newer is used
	binary.NativeEndian.PutUint32(m.buf[offStart:], headSize)
	binary.NativeEndian.PutUint32(m.buf[offFlags:], flags)
	copy(m.buf[offName:], name)
	return m, nil
}

// addTarget appends a target, its parameters ended by a zero and padded to eight.
func (m *message) addTarget(t target) {
	size := (specSize + len(t.params) + 1 + 7) / 8 * 8
	buf := make([]byte, len(m.buf)+size)
	copy(buf, m.buf)
	spec := buf[len(m.buf):]
	clear(m.buf) // a key may be in it
	binary.NativeEndian.PutUint64(spec, t.start)
	binary.NativeEndian.PutUint64(spec[offLength:], t.length)
	binary.NativeEndian.PutUint32(spec[offNext:], uint32(size))
	copy(spec[offType:offType+typeLength-1], t.kind)
	copy(spec[specSize:], t.params)
	binary.NativeEndian.PutUint32(buf[offTargets:], binary.NativeEndian.Uint32(buf[offTargets:])+1)
	m.buf = buf
}

func (m *message) send(command uintptr) error {
	control, err := os.OpenFile(filepath.Join(Dir, "control"), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer control.Close()
	binary.NativeEndian.PutUint32(m.buf[offSize:], uint32(len(m.buf)))
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), command, uintptr(unsafe.Pointer(&m.buf[0]))); errno != 0 {
		return errno
	}
	return nil
}

// deviceSize is a block device's size in bytes.
func deviceSize(device string) (uint64, error) {
	if !strings.HasPrefix(device, "/dev/") || strings.ContainsAny(device, " \t\n") {
		return 0, fmt.Errorf("device %q", device)
	}
	f, err := os.Open(device)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var size uint64
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&size))); errno != 0 {
		return 0, fmt.Errorf("ask for the size of %s: %w", device, errno)
	}
	return size, nil
}
