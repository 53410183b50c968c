// Package unlockmsg is the conversation over the unlock channel: an SSH connection
// from the orchestrator to the VM (act 8), one session, subsystem [Subsystem], framed
// as in package frame.
//
//	orchestrator                     guest
//	AuditRequest               →
//	                           ←     AuditReply       facts, and public keys to certify
//	Handover                   →                      only if the audit passed
//	                           ←     HandoverReply    what the guest made of it
//
// Secrets travel in Handover alone and stay in the guest's memory.
package unlockmsg

import (
	"net/netip"

	"foothold/internal/secret"
	"foothold/protocol/audit"
	"foothold/protocol/digest"
	"foothold/protocol/token"
)

// Subsystem is the SSH subsystem that carries the conversation.
const Subsystem = "foothold-unlock"

// MaxFrame bounds a frame in bytes: two LUKS2 headers in base64 and an audit.
const MaxFrame = 4 << 20

// AuditRequest asks for the first audit.
type AuditRequest struct {
	Nonce []byte `json:"nonce"`
}

// AuditReply answers it. The private halves of the keys never leave the VM.
type AuditReply struct {
	Report       audit.Report `json:"report"`
	Request      []byte       `json:"request"`       // DER of a PKCS #10 request; only its key counts, names are ignored
	WireGuardKey []byte       `json:"wireguard_key"` // Curve25519 public key, 32 bytes
}

// Disk opens one encrypted disk.
type Disk struct {
	Device     string       `json:"device"`     // "vda", "vdb"
	Header     []byte       `json:"header"`     // detached LUKS2 header, fresh for this start
	Passphrase secret.Bytes `json:"passphrase"` // of its one key slot, fresh for this start
	Format     bool         `json:"format"`     // make a file system first: the volume's first start only
	// Authenticated: a tag beside each sector shows that it was altered or moved
	// (dm-integrity). Never the template's, which verity covers.
	Authenticated bool `json:"authenticated,omitempty"`
}

// Verity pins the template's content.
type Verity struct {
	RootHash   digest.SHA256 `json:"root_hash"`
	HashOffset int64         `json:"hash_offset"` // bytes: data ends and the hash area (with its superblock) begins here
}

// Handover is everything the VM gets for one start.
type Handover struct {
	Template    Disk         `json:"template"`
	Verity      Verity       `json:"verity"`
	Volume      Disk         `json:"volume"`
	T3          token.Token  `json:"t3"`
	User        string       `json:"user"`
	Password    secret.Bytes `json:"password"`
	Certificate []byte       `json:"certificate"` // DER, for the key in AuditReply.Request
	Gateway     Gateway      `json:"gateway"`
}

// Gateway is where the VM asks for admission.
type Gateway struct {
	Address    netip.AddrPort `json:"address"`     // admission HTTPS
	ServerName string         `json:"server_name"` //
	CA         []byte         `json:"ca"`          // DER of the CA that issued its certificate
}

// HandoverReply ends the conversation.
type HandoverReply struct {
	OK     bool   `json:"ok"`
	Reason string `json:"reason,omitempty"` // a code of package event

	FailedLogins int `json:"failed_logins,omitempty"` // connections so far that did not become the one login, the orchestrator's own probes among them
}
