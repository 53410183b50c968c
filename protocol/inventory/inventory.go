// Package inventory is the provider's signed list of hosts and their TPM keys
// (the seed's "trusted and verifiable inventory of valid attestation identity keys").
package inventory

import (
	"net/netip"
	"time"
)

// Persistent handles under which foothold-host keeps its keys in the TPM.
const (
	AIKHandle     = 0x81010020 // restricted signing key, ECDSA P-256 with SHA-256
	SessionHandle = 0x81010021 // restricted decryption key, ECC P-256, AES-128-CFB; salts sessions
	// TenantHandle stands for the tenant's own migrated key, where there is one, in the start
	// of a VM's session. Nothing lies there: the broker puts the key's handle in its place.
	TenantHandle = 0x81010022
)

// MaxEKChain bounds Host.EKChain. A firmware TPM certified on the die has five certificates
// there: three of the machine, two of the manufacturer.
const MaxEKChain = 8

// Inventory is the payload of a signed envelope with label signed.Inventory.
type Inventory struct {
	Provider string    `json:"provider"`
	Version  int       `json:"version"` // grows by one with each change
	Issued   time.Time `json:"issued"`
	Expires  time.Time `json:"expires"`
	Hosts    []Host    `json:"hosts"`
}

// Host is one hypervisor. AIK and Session are marshalled TPMT_PUBLIC.
type Host struct {
	Name     string         `json:"name"`     // DNS label, the name in its server certificate
	API      netip.AddrPort `json:"api"`      // management address
	Location string         `json:"location"` // site, row, rack, as the provider states it
	Asset    string         `json:"asset"`    // asset tag
	EK       []byte         `json:"ek"`       // DER of the EK certificate
	// EKChain is DER of the certificates between EK and its manufacturer's root, in any order.
	EKChain [][]byte `json:"ek_chain"`
	AIK     []byte   `json:"aik"`
	Session []byte   `json:"session"`
	// SessionCertify and SessionSignature are TPMS_ATTEST and TPMT_SIGNATURE of
	// TPM2_Certify(Session) by AIK.
	SessionCertify   []byte `json:"session_certify"`
	SessionSignature []byte `json:"session_signature"`
	Software         string `json:"software"` // platform release, a platform.Manifest name
}

// Find returns the host of that name.
func (inv *Inventory) Find(name string) (Host, bool) {
	for _, h := range inv.Hosts {
		if h.Name == name {
			return h, true
		}
	}
	return Host{}, false
}
