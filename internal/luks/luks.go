// Package luks encrypts disk images and makes their detached LUKS2 headers.
//
// An encrypted image is nothing but ciphertext: AES-256-XTS over 4096-byte sectors,
// data from byte 0, no header. Its header exists apart from it, made fresh for each
// start of a VM around the same volume key with a new passphrase, because LUKS2
// headers are not authenticated and an old one would revive an old passphrase.
// Header makes one by the cryptsetup program, which needs neither root nor
// device-mapper for that; the volume key, the passphrase and the header itself pass
// in memory files and pipes. Inspect is the reader's side: it accepts only a header
// that Header could have made.
//
// A guest opens the pair by Unlock, which gives the volume key, and package devmapper's
// Crypt; or, the same thing slower, by
//
//	cryptsetup open --type luks2 --header HEADER --key-file - DEVICE NAME
//
// with exactly the passphrase's bytes on standard input.
package luks

import (
	"crypto/aes"
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

	"foothold/internal/secret"

	"golang.org/x/crypto/xts"
)

// What every header says and every image is encrypted with.
const (
	Cipher     = "aes-xts-plain64"
	KeySize    = 64   // bytes: two AES-256 keys
	SectorSize = 4096 // bytes
)

// ivUnit is what plain64 counts sectors in, in bytes: 512 whatever the sector size,
// since LUKS2 does not set dm-crypt's iv_large_sectors.
const ivUnit = 512

// chunk is how much is encrypted at a time, in bytes.
const chunk = 256 * SectorSize

// ErrSize is returned for an image that does not fill its last sector.
var ErrSize = errors.New("image size is not a multiple of 4096 bytes")

// NewKey makes a volume key.
func NewKey() secret.Bytes { return secret.Random(KeySize) }

// MACKey derives from a volume key the 32-byte key that authenticates its sectors,
// where they are (package devmapper, CryptAuthenticated): HKDF-SHA-256 (RFC 5869), no
// salt. The header holds the volume key alone.
func MACKey(volumeKey secret.Bytes) (secret.Bytes, error) {
	if volumeKey.Len() != KeySize {
		return secret.Bytes{}, fmt.Errorf("derive MAC key: volume key has %d bytes, want %d", volumeKey.Len(), KeySize)
	}
	key, err := hkdf.Key(sha256.New, volumeKey.Reveal(), nil, "foothold/volume-mac/v1", sha256.Size)
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("derive MAC key: %w", err)
	}
	return secret.New(key), nil
}

// Encrypt encrypts the image src to dst and returns its size. src must end at a
// sector's end.
func Encrypt(dst io.Writer, src io.Reader, key secret.Bytes) (int64, error) {
	return convert(dst, src, key, (*xts.Cipher).Encrypt)
}

// Decrypt is the inverse of Encrypt. Nothing authenticates the result: check it
// against a digest of the ciphertext or a verity root hash.
func Decrypt(dst io.Writer, src io.Reader, key secret.Bytes) (int64, error) {
	return convert(dst, src, key, (*xts.Cipher).Decrypt)
}

func convert(dst io.Writer, src io.Reader, key secret.Bytes, step func(*xts.Cipher, []byte, []byte, uint64)) (int64, error) {
	if key.Len() != KeySize {
		return 0, fmt.Errorf("volume key has %d bytes, want %d", key.Len(), KeySize)
	}
	c, err := xts.NewCipher(aes.NewCipher, key.Reveal())
	if err != nil {
		return 0, fmt.Errorf("set up cipher: %w", err)
	}
	buf := make([]byte, chunk)
	defer clear(buf)
	var done int64
	for {
		n, err := io.ReadFull(src, buf)
		if n%SectorSize != 0 {
			return done, ErrSize
		}
		for at := 0; at < n; at += SectorSize {
			sector := buf[at : at+SectorSize]
			step(c, sector, sector, uint64(done+int64(at))/ivUnit)
		}
		if _, err := dst.Write(buf[:n]); err != nil {
			return done, fmt.Errorf("write image: %w", err)
		}
		done += int64(n)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return done, nil
		}
		if err != nil {
			return done, fmt.Errorf("read image: %w", err)
		}
	}
}
