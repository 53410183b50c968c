package bootimage

import (
	"bytes"
	"debug/pe"
	"encoding/binary"
	"errors"
	"testing"
)

// stub is a PE file with one section and room for a few section headers.
func stub() []byte {
	const signature, optional = 0x80, 240
	b := make([]byte, 0x600)
	copy(b, "MZ")
	binary.LittleEndian.PutUint32(b[peOffsetAt:], signature)
	copy(b[signature:], "PE\x00\x00")
	coff := b[signature+4:]
	binary.LittleEndian.PutUint16(coff, 0x8664)
	binary.LittleEndian.PutUint16(coff[2:], 1)
	binary.LittleEndian.PutUint16(coff[16:], optional)
	head := b[signature+coffLen:]
	binary.LittleEndian.PutUint16(head, 0x20b)
	binary.LittleEndian.PutUint32(head[sizeOfHeaderAt:], 0x400)
	binary.LittleEndian.PutUint32(head[108:], 16) // data directories
	text := b[signature+coffLen+optional:]
	copy(text, ".text")
	for at, v := range map[int]uint32{8: 0x1234, 12: 0x4000, 16: 0x200, 20: 0x400} {
		binary.LittleEndian.PutUint32(text[at:], v)
	}
	return b
}

func TestUnifiedImageHoldsItsSections(t *testing.T) {
	want := []Section{{".cmdline", []byte("quiet")}, {".linux", bytes.Repeat([]byte("k"), 5000)}, {".initrd", make([]byte, 512)}}
	data, err := Unify(stub(), want)
	if err != nil {
		t.Fatal(err)
	}
	f, err := pe.NewFile(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	end := uint32(0)
	for _, s := range f.Sections {
		if s.VirtualAddress < end || s.VirtualAddress%memoryAlign != 0 || s.Offset%fileAlign != 0 || s.Size%fileAlign != 0 {
			t.Errorf("%s lies at %#x, where another ends at %#x, or is not aligned", s.Name, s.VirtualAddress, end)
		}
		end = s.VirtualAddress + s.VirtualSize
	}
	if size := f.OptionalHeader.(*pe.OptionalHeader64).SizeOfImage; size < end || size%memoryAlign != 0 {
		t.Errorf("the image takes %#x bytes of memory, its sections end at %#x", size, end)
	}
	for _, w := range want {
		s := f.Section(w.Name)
		if s == nil {
			t.Errorf("no section %s", w.Name)
			continue
		}
		if got, err := s.Data(); err != nil || s.VirtualSize != uint32(len(w.Data)) || !bytes.Equal(got[:s.VirtualSize], w.Data) {
			t.Errorf("%s holds %d bytes, %v", w.Name, s.VirtualSize, err)
		}
	}
}

func TestStubsOfOtherFormsAreRefused(t *testing.T) {
	far := stub()
	binary.LittleEndian.PutUint32(far[peOffsetAt:], 1<<31)
	for name, b := range map[string][]byte{"empty": nil, "short": stub()[:0x90], "no signature": make([]byte, 0x600), "signature far off": far} {
		if _, err := Unify(b, nil); !errors.Is(err, errStub) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Unify(stub(), make([]Section, 20)); err == nil {
		t.Error("section headers ran over the stub's code")
	}
	if _, err := Unify(stub(), []Section{{".too.long", nil}}); err == nil {
		t.Error("a section's name was cut")
	}
}
