package tpm

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"
	"testing/iotest"

	"github.com/google/go-tpm/tpm2"
)

// A response is taken only as long as it says it is, in whatever pieces it comes.
func FuzzResponse(f *testing.F) {
	f.Add([]byte{0x80, 1, 0, 0, 0, 10, 0, 0, 0, 0})
	f.Add([]byte{0x80, 1, 0, 0, 0, 12, 0, 0, 0, 0, 1, 2})
	f.Add([]byte{0x80, 1, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) {
		var buf [MaxMessage]byte
		whole, err := readResponse(bytes.NewReader(data), buf[:])
		if err == nil && (len(whole) < headerLen || int(binary.BigEndian.Uint32(whole[2:])) != len(whole) || !bytes.Equal(whole, data)) {
			t.Fatalf("took %x", whole)
		}
		if buf != [MaxMessage]byte{} {
			t.Fatal("something of the response stays behind")
		}
		pieces, err := readResponse(iotest.OneByteReader(bytes.NewReader(data)), buf[:])
		if err == nil && (int(binary.BigEndian.Uint32(pieces[2:])) != len(pieces) || !bytes.HasPrefix(data, pieces)) {
			t.Fatalf("took %x in pieces", pieces)
		}
	})
}

// A public area is taken in its one form, and passes for one of the host's keys only if
// it differs from the template in its point alone.
func FuzzPublic(f *testing.F) {
	f.Add(tpm2.Marshal(AIKTemplate()))
	f.Add(tpm2.Marshal(SessionTemplate()))
	f.Add(tpm2.Marshal(migratedTemplate()))
	f.Add(tpm2.Marshal(tpm2.RSAEKTemplate))
	f.Fuzz(func(t *testing.T, data []byte) {
		pub, err := ParsePublic(data)
		if err != nil {
			return
		}
		if !bytes.Equal(tpm2.Marshal(pub), data) {
			t.Fatal("took another form")
		}
		if CheckMigrated(pub) == nil && (pub.ObjectAttributes.FixedTPM || CheckSession(pub) == nil) {
			t.Fatal("a key of the TPM's own is taken for a migrated one")
		}
		aik, session := CheckAIK(pub) == nil, CheckSession(pub) == nil
		if aik && session || aik && !pub.ObjectAttributes.SignEncrypt || session && !pub.ObjectAttributes.Decrypt ||
			(aik || session) && (!pub.ObjectAttributes.FixedTPM || !pub.ObjectAttributes.Restricted) {
			t.Fatalf("taken for a key of the host's: %+v", pub.ObjectAttributes)
		}
	})
}

// What pads certificates in NV memory is cut off; nothing panics.
func FuzzCertificate(f *testing.F) {
	f.Add([]byte{0x30, 0})
	f.Add([]byte{0x30, 0x84, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, data []byte) {
		if der, rest, err := certificate(data); err == nil && !bytes.Equal(slices.Concat(der, rest), data) {
			t.Fatal("not what was there")
		}
		chain, err := certificates(data)
		for _, der := range chain {
			if err != nil || len(der) == 0 || !bytes.Contains(data, der) {
				t.Fatalf("not what was there: %x, %v", der, err)
			}
		}
	})
}
