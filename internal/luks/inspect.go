package luks

import (
	"bytes"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/binary"
	"errors"
	"fmt"

	"foothold/internal/strictjson"
)

// Layout of the binary header, "LUKS2 On-Disk Format Specification" 1.1, section 2.1.
const (
	binarySize   = 4096 // bytes before the JSON area
	offVersion   = 6
	offSize      = 8
	offSequence  = 16
	offAlgorithm = 72
	offSalt      = 104
	offUUID      = 168
	offOffset    = 256
	offSum       = 448
	sumSize      = 64
)

var (
	magicFirst  = []byte("LUKS\xba\xbe")
	magicSecond = []byte("SKUL\xba\xbe")
)

// Params is what a header says.
type Params struct {
	UUID       string
	Cipher     string
	KeySize    int // bytes
	SectorSize int // bytes
	Offset     string
	KDF        string
	Iterations int
	SlotCipher string
}

// metadata is the JSON area (section 3), with exactly the fields that Header's
// headers have: tokens, requirements, flags, integrity and further slots are unknown
// fields or counts and refused.
type metadata struct {
	Keyslots map[string]keyslot    `json:"keyslots"`
	Tokens   map[string]struct{}   `json:"tokens"`
	Segments map[string]segment    `json:"segments"`
	Digests  map[string]slotDigest `json:"digests"`
	Config   struct {
		JSONSize     string `json:"json_size"`
		KeyslotsSize string `json:"keyslots_size"`
	} `json:"config"`
}

type keyslot struct {
	Type    string `json:"type"`
	KeySize int    `json:"key_size"`
	AF      struct {
		Type    string `json:"type"`
		Stripes int    `json:"stripes"`
		Hash    string `json:"hash"`
	} `json:"af"`
	Area struct {
		Type       string `json:"type"`
		Offset     string `json:"offset"`
		Size       string `json:"size"`
		Encryption string `json:"encryption"`
		KeySize    int    `json:"key_size"`
	} `json:"area"`
	KDF struct {
		Type       string `json:"type"`
		Hash       string `json:"hash"`
		Iterations int    `json:"iterations"`
		Salt       []byte `json:"salt"`
	} `json:"kdf"`
}

type segment struct {
	Type       string `json:"type"`
	Offset     string `json:"offset"`
	Size       string `json:"size"`
	IVTweak    string `json:"iv_tweak"`
	Encryption string `json:"encryption"`
	SectorSize int    `json:"sector_size"`
}

type slotDigest struct {
	Type       string   `json:"type"`
	Keyslots   []string `json:"keyslots"`
	Segments   []string `json:"segments"`
	Hash       string   `json:"hash"`
	Iterations int      `json:"iterations"`
	Salt       []byte   `json:"salt"`
	Digest     []byte   `json:"digest"`
}

// Check accepts a header only if it is of the one kind that Header makes: our cipher,
// key size, sector size and offset, one key slot, nothing besides.
func Check(header []byte) error {
	p, err := Inspect(header)
	if err != nil {
		return err
	}
	want := Params{UUID: p.UUID, Cipher: Cipher, KeySize: KeySize, SectorSize: SectorSize, Offset: "0",
		KDF: "pbkdf2-sha256", Iterations: iterations, SlotCipher: Cipher}
	if p != want {
		return fmt.Errorf("disk header says %+v, want %+v", p, want)
	}
	return nil
}

// Inspect reads a header strictly: both copies whole, equal and with good checksums,
// one key slot, one segment over the whole disk, no token, no flag.
func Inspect(header []byte) (Params, error) {
	m, uuid, err := parse(header)
	if err != nil {
		return Params{}, err
	}
	return m.params(uuid)
}

