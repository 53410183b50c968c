package luks

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"foothold/internal/command"
	"foothold/internal/secret"
)

func TestEncryptIsReversible(t *testing.T) {
	key := NewKey()
	plain := bytes.Repeat([]byte("foothold"), 300*SectorSize/8) // more than a chunk
	var cipher, back bytes.Buffer
	n, err := Encrypt(&cipher, bytes.NewReader(plain), key)
	if err != nil || n != int64(len(plain)) || cipher.Len() != len(plain) {
		t.Fatalf("encrypted %d of %d: %v", n, len(plain), err)
	}
	if bytes.Equal(cipher.Bytes()[:SectorSize], cipher.Bytes()[SectorSize:2*SectorSize]) {
		t.Error("two sectors of the same content encrypt to the same")
	}
	if _, err := Decrypt(&back, bytes.NewReader(cipher.Bytes()), key); err != nil || !bytes.Equal(back.Bytes(), plain) {
		t.Errorf("does not decrypt to the same (%v)", err)
	}
	if _, err := Encrypt(&cipher, bytes.NewReader(plain[:SectorSize+1]), key); !errors.Is(err, ErrSize) {
		t.Errorf("a part of a sector: %v", err)
	}
	if _, err := Encrypt(&cipher, bytes.NewReader(plain), secret.Random(32)); err == nil {
		t.Error("a short key is accepted")
	}
}

func TestMACKeyIsAnotherKey(t *testing.T) {
	key := NewKey()
	a, err := MACKey(key)
	if err != nil || a.Len() != 32 || bytes.Contains(key.Reveal(), a.Reveal()) {
		t.Fatalf("%d bytes, %v", a.Len(), err)
	}
	if b, err := MACKey(key); err != nil || !a.Equal(b) {
		t.Errorf("it differs from call to call (%v)", err)
	}
	if b, err := MACKey(NewKey()); err != nil || a.Equal(b) {
		t.Errorf("two volume keys give the same (%v)", err)
	}
	if _, err := MACKey(secret.Random(32)); err == nil {
		t.Error("a short volume key is accepted")
	}
	// What is on disks must open for ever.
	fixed, err := MACKey(secret.New(bytes.Repeat([]byte{1}, KeySize)))
	if got := hex.EncodeToString(fixed.Reveal()); err != nil || got != "1f6378e737c323f4b15c333fd6d07714a39bccafccab5fc763ec149f3f8e5012" {
		t.Errorf("key of a fixed volume key: %s, %v", got, err)
	}
}

func makeHeader(t *testing.T, key, pass secret.Bytes) []byte {
	t.Helper()
	header, err := Header(t.Context(), 64<<20, key, pass)
	if err != nil {
		t.Fatal(err)
	}
	return header
}

func TestHeadersOfOneKeyDiffer(t *testing.T) {
	key := NewKey()
	a := makeHeader(t, key, secret.Random(32))
	b := makeHeader(t, key, secret.Random(32))
	if bytes.Equal(a, b) {
		t.Error("two headers are the same")
	}
	if bytes.Contains(a, key.Reveal()) {
		t.Error("the header holds the volume key in clear")
	}
	if _, err := Header(t.Context(), 64<<20, key, secret.Random(8)); err == nil {
		t.Error("a short passphrase is accepted")
	}
}

// cryptsetup, as an independent reader, gets our volume key back with the passphrase alone.
func TestCryptsetupOpensTheHeader(t *testing.T) {
	key, pass := NewKey(), secret.Random(32)
	dir := t.TempDir()
	path, out := filepath.Join(dir, "header"), filepath.Join(dir, "key")
	if err := os.WriteFile(path, makeHeader(t, key, pass), 0o600); err != nil {
		t.Fatal(err)
	}
	open := func(pass secret.Bytes) error {
		cmd, err := command.New(t.Context(), "cryptsetup", "luksDump", "--batch-mode", "--dump-volume-key", "--volume-key-file", out, "--key-file", "-", path)
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stdin = bytes.NewReader(pass.Reveal())
		_, err = command.Wait(cmd)
		return err
	}
	if err := open(secret.Random(32)); err == nil {
		t.Error("another passphrase opens the header")
	}
	if err := open(pass); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(out); !bytes.Equal(got, key.Reveal()) {
		t.Error("the header holds another volume key")
	}
}

