// Package upstream is the DMZ daemons' side of the orchestrator's API: calls, the
// stream of zone documents, and the queue of events.
package upstream

import (
	"net/netip"

	"foothold/internal/mtls"
)

// Config says how a DMZ daemon reaches the orchestrator.
type Config struct {
	Address    netip.AddrPort `yaml:"address"`
	ServerName string         `yaml:"server_name"`
	TLS        mtls.Files     `yaml:"tls"`
	// ZoneKey verifies zone documents: the orchestrator's Ed25519 public key (hex).
	ZoneKey string `yaml:"zone_key"`
}

// Reads lists the files that this end reads.
func (c Config) Reads() []string { return append(c.TLS.Paths(), bootID) }
