package tcglog

import (
	"encoding/binary"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf16"
)

// maxDescription bounds a description in characters.
const maxDescription = 80

// Describe says for people what an event claims to be: its type, and what its data name.
// Nothing may be decided by it.
func (e Event) Describe() string {
	text := e.Type.String()
	if name := e.name(); name != "" {
		text += " " + name
	}
	return text
}

// name is what data of some types carry: a variable's name, a version, a text.
func (e Event) name() string {
	switch e.Type {
	case VariableConfig, 0x80000002, 0x8000000c, 0x800000e0:
		// UEFI_VARIABLE_DATA: vendor [16] | name's length in characters u64 | data's length u64 | name | data
		const head = 16 + 8 + 8
		if len(e.Data) < head {
			return ""
		}
		n := binary.LittleEndian.Uint64(e.Data[16:])
		if n > maxDescription || uint64(len(e.Data)-head) < 2*n {
			return ""
		}
		return printable(wide(e.Data[head : head+2*n]))
	case Separator, NoAction:
		return ""
	}
	return text(e.Data)
}

// text reads data that are text, of one or of two bytes a character; else it is empty.
func text(data []byte) string {
	if s := printable(strings.TrimRight(string(data), "\x00")); s != "" {
		return s
	}
	if len(data)%2 == 0 {
		return printable(strings.TrimRight(wide(data), "\x00"))
	}
	return ""
}

// wide reads UTF-16, little endian.
func wide(data []byte) string {
	units := make([]uint16, 0, maxDescription)
	for ; len(data) >= 2 && len(units) < 4*maxDescription; data = data[2:] {
		units = append(units, binary.LittleEndian.Uint16(data))
	}
	return string(utf16.Decode(units))
}

// printable is s, shortened, if every character of it can be shown.
func printable(s string) string {
	for _, r := range s {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return ""
		}
	}
	if runes := []rune(s); len(runes) > maxDescription {
		return fmt.Sprintf("%s…", string(runes[:maxDescription]))
	}
	return s
}