// The header is cryptsetup's work, so this holds Unlock against another implementation.
func TestUnlockGivesTheKeyToThePassphraseAlone(t *testing.T) {
	key, pass := NewKey(), secret.Random(32)
	header := makeHeader(t, key, pass)
	got, err := Unlock(header, pass)
	if err != nil || !got.Equal(key) {
		t.Fatalf("another key, or none: %v", err)
	}
	if _, err := Unlock(header, secret.Random(32)); !errors.Is(err, ErrPassphrase) {
		t.Errorf("another passphrase: %v", err)
	}
	slot := slices.Clone(header)
	slot[2*metadataSize+100] ^= 1
	if _, err := Unlock(slot, pass); !errors.Is(err, ErrPassphrase) {
		t.Errorf("an altered key slot: %v", err)
	}
	if _, err := Unlock(rewrite(header, `"offset":"32768"`, `"offset":"557056"`), pass); err == nil || errors.Is(err, ErrPassphrase) {
		t.Errorf("a key slot outside the header: %v", err)
	}
}

// rewrite replaces text in both copies' JSON and mends their checksums, as an attacker would.
func rewrite(header []byte, old, new string) []byte {
	h := slices.Clone(header)
	for _, at := range []int{0, metadataSize} {
		text := h[at+binarySize : at+metadataSize]
		changed := []byte(strings.Replace(string(bytes.TrimRight(text, "\x00")), old, new, 1))
		clear(text)
		copy(text, changed)
		mend(h[at : at+metadataSize])
	}
	return h
}

func mend(copy_ []byte) {
	clear(copy_[offSum : offSum+sumSize])
	sum := sha256.Sum256(copy_)
	copy(copy_[offSum:], sum[:])
}

func TestCheckRefusesEveryOtherHeader(t *testing.T) {
	good := makeHeader(t, NewKey(), secret.Random(32))
	if err := Check(good); err != nil {
		t.Fatal(err)
	}
	if err := Check(rewrite(good, "sha256", "sha256")); err != nil {
		t.Fatalf("rewriting nothing is refused: %v", err)
	}
	for name, change := range map[string][2]string{
		"null cipher":    {`"encryption":"aes-xts-plain64","sector_size"`, `"encryption":"cipher_null-ecb","sector_size"`},
		"other sector":   {`"sector_size":4096`, `"sector_size":512`},
		"data offset":    {`"type":"crypt","offset":"0"`, `"type":"crypt","offset":"4096"`},
		"linear segment": {`"type":"crypt"`, `"type":"linear"`},
		"second slot":    {`"keyslots":{`, `"keyslots":{"1":{"type":"luks2","key_size":64},`},
		"token":          {`"tokens":{`, `"tokens":{"0":{}`},
		"requirement":    {`"config":{`, `"config":{"requirements":{"mandatory":["x"]},`},
		"flag":           {`"config":{`, `"config":{"flags":["allow-discards"],`},
		"no slot":        {`"keyslots":{"0"`, `"keyslots":{"7"`},
		"short key":      {`"key_size":64`, `"key_size":32`},
		"iv tweak":       {`"iv_tweak":"0"`, `"iv_tweak":"8"`},
	} {
		bad := rewrite(good, change[0], change[1])
		if bytes.Equal(bad, good) {
			t.Errorf("%s: the change finds no place", name)
		} else if err := Check(bad); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
	flipped := slices.Clone(good)
	flipped[binarySize+5] ^= 1
	if err := Check(flipped); err == nil {
		t.Error("a wrong checksum is accepted")
	}
	newer := slices.Clone(good)
	newer[metadataSize+offSequence+7]++
	mend(newer[metadataSize : 2*metadataSize])
	if err := Check(newer); err == nil {
		t.Error("a second copy that is newer is accepted")
	}
	if err := Check(good[:len(good)-1]); err == nil {
		t.Error("a short header is accepted")
	}
}

func FuzzUnlock(f *testing.F) {
	f.Add(make([]byte, HeaderSize))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) < HeaderSize {
			data = append(data, make([]byte, HeaderSize-len(data))...)
		}
		mend(data[:metadataSize])
		mend(data[metadataSize : 2*metadataSize])
		Unlock(data, secret.New([]byte("passphrase")))
	})
}
