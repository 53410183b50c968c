package bootimage

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
)

// Section is a part that a unified kernel image carries for systemd-stub.
type Section struct {
	Name string // at most 8 bytes
	Data []byte
}

// Sizes and offsets of Microsoft's "PE Format", in bytes. Alignments are what EDK II and
// the stub's own sections use.
const (
	peOffsetAt     = 0x3c // of the PE signature, in the DOS header
	coffLen        = 4 + 20
	sectionLen     = 40
	fileAlign      = 512
	memoryAlign    = 4096
	maxHeader      = 1 << 16
	sizeOfImageAt  = 56 // in the optional header
	sizeOfHeaderAt = 60
	checkSumAt     = 64
	readOnlyData   = 0x40000040 // IMAGE_SCN_CNT_INITIALIZED_DATA, IMAGE_SCN_MEM_READ
)

var errStub = errors.New("it is not a PE file as systemd-stub is")

// Unify appends the sections to systemd-stub: a program of EFI's that holds kernel,
// initramfs and command line, and is measured as one (UAPI group's specification, "Unified
// Kernel Image"). The section headers must fit into the stub's own header.
func Unify(stub []byte, sections []Section) ([]byte, error) {
	if len(stub) < 0x40 {
		return nil, fmt.Errorf("unify kernel: stub: %w", errStub)
	}
	pe := int(binary.LittleEndian.Uint32(stub[peOffsetAt:]))
	if pe < 0x40 || pe > maxHeader || len(stub) < pe+coffLen+sizeOfHeaderAt+4 || !bytes.Equal(stub[pe:pe+4], []byte("PE\x00\x00")) {
		return nil, fmt.Errorf("unify kernel: stub: %w", errStub)
	}
	out := bytes.Clone(stub)
	count := int(binary.LittleEndian.Uint16(out[pe+6:]))
	optional := pe + coffLen
	table := optional + int(binary.LittleEndian.Uint16(out[pe+20:]))
	next := table + count*sectionLen // where the next section's header goes
	headers := int(binary.LittleEndian.Uint32(out[optional+sizeOfHeaderAt:]))
	if end := next + len(sections)*sectionLen; end > headers || headers > len(out) {
		return nil, fmt.Errorf("unify kernel: %d more sections do not fit into the stub's header of %d bytes", len(sections), headers)
	}
	memory := uint32(0) // end of what the sections take in memory
	for at := table; at < next; at += sectionLen {
		memory = max(memory, binary.LittleEndian.Uint32(out[at+8:])+binary.LittleEndian.Uint32(out[at+12:]))
	}
	for _, s := range sections {
		memory = alignUp(memory, memoryAlign)
		out = append(out, make([]byte, int(alignUp(uint32(len(out)), fileAlign))-len(out))...)
		start := len(out)
		out = append(out, s.Data...)
		out = append(out, make([]byte, int(alignUp(uint32(len(out)), fileAlign))-len(out))...)
		header := out[next : next+sectionLen]
		clear(header)
		if copy(header[:8], s.Name) < len(s.Name) {
			return nil, fmt.Errorf("unify kernel: section name %q is too long", s.Name)
		}
		binary.LittleEndian.PutUint32(header[8:], uint32(len(s.Data)))
		binary.LittleEndian.PutUint32(header[12:], memory)
		binary.LittleEndian.PutUint32(header[16:], uint32(len(out)-start))
		binary.LittleEndian.PutUint32(header[20:], uint32(start))
		binary.LittleEndian.PutUint32(header[36:], readOnlyData)
		memory += uint32(len(s.Data))
		next += sectionLen
	}
	binary.LittleEndian.PutUint16(out[pe+6:], uint16(count+len(sections)))
	binary.LittleEndian.PutUint32(out[optional+sizeOfImageAt:], alignUp(memory, memoryAlign))
	binary.LittleEndian.PutUint32(out[optional+checkSumAt:], 0)
	return out, nil
}

func alignUp(n, to uint32) uint32 { return (n + to - 1) / to * to }
