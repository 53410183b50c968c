package facts

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"unsafe"

	"foothold/protocol/audit"

	"golang.org/x/sys/unix"
)

// disks lists block devices with their device-mapper tables.
func disks(r *audit.Report) error {
	entries, err := os.ReadDir("/sys/block")
	if err != nil {
		return err
	}
	for _, e := range entries {
		d, err := disk(e.Name())
		if err != nil {
			return fmt.Errorf("%s: %w", e.Name(), err)
		}
		r.Disks = append(r.Disks, d)
	}
	slices.SortFunc(r.Disks, func(a, b audit.Disk) int { return strings.Compare(a.Name, b.Name) })
	return nil
}

func disk(name string) (audit.Disk, error) {
	dir := filepath.Join("/sys/block", name)
	value := func(file string) (string, error) {
		data, err := os.ReadFile(filepath.Join(dir, file))
		return strings.TrimSpace(string(data)), err
	}
	d := audit.Disk{Name: name}
	var err error
	if d.Number, err = value("dev"); err != nil {
		return d, err
	}
	size, err := value("size")
	if err != nil {
		return d, err
	}
	sectors, err := strconv.ParseInt(size, 10, 64)
	if err != nil {
		return d, err
	}
	d.Size = sectors * 512 // sysfs counts units of 512 bytes whatever the sector size
	ro, err := value("ro")
	if err != nil {
		return d, err
	}
	d.ReadOnly = ro != "0"
	d.Mapped, err = value("dm/name")
	if os.IsNotExist(err) {
		return d, nil
	}
	if err == nil {
		d.Table, err = table(d.Mapped)
	}
	return d, err
}

// The device-mapper's ioctl interface (include/uapi/linux/dm-ioctl.h).
const (
	dmTableStatus = 0xc138fd0c // _IOWR(0xfd, 12, struct dm_ioctl)
	dmHeader      = 312        // bytes of struct dm_ioctl; offsets of its fields below
	dmDataSize    = 12
	dmDataStart   = 16
	dmTargets     = 20
	dmFlags       = 28
	dmName        = 48
	dmBuffer      = 64 << 10

	dmStatusTable = 1 << 4  // DM_STATUS_TABLE_FLAG: the table, not its status
	dmBufferFull  = 1 << 8  // DM_BUFFER_FULL_FLAG
	dmSecureData  = 1 << 15 // DM_SECURE_DATA_FLAG: wipe the kernel's copy
)

// table asks for a device's table; a crypt target's key is replaced by "-".
func table(name string) (string, error) {
	control, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer control.Close()
	buf := make([]byte, dmBuffer)
	defer clear(buf)
	binary.NativeEndian.PutUint32(buf[0:], 4) // version 4.0.0 suffices
	binary.NativeEndian.PutUint32(buf[dmDataSize:], dmBuffer)
	binary.NativeEndian.PutUint32(buf[dmDataStart:], dmHeader)
	binary.NativeEndian.PutUint32(buf[dmFlags:], dmStatusTable|dmSecureData)
	copy(buf[dmName:dmName+127], name)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), dmTableStatus, uintptr(unsafe.Pointer(&buf[0]))); errno != 0 {
		return "", fmt.Errorf("ask for the table of %s: %w", name, errno)
	}
	if binary.NativeEndian.Uint32(buf[dmFlags:])&dmBufferFull != 0 {
		return "", fmt.Errorf("the table of %s is too long", name)
	}
	return parseTable(buf)
}

// parseTable reads the answer: targets of struct dm_target_spec (start, length, status,
// next, type of 16 bytes), each followed by its parameters; next counts from the first.
func parseTable(buf []byte) (string, error) {
	const spec = 40
	start := binary.NativeEndian.Uint32(buf[dmDataStart:])
	if start > uint32(len(buf)) {
		return "", errors.New("malformed table")
	}
	data, at := buf[start:], uint32(0)
	var out []string
	for range binary.NativeEndian.Uint32(buf[dmTargets:]) {
		if at > uint32(len(data)) || len(data[at:]) < spec {
			return "", errors.New("malformed table")
		}
		t := data[at:]
		params, _, ok := bytes.Cut(t[spec:], []byte{0})
		if !ok {
			return "", errors.New("malformed table")
		}
		kind := text(t[24:spec])
		out = append(out, fmt.Sprintf("%d %d %s %s", binary.NativeEndian.Uint64(t), binary.NativeEndian.Uint64(t[8:]), kind, public(kind, string(params))))
		next := binary.NativeEndian.Uint32(t[20:])
		if next < at+spec { // it would go round
			return "", errors.New("malformed table")
		}
		at = next
	}
	return strings.Join(out, "\n"), nil
}

// public hides a crypt target's key, its second parameter (admin-guide/device-mapper/dm-crypt).
func public(kind, params string) string {
	if kind != "crypt" {
		return params
	}
	f := strings.Fields(params)
	if len(f) < 2 {
		return "-"
	}
	f[1] = "-"
	return strings.Join(f, " ")
}
