// Package bootmsg is the conversation between a VM and the boot server: acts 4 to 7.
//
// It is HTTP/1.1 over exactly one TLS 1.3 connection, the boot tunnel; the state of
// the conversation belongs to the connection, and the loader never dials twice.
//
//	POST /v1/boot/open      OpenRequest   → OpenResponse      T1 in, nonce out
//	POST /v1/boot/attest    AttestRequest → AttestResponse    repeated: the answer carries the next
//	                                                          TPM command, the request its response
//	GET  /v1/boot/kernel, /v1/boot/initramfs, /v1/boot/unique  bytes, after admission
//	POST /v1/boot/done      DoneRequest   → {}                delivered, or why the loader gives up
//
// and, from the delivered system, on a new connection with the same pins:
//
//	POST /v1/ready          signed.Envelope of Report → {}    T2 in; the boot server only relays
//
// A refusal is an HTTP status with Refusal as body; it tells the VM no detail.
package bootmsg

import (
	"net/netip"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/signed"
	"foothold/protocol/token"
)

// Paths of the conversation.
const (
	PathOpen      = "/v1/boot/open"
	PathAttest    = "/v1/boot/attest"
	PathKernel    = "/v1/boot/kernel"
	PathInitramfs = "/v1/boot/initramfs"
	PathUnique    = "/v1/boot/unique"
	PathDone      = "/v1/boot/done"
	PathReady     = "/v1/ready"
)

// Limits in bytes.
const (
	MaxMessage   = 64 << 10  // any JSON message
	MaxUnique    = 64 << 10  // unique part
	MaxKernel    = 64 << 20  //
	MaxInitramfs = 256 << 20 //
)

// OpenRequest begins the conversation.
type OpenRequest struct {
	Token token.Token `json:"token"`  // T1
	VMKey []byte      `json:"vm_key"` // Ed25519 public key made by the loader for this start
}

// OpenResponse binds the connection to a reservation.
type OpenResponse struct {
	Reservation string `json:"reservation"`
	Nonce       []byte `json:"nonce"` // evidence.NonceLen bytes, context of the exporter
}

// AttestRequest drives the TPM session through the tunnel. The first one is sent
// when the host has said, over the local channel, that it holds the TPM for this VM.
type AttestRequest struct {
	Response []byte `json:"response,omitempty"` // TPM response to the last command; absent in the first request
}

// AttestResponse carries the next command, or the end.
type AttestResponse struct {
	Command []byte `json:"command,omitempty"`
	Grant   *Grant `json:"grant,omitempty"` // set once, instead of Command: the VM is admitted
}

// Grant is what an admitted VM may fetch. The loader believes neither the boot
// server nor this message, only the two signatures inside.
type Grant struct {
	Manifest   signed.Envelope `json:"manifest"`   // Manifest, by the orchestrator's manifest key
	Components signed.Envelope `json:"components"` // Components, by the organisation's component key
}

// Component is one delivered file.
type Component struct {
	Name   string        `json:"name"` // "kernel", "initramfs", "unique"
	SHA256 digest.SHA256 `json:"sha256"`
	Size   int64         `json:"size"`
}

// Components is signed off line, once a release of the shared components.
type Components struct {
	Release   string    `json:"release"`
	Created   time.Time `json:"created"`
	Kernel    Component `json:"kernel"`
	Initramfs Component `json:"initramfs"`
}

// Manifest says exactly what one start of one VM runs. Signed by the orchestrator
// after the verdict.
type Manifest struct {
	Reservation string        `json:"reservation"`
	Start       int           `json:"start"`
	VMKey       []byte        `json:"vm_key"` // the key that the quote admitted
	Tunnel      digest.SHA256 `json:"tunnel"` // the tunnel measurement that the quote admitted
	Kernel      Component     `json:"kernel"`
	Initramfs   Component     `json:"initramfs"`
	Unique      Component     `json:"unique"`
	Cmdline     string        `json:"cmdline"`
	Expires     time.Time     `json:"expires"`
}

// Unique is the small part of the initramfs that belongs to one start of one VM.
// It holds no private key. Its JSON lies at bundle.UniquePath.
type Unique struct {
	Reservation   string      `json:"reservation"`
	Start         int         `json:"start"`
	Name          string      `json:"name"`           // host name
	Account       string      `json:"account"`        // the one account that may log in
	AuthorizedKey []byte      `json:"authorized_key"` // its SSH public key, wire format
	T2            token.Token `json:"t2"`
	Network       Network     `json:"network"`
	BootURL       string      `json:"boot_url"`
	ServerName    string      `json:"server_name"`
	BootCA        []byte      `json:"boot_ca"`      // DER
	ManifestKey   []byte      `json:"manifest_key"` // verifies what the orchestrator signs later
	Orchestrator  netip.Addr  `json:"orchestrator"` // the one address that may open SSH
}

// Network is the delivered system's static configuration on the cloud network.
type Network struct {
	MAC     string       `json:"mac"`
	Address netip.Prefix `json:"address"`
	Gateway netip.Addr   `json:"gateway"`
	MTU     int          `json:"mtu"`
}

// DoneRequest ends the conversation. A reason other than "" is one of the event
// package's codes: the loader then powers the VM off.
type DoneRequest struct {
	Reason string `json:"reason,omitempty"`
}

// Report is the payload of the ready report, label signed.Report, signed by the VM's key.
type Report struct {
	Reservation string      `json:"reservation"`
	Start       int         `json:"start"`
	T2          token.Token `json:"t2"`
	Kernel      string      `json:"kernel"`      // uname -r
	BootMillis  int64       `json:"boot_millis"` // since the delivered kernel started
}

// Refusal is the body of every refusal to a VM.
type Refusal struct {
	Error string `json:"error"` // always "refused"
}
