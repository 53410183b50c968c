package devmapper

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// veritySuperblock makes one by the veritysetup program.
func veritySuperblock(t *testing.T) []byte {
	t.Helper()
	path := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(path, make([]byte, 4*block), 0o600); err != nil {
		t.Fatal(err)
	}
	salt := "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"
	out, err := exec.Command("/usr/sbin/veritysetup", "format", "--salt="+salt, "--data-blocks=4", "--hash-offset=16384", path, path).CombinedOutput()
	if err != nil {
		t.Fatalf("veritysetup (package cryptsetup-bin): %v: %s", err, out)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data[4*block : 5*block]
}

func TestSuperblockOfVeritysetupIsRead(t *testing.T) {
	data := veritySuperblock(t)
	salt, err := parseSuperblock(data, 4)
	if err != nil || len(salt) != 32 || salt[0] != 0 || salt[1] != 0x11 {
		t.Fatalf("salt %x, %v", salt, err)
	}
	if _, err := parseSuperblock(data, 5); err == nil {
		t.Error("another amount of data is accepted")
	}
	for name, at := range map[string]int{"signature": 0, "version": 8, "hash type": 12, "algorithm": 32, "data block": 65, "hash block": 69, "blocks": 72} {
		bad := bytes.Clone(data)
		bad[at] ^= 1
		if _, err := parseSuperblock(bad, 4); err == nil {
			t.Errorf("another %s is accepted", name)
		}
	}
	for _, size := range []uint16{0, maxSalt + 1} {
		bad := bytes.Clone(data)
		binary.LittleEndian.PutUint16(bad[80:], size)
		if _, err := parseSuperblock(bad, 4); err == nil {
			t.Errorf("a salt of %d bytes is accepted", size)
		}
	}
}

func TestMessageLayout(t *testing.T) {
	m, err := newMessage("os", flagReadOnly)
	if err != nil {
		t.Fatal(err)
	}
	m.addTarget("verity", 32, []byte("1 2 3"))
	if len(m.buf) != headSize+48 || string(m.buf[offName:offName+3]) != "os\x00" {
		t.Errorf("%d bytes, name %q", len(m.buf), m.buf[offName:offName+3])
	}
	spec := m.buf[headSize:]
	if binary.NativeEndian.Uint64(spec) != 0 || binary.NativeEndian.Uint64(spec[8:]) != 32 || binary.NativeEndian.Uint32(spec[20:]) != 48 ||
		string(spec[24:31]) != "verity\x00" || string(spec[40:46]) != "1 2 3\x00" {
		t.Errorf("target %q", spec)
	}
	for _, name := range []string{"", "../x", "a b", "A"} {
		if _, err := newMessage(name, 0); err == nil {
			t.Errorf("name %q is accepted", name)
		}
	}
}

func FuzzSuperblock(f *testing.F) {
	f.Add(make([]byte, block), uint64(4))
	f.Fuzz(func(t *testing.T, data []byte, blocks uint64) { parseSuperblock(data, blocks) })
}

// integrityBlock is a superblock as the kernel's FormatIntegrity left one, in a disk of
// diskSectors.
const diskSectors = 1<<18 + 18000

func integrityBlock(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := binary.Write(&b, binary.LittleEndian, integritySuperblock{Magic: [8]byte{'i', 'n', 't', 'e', 'g', 'r', 't'}, Version: 4, LogInterleave: 15, TagSize: 32,
		JournalSections: 64, ProvidedSectors: 1 << 18, Flags: 8, LogSectorsPerUnit: 3, LogBitmap: 12}); err != nil {
		t.Fatal(err)
	}
	return append(b.Bytes(), make([]byte, block-b.Len())...)
}

func TestIntegritySuperblock(t *testing.T) {
	if n, err := parseIntegrity(integrityBlock(t), diskSectors); err != nil || n != 1<<18 {
		t.Fatalf("%d sectors, %v", n, err)
	}
	macs := integrityBlock(t)
	macs[24] |= 1
	if _, err := parseIntegrity(macs, diskSectors); err == nil {
		t.Error("a journal with MACs is accepted")
	}
	for name, at := range map[string]int{"magic": 0, "version": 8, "interleaving": 9, "tag size": 10, "journal": 12, "part of a block": 16, "recalculating": 24, "block size": 28, "bitmap": 29, "place to recalculate from": 32, "salt": 48} {
		bad := integrityBlock(t)
		bad[at] ^= 2
		if _, err := parseIntegrity(bad, diskSectors); err == nil {
			t.Errorf("another %s is accepted", name)
		}
	}
	for name, sectors := range map[string]uint64{"nothing": 0, "a block": 8, "half the disk": diskSectors / 16 * 8, "the whole disk": diskSectors, "more than the disk": 1 << 40} {
		bad := integrityBlock(t)
		binary.LittleEndian.PutUint64(bad[16:], sectors)
		if _, err := parseIntegrity(bad, diskSectors); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	if _, err := parseIntegrity(make([]byte, block), diskSectors); err == nil {
		t.Error("zeros are accepted")
	}
}

func FuzzIntegritySuperblock(f *testing.F) {
	f.Add(make([]byte, block), uint64(320))
	f.Fuzz(func(t *testing.T, data []byte, disk uint64) {
		if n, err := parseIntegrity(data, disk); err == nil && n >= disk {
			t.Errorf("%d of %d sectors", n, disk)
		}
	})
}