// parse reads both copies and returns the metadata that they agree on, and the UUID.
func parse(header []byte) (*metadata, string, error) {
	if len(header) != HeaderSize {
		return nil, "", fmt.Errorf("disk header has %d bytes, want %d", len(header), HeaderSize)
	}
	first, err := area(header[:metadataSize], magicFirst, 0)
	if err != nil {
		return nil, "", fmt.Errorf("disk header: %w", err)
	}
	second, err := area(header[metadataSize:2*metadataSize], magicSecond, metadataSize)
	if err != nil {
		return nil, "", fmt.Errorf("disk header's second copy: %w", err)
	}
	if !bytes.Equal(first, second) || !bytes.Equal(header[offSequence:offSequence+8], header[metadataSize+offSequence:metadataSize+offSequence+8]) {
		return nil, "", errors.New("disk header: its two copies differ")
	}
	m := &metadata{}
	if err := strictjson.Unmarshal(first, m); err != nil {
		return nil, "", fmt.Errorf("disk header's metadata: %w", err)
	}
	uuid, _, _ := bytes.Cut(header[offUUID:offUUID+40], []byte{0})
	return m, string(uuid), nil
}

// area checks one copy and returns its JSON.
func area(data, magic []byte, offset uint64) ([]byte, error) {
	switch {
	case !bytes.HasPrefix(data, magic):
		return nil, errors.New("not LUKS")
	case binary.BigEndian.Uint16(data[offVersion:]) != 2:
		return nil, errors.New("not LUKS2")
	case binary.BigEndian.Uint64(data[offSize:]) != metadataSize:
		return nil, errors.New("wrong metadata size")
	case binary.BigEndian.Uint64(data[offOffset:]) != offset:
		return nil, errors.New("wrong place")
	case string(bytes.TrimRight(data[offAlgorithm:offAlgorithm+32], "\x00")) != "sha256":
		return nil, errors.New("wrong checksum algorithm")
	}
	h := sha256.New()
	h.Write(data[:offSum])
	h.Write(make([]byte, sumSize))
	h.Write(data[offSum+sumSize:])
	if subtle.ConstantTimeCompare(h.Sum(nil), data[offSum:offSum+sha256.Size]) != 1 {
		return nil, errors.New("wrong checksum")
	}
	text, rest, _ := bytes.Cut(data[binarySize:], []byte{0})
	if len(bytes.Trim(rest, "\x00")) != 0 {
		return nil, errors.New("data behind the metadata")
	}
	return text, nil
}

// params checks the parts that have one good form and returns the rest.
func (m *metadata) params(uuid string) (Params, error) {
	slot, oneSlot := m.Keyslots["0"]
	seg, oneSegment := m.Segments["0"]
	dig, oneDigest := m.Digests["0"]
	bad := func(what string) (Params, error) { return Params{}, errors.New("disk header: " + what) }
	switch {
	case len(m.Keyslots) != 1 || !oneSlot:
		return bad("want one key slot, number 0")
	case len(m.Segments) != 1 || !oneSegment || seg.Type != "crypt" || seg.Size != "dynamic" || seg.IVTweak != "0":
		return bad("want one segment, encrypted, over the whole disk")
	case len(m.Digests) != 1 || !oneDigest || dig.Type != "pbkdf2" || dig.Hash != "sha256" || dig.Iterations != iterations || len(dig.Digest) != sha256.Size ||
		len(dig.Keyslots) != 1 || dig.Keyslots[0] != "0" || len(dig.Segments) != 1 || dig.Segments[0] != "0":
		return bad("want one digest, of the key slot and the segment")
	case len(m.Tokens) != 0:
		return bad("want no token")
	case slot.Type != "luks2" || slot.AF.Type != "luks1" || slot.AF.Hash != "sha256" || slot.AF.Stripes != 4000 ||
		slot.Area.Type != "raw" || slot.Area.KeySize != KeySize || slot.KDF.Type != "pbkdf2":
		return bad("want a plain passphrase slot")
	}
	return Params{UUID: uuid, Cipher: seg.Encryption, KeySize: slot.KeySize, SectorSize: seg.SectorSize, Offset: seg.Offset,
		KDF: slot.KDF.Type + "-" + slot.KDF.Hash, Iterations: slot.KDF.Iterations, SlotCipher: slot.Area.Encryption}, nil
}
