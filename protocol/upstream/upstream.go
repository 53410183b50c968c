// Package upstream is the orchestrator's API for the DMZ's daemons, over mutual TLS.
// The role in the client certificate decides which calls a daemon may make.
//
//	boot server  POST /v1/boot/open      OpenRequest → OpenResponse         spends T1
//	             POST /v1/boot/verdict   VerdictRequest → VerdictResponse   act 5
//	             POST /v1/boot/done      DoneRequest → {}
//	             POST /v1/boot/ready     ReadyRequest → {}                  spends T2
//	gateway      POST /v1/gateway/admit  AdmitRequest → AdmitResponse       spends T3
//	             POST /v1/gateway/agent  AgentRequest → signed.Envelope of agentmsg.Down
//	all          GET  /v1/zone           stream: one signed.Envelope a line, the newest first
//	             POST /v1/zone/report    zone.Report → {}
//	             POST /v1/events         []event.Event → {}
//
// A refusal is a status of 400 or above with Problem as body.
package upstream

import (
	"net/netip"
	"time"

	"foothold/internal/secret"
	"foothold/protocol/bootmsg"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/signed"
	"foothold/protocol/token"
)

// Paths.
const (
	PathBootOpen     = "/v1/boot/open"
	PathBootVerdict  = "/v1/boot/verdict"
	PathBootDone     = "/v1/boot/done"
	PathBootReady    = "/v1/boot/ready"
	PathGatewayAdmit = "/v1/gateway/admit"
	PathGatewayAgent = "/v1/gateway/agent"
	PathZone         = "/v1/zone"
	PathZoneReport   = "/v1/zone/report"
	PathEvents       = "/v1/events"
)

// MaxDetail bounds a failure's detail in bytes. It holds no secret.
const MaxDetail = 512

// MaxMessage bounds a message in bytes.
const MaxMessage = 4 << 20

// OpenRequest presents T1 for a VM at Source.
type OpenRequest struct {
	Token  token.Token `json:"token"`
	Source netip.Addr  `json:"source"`
	VMKey  []byte      `json:"vm_key"`
}

// OpenResponse gives the boot server what the TPM session needs. The public areas come
// from the tenant's copy of the inventory, or are of the tenant's own key; they are never
// read from the bus.
type OpenResponse struct {
	Reservation string `json:"reservation"`
	Nonce       []byte `json:"nonce"`
	AIK         []byte `json:"aik"`     // TPMT_PUBLIC of the host that acknowledged the VM
	Session     []byte `json:"session"` // TPMT_PUBLIC
	// Own: Session is the tenant's own key, which the host's TPM was given.
	Own      bool          `json:"own,omitempty"`
	Settings digest.SHA256 `json:"settings"` // VM configuration digest, part of the qualifying data
}

// VerdictRequest carries the boot server's end of the tunnel and the quote.
type VerdictRequest struct {
	Reservation  string         `json:"reservation"`
	Source       netip.Addr     `json:"source"`
	ExporterHash digest.SHA256  `json:"exporter_hash"` // SHA-256 of the exporter
	ServerLeaf   []byte         `json:"server_leaf"`   // DER
	LoaderLeaf   []byte         `json:"loader_leaf"`   // DER
	VMKey        []byte         `json:"vm_key"`
	Quote        evidence.Quote `json:"quote"`
}

// VerdictResponse is given for an admitted VM alone.
type VerdictResponse struct {
	Grant     bootmsg.Grant     `json:"grant"`
	Kernel    bootmsg.Component `json:"kernel"`    // which objects of the store to send
	Initramfs bootmsg.Component `json:"initramfs"` //
	Unique    []byte            `json:"unique"`    // archive made by package bundle; holds T2
}

// DoneRequest says how the boot conversation ended.
type DoneRequest struct {
	Reservation string              `json:"reservation"`
	Reason      event.Reason        `json:"reason,omitempty"` // absent: everything was delivered
	Detail      string              `json:"detail,omitempty"` // of a failure, at most MaxDetail bytes
	Delivered   []bootmsg.Component `json:"delivered,omitempty"`
}

// ReadyRequest relays the VM's report.
type ReadyRequest struct {
	Source netip.Addr      `json:"source"`
	Report signed.Envelope `json:"report"`
}

// AdmitRequest asks for the decision on a tunnel.
type AdmitRequest struct {
	T3          token.Token  `json:"t3"`
	User        string       `json:"user"`
	Password    secret.Bytes `json:"password"`
	Certificate []byte       `json:"certificate"` // DER, as verified in TLS by the gateway
	Source      netip.Addr   `json:"source"`
	Address     netip.Addr   `json:"address"` // from the gateway's pool
}

// AdmitResponse is given for an admitted VM alone. The peer is also in the gateway's
// next zone document.
type AdmitResponse struct {
	Reservation string        `json:"reservation"`
	Start       int           `json:"start"`
	Serial      string        `json:"serial"`
	PublicKey   []byte        `json:"public_key"` // the WireGuard key that the certificate names
	TTL         time.Duration `json:"ttl"`
}

// AgentRequest relays a message of a guest that came through the tunnel.
type AgentRequest struct {
	Address  netip.Addr      `json:"address"` // tunnel address it came from
	Serial   string          `json:"serial"`  // of the client certificate, decimal
	Envelope signed.Envelope `json:"envelope"`
}

// Problem is the body of every refusal.
type Problem struct {
	Reason event.Reason `json:"reason"`
	Detail string       `json:"detail"`
}
