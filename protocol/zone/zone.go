// Package zone is the desired state of one DMZ daemon, as one signed document.
//
// The orchestrator signs a new revision whenever the state should change and when the
// lease of the last one is half over. A daemon takes a document only if its zone is
// its own, its epoch and revision are higher than the highest it has persisted, and
// the signature is the orchestrator's; it then makes the state so, and reports what it
// reads back. Durations run from receipt on the boot-time clock, so no daemon's wall
// clock matters.
package zone

import (
	"net/netip"
	"time"

	"foothold/protocol/digest"
)

// Zones, one a daemon.
const (
	External = "external" // firewall between cloud network and DMZ
	Internal = "internal" // firewall between DMZ, tenant network and provider management
	Gateway  = "gateway"  //
	Boot     = "boot"     // boot server
)

// MaxDocument bounds an encoded document in bytes: 10,000 VMs with three flows each.
const MaxDocument = 32 << 20

// Document is the payload of a signed envelope with label signed.Zone.
type Document struct {
	Zone     string        `json:"zone"`
	Epoch    int64         `json:"epoch"`    // grows when the ledger was restored
	Revision int64         `json:"revision"` // grows with each document of an epoch
	Issued   time.Time     `json:"issued"`   // for people
	Lease    time.Duration `json:"lease"`    // nanoseconds from receipt; afterwards nothing dynamic is left open
	Flows    []Flow        `json:"flows,omitempty"`
	Peers    []Peer        `json:"peers,omitempty"` // gateway
	Boots    []Boots       `json:"boots,omitempty"` // boot server
}

// Flow is one permitted kind of connection. The initiator is From; packets back are
// permitted only while the flow is, so nothing outlives it.
type Flow struct {
	ID          string        `json:"id"`                    // stable across revisions
	Reservation string        `json:"reservation,omitempty"` // absent: a standing flow between daemons
	Phase       string        `json:"phase,omitempty"`
	From        Endpoint      `json:"from"`
	To          Endpoint      `json:"to"`
	Proto       string        `json:"proto"` // tcp, udp
	Port        int           `json:"port"`  // of To
	TTL         time.Duration `json:"ttl"`   // from receipt; 0: the document's lease for a VM's flow, no end for a standing one
}

// Endpoint is one side of a flow. MAC is given where the firewall is adjacent on
// layer 2, else absent.
type Endpoint struct {
	Prefix netip.Prefix `json:"prefix"`
	MAC    string       `json:"mac,omitempty"`
}

// Peer is one admitted tunnel.
type Peer struct {
	Reservation string        `json:"reservation"`
	Start       int           `json:"start"`
	Serial      string        `json:"serial"`      // of the certificate that it was admitted with, decimal
	PublicKey   []byte        `json:"public_key"`  // WireGuard, from that certificate
	Address     netip.Addr    `json:"address"`     // inside the tunnel
	Source      netip.Addr    `json:"source"`      // on the cloud network
	Quarantined bool          `json:"quarantined"` // reaches only the gateway itself
	TTL         time.Duration `json:"ttl"`         // from receipt
}

// Boots is one address that may open a connection to the boot server.
type Boots struct {
	Reservation string        `json:"reservation"`
	Start       int           `json:"start"`
	Address     netip.Addr    `json:"address"`
	TTL         time.Duration `json:"ttl"` // from receipt
}

// Report is what a daemon says after it has made a document so.
type Report struct {
	Zone     string        `json:"zone"`
	Epoch    int64         `json:"epoch"`
	Revision int64         `json:"revision"`
	Document digest.SHA256 `json:"document"` // of the payload
	Live     []Live        `json:"live"`     // read back from the kernel, not from memory
	Error    string        `json:"error,omitempty"`
}

// Live is one element read back.
type Live struct {
	ID          string        `json:"id"` // of the flow, or of the peer's reservation
	Reservation string        `json:"reservation,omitempty"`
	Rule        string        `json:"rule"` // for people: "10.82.0.10 02:00:.. → 10.81.0.10 tcp 443"
	Remaining   time.Duration `json:"remaining"`
	Packets     uint64        `json:"packets"`
}
