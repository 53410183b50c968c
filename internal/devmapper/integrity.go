package devmapper

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// TagSize is how much is kept beside each block for the crypt device above, in bytes:
// one HMAC-SHA-256.
const TagSize = 32

// The layout, the same on every disk (drivers/md/dm-integrity.c of the kernel): the
// superblock, the journal, then runs of data, each behind its tags. A section of the
// journal is 32 entries of one block with its tag, 264 sectors
// (calculate_journal_section_size). Counts are of sectors of 512 bytes.
const (
	superblockSectors = block / unit
	journalSections   = 64
	journalSectors    = journalSections * 264 // 8.25 MiB
	logInterleave     = 15                    // runs of 2^15 sectors
	runSectors        = 1 << logInterleave
	tagSectors        = runSectors / (block / unit) * TagSize / unit // of one run
)

// What the superblock says besides.
const (
	integrityVersion = 4 // with fix_padding
	flagFixedPadding = 1 << 3
	logSectors       = 3  // 2^3 sectors of 512 bytes are a block
	logBitmap        = 12 // the kernel's default; a disk with a journal has no bitmap
)

// memory is the RAM disk (module brd) that the superblock lies on. It is the only one, and as
// large as that.
const memory = "/dev/ram0"

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

// Integrity opens a disk that keeps a tag beside each 4096-byte block (dm-integrity,
// table of admin-guide/device-mapper/dm-integrity), for CryptAuthenticated above it. A
// journal makes block and tag change together.
//
// Nothing authenticates dm-integrity's superblock, and the kernel does as it says. It
// therefore lies in memory, made from this package's constants and the disk's size
// at every start: the disk's own first block is neither read nor written. Where isNew, the
// kernel makes the superblock, an empty journal with it, and whatever the disk held is lost;
// a kernel that makes another superblock than ours is refused. A crash while that
// happens leaves a disk that has to be made new again.
func Integrity(name, device string, isNew bool) error {
	if err := openIntegrity(name, device, isNew); err != nil {
		return fmt.Errorf("open %s as %s: %w", device, name, err)
	}
	return nil
}

func openIntegrity(name, device string, isNew bool) (err error) {
	size, err := deviceSize(device)
	if err != nil {
		return err
	}
	sectors, superblock, err := integrityLayout(size / unit)
	if err != nil {
		return err
	}
	first := superblock
	if isNew {
		first = make([]byte, block) // the kernel makes one, and empties the journal, where it finds zeros
	}
	if err := writeMemory(first); err != nil {
		return err
	}
	base := name + "-disk"
	if err := createTable(base, baseTable(device, size/unit), false); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, Remove(base))
		}
	}()
	if err := create(name, "integrity", sectors, integrityTable(filepath.Join(Dir, base)), false); err != nil {
		return err
	}
	if err := checkMemory(superblock); err != nil {
		return errors.Join(err, Remove(name))
	}
	return nil
}

// baseTable is the disk with its first block in memory.
func baseTable(device string, sectors uint64) []target {
	return []target{
		{"linear", 0, superblockSectors, fmt.Appendf(nil, "%s 0", memory)},
		{"linear", superblockSectors, sectors - superblockSectors, fmt.Appendf(nil, "%s %d", device, superblockSectors)},
	}
}

// integrityTable: from sector 0, tags that the device above makes, with a journal. The
// padding is what newer kernels make, the smaller one.
func integrityTable(device string) []byte {
	return fmt.Appendf(nil, "%s 0 %d J 4 block_size:%d fix_padding journal_sectors:%d interleave_sectors:%d", device, TagSize, block, journalSectors, runSectors)
}

// integrityLayout returns how many sectors a disk of so many provides for data, and its
// superblock: as many whole blocks as find room behind the journal, with the tags of each
// begun run (calculate_device_limits).
func integrityLayout(disk uint64) (provided uint64, superblock []byte, err error) {
	if disk > superblockSectors+journalSectors {
		room := disk - superblockSectors - journalSectors
		provided = room / (tagSectors + runSectors) * runSectors
		if rest := room % (tagSectors + runSectors); rest > tagSectors {
			provided += (rest - tagSectors) / (block / unit) * (block / unit)
		}
	}
	if provided == 0 {
		return 0, nil, fmt.Errorf("%d sectors are too few for journal and tags", disk)
	}
	superblock, err = binary.Append(nil, binary.LittleEndian, integritySuperblock{
		Magic: [8]byte{'i', 'n', 't', 'e', 'g', 'r', 't'}, Version: integrityVersion, LogInterleave: logInterleave, TagSize: TagSize,
		JournalSections: journalSections, ProvidedSectors: provided, Flags: flagFixedPadding, LogSectorsPerUnit: logSectors, LogBitmap: logBitmap,
	})
	return provided, append(superblock, make([]byte, block-len(superblock))...), err
}

// writeMemory fills the RAM disk, which has to hold exactly one superblock: a larger one is
// not the one that the tenant's audit expects.
func writeMemory(superblock []byte) error {
	size, err := deviceSize(memory)
	if err != nil {
		return fmt.Errorf("RAM disk (module brd): %w", err)
	}
	if size != uint64(len(superblock)) {
		return fmt.Errorf("RAM disk %s has %d bytes, want %d", memory, size, len(superblock))
	}
	return direct(memory, os.O_WRONLY, func(f *os.File, page []byte) error {
		copy(page, superblock)
		_, err := f.WriteAt(page, 0)
		return err
	})
}

// checkMemory holds the superblock that the kernel works by against ours.
func checkMemory(superblock []byte) error {
	return direct(memory, os.O_RDONLY, func(f *os.File, page []byte) error {
		if _, err := f.ReadAt(page, 0); err != nil {
			return err
		}
		return sameSuperblock(page, superblock)
	})
}

func sameSuperblock(kernels, ours []byte) error {
	if !bytes.Equal(kernels, ours) {
		return errors.New("superblock: this kernel's dm-integrity lays the disk out otherwise than this program; integrityLayout has to learn the kernel's layout first")
	}
	return nil
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
