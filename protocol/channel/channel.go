// Package channel is the VM's local channel to the host that launched it: a
// virtio-serial port, framed as in package frame. The host asks; the loader answers.
// Whatever comes unasked, twice or out of order ends the VM.
//
//	loader                           host
//	TunnelUp                   →                      a hint: may be sent once
//	                           ←     AskTunnel        fresh challenge
//	Tunnel (same challenge)    →
//	                           ←     Ready            what the quote is to prove is taken down
//	Command                    →                      TPM command of the boot server's session
//	                           ←     Response         repeated; PCR 16 and 23 are the VM's for the quote alone
//	Handover                   →                      components verified, about to kexec
//	                           ←     Released         boot timer stopped; the loader kexecs
//
// At any point the loader may send Failed, the host Refused. After Released the delivered
// system's agent may send Failed, as the last word of a VM that gives up.
package channel

import "foothold/protocol/digest"

// Type names a message.
type Type string

// The messages.
const (
	TunnelUp  Type = "tunnel-up"
	AskTunnel Type = "ask-tunnel"
	Tunnel    Type = "tunnel"
	Ready     Type = "ready"
	Command   Type = "command"
	Response  Type = "response"
	Handover  Type = "handover"
	Released  Type = "released"
	Failed    Type = "failed"
	Refused   Type = "refused"
)

// MaxFrame bounds a frame in bytes; a TPM command has at most 4 KiB.
const MaxFrame = 16 << 10

// ChallengeLen is the length in bytes of AskTunnel's challenge.
const ChallengeLen = 16

// Message is every message; unused fields are absent.
type Message struct {
	Type        Type           `json:"type"`
	Challenge   []byte         `json:"challenge,omitempty"`   // AskTunnel, Tunnel
	Measurement *digest.SHA256 `json:"measurement,omitempty"` // Tunnel
	Data        []byte         `json:"data,omitempty"`        // Command, Response
	Reason      string         `json:"reason,omitempty"`      // Failed, Refused: a code of package event
}
