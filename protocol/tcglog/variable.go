package tcglog

import (
	"bytes"
	"encoding/binary"
	"unicode/utf16"
)

// A GUID as UEFI writes it: its first three parts in little endian.
type GUID [16]byte

// GlobalVariable is the vendor of the variables that the UEFI specification defines
// (section 3.3, "EFI_GLOBAL_VARIABLE"), 8be4df61-93ca-11d2-aa0d-00e098032b8c.
var GlobalVariable = GUID{0x61, 0xdf, 0xe4, 0x8b, 0xca, 0x93, 0xd2, 0x11, 0xaa, 0x0d, 0x00, 0xe0, 0x98, 0x03, 0x2b, 0x8c}

// maxVariableName bounds a variable's name in characters.
const maxVariableName = 256

// Variable is one variable of the firmware as it was measured (UEFI_VARIABLE_DATA, section
// 10.2.6). Data of signature databases are not taken apart: a database is compared by its
// digest as a whole, so that no list within it can add to what is trusted.
type Variable struct {
	Vendor GUID
	Name   string
	Data   []byte // a part of the log
}

// Variable reads the variable whose content the register proves: false where the digest in
// that bank is not the digest of the event's data, whatever type the event claims, and where
// the data are not exactly one variable.
func (e Event) Variable(b Bank) (v Variable, ok bool) {
	if !e.Authentic(b) {
		return v, false
	}
	const head = 16 + 8 + 8
	if len(e.Data) < head {
		return v, false
	}
	chars, size := binary.LittleEndian.Uint64(e.Data[16:]), binary.LittleEndian.Uint64(e.Data[24:])
	if chars > maxVariableName || size > uint64(len(e.Data)) || head+2*chars+size != uint64(len(e.Data)) {
		return v, false
	}
	name := e.Data[head : head+2*chars]
	units := make([]uint16, 0, chars)
	for i := 0; i < len(name); i += 2 {
		units = append(units, binary.LittleEndian.Uint16(name[i:]))
	}
	return Variable{GUID(e.Data[:16]), string(utf16.Decode(units)), e.Data[head+2*chars:]}, true
}

// Version reads the text of a version that the register proves (EV_S_CRTM_VERSION, section
// 10.4.1): of two bytes a character, or of one, printable, with or without a zero at its
// end. Which event of register 0 is the version, its type only claims.
func (e Event) Version(b Bank) (string, bool) {
	if !e.Authentic(b) {
		return "", false
	}
	if len(e.Data) >= 2 && len(e.Data)%2 == 0 && e.Data[1] == 0 {
		s := text16(e.Data)
		return s, s != ""
	}
	data := bytes.TrimSuffix(e.Data, []byte{0})
	if len(data) > maxDescription {
		return "", false
	}
	s := printable(string(data))
	return s, s != ""
}

// text16 is UTF-16 in full, or empty if it is long or has what cannot be shown.
func text16(data []byte) string {
	units := make([]uint16, 0, maxDescription)
	for ; len(data) >= 2; data = data[2:] {
		units = append(units, binary.LittleEndian.Uint16(data))
	}
	if n := len(units); n > 0 && units[n-1] == 0 {
		units = units[:n-1]
	}
	if len(units) > maxDescription {
		return ""
	}
	return printable(string(utf16.Decode(units)))
}

// UTF16 is a text as firmware and loaders pass it on: little endian, with a zero at its end.
func UTF16(s string) []byte {
	out := make([]byte, 0, 2*len(s)+2)
	for _, unit := range utf16.Encode([]rune(s)) {
		out = binary.LittleEndian.AppendUint16(out, unit)
	}
	return append(out, 0, 0)
}
