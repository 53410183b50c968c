package opener

import (
	"bytes"
	"crypto/sha256"
	"testing"

	"foothold/internal/luks"
	"foothold/internal/secret"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/unlockmsg"
)

// nullCipher rewrites a header as an attacker would who wants the VM to write in clear:
// the cipher is none, in both copies, and the checksums fit (LUKS2 On-Disk Format
// Specification, section 2.1).
func nullCipher(header []byte) []byte {
	const copied, text, sum, sumLen = 16384, 4096, 0x1c0, 64
	h := bytes.Clone(header)
	for _, at := range []int{0, copied} {
		area := h[at : at+copied]
		json := bytes.TrimRight(area[text:], "\x00")
		changed := bytes.Replace(json, []byte(`"encryption":"aes-xts-plain64","sector_size"`), []byte(`"encryption":"cipher_null-ecb","sector_size"`), 1)
		clear(area[text:])
		copy(area[text:], changed)
		clear(area[sum : sum+sumLen])
		fresh := sha256.Sum256(area)
		copy(area[sum:], fresh[:])
	}
	return h
}

// TestNullCipherIsRefused: whichever disk it is of.
func TestNullCipherIsRefused(t *testing.T) {
	pass := secret.Random(32)
	header, err := luks.Header(t.Context(), 1<<20, luks.NewKey(), pass)
	if err != nil {
		t.Fatal(err)
	}
	null := nullCipher(header)
	if p, err := luks.Inspect(null); err != nil || p.Cipher != "cipher_null-ecb" {
		t.Fatalf("the header is not the one that was meant: %+v %v", p, err)
	}
	for name, headers := range map[string][2][]byte{"template": {null, header}, "volume": {header, null}} {
		h := unlockmsg.Handover{Template: unlockmsg.Disk{Device: "vda", Header: headers[0], Passphrase: pass}, Volume: unlockmsg.Disk{Device: "vdb", Header: headers[1], Passphrase: pass},
			Verity: unlockmsg.Verity{RootHash: digest.Of([]byte("x")), HashOffset: 4096}}
		if err := Check(&h); event.ReasonOf(err) != event.DiskRefused {
			t.Errorf("%s: %v", name, err)
		}
	}
}
