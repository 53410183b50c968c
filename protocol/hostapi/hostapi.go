// Package hostapi is the provider's API of one host, called by a tenant's orchestrator
// over mutual TLS. Every call is authorised for the tenant named in the client
// certificate; one tenant cannot see another's VMs.
//
//	POST   /v1/vms              CreateRequest → VM     idempotent by reservation and start
//	POST   /v1/vms/ID/start     → VM                   idempotent
//	GET    /v1/vms              → []VM
//	GET    /v1/vms/ID           → VM                   ?wait=STATE holds the answer up to 30 s for a change
//	GET    /v1/vms/ID/console   text                   output-only console, last 1 MiB
//	DELETE /v1/vms/ID           → VM                   stops it; absent already is success: {}
//	GET    /v1/volumes          → []Volume
//	DELETE /v1/volumes/ID       → {}
//	POST   /v1/quote            QuoteRequest → QuoteResponse
//	POST   /v1/activate         ActivateRequest → ActivateResponse
//	GET    /v1/platform         → evidence.Platform
//	GET    /v1/inventory        signed.Envelope        the newest that the provider published
//	GET    /v1/inventory/digest → InventoryDigest      of the same, to compare over another way
//	PUT    /v1/templates/SHA256 bytes                  refused unless the bytes hash to the name
//	GET    /v1/templates        → []Template
//	DELETE /v1/templates/SHA256 → {}
package hostapi

import (
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/token"
	"foothold/protocol/vmspec"
)

// MaxMessage bounds a JSON message in bytes.
const MaxMessage = 64 << 10

// CreateRequest asks for a VM. T1 travels beside the settings, which hold its digest.
type CreateRequest struct {
	Spec  vmspec.Spec `json:"spec"`
	Token token.Token `json:"token"`
}

// MaxDetail bounds VM.Detail in bytes.
const MaxDetail = 300

// States of a VM on a host.
const (
	Created = "created" // disks and settings are there
	Running = "running" // QEMU runs
	Stopped = "stopped" // ended, with Reason
)

// Boot stages of a running VM.
const (
	Waiting   = "waiting"   // for the loader's tunnel
	Attesting = "attesting" // its measurements are taken down, its quote is awaited
	Quoted    = "quoted"    // in its turn with the TPM
	Delivered = "delivered" // the loader handed over
)

// VM is what a host says of one VM. Its id is the reservation's.
type VM struct {
	ID       string          `json:"id"`
	Start    int             `json:"start"`
	Name     string          `json:"name"`
	Host     string          `json:"host"`
	State    string          `json:"state"`
	Boot     string          `json:"boot,omitempty"`
	Settings digest.SHA256   `json:"settings"` // digest of the settings it runs with
	Firmware vmspec.Firmware `json:"firmware"` // digests of what it was given
	Created  time.Time       `json:"created"`
	Started  time.Time       `json:"started,omitzero"`
	Ended    time.Time       `json:"ended,omitzero"`
	Reason   event.Reason    `json:"reason,omitempty"`
	Detail   string          `json:"detail,omitempty"`   // of the reason: which TPM command was refused, for instance; at most MaxDetail
	TPMHeld  time.Duration   `json:"tpm_held,omitempty"` // nanoseconds that the TPM was held for it
	Dropped  Dropped         `json:"dropped,omitzero"`
}

// Dropped counts the frames of one start of a VM that the host's bridge dropped.
type Dropped struct {
	OtherSource uint64 `json:"other_source,omitempty"` // under another source address than the VM's
	Neighbour   uint64 `json:"neighbour,omitempty"`    // under its own, to another VM of the host
}

// QuoteRequest asks for a static quote over pcr.StaticSelection.
type QuoteRequest struct {
	QualifyingData digest.SHA256 `json:"qualifying_data"`
}

// QuoteResponse carries it, with the log that replays to it.
type QuoteResponse struct {
	Quote    evidence.Quote    `json:"quote"`
	Platform evidence.Platform `json:"platform"`
}

// InventoryDigest names the inventory that a host serves. It is the host's word: the
// provider's signature is on the inventory itself.
type InventoryDigest struct {
	Version int           `json:"version"`
	SHA256  digest.SHA256 `json:"sha256"` // of the envelope's payload
}

// ActivateRequest challenges the host's TPM to prove that it holds the inventory's AIK
// (TPM 2.0 Library, part 3, TPM2_ActivateCredential). Package internal/tpm makes and
// answers challenges.
type ActivateRequest struct {
	Blob   []byte `json:"blob"`   // TPMS_ID_OBJECT, at most 128 bytes
	Secret []byte `json:"secret"` // seed, encrypted to the endorsement key, at most 256 bytes
}

// MigratedKey is a tenant's own key for sessions with the host's TPM (package
// internal/tpm), in the place of the inventory's. It is encrypted to the inventory's
// session key; only that TPM can take it.
type MigratedKey struct {
	Public    []byte `json:"public"`    // TPMT_PUBLIC
	Duplicate []byte `json:"duplicate"` // TPM2B_PRIVATE's buffer, at most 256 bytes
	Seed      []byte `json:"seed"`      // TPM2B_ENCRYPTED_SECRET's buffer, at most 68 bytes
}

// ActivateResponse carries what only that TPM could recover.
type ActivateResponse struct {
	Credential []byte `json:"credential"`
}

// Template is a stored template image.
type Template struct {
	SHA256 digest.SHA256 `json:"sha256"`
	Size   int64         `json:"size"`
	Users  int           `json:"users"` // VMs that have it attached
}

// Volume is a stored volume.
type Volume struct {
	ID       string `json:"id"`
	Size     int64  `json:"size"`     // bytes, as the VM sees it
	Attached bool   `json:"attached"` // a VM that has not ended has it
}

// Problem is the body of every refusal.
type Problem struct {
	Reason event.Reason `json:"reason"`
	Detail string       `json:"detail"`
}
