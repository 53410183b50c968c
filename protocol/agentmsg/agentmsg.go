// Package agentmsg is what the guest says to the gateway (act 9) and, through the
// tunnel and the gateway's relay, to the orchestrator (acts 9 to 11).
//
//	POST /v1/admit   AdmitRequest → AdmitResponse          on the cloud network, mutual TLS
//	POST /v1/agent   signed.Envelope of Up → of Down       inside the tunnel, mutual TLS
//
// Up is signed by the VM's key (label signed.AgentUp), Down by the orchestrator's
// manifest key (label signed.AgentDown): the gateway relays and can forge neither.
// Each Up answers the nonce of the last Down, so nothing replays.
package agentmsg

import (
	"net/netip"

	"foothold/internal/secret"
	"foothold/protocol/audit"
	"foothold/protocol/digest"
	"foothold/protocol/token"
)

// Paths.
const (
	PathAdmit = "/v1/admit"
	PathAgent = "/v1/agent"
)

// TunnelPort is the UDP port of the VM's end of the tunnel. It is fixed, so that a
// gateway that has restarted knows where to call.
const TunnelPort = 51820

// MaxMessage bounds a message in bytes.
const MaxMessage = 3 << 20

// AdmitRequest asks for a tunnel. The client certificate travels in TLS and names
// the VM, its address and its WireGuard key.
type AdmitRequest struct {
	T3       token.Token  `json:"t3"`
	User     string       `json:"user"`
	Password secret.Bytes `json:"password"`
}

// AdmitResponse describes the tunnel. The pre-shared key is not in it: both ends take
// it from the TLS exporter (evidence.PSKLabel).
type AdmitResponse struct {
	Address    netip.Addr     `json:"address"`     // the VM's address inside the tunnel
	GatewayKey []byte         `json:"gateway_key"` // WireGuard public key of the gateway
	Endpoint   netip.AddrPort `json:"endpoint"`    // UDP
	Relay      netip.AddrPort `json:"relay"`       // agent API inside the tunnel, same name and CA as the admission's
	MTU        int            `json:"mtu"`
	Keepalive  int            `json:"keepalive"` // seconds
}

// Up is a message of the guest.
type Up struct {
	Reservation string        `json:"reservation"`
	Start       int           `json:"start"`
	Seq         int           `json:"seq"`             // from 1
	Nonce       []byte        `json:"nonce"`           // of the last Down; empty in the first
	Audit       *audit.Report `json:"audit,omitempty"` // when the last Down asked for it
	Workload    *Status       `json:"workload,omitempty"`
	Events      []string      `json:"events,omitempty"` // at most 32 lines of 256 bytes
}

// Status is the state of the workload.
type Status struct {
	SHA256 digest.SHA256 `json:"sha256"`
	State  string        `json:"state"` // fetching, running, failed, exited
	Detail string        `json:"detail,omitempty"`
}

// Down is the orchestrator's answer.
type Down struct {
	Reservation string    `json:"reservation"`
	Seq         int       `json:"seq"`   // of the Up it answers
	Nonce       []byte    `json:"nonce"` // for the next Up
	Audit       bool      `json:"audit"` // send an audit next, at once
	Workload    *Workload `json:"workload,omitempty"`
	Interval    int       `json:"interval"` // seconds until the next Up
	Stop        bool      `json:"stop"`     // erase and power off
}

// Workload is what the VM is there to run, pinned by digest.
type Workload struct {
	SHA256    digest.SHA256  `json:"sha256"`
	Size      int64          `json:"size"`
	Kind      string         `json:"kind"`  // "executable" or "tar" (gzip- or zstd-compressed or plain)
	Entry     string         `json:"entry"` // for tar: path of the executable inside
	Store     netip.AddrPort `json:"store"` // HTTPS, GET /v1/objects/SHA256
	StoreName string         `json:"store_name"`
	Port      int            `json:"port"` // TCP port that it serves on the tunnel address; 0: none
	Env       []string       `json:"env,omitempty"`
}
