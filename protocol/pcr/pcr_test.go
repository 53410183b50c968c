package pcr

import (
	"bytes"
	"crypto/sha256"
	"slices"
	"testing"

	"foothold/protocol/digest"
)

// Values computed with another implementation: printf of 64 zero bytes through sha256sum
// (extend of zero by zero), and again with that as the old value.
func TestExtendAndComposite(t *testing.T) {
	once := Extend(digest.SHA256{}, digest.SHA256{})
	const want = "f5a5fd42d16a20302798ef6ed309979b43003d2320d9f0e8ea9831a92759fb4b"
	if once.String() != want {
		t.Fatalf("extend zero by zero = %s, want %s", once, want)
	}
	regs := Replay([]Event{{PCR: VM}, {PCR: VM}, {PCR: Platform, Digest: digest.Of([]byte("x"))}})
	if regs[VM] != Extend(once, digest.SHA256{}) {
		t.Fatal("two events of one register do not chain")
	}
	h := sha256.New()
	p, v := regs[Platform], regs[VM]
	h.Write(p[:])
	h.Write(v[:])
	if got := Composite([]int{Platform, VM}, regs); got != digest.SHA256(h.Sum(nil)) {
		t.Fatalf("composite %s", got)
	}
	if Composite([]int{Platform, VM}, regs) == Composite([]int{Platform, Tunnel}, regs) {
		t.Fatal("the selection does not count")
	}
}

// Registers that only a dynamic launch resets are ones until there was one.
func TestUntouchedRegisters(t *testing.T) {
	h := sha256.New()
	for _, b := range []byte{0x00, 0xff, 0xff, 0x00} { // 16, 17, 22, 23
		h.Write(bytes.Repeat([]byte{b}, 32))
	}
	if got := Composite([]int{16, 17, 22, 23}, nil); got != digest.SHA256(h.Sum(nil)) {
		t.Errorf("composite of untouched registers %s", got)
	}
	if !slices.IsSorted(BootSelection()) || !slices.IsSorted(StaticSelection()) {
		t.Error("a selection is not in ascending order")
	}
}

func TestSelectionsAreFreshCopies(t *testing.T) {
	a := BootSelection()
	a[0] = 99
	if BootSelection()[0] == 99 || StaticSelection()[0] == 99 {
		t.Fatal("a caller can change the table")
	}
	if n := len(BootSelection()); n != len(Static)+2 {
		t.Fatalf("boot selection has %d registers", n)
	}
}
