package devmapper

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"foothold/protocol/digest"
)

// block is the size of data and hash blocks, in bytes.
const block = 4096

// maxSalt is the longest salt that verity's superblock holds, in bytes.
const maxSalt = 256

// superblock is struct verity_sb of cryptsetup's lib/verity/verity.c, little-endian.
type superblock struct {
	Signature     [8]byte
	Version       uint32
	HashType      uint32
	UUID          [16]byte
	Algorithm     [32]byte
	DataBlockSize uint32
	HashBlockSize uint32
	DataBlocks    uint64
	SaltSize      uint16
	_             [6]byte
	Salt          [maxSalt]byte
}

// Verity opens a disk whose first hashOffset bytes are data and whose hash tree begins
// there with verity's superblock (dm-verity, table of
// admin-guide/device-mapper/verity). Only root counts: the superblock lies on the
// disk, gives no more than the salt, and with a false salt no block verifies.
func Verity(name, device string, root digest.SHA256, hashOffset int64) error {
	params, err := verityTable(device, root, hashOffset)
	if err == nil {
		err = create(name, "verity", uint64(hashOffset)/unit, params, true)
	}
	if err != nil {
		return fmt.Errorf("open %s as %s: %w", device, name, err)
	}
	return nil
}

func verityTable(device string, root digest.SHA256, hashOffset int64) ([]byte, error) {
	if root.IsZero() || hashOffset <= 0 || hashOffset%block != 0 {
		return nil, errors.New("no root hash, or data that does not end at a block's end")
	}
	size, err := deviceSize(device)
	if err != nil {
		return nil, err
	}
	if uint64(hashOffset)+block > size {
		return nil, errors.New("the disk ends before its hash tree")
	}
	f, err := os.Open(device)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data := make([]byte, block)
	if _, err := f.ReadAt(data, hashOffset); err != nil {
		return nil, fmt.Errorf("read superblock: %w", err)
	}
	salt, err := parseSuperblock(data, uint64(hashOffset)/block)
	if err != nil {
		return nil, err
	}
	blocks := hashOffset / block
	return fmt.Appendf(nil, "1 %s %s %d %d %d %d sha256 %s %x", device, device, block, block, blocks, blocks+1, root, salt), nil
}

// parseSuperblock returns the salt of a superblock that says exactly what a template's does.
func parseSuperblock(data []byte, blocks uint64) ([]byte, error) {
	var sb superblock
	if err := binary.Read(bytes.NewReader(data), binary.LittleEndian, &sb); err != nil {
		return nil, errors.New("superblock: too short")
	}
	switch {
	case sb.Signature != [8]byte{'v', 'e', 'r', 'i', 't', 'y'}:
		return nil, errors.New("superblock: not verity")
	case sb.Version != 1 || sb.HashType != 1 || sb.DataBlockSize != block || sb.HashBlockSize != block:
		return nil, errors.New("superblock: another version or block size")
	case string(bytes.TrimRight(sb.Algorithm[:], "\x00")) != "sha256":
		return nil, errors.New("superblock: another hash")
	case sb.DataBlocks != blocks:
		return nil, errors.New("superblock: another amount of data")
	case sb.SaltSize == 0 || sb.SaltSize > maxSalt:
		return nil, errors.New("superblock: no salt, or too long a one")
	}
	return sb.Salt[:sb.SaltSize], nil
}
