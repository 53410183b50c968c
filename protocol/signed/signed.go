// Package signed is the envelope of every signed document: inventory, platform
// reference values, component release, VM manifest, zone document, reports of a VM, report
// of a host audit.
//
// The signature is Ed25519 (RFC 8032) over transcript(label, payload), so a document
// of one kind can never pass for another. The payload is the exact bytes signed;
// readers decode those bytes and never re-encode them.
package signed

import (
	"crypto/ed25519"
	"errors"

	"foothold/internal/strictjson"
	"foothold/protocol/transcript"
)

// Labels, one a document kind.
const (
	Inventory  = "foothold/inventory/v1"
	Platform   = "foothold/platform/v1"
	Components = "foothold/components/v1"
	Manifest   = "foothold/manifest/v1"
	Zone       = "foothold/zone/v1"
	Report     = "foothold/ready-report/v1"
	AgentUp    = "foothold/agent-up/v1"
	AgentDown  = "foothold/agent-down/v1"
	HostAudit  = "foothold/host-audit/v1"
)

// ErrSignature is returned for a payload that the key did not sign under the label.
var ErrSignature = errors.New("signature does not verify")

// Envelope carries a payload and its signature. JSON shows both as base64.
type Envelope struct {
	Payload   []byte `json:"payload"`
	Signature []byte `json:"signature"`
}

// Seal signs payload under label.
func Seal(key ed25519.PrivateKey, label string, payload []byte) Envelope {
	return Envelope{Payload: payload, Signature: ed25519.Sign(key, transcript.Bytes(label, payload))}
}

// Open verifies the envelope and decodes its payload strictly into v.
func (e Envelope) Open(key ed25519.PublicKey, label string, v any) error {
	if len(key) != ed25519.PublicKeySize || len(e.Signature) != ed25519.SignatureSize ||
		!ed25519.Verify(key, transcript.Bytes(label, e.Payload), e.Signature) {
		return ErrSignature
	}
	return strictjson.Unmarshal(e.Payload, v)
}
