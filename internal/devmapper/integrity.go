package devmapper

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// TagSize is how much is kept beside each block for the crypt device above, in bytes:
// one HMAC-SHA-256.
const TagSize = 32

// The layout, the same on every disk: a section of the journal is 32 entries of one
// block with its tag, 264 sectors (calculate_journal_section_size of the kernel's
// drivers/md/dm-integrity.c).
const (
	journalSections = 64
	journalSectors  = journalSections * 264 // of 512 bytes: 8.25 MiB
	logInterleave   = 15                    // runs of 2^15 sectors, each behind its tags
)

// integritySuperblock is struct superblock of drivers/md/dm-integrity.c, little-endian, as
// far as it is not zero.
type integritySuperblock struct {
	Magic             [8]byte
	Version           uint8
	LogInterleave     uint8
	TagSize           uint16
	JournalSections   uint32
	ProvidedSectors   uint64
	Flags             uint32
	LogSectorsPerUnit uint8
	LogBitmap         uint8
}

// What a superblock that FormatIntegrity had the kernel make says.
const (
	integrityVersion = 4 // with fix_padding
	flagFixedPadding = 1 << 3
	logSectors       = 3  // 2^3 sectors of 512 bytes are a block
	logBitmap        = 12 // the kernel's default; a disk with a journal has no bitmap
)

// FormatIntegrity makes a disk new for Integrity: whatever it held is lost. A crash leaves
// a disk that has to be formatted again.
func FormatIntegrity(name, device string) error {
	if err := formatIntegrity(name, device); err != nil {
		return fmt.Errorf("format %s for tags: %w", device, err)
	}
	return nil
}

func formatIntegrity(name, device string) error {
	if err := direct(device, os.O_RDWR, func(f *os.File, b []byte) error { _, err := f.WriteAt(b, 0); return err }); err != nil {
		return err
	}
	// The kernel writes a superblock where it finds zeros, for whatever length is asked.
	if err := create(name, "integrity", block/unit, integrityTable(device), false); err != nil {
		return err
	}
	return Remove(name)
}

// Integrity opens a disk that keeps a tag beside each 4096-byte block (dm-integrity,
// table of admin-guide/device-mapper/dm-integrity), for CryptAuthenticated above it. A
// journal makes block and tag change together. The disk's superblock is not
// authenticated; it is accepted only as FormatIntegrity makes it, down to the layout, and
// says no more than how large the device is, within a sixty-fourth of the disk. The kernel
// reads it again: a disk that answers two reads differently is beyond this check.
func Integrity(name, device string) error {
	size, err := deviceSize(device)
	if err != nil {
		return fmt.Errorf("open %s as %s: %w", device, name, err)
	}
	var sectors uint64
	err = direct(device, os.O_RDONLY, func(f *os.File, b []byte) error {
		if _, err := f.ReadAt(b, 0); err != nil {
			return err
		}
		sectors, err = parseIntegrity(b, size/unit)
		return err
	})
	if err == nil {
		err = create(name, "integrity", sectors, integrityTable(device), false)
	}
	if err != nil {
		return fmt.Errorf("open %s as %s: %w", device, name, err)
	}
	return nil
}

// integrityTable: from sector 0, tags that the device above makes, with a journal. The
// padding is what newer kernels make, the smaller one.
func integrityTable(device string) []byte {
	return fmt.Appendf(nil, "%s 0 %d J 4 block_size:%d fix_padding journal_sectors:%d interleave_sectors:%d", device, TagSize, block, journalSectors, 1<<logInterleave)
}

// parseIntegrity returns how many sectors of 512 bytes the superblock provides on a
// disk that has so many.
func parseIntegrity(data []byte, disk uint64) (uint64, error) {
	var sb integritySuperblock
	if err := binary.Read(bytes.NewReader(data), binary.LittleEndian, &sb); err != nil {
		return 0, errors.New("superblock: too short")
	}
	switch {
	case sb.Magic != [8]byte{'i', 'n', 't', 'e', 'g', 'r', 't'}:
		return 0, errors.New("superblock: not dm-integrity; the volume was not formatted, or its first block was overwritten")
	case sb.Version != integrityVersion || sb.Flags != flagFixedPadding:
		return 0, errors.New("superblock: another version or other features")
	case sb.TagSize != TagSize || sb.LogSectorsPerUnit != logSectors:
		return 0, errors.New("superblock: another size of tags or blocks")
	case sb.JournalSections != journalSections || sb.LogInterleave != logInterleave || sb.LogBitmap != logBitmap || len(bytes.Trim(data[binary.Size(sb):], "\x00")) != 0:
		return 0, errors.New("superblock: another layout")
	case sb.ProvidedSectors < leastProvided(disk) || sb.ProvidedSectors >= disk || sb.ProvidedSectors%(block/unit) != 0:
		return 0, errors.New("superblock: it provides more than the disk has or much less, or parts of a block")
	}
	return sb.ProvidedSectors, nil
}

// leastProvided is how much of a disk is for data at the least: all but the journal, a
// tag for each block, and the rounding of runs.
func leastProvided(disk uint64) uint64 {
	overhead := uint64(journalSectors) + disk/64
	if disk <= overhead {
		return 1
	}
	return disk - overhead
}

// direct hands f a page of zeros and the device, past its cache: the kernel's targets
// read and write beside it.
func direct(device string, mode int, f func(*os.File, []byte) error) error {
	file, err := os.OpenFile(device, mode|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	page, err := unix.Mmap(-1, 0, block, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		file.Close()
		return fmt.Errorf("map a page: %w", err)
	}
	defer unix.Munmap(page)
	return errors.Join(f(file, page), file.Close())
}
