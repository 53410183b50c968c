package signed

import (
	"crypto/ed25519"
	"errors"
	"testing"
)

func TestOpen(t *testing.T) {
	pub, key, _ := ed25519.GenerateKey(nil)
	other, _, _ := ed25519.GenerateKey(nil)
	type doc struct {
		A int `json:"a"`
	}
	e := Seal(key, Manifest, []byte(`{"a":1}`))
	var d doc
	if err := e.Open(pub, Manifest, &d); err != nil || d.A != 1 {
		t.Fatalf("%v %v", d, err)
	}
	flip := func(b []byte) []byte {
		c := append([]byte{}, b...)
		c[len(c)/2] ^= 1
		return c
	}
	for name, err := range map[string]error{
		"another label":     e.Open(pub, Zone, &d),
		"another key":       e.Open(other, Manifest, &d),
		"no key":            e.Open(nil, Manifest, &d),
		"altered payload":   Envelope{flip(e.Payload), e.Signature}.Open(pub, Manifest, &d),
		"altered signature": Envelope{e.Payload, flip(e.Signature)}.Open(pub, Manifest, &d),
		"no signature":      Envelope{Payload: e.Payload}.Open(pub, Manifest, &d),
		"cut payload":       Envelope{e.Payload[:3], e.Signature}.Open(pub, Manifest, &d),
		"empty":             Envelope{}.Open(pub, Manifest, &d),
	} {
		if !errors.Is(err, ErrSignature) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if err := Seal(key, Manifest, []byte(`{"a":1,"a":2}`)).Open(pub, Manifest, &d); err == nil {
		t.Error("a signed document with a duplicate key was accepted")
	}
}
