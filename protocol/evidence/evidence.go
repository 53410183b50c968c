// Package evidence is what a host offers as proof and how its parts are bound to one
// VM, one tunnel and one nonce. It verifies nothing; tenant/verify does.
package evidence

import (
	"foothold/protocol/digest"
	"foothold/protocol/pcr"
	"foothold/protocol/transcript"
)

// ExporterLabel and ExporterLen give the TLS exporter (RFC 8446, section 7.5) that
// both ends of the boot tunnel derive, with [ExporterContext] as context.
const (
	ExporterLabel = "EXPORTER-Foothold-Boot-Tunnel"
	ExporterLen   = 32
)

// PSKLabel gives the WireGuard pre-shared key from the admission's TLS exporter,
// with the reservation's id as context.
const (
	PSKLabel = "EXPORTER-Foothold-WireGuard-PSK"
	PSKLen   = 32
)

// NonceLen is the length in bytes of the orchestrator's nonces.
const NonceLen = 32

// Roles enter the qualifying data, so that a quote asked for one purpose serves no other.
const (
	RoleBoot    = "boot"    // act 5
	RoleUnlock  = "unlock"  // act 8, static
	RoleConnect = "connect" // act 9, static
	RoleWatch   = "watch"   // while computing, static
	RoleSurvey  = "survey"  // of a host, for no VM, static; releases nothing
)

// ExporterContext is the context of the boot tunnel's exporter.
func ExporterContext(reservation string, nonce []byte) []byte {
	return transcript.Bytes("foothold/exporter-context/v1", []byte(reservation), nonce)
}

// Tunnel is the tunnel measurement that goes into PCR 23. serverLeaf and loaderLeaf
// are the DER of the two end certificates, vmKey the VM's 32-byte Ed25519 public key.
func Tunnel(exporterHash digest.SHA256, serverLeaf, loaderLeaf, vmKey []byte) digest.SHA256 {
	return transcript.Sum("foothold/tunnel/v1", exporterHash[:], serverLeaf, loaderLeaf, vmKey)
}

// Binding is a boot quote's qualifying data.
func Binding(role, reservation string, tunnel, settings digest.SHA256, nonce []byte) digest.SHA256 {
	return transcript.Sum("foothold/binding/v1", []byte(role), []byte(reservation), tunnel[:], settings[:], nonce)
}

// StaticBinding is a static quote's qualifying data; previous is the digest of the
// verdict before it in this start's chain.
func StaticBinding(role, reservation string, previous digest.SHA256, nonce []byte) digest.SHA256 {
	return transcript.Sum("foothold/static-binding/v1", []byte(role), []byte(reservation), previous[:], nonce)
}

// SurveyBinding is a quote's qualifying data where a host is asked for no VM.
func SurveyBinding(host string, nonce []byte) digest.SHA256 {
	return transcript.Sum("foothold/survey-binding/v1", []byte(RoleSurvey), []byte(host), nonce)
}

// Quote is the TPM's answer to TPM2_Quote: a marshalled TPMS_ATTEST and TPMT_SIGNATURE.
type Quote struct {
	Attest    []byte `json:"attest"`    // TPMS_ATTEST, at most 1 KiB
	Signature []byte `json:"signature"` // TPMT_SIGNATURE, at most 1 KiB
}

// Platform is what a host says about itself beside a quote: its measurement logs, read
// after the quote. They are believed only as far as they replay to quoted registers.
type Platform struct {
	// Log is the launcher's, which stands for the others in a lab.
	Log []pcr.Event `json:"log,omitempty"`
	// Firmware is the log of firmware and boot loader (protocol/tcglog), Kernel the list of
	// files that the kernel measured (protocol/imalog), each as the kernel gives it.
	Firmware []byte `json:"firmware,omitempty"`
	Kernel   []byte `json:"kernel,omitempty"`
	// Userspace is the log of what the host's system measured once the kernel ran
	// (protocol/systemdlog); absent where it keeps none.
	Userspace []byte `json:"userspace,omitempty"`
}
