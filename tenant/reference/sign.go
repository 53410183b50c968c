package reference

import (
	"crypto/ed25519"
	"encoding/json"

	"foothold/internal/strictjson"
	"foothold/protocol/platform"
	"foothold/protocol/signed"
	"foothold/tenant/verify"
)

// Sign seals the encoded manifest exactly as it was examined. One that the verifier would
// refuse during its validity is refused.
func Sign(key ed25519.PrivateKey, payload []byte) (signed.Envelope, error) {
	var doc platform.Manifest
	if err := strictjson.Unmarshal(payload, &doc); err != nil {
		return signed.Envelope{}, err
	}
	env := signed.Seal(key, signed.Platform, payload)
	data, err := json.Marshal(env)
	if err != nil {
		return signed.Envelope{}, err
	}
	_, err = verify.ParsePlatform(data, key.Public().(ed25519.PublicKey), doc.Profile, doc.ValidFrom)
	return env, err
}
