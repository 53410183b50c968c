// Package vmspec is a VM's settings and their canonical form: what the tenant asks
// for, what the host derives QEMU's arguments from, what the loader finds in
// fw_cfg, and what PCR 16 measures. The tenant predicts the measurement from its own
// copy; the host computes it from what it really runs.
package vmspec

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"regexp"

	"foothold/protocol/digest"
	"foothold/protocol/pcr"
	"foothold/protocol/transcript"
)

// fw_cfg items through which the host hands settings to the loader.
const (
	FwCfgSettings = "opt/foothold/settings" // JSON of Spec
	FwCfgToken    = "opt/foothold/token"    // text of T1
)

// ChannelPort is the virtio-serial port of the VM's local channel to the host.
const ChannelPort = "foothold.channel.0"

// Spec is a VM's settings for one start. It holds no secret: T1 travels beside it.
type Spec struct {
	Reservation string        `json:"reservation"`  // UUID of the reservation
	Start       int           `json:"start"`        // which start of this VM, from 1
	Tenant      string        `json:"tenant"`       // name of the tenant at the provider
	Name        string        `json:"name"`         // the VM's name
	VCPUs       int           `json:"vcpus"`        // 1-64
	MemoryMiB   int           `json:"memory_mib"`   // 256-1048576
	Network     Network       `json:"network"`      //
	Boot        Boot          `json:"boot"`         //
	TokenDigest digest.SHA256 `json:"token_digest"` // SHA-256 of T1's text
	Template    digest.SHA256 `json:"template"`     // SHA-256 of the template's ciphertext, disk vda, read-only
	Volume      Volume        `json:"volume"`       // disk vdb
}

// Network is the VM's address on the cloud network, set statically by the loader.
type Network struct {
	MAC     string       `json:"mac"`     // lower-case, colon-separated, locally administered, unicast
	Address netip.Prefix `json:"address"` // IPv4 address and prefix length
	Gateway netip.Addr   `json:"gateway"` // next hop towards the DMZ
	MTU     int          `json:"mtu"`     // 1280-9000
	DHCP    bool         `json:"dhcp"`    // take address and gateway from DHCP instead; what is measured is that choice
}

// Boot says where the loader may boot from and whom it may believe.
type Boot struct {
	URL          string `json:"url"`           // https://HOST:PORT of the boot server
	ServerName   string `json:"server_name"`   // DNS name its certificate must carry
	CA           []byte `json:"ca"`            // DER of the boot CA's certificate
	ManifestKey  []byte `json:"manifest_key"`  // Ed25519 public key that signs this VM's manifest
	ComponentKey []byte `json:"component_key"` // Ed25519 public key that signs the shared components
}

// Volume is the VM's own disk.
type Volume struct {
	ID      string `json:"id"`       // UUID
	SizeMiB int    `json:"size_mib"` // 64-1048576
}

