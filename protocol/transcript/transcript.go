// Package transcript hashes labelled, length-prefixed fields.
//
// Every digest and every signature of the protocol is taken over a transcript,
// never over bare concatenation, so that no two different lists of fields can
// have the same bytes. The format is
//
//	u32be(len(label)) label u32be(n) { u32be(len(field)) field }*n
//
// and the digest is SHA-256 over it. Labels name the use and its version
// ("foothold/tunnel/v1"); a change of fields takes a new label.
package transcript

import (
	"crypto/sha256"
	"encoding/binary"
)

// Bytes returns the transcript of label and fields, for use as a signature's message.
func Bytes(label string, fields ...[]byte) []byte {
	size := 8 + len(label)
	for _, f := range fields {
		size += 4 + len(f)
	}
	out := make([]byte, 0, size)
	out = binary.BigEndian.AppendUint32(out, uint32(len(label)))
	out = append(out, label...)
	out = binary.BigEndian.AppendUint32(out, uint32(len(fields)))
	for _, f := range fields {
		out = binary.BigEndian.AppendUint32(out, uint32(len(f)))
		out = append(out, f...)
	}
	return out
}

// Sum returns the SHA-256 of the transcript of label and fields.
func Sum(label string, fields ...[]byte) [sha256.Size]byte {
	return sha256.Sum256(Bytes(label, fields...))
}
