// Package orchestrator decides: reservations, verdicts, releases, one file an act.
package orchestrator

import (
	"net/netip"
	"time"

	"foothold/internal/mtls"
	"foothold/tenant/verify"
)

// Config is the orchestrator's configuration file.
type Config struct {
	// State is the directory of ledger, vault and journal. Made by `foothold orchestrator init`.
	State string `yaml:"state"`
	// Profile of platform documents that this installation accepts: lab or production.
	Profile string `yaml:"profile"`
	// API listens for operators: HOST:PORT, or fd:N for a listening socket handed in as an open file.
	API string `yaml:"api"`
	// Upstream listens for the DMZ's daemons.
	Upstream netip.AddrPort `yaml:"upstream"`
	// OperatorTLS serves the API; its CA issues operators' certificates.
	OperatorTLS mtls.Files `yaml:"operator_tls"`
	// UpstreamTLS serves the DMZ's daemons; its CA issues their certificates.
	UpstreamTLS mtls.Files `yaml:"upstream_tls"`
	// StoreTLS reaches the DMZ's store.
	StoreTLS mtls.Files `yaml:"store_tls"`
	// HostTLS reaches the provider's hosts; its CA is the provider's.
	HostTLS mtls.Files `yaml:"host_tls"`
	// Tenant is this organisation's name at the provider.
	Tenant string `yaml:"tenant"`

	// Inventory is the provider's signed inventory, InventoryKey the provider's public key (hex).
	// The file is the first one: `foothold inventory import` takes later versions, which count from then on.
	Inventory    string `yaml:"inventory"`
	InventoryKey string `yaml:"inventory_key"`
	// TPMRoots is a PEM file of the authorities of TPM manufacturers; every host's endorsement
	// certificate must chain to one of them.
	TPMRoots string `yaml:"tpm_roots"`
	// OwnSessionKey: boot servers' sessions with the hosts' TPMs are salted to a key of our
	// own, which each TPM takes from us, and not to the inventory's session key [false].
	OwnSessionKey bool `yaml:"own_session_key,omitempty"`
	// Platform is the signed reference values, PlatformKey the public key that signs them (hex).
	// The file is the first one, too: see `foothold platform manifest import`.
	Platform    string `yaml:"platform"`
	PlatformKey string `yaml:"platform_key"`
	// HostPolicy is what hosts must be beside their release's reference values: by default,
	// and what differs for single hosts. In production it must name locations.
	HostPolicy verify.Policies `yaml:"host_policy,omitempty"`
	// HostLost is what becomes of VMs that run on a host which lost its good standing, because it left
	// the inventory, has other keys, failed an audit in person, or its release has no reference values
	// left: alert, close or terminate [close]. A refused quote is quote_refused's, and limits.attest_within holds whatever this says.
	HostLost string `yaml:"host_lost"`
	// QuoteRefused is what becomes of a VM that has computed when a later quote of its host is
	// refused: close or terminate [close]. One that has not is ended whatever this says.
	QuoteRefused string `yaml:"quote_refused"`
	// ComponentKey is the organisation's off-line component key, public part (hex).
	ComponentKey string `yaml:"component_key"`

	Boot    Boot    `yaml:"boot"`
	Gateway Gateway `yaml:"gateway"`
	Store   Store   `yaml:"store"`
	Network Network `yaml:"network"`
	Limits  Limits  `yaml:"limits"`
	// Standing flows between daemons, for the firewalls' documents.
	Standing []Standing `yaml:"standing"`
	// Destinations that a computing VM may reach from its tunnel address.
	Destinations []Destination `yaml:"destinations"`
	// WorkloadClients may reach workloads on their tunnel addresses.
	WorkloadClients []netip.Prefix `yaml:"workload_clients"`
}

// Boot describes the boot server as VMs see it.
type Boot struct {
	Address    netip.AddrPort `yaml:"address"`
	ServerName string         `yaml:"server_name"`
	CA         string         `yaml:"ca"` // PEM file: the boot CA
}

// Gateway describes the gateway as VMs see it.
type Gateway struct {
	Admission  netip.AddrPort `yaml:"admission"`
	WireGuard  netip.AddrPort `yaml:"wireguard"`
	ServerName string         `yaml:"server_name"`
	CA         string         `yaml:"ca"` // PEM file: CA of its VM-facing certificate
	// Pool is the prefix of tunnel addresses, as in the gateway's own configuration.
	Pool netip.Prefix `yaml:"pool"`
}

// Store describes the DMZ's store, for the orchestrator and for VMs.
type Store struct {
	Address    netip.AddrPort `yaml:"address"`
	ServerName string         `yaml:"server_name"`
}

// Network is the pool of VM addresses on the cloud network.
type Network struct {
	Prefix  netip.Prefix `yaml:"prefix"`  // with the router's prefix length
	Gateway netip.Addr   `yaml:"gateway"` // external firewall, cloud side
	First   netip.Addr   `yaml:"first"`   // pool bounds, inclusive
	Last    netip.Addr   `yaml:"last"`
	MTU     int          `yaml:"mtu"` // default 1500
	// Self is the orchestrator's address, from which it opens SSH.
	Self netip.Addr `yaml:"self"`
}

// Limits bounds phases and amounts. Durations like "60s"; the defaults are in brackets.
type Limits struct {
	Reserved   time.Duration `yaml:"reserved"`   // [30s]
	Booting    time.Duration `yaml:"booting"`    // [60s]
	Unlocking  time.Duration `yaml:"unlocking"`  // [60s]
	Connecting time.Duration `yaml:"connecting"` // [90s]
	Lease      time.Duration `yaml:"lease"`      // [60s] computing, renewed by each good heartbeat
	VMs        int           `yaml:"vms"`        // [64] live VMs
	MemoryMiB  int           `yaml:"memory_mib"` // [65536] of live VMs together
	// BootsAtOnce is how many VMs may be in phase booting at one host [16]; others wait
	// their turn while they are reserved.
	BootsAtOnce int `yaml:"boots_at_once"`
	// AttestEvery lies between two quotes of a computing VM's host [1m]. A host that gives no
	// good one for AttestWithin [5m] loses the VM: its rules and its tunnel are closed.
	AttestEvery  time.Duration `yaml:"attest_every"`
	AttestWithin time.Duration `yaml:"attest_within"`
}

// Standing is a flow between daemons in the document of one firewall.
type Standing struct {
	Zone  string       `yaml:"zone"` // external or internal
	From  netip.Prefix `yaml:"from"`
	To    netip.Prefix `yaml:"to"`
	Proto string       `yaml:"proto"`
	Port  int          `yaml:"port"`
}

// Destination is what a computing VM may reach.
type Destination struct {
	Prefix netip.Prefix `yaml:"prefix"`
	Proto  string       `yaml:"proto"`
	Port   int          `yaml:"port"`
}
