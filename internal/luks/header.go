package luks

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"strconv"

	"foothold/internal/command"
	"foothold/internal/secret"

	"golang.org/x/sys/unix"
)

// HeaderSize is a detached header's size in bytes: twice the metadata, and the key
// slots.
const HeaderSize = 2*metadataSize + keyslotsSize

const (
	metadataSize = 16 << 10  // bytes: the least that LUKS2 knows
	keyslotsSize = 512 << 10 // bytes: room for one slot of a 64-byte key (4000 stripes) and its alignment
)

// iterations of PBKDF2, the least that LUKS2 knows. Passphrases are 256 random bits:
// stretching adds nothing to them.
const iterations = 1000

// Header makes a fresh detached header around a volume key, with one key slot that
// the passphrase opens. size is that of the encrypted image in bytes.
func Header(ctx context.Context, size int64, volumeKey, passphrase secret.Bytes) ([]byte, error) {
	switch {
	case volumeKey.Len() != KeySize:
		return nil, fmt.Errorf("make disk header: volume key has %d bytes, want %d", volumeKey.Len(), KeySize)
	case passphrase.Len() < 32:
		return nil, fmt.Errorf("make disk header: passphrase has %d bytes, want 32 or more", passphrase.Len())
	case size <= 0 || size%SectorSize != 0:
		return nil, fmt.Errorf("make disk header: %w", ErrSize)
	}
	header, err := format(ctx, size, volumeKey, passphrase)
	if err != nil {
		return nil, fmt.Errorf("make disk header: %w", err)
	}
	if err := Check(header); err != nil {
		return nil, fmt.Errorf("make disk header: cryptsetup made another header than asked for: %w", err)
	}
	return header, nil
}

// format runs cryptsetup luksFormat on memory files: the header, a sparse stand-in
// for the disk, and the volume key are its files 3, 4 and 5.
func format(ctx context.Context, size int64, volumeKey, passphrase secret.Bytes) ([]byte, error) {
	var files []*os.File
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	for _, length := range []int64{HeaderSize, size, int64(volumeKey.Len())} {
		f, err := memFile(length)
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	if _, err := files[2].WriteAt(volumeKey.Reveal(), 0); err != nil {
		return nil, fmt.Errorf("pass volume key: %w", err)
	}
	cmd, err := command.New(ctx, "cryptsetup", "luksFormat", "--batch-mode", "--type", "luks2",
		"--header", "/dev/fd/3", "--volume-key-file", "/dev/fd/5", "--key-file", "-",
		"--cipher", Cipher, "--key-size", strconv.Itoa(8*KeySize), "--sector-size", strconv.Itoa(SectorSize), "--offset", "0",
		"--hash", "sha256", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", strconv.Itoa(iterations),
		"--luks2-metadata-size", strconv.Itoa(metadataSize), "--luks2-keyslots-size", strconv.Itoa(keyslotsSize),
		"/dev/fd/4")
	if err != nil {
		return nil, err
	}
	cmd.Stdin = bytes.NewReader(passphrase.Reveal())
	cmd.ExtraFiles = files
	if _, err := command.Wait(cmd); err != nil {
		return nil, err
	}
	header := make([]byte, HeaderSize)
	if _, err := io.ReadFull(io.NewSectionReader(files[0], 0, HeaderSize), header); err != nil {
		return nil, fmt.Errorf("read header: %w", err)
	}
	return header, nil
}

// memFile is a memory file of a length; its pages come into being when written.
func memFile(length int64) (*os.File, error) {
	fd, err := unix.MemfdCreate("luks", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make memory file: %w", err)
	}
	f := os.NewFile(uintptr(fd), "memory file")
	if err := f.Truncate(length); err != nil {
		f.Close()
		return nil, fmt.Errorf("size memory file: %w", err)
	}
	return f, nil
}
