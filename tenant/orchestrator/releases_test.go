package orchestrator

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"testing"

	"foothold/protocol/bootmsg"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/signed"
)

// TestAGoodReleaseMakesNoOtherGood: a release that was opened before is opened again by all
// its bytes alone; another payload under its signature, or it under another, is refused.
func TestAGoodReleaseMakesNoOtherGood(t *testing.T) {
	public, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	component := func(name string) bootmsg.Component {
		return bootmsg.Component{Name: name, SHA256: digest.Of([]byte(name)), Size: 1}
	}
	payload, err := json.Marshal(bootmsg.Components{Release: "one", Kernel: component("kernel"), Initramfs: component("initramfs")})
	if err != nil {
		t.Fatal(err)
	}
	o := &Orchestrator{ground: ground{componentKey: public}}
	good := signed.Seal(key, signed.Components, payload)
	first, err := o.components(good)
	if err != nil {
		t.Fatal(err)
	}
	other, signature := bytes.Replace(payload, []byte("one"), []byte("two"), 1), bytes.Clone(good.Signature)
	signature[0] ^= 1
	for what, e := range map[string]signed.Envelope{
		"another payload":   {Payload: other, Signature: good.Signature},
		"another signature": {Payload: payload, Signature: signature},
	} {
		for range 2 { // nor is what was refused remembered as good
			if _, err := o.components(e); event.ReasonOf(err) != event.SignatureInvalid {
				t.Errorf("%s: %v", what, err)
			}
		}
	}
	if again, err := o.components(good); err != nil || again != first {
		t.Errorf("the good one again: %v, %v", again, err)
	}
}
