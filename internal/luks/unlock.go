package luks

import (
	"crypto/aes"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"

	"foothold/internal/secret"

	"golang.org/x/crypto/pbkdf2"
	"golang.org/x/crypto/xts"
)

// ErrPassphrase is returned for a passphrase that does not open the header's key slot.
var ErrPassphrase = errors.New("passphrase does not open the disk header")

// Unlock checks a header as Check does and returns the volume key that the passphrase
// opens ("LUKS2 On-Disk Format Specification" 1.1, sections 3.2 and 4). It is what
// cryptsetup does, without its libraries; the header's digest proves the key.
func Unlock(header []byte, passphrase secret.Bytes) (secret.Bytes, error) {
	if err := Check(header); err != nil {
		return secret.Bytes{}, err
	}
	m, _, err := parse(header)
	if err != nil {
		return secret.Bytes{}, err
	}
	slot, dig := m.Keyslots["0"], m.Digests["0"]
	area, err := slot.area(header)
	if err != nil {
		return secret.Bytes{}, err
	}
	slotKey := pbkdf2.Key(passphrase.Reveal(), slot.KDF.Salt, slot.KDF.Iterations, slot.Area.KeySize, sha256.New)
	defer clear(slotKey)
	c, err := xts.NewCipher(aes.NewCipher, slotKey)
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("set up cipher of the key slot: %w", err)
	}
	split := make([]byte, len(area))
	defer clear(split)
	for at := 0; at < len(area); at += ivUnit {
		c.Decrypt(split[at:at+ivUnit], area[at:at+ivUnit], uint64(at/ivUnit))
	}
	key := merge(split, KeySize)
	sum := pbkdf2.Key(key, dig.Salt, dig.Iterations, len(dig.Digest), sha256.New)
	if subtle.ConstantTimeCompare(sum, dig.Digest) != 1 {
		clear(key)
		return secret.Bytes{}, ErrPassphrase
	}
	return secret.New(key), nil
}

// area is the slot's encrypted, split key inside the header.
func (s *keyslot) area(header []byte) ([]byte, error) {
	offset, err := strconv.ParseUint(s.Area.Offset, 10, 32)
	if err != nil {
		return nil, errors.New("disk header: malformed key slot offset")
	}
	size := uint64(s.AF.Stripes) * KeySize
	if offset < 2*metadataSize || offset+size > HeaderSize || size%ivUnit != 0 {
		return nil, errors.New("disk header: the key slot lies outside")
	}
	return header[offset : offset+size], nil
}

// merge undoes the anti-forensic split (LUKS1 On-Disk Format Specification 1.2.3,
// section 2.4) with SHA-256.
func merge(split []byte, size int) []byte {
	d := make([]byte, size)
	for at := 0; at < len(split); at += size {
		if at > 0 {
			diffuse(d)
		}
		subtle.XORBytes(d, d, split[at:at+size])
	}
	return d
}

// diffuse hashes each digest-sized part with its number.
func diffuse(d []byte) {
	var in [4 + sha256.Size]byte
	for i := 0; i*sha256.Size < len(d); i++ {
		part := d[i*sha256.Size : min((i+1)*sha256.Size, len(d))]
		binary.BigEndian.PutUint32(in[:], uint32(i))
		n := copy(in[4:], part)
		sum := sha256.Sum256(in[:4+n])
		copy(part, sum[:])
	}
}
