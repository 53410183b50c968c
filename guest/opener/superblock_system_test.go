//go:build system

package opener_test

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"foothold/protocol/unlockmsg"
)

// What of an authenticated volume's disk is not data, in bytes.
const (
	superblockEnd = 4096
	journalEnd    = superblockEnd + 64*264*512
)

// committed is how many pieces the probe had the disk confirm.
const committed = 16

// overwrite puts data on the volume's disk, as its provider could.
func (m *machine) overwrite(at int64, data []byte) {
	m.t.Helper()
	f, err := os.OpenFile(m.image, os.O_WRONLY, 0)
	if err != nil {
		m.t.Fatal(err)
	}
	if _, err := f.WriteAt(data, at); err != nil {
		m.t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		m.t.Fatal(err)
	}
}

// emptyJournal is what the kernel makes on a new disk.
func emptyJournal(t *testing.T) []byte {
	t.Helper()
	m := newMachine(t)
	if console := m.start("layout", unlockmsg.Disk{Authenticated: true}); !strings.Contains(console, "PROBE laid out\n") {
		t.Fatal("no new journal")
	}
	data, err := os.ReadFile(m.image)
	if err != nil {
		t.Fatal(err)
	}
	return data[superblockEnd:journalEnd]
}

// firstBlock is what lies where the superblock would.
func (m *machine) firstBlock() []byte {
	m.t.Helper()
	f, err := os.Open(m.image)
	if err != nil {
		m.t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, superblockEnd)
	if _, err := f.ReadAt(b, 0); err != nil {
		m.t.Fatal(err)
	}
	return b
}

// copied is a second machine with a copy of the disk as it is now.
func (m *machine) copied() *machine {
	m.t.Helper()
	data, err := os.ReadFile(m.image)
	if err != nil {
		m.t.Fatal(err)
	}
	other := *m
	other.image = filepath.Join(m.t.TempDir(), "copy")
	if err := os.WriteFile(other.image, data, 0o600); err != nil {
		m.t.Fatal(err)
	}
	return &other
}

// forged is a superblock that the kernel would accept: every field but the magic and the version is
// another one than ours, and the tags are to be made anew.
func forged() []byte {
	b := make([]byte, superblockEnd)
	copy(b, "integrt\x00\x04")
	b[9] = 12                                    // shorter runs
	binary.LittleEndian.PutUint16(b[10:], 16)    // tag size
	binary.LittleEndian.PutUint32(b[12:], 2)     // sections of the journal
	binary.LittleEndian.PutUint64(b[16:], 1<<15) // provided sectors
	binary.LittleEndian.PutUint32(b[24:], 1<<1)  // recalculating
	b[28], b[29] = 0, 15                         // sectors of a block, bitmap
	binary.LittleEndian.PutUint64(b[32:], 1<<10) // where to recalculate from
	copy(b[48:], bytes.Repeat([]byte{0x55}, 16)) // salt
	return b
}

// TestSuperblockOfTheDiskIsNotRead: whatever a provider puts where the superblock would lie, the
// volume opens as the tenant's audit wants it and holds what was confirmed, even what
// lay in the journal alone when the power was cut; the block is never written either.
func TestSuperblockOfTheDiskIsNotRead(t *testing.T) {
	m := newMachine(t)
	first := m.start("commit", unlockmsg.Disk{Format: true, Authenticated: true})
	if strings.Contains(first, "ERROR") || strings.Contains(first, "PROBE failed") {
		t.Fatal("making and filling it meets errors")
	}
	if !bytes.Equal(m.firstBlock(), make([]byte, superblockEnd)) {
		t.Error("making the volume new writes a superblock on the disk")
	}
	// With the empty journal of a new disk there is nothing to read: the power was cut before
	// the replay.
	bare := m.copied()
	bare.overwrite(superblockEnd, emptyJournal(t))
	if console := bare.start("read", unlockmsg.Disk{Authenticated: true}); strings.Contains(console, fmt.Sprintf("PROBE read good=%d ", committed)) {
		t.Error("the data had left the journal already: this test does not show what it is for")
	}
	noise := make([]byte, superblockEnd)
	rand.Read(noise)
	for _, c := range []struct {
		what string
		data []byte
	}{{"nothing", make([]byte, superblockEnd)}, {"noise", noise}, {"another superblock", forged()}} {
		// Each on a disk whose journal was not replayed yet.
		disk := m.copied()
		disk.overwrite(0, c.data)
		console := disk.start("read", unlockmsg.Disk{Authenticated: true})
		good, bad, refused := result(t, console)
		if good != committed || bad != 0 || refused != 0 || strings.Contains(console, "ERROR") {
			t.Errorf("%s: %d good, %d noise, %d refused", c.what, good, bad, refused)
		}
		judged(t, console)
		if !bytes.Equal(disk.firstBlock(), c.data) {
			t.Errorf("%s: the first block of the disk was written", c.what)
		}
	}
}

// TestSuperblockIsTheKernels: on disks of many sizes the superblock that we compute is the one that
// the kernel makes, byte for byte; devmapper.Integrity compares them.
func TestSuperblockIsTheKernels(t *testing.T) {
	const start = 16904 + 256 // sectors in front of the first block
	for _, sectors := range []int64{start + 8, start + 1<<15 + 255, start + 256 + 1<<15 + 15, 100<<21 + 7} {
		m := newMachine(t)
		if err := os.Truncate(m.image, sectors*512); err != nil {
			t.Fatal(err)
		}
		if console := m.start("layout", unlockmsg.Disk{Authenticated: true}); !strings.Contains(console, "PROBE laid out\n") {
			t.Errorf("%d sectors: the kernel lays them out otherwise", sectors)
		}
	}
}
