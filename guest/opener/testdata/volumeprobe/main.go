// Command volumeprobe is the first process of the volume's test: it opens /dev/vdb as
// /disk.json says, does what the kernel argument probe= names, says how that went on the
// console, and powers off.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"foothold/guest/facts"
	"foothold/guest/opener"
	"foothold/guest/pid1"
	"foothold/internal/devmapper"
	"foothold/internal/kmod"
	"foothold/protocol/audit"
	"foothold/protocol/unlockmsg"

	"golang.org/x/sys/unix"
)

const (
	mountpoint = "/volume"
	file       = mountpoint + "/data"
)

func main() {
	if err := probe(); err != nil {
		fmt.Println("PROBE failed:", err)
	}
	fmt.Println("PROBE done")
	pid1.PowerOff()
}

func probe() error {
	if err := pid1.Mount(); err != nil {
		return err
	}
	set, err := kmod.Open()
	if err != nil {
		return err
	}
	if err := set.LoadAll(); err != nil {
		return err
	}
	text, err := os.ReadFile("/disk.json")
	if err != nil {
		return err
	}
	var disk unlockmsg.Disk
	if err := json.Unmarshal(text, &disk); err != nil {
		return err
	}
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	if strings.Contains(string(cmdline), "probe=layout") {
		return layout()
	}
	if err := opener.OpenVolume(context.Background(), disk); err != nil {
		return fmt.Errorf("open: %w", err)
	}
	if err := report(); err != nil {
		return err
	}
	if err := errors.Join(os.Mkdir(mountpoint, 0o700), unix.Mount(opener.Volume, mountpoint, "ext4", 0, "")); err != nil {
		return fmt.Errorf("mount: %w", err)
	}
	switch {
	case strings.Contains(string(cmdline), "probe=fill"):
		err = fill()
	case strings.Contains(string(cmdline), "probe=commit"):
		err = commit()
	default:
		err = read()
	}
	return errors.Join(err, unix.Unmount(mountpoint, 0))
}

// report shows the disks as an audit would.
func report() error {
	var g facts.Gatherer
	r, err := g.Gather(audit.Initramfs, []byte("nonce"), facts.Initramfs())
	if err != nil {
		return err
	}
	text, err := json.Marshal(r.Disks)
	fmt.Printf("PROBE disks %s\n", text)
	return err
}

// block is one recognisable piece of the file.
func block(n int) []byte {
	sum := sha256.Sum256(fmt.Append(nil, n))
	return bytes.Repeat(sum[:], 64<<10/len(sum))
}

// fill writes until the volume is full, so that every part of it was written once.
func fill() error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	n := 0
	for err == nil {
		if _, err = f.Write(block(n)); err == nil {
			n++
		}
	}
	if !errors.Is(err, unix.ENOSPC) {
		return err
	}
	fmt.Printf("PROBE wrote %d\n", n)
	return errors.Join(f.Truncate(int64(n)*64<<10), f.Sync(), f.Close())
}

// layout has the kernel lay out the whole disk, and a second time by our superblock.
func layout() error {
	for _, isNew := range []bool{true, false} {
		if err := devmapper.Integrity("tags", "/dev/vdb", isNew); err != nil {
			return err
		}
		if err := errors.Join(devmapper.Remove("tags"), devmapper.Remove("tags-disk")); err != nil {
			return err
		}
	}
	fmt.Println("PROBE laid out")
	return nil
}

// pieces is what commit writes, of which the last at the least is in dm-integrity's journal alone
// when the power is cut; the test holds that against an empty journal.
const pieces = 16

// commit writes a file, has the disk confirm each piece, and cuts the power: no unmount, no
// sync.
func commit() error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	for n := range pieces {
		if _, err := f.Write(block(n)); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
	}
	fmt.Printf("PROBE wrote %d\nPROBE done\n", pieces)
	return unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// read compares what fill wrote.
func read() error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	good, noise, refused := 0, 0, 0
	buf := make([]byte, 64<<10)
	for n := 0; ; n++ {
		_, err := f.ReadAt(buf, int64(n)*64<<10)
		switch {
		case errors.Is(err, io.EOF):
			fmt.Printf("PROBE read good=%d noise=%d refused=%d\n", good, noise, refused)
			return nil
		case err != nil:
			refused++
		case bytes.Equal(buf, block(n)):
			good++
		default:
			noise++
		}
	}
}
