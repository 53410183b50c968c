// Package imalogtest writes the lists that kernels keep of their measurements, for tests.
package imalogtest

import (
	"bytes"
	"encoding/binary"
	"strings"
	"testing"

	"foothold/protocol/digest"
	"foothold/protocol/imalog"
	"foothold/protocol/tcglog"
)

// Entry is an entry of template ima-ng with a digest of SHA-256, and what it extends.
func Entry(path string, sum []byte) (entry []byte, extended digest.SHA256) {
	data := append(field(append([]byte("sha256:\x00"), sum...)), field(append([]byte(path), 0))...)
	entry = append(word(imalog.Register), bytes.Repeat([]byte{1}, 20)...)
	return append(append(entry, field([]byte("ima-ng"))...), field(data)...), digest.Of(data)
}

// List is the list of a kernel that was started by the firmware which wrote that log: the
// aggregate over registers 0 to 9, then files "path=content".
func List(t testing.TB, firmware []byte, files ...string) []byte {
	t.Helper()
	l, err := tcglog.Parse(firmware)
	if err != nil {
		t.Fatal(err)
	}
	values, err := l.Replay(tcglog.SHA256)
	if err != nil {
		t.Fatal(err)
	}
	var registers []byte
	for i := range 10 {
		registers = append(registers, append(values[i], make([]byte, 32)...)[:32]...)
	}
	var list []byte
	for _, f := range append([]string{"boot_aggregate=" + string(registers)}, files...) {
		path, content, _ := strings.Cut(f, "=")
		sum := digest.Of([]byte(content))
		entry, _ := Entry(path, sum[:])
		list = append(list, entry...)
	}
	return list
}

func word(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }

func field(data []byte) []byte { return append(word(uint32(len(data))), data...) }
