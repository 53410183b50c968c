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
	m.addTarget(target{"verity", 0, 32, []byte("1 2 3")})
	if len(m.buf) != headSize+48 || string(m.buf[offName:offName+3]) != "os\x00" {
		t.Errorf("%d bytes, name %q", len(m.buf), m.buf[offName:offName+3])
	}
	spec := m.buf[headSize:]
	if binary.NativeEndian.Uint64(spec) != 0 || binary.NativeEndian.Uint64(spec[8:]) != 32 || binary.NativeEndian.Uint32(spec[20:]) != 48 ||
		string(spec[24:31]) != "verity\x00" || string(spec[40:46]) != "1 2 3\x00" {
		t.Errorf("target %q", spec)
	}
	m.addTarget(target{"linear", 32, 8, []byte("4 5")})
	spec = m.buf[headSize+48:]
	if len(spec) != 48 || binary.NativeEndian.Uint64(spec) != 32 || string(spec[24:31]) != "linear\x00" || string(spec[40:44]) != "4 5\x00" ||
		binary.NativeEndian.Uint32(m.buf[offTargets:]) != 2 || string(m.buf[headSize+40:headSize+46]) != "1 2 3\x00" {
		t.Errorf("two targets %q", m.buf[headSize:])
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

// TestIntegrityLayout is about the edges; guest/opener.TestSuperblockIsTheKernels compares with the
// kernel's own.
func TestIntegrityLayout(t *testing.T) {
	for disk, want := range map[uint64]uint64{
		16904 + 256 + 8:           8,
		16904 + 256 + 15:          8,
		16904 + 256 + 1<<15:       1 << 15,
		16904 + 256 + 1<<15 + 263: 1 << 15,
		16904 + 512 + 1<<15 + 8:   1<<15 + 8,
	} {
		n, superblock, err := integrityLayout(disk)
		if err != nil || n != want || len(superblock) != block || binary.LittleEndian.Uint64(superblock[16:]) != want {
			t.Errorf("disk of %d sectors: %d for data, %v; want %d", disk, n, err, want)
		}
	}
	for _, disk := range []uint64{0, 8, 16904, 16904 + 256, 16904 + 256 + 7} {
		if n, _, err := integrityLayout(disk); err == nil {
			t.Errorf("a disk of %d sectors has %d for data", disk, n)
		}
	}
}

// TestAnotherSuperblockIsRefused: one bit anywhere in the block.
func TestAnotherSuperblockIsRefused(t *testing.T) {
	_, ours, err := integrityLayout(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	if err := sameSuperblock(bytes.Clone(ours), ours); err != nil {
		t.Error(err)
	}
	for at := range ours {
		kernels := bytes.Clone(ours)
		kernels[at] ^= 2
		if sameSuperblock(kernels, ours) == nil {
			t.Errorf("another byte %d is accepted", at)
		}
	}
	if sameSuperblock(make([]byte, block), ours) == nil {
		t.Error("zeros are accepted")
	}
}

// TestIntegrityTakesNothingFromTheFirstBlock: no target maps it.
func TestIntegrityTakesNothingFromTheFirstBlock(t *testing.T) {
	table := baseTable("/dev/vdb", 1000)
	if len(table) != 2 || table[0].start != 0 || table[0].length != 8 || string(table[0].params) != "/dev/ram0 0" ||
		table[1].start != 8 || table[1].length != 992 || string(table[1].params) != "/dev/vdb 8" {
		t.Errorf("table %+v", table)
	}
}
