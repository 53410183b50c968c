package reference

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"foothold/protocol/digest"
)

// image is a program of EFI's (Microsoft's "PE Format"), as far as its measurement needs it.
// Offsets and sizes are in bytes, and lie within data; no two sections share any.
type image struct {
	data        []byte
	headers     int // SizeOfHeaders
	checksum    int // where CheckSum is
	certificate int // where the entry of the certificates' table is; 0: there is none
	signature   int // size of the certificates
	sections    []section
}

type section struct {
	name        string
	start, size int    // in the file, padded
	data        []byte // what is loaded of it
}

var errImage = errors.New("it is not a program of EFI's")

// parseImage reads headers and sections. What lies outside of the file is an error.
func parseImage(data []byte) (p image, err error) {
	const (
		coff, entry   = 24, 40 // signature and COFF header; a section's header
		sizeOfHeaders = 60     // in the optional header, as CheckSum is behind it
		certificates  = 4      // number of the data directory
	)
	if len(data) < 0x40 {
		return p, errImage
	}
	pe := int(binary.LittleEndian.Uint32(data[0x3c:]))
	if pe > len(data)-coff-2 || !bytes.Equal(data[pe:pe+4], []byte("PE\x00\x00")) {
		return p, errImage
	}
	count, size := int(binary.LittleEndian.Uint16(data[pe+6:])), int(binary.LittleEndian.Uint16(data[pe+20:]))
	optional := pe + coff
	directories := map[uint16]int{0x10b: 96, 0x20b: 112}[binary.LittleEndian.Uint16(data[optional:])] // PE32, PE32+
	table := optional + size
	if directories == 0 || size < directories || table+count*entry > len(data) {
		return p, errImage
	}
	p = image{data: data, headers: int(binary.LittleEndian.Uint32(data[optional+sizeOfHeaders:])), checksum: optional + sizeOfHeaders + 4}
	if p.headers > len(data) || p.headers < table+count*entry {
		return p, errImage
	}
	if n := binary.LittleEndian.Uint32(data[optional+directories-4:]); n > certificates {
		p.certificate = optional + directories + certificates*8
		if p.certificate+8 > table {
			return p, errImage
		}
		p.signature = int(binary.LittleEndian.Uint32(data[p.certificate+4:]))
	}
	for i := range count {
		header := data[table+i*entry:][:entry]
		s := section{name: string(bytes.TrimRight(header[:8], "\x00")), size: int(binary.LittleEndian.Uint32(header[16:])), start: int(binary.LittleEndian.Uint32(header[20:]))}
		if s.size > 0 && (s.start > len(data) || s.size > len(data)-s.start) {
			return p, fmt.Errorf("%w: its section %.8q goes on after its end", errImage, s.name)
		}
		if s.size > 0 {
			s.data = data[s.start : s.start+min(s.size, int(binary.LittleEndian.Uint32(header[8:])))]
		}
		p.sections = append(p.sections, s)
	}
	end := p.headers
	for _, s := range p.inFile() {
		if s.start < end {
			return p, fmt.Errorf("%w: its section %.8q lies upon another, or upon its headers", errImage, s.name)
		}
		end = s.start + s.size
	}
	return p, nil
}

// inFile are the sections that the file has something of, in its order.
func (p image) inFile() []section {
	list := slices.DeleteFunc(slices.Clone(p.sections), func(s section) bool { return s.size == 0 })
	slices.SortStableFunc(list, func(a, b section) int { return cmp.Compare(a.start, b.start) })
	return list
}

// authenticode is the digest that firmware measures of a program before it runs it
// (Microsoft's "Windows Authenticode Portable Executable Signature Format", as EDK II's
// DxeTpm2MeasureBootLib computes it): all of it but checksum and signatures.
func (p image) authenticode() digest.SHA256 {
	h := sha256.New()
	h.Write(p.data[:p.checksum])
	if p.certificate == 0 {
		h.Write(p.data[p.checksum+4 : p.headers])
	} else {
		h.Write(p.data[p.checksum+4 : p.certificate])
		h.Write(p.data[p.certificate+8 : p.headers])
	}
	hashed := p.headers
	for _, s := range p.inFile() {
		h.Write(p.data[s.start : s.start+s.size])
		hashed += s.size
	}
	// As much as was not hashed, counted from where hashing would be without gaps between
	// sections: so it is specified, and firmware does it.
	if rest := len(p.data) - hashed - p.signature; rest > 0 {
		h.Write(p.data[hashed : hashed+rest])
	}
	return digest.SHA256(h.Sum(nil))
}

// find gives a section's data; nil where there is none. One that is there twice is an error.
func (p image) find(name string) (data []byte, err error) {
	found := false
	for _, s := range p.sections {
		if s.name != name {
			continue
		}
		if found {
			return nil, fmt.Errorf("it has two sections %s", name)
		}
		found, data = true, s.data
		if data == nil {
			data = []byte{}
		}
	}
	return data, nil
}