var (
	uuidForm = regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$`)
	nameForm = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)
	macForm  = regexp.MustCompile(`^[0-9a-f][26ae](:[0-9a-f]{2}){5}$`)
)

// ValidName reports whether name can name a VM, tenant or template: a DNS label
// (RFC 1123), lower case.
func ValidName(name string) bool { return nameForm.MatchString(name) }

// ValidID reports whether id is a UUID in its canonical text form.
func ValidID(id string) bool { return uuidForm.MatchString(id) }

// Validate checks every field's form and bounds; it knows no policy.
func (s *Spec) Validate() error {
	bad := func(field, want string) error { return fmt.Errorf("vm settings: %s: want %s", field, want) }
	switch {
	case !ValidID(s.Reservation):
		return bad("reservation", "a UUID")
	case s.Start < 1:
		return bad("start", "a number from 1")
	case !ValidName(s.Tenant):
		return bad("tenant", "a lower-case DNS label")
	case !ValidName(s.Name):
		return bad("name", "a lower-case DNS label")
	case s.VCPUs < 1 || s.VCPUs > 64:
		return bad("vcpus", "1 to 64")
	case s.MemoryMiB < 256 || s.MemoryMiB > 1<<20:
		return bad("memory_mib", "256 to 1048576")
	case !macForm.MatchString(s.Network.MAC):
		return bad("network.mac", "a locally administered unicast address in lower case")
	case !s.Network.Address.IsValid() || !s.Network.Address.Addr().Is4():
		return bad("network.address", "an IPv4 address with prefix length")
	case !s.Network.Gateway.Is4() || !s.Network.Address.Contains(s.Network.Gateway) || s.Network.Gateway == s.Network.Address.Addr():
		return bad("network.gateway", "another IPv4 address of the same network")
	case s.Network.MTU < 1280 || s.Network.MTU > 9000:
		return bad("network.mtu", "1280 to 9000")
	case s.Boot.ServerName == "" || len(s.Boot.ServerName) > 253:
		return bad("boot.server_name", "a DNS name")
	case len(s.Boot.CA) == 0 || len(s.Boot.CA) > 8192:
		return bad("boot.ca", "the DER of one certificate")
	case len(s.Boot.ManifestKey) != 32:
		return bad("boot.manifest_key", "an Ed25519 public key")
	case len(s.Boot.ComponentKey) != 32:
		return bad("boot.component_key", "an Ed25519 public key")
	case s.TokenDigest.IsZero():
		return bad("token_digest", "the SHA-256 of T1")
	case s.Template.IsZero():
		return bad("template", "the SHA-256 of a template")
	case !ValidID(s.Volume.ID):
		return bad("volume.id", "a UUID")
	case s.Volume.SizeMiB < 64 || s.Volume.SizeMiB > 1<<20:
		return bad("volume.size_mib", "64 to 1048576")
	}
	u, err := url.Parse(s.Boot.URL)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.Path != "" || u.RawQuery != "" || u.User != nil || u.Fragment != "" {
		return errors.New("vm settings: boot.url: want https://HOST:PORT")
	}
	return nil
}

// Digest is the VM configuration digest: the canonical form of every field.
func (s *Spec) Digest() digest.SHA256 {
	num := func(n int) []byte { return binary.BigEndian.AppendUint64(nil, uint64(n)) }
	dhcp := []byte{0}
	if s.Network.DHCP {
		dhcp[0] = 1
	}
	return transcript.Sum("foothold/vm-settings/v1",
		[]byte(s.Reservation), num(s.Start), []byte(s.Tenant), []byte(s.Name), num(s.VCPUs), num(s.MemoryMiB),
		[]byte(s.Network.MAC), []byte(s.Network.Address.String()), []byte(s.Network.Gateway.String()), num(s.Network.MTU), dhcp,
		[]byte(s.Boot.URL), []byte(s.Boot.ServerName), s.Boot.CA, s.Boot.ManifestKey, s.Boot.ComponentKey,
		s.TokenDigest[:], s.Template[:], []byte(s.Volume.ID), num(s.Volume.SizeMiB))
}

// Firmware is what a VM runs before the tenant's components arrive, by SHA-256 of
// the bytes that QEMU is given.
type Firmware struct {
	BIOS            digest.SHA256 `json:"bios"`
	LoaderKernel    digest.SHA256 `json:"loader_kernel"`
	LoaderInitramfs digest.SHA256 `json:"loader_initramfs"`
	LoaderCmdline   string        `json:"loader_cmdline"`
}

// Measurements lists what PCR 16 is extended with, in order.
func Measurements(fw Firmware, settings digest.SHA256) []pcr.Event {
	return []pcr.Event{
		{PCR: pcr.VM, Digest: fw.BIOS, Name: "vm firmware"},
		{PCR: pcr.VM, Digest: fw.LoaderKernel, Name: "vm loader kernel"},
		{PCR: pcr.VM, Digest: fw.LoaderInitramfs, Name: "vm loader initramfs"},
		{PCR: pcr.VM, Digest: digest.Of([]byte(fw.LoaderCmdline)), Name: "vm loader command line"},
		{PCR: pcr.VM, Digest: settings, Name: "vm settings"},
	}
}
