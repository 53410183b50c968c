package orchestrator

import (
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"foothold/internal/config"
	"foothold/protocol/platform"
	"foothold/protocol/vmspec"
	"foothold/protocol/zone"
	"foothold/tenant/policy"
	"foothold/tenant/reservation"
)

// ReadConfig reads the configuration file over the defaults and checks it.
func ReadConfig(file string) (Config, error) {
	d := reservation.Default()
	c := Config{
		Network:  Network{MTU: 1500},
		HostLost: lostClose, QuoteRefused: quoteClose,
		Limits: Limits{Reserved: d.Reserved, Booting: d.Booting, Unlocking: d.Unlocking, Connecting: d.Connecting, Lease: d.Lease,
			VMs: 64, MemoryMiB: 65536, BootsAtOnce: 16,
			AttestEvery: time.Minute, AttestWithin: 5 * time.Minute},
	}
	if err := config.Read(file, &c); err != nil {
		return c, err
	}
	if err := c.Validate(); err != nil {
		return c, fmt.Errorf("configuration %s: %w", file, err)
	}
	return c, nil
}

// Validate refuses a configuration with which the orchestrator could not decide.
func (c Config) Validate() error {
	var errs []error
	need := func(ok bool, field, want string) {
		if !ok {
			errs = append(errs, fmt.Errorf("%s: want %s", field, want))
		}
	}
	key := func(text, field string) {
		_, err := publicKey(text)
		need(err == nil, field, "an Ed25519 public key, 64 hexadecimal digits")
	}
	need(c.State != "", "state", "the directory that `foothold orchestrator init` made")
	need(c.Profile == platform.Lab || c.Profile == platform.Production, "profile", "lab or production")
	need(c.API != "", "api", "HOST:PORT or fd:N")
	need(c.Upstream.IsValid(), "upstream", "ADDRESS:PORT")
	need(vmspec.ValidName(c.Tenant), "tenant", "a lower-case DNS label")
	need(c.Inventory != "", "inventory", "a file")
	need(c.TPMRoots != "", "tpm_roots", "a PEM file of TPM manufacturers' authorities")
	need(c.Platform != "", "platform", "a file")
	need(c.HostLost == lostAlert || c.HostLost == lostClose || c.HostLost == lostTerminate, "host_lost", "alert, close or terminate")
	need(c.QuoteRefused == quoteClose || c.QuoteRefused == quoteTerminate, "quote_refused", "close or terminate")
	key(c.InventoryKey, "inventory_key")
	key(c.PlatformKey, "platform_key")
	key(c.ComponentKey, "component_key")
	need(c.Boot.Address.Addr().Is4() && c.Boot.Address.Port() != 0, "boot.address", "IPv4 ADDRESS:PORT")
	need(c.Boot.ServerName != "" && c.Boot.CA != "", "boot", "server_name and ca")
	need(c.Gateway.Admission.Addr().Is4() && c.Gateway.WireGuard.Addr().Is4(), "gateway", "admission and wireguard as IPv4 ADDRESS:PORT")
	need(c.Gateway.ServerName != "" && c.Gateway.CA != "", "gateway", "server_name and ca")
	need(c.Gateway.Pool.IsValid() && c.Gateway.Pool.Addr().Is4(), "gateway.pool", "the IPv4 prefix of tunnel addresses")
	need(c.Store.Address.Addr().Is4() && c.Store.ServerName != "", "store", "address and server_name")
	need(c.Network.Prefix.IsValid() && c.Network.Prefix.Contains(c.Network.Gateway), "network", "a prefix that contains gateway")
	need(c.Network.Self.Is4(), "network.self", "the orchestrator's IPv4 address")
	need(c.Network.MTU >= 1280 && c.Network.MTU <= 9000, "network.mtu", "1280 to 9000")
	need(c.Limits.VMs > 0 && c.Limits.MemoryMiB > 0 && c.Limits.BootsAtOnce > 0, "limits", "vms, memory_mib and boots_at_once above 0")
	need(c.Limits.AttestEvery >= time.Second && c.Limits.AttestEvery <= time.Hour && c.Limits.AttestWithin > c.Limits.AttestEvery && c.Limits.AttestWithin <= 24*time.Hour,
		"limits", "attest_every from 1s to 1h, and attest_within above it, at most 24h")
	errs = append(errs, c.pool().Validate(c.Network.Prefix), c.phaseLimits().Validate())
	for i, s := range c.Standing {
		need((s.Zone == zone.External || s.Zone == zone.Internal) && s.From.IsValid() && s.To.IsValid() && validFlow(s.Proto, s.Port),
			fmt.Sprintf("standing[%d]", i), "zone external or internal, from, to, proto tcp or udp, port")
	}
	for i, d := range c.Destinations {
		need(d.Prefix.IsValid() && validFlow(d.Proto, d.Port), fmt.Sprintf("destinations[%d]", i), "prefix, proto tcp or udp, port")
	}
	return errors.Join(errs...)
}

func validFlow(proto string, port int) bool {
	return (proto == "tcp" || proto == "udp") && port > 0 && port < 1<<16
}

func publicKey(text string) (ed25519.PublicKey, error) {
	key, err := hex.DecodeString(text)
	if err != nil || len(key) != ed25519.PublicKeySize {
		return nil, errors.New("not an Ed25519 public key in hexadecimal")
	}
	return key, nil
}

func (c Config) pool() policy.Pool { return policy.Pool{First: c.Network.First, Last: c.Network.Last} }

func (c Config) phaseLimits() reservation.Limits {
	l := c.Limits
	return reservation.Limits{Reserved: l.Reserved, Booting: l.Booting, Unlocking: l.Unlocking, Connecting: l.Connecting, Lease: l.Lease}
}

// heartbeat is how often a computing guest reports: three may be lost within a lease.
func (c Config) heartbeat() time.Duration { return max(c.Limits.Lease/4, time.Second) }

// policyNetwork is what the zone documents are made from.
func (c Config) policyNetwork() policy.Network {
	n := policy.Network{
		Orchestrator: c.Network.Self, BootServer: c.Boot.Address, Admission: c.Gateway.Admission, WireGuard: c.Gateway.WireGuard,
		Store: c.Store.Address, Lease: c.Limits.Lease, Clients: append([]netip.Prefix{}, c.WorkloadClients...),
	}
	for _, s := range c.Standing {
		n.Standing = append(n.Standing, policy.Standing(s))
	}
	for _, d := range c.Destinations {
		n.Destinations = append(n.Destinations, policy.Destination(d))
	}
	return n
}
