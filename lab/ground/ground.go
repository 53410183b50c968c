// Package ground makes what the lab's daemons stand on before the first of them
// starts: authorities and certificates, off-line keys, the host's TPM and its entry
// in the provider's inventory, the provider's platform release with the tenant's
// reference values for it, and every daemon's configuration.
//
// It plays each organisation's part in its own folder. The tenant's folder holds the
// orchestrator's state and the tenant's off-line keys; the provider's folder its own
// authority, inventory key, TPM and release; a DMZ daemon's folder its certificates
// alone. Only public parts are copied from one folder to another.
//
// [Make] may run at every start of a lab. Keys, TPM, enrolment and release are made
// once; certificates and configurations are written anew, so that a lab made by an
// older version goes on. A crash leaves nothing that the next run does not finish.
package ground

import (
	"context"
	"crypto/ed25519"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"foothold/client"
	"foothold/internal/durable"
	"foothold/internal/mtls"
	"foothold/internal/signingkey"
	"foothold/lab"
	"foothold/tenant/authority"
	"foothold/tenant/orchestrator"
)

// Names in the lab.
const (
	TenantName   = "example"
	HostName     = "host-1"
	HostAsset    = "LAB-0001" // asset tag, also of its chassis
	ProviderName = "lab-provider"

	orchestratorDNS = "orchestrator.foothold.internal"
	bootDNS         = "boot.foothold.internal"
	gatewayDNS      = "gateway.foothold.internal"
	storeDNS        = "store.foothold.internal"
	hostDNS         = HostName + ".host.provider.internal"
)

// Ports.
const (
	upstreamPort  = 8443
	bootPort      = 443
	admissionPort = 8443
	wireguardPort = 51820
	relayPort     = 8443
	storePort     = 8443
	hostPort      = 8443
)

// lifetime of daemons' certificates; every start of the lab issues new ones.
const lifetime = 90 * 24 * time.Hour

// Options say where things come from.
type Options struct {
	Binaries string // folder of foothold-host, foothold-loader, foothold-guest
	Cache    string // folder that keeps downloaded kernels, shared by all labs of the user
	API      string // address of the operator API
	Accel    string // kvm or tcg
	// Patience multiplies every phase's time limit, for machines that are slow or
	// busy. 1 is what a real installation has.
	Patience int
}

// Report is told of each part: what it was, and how long it took.
type Report func(what string, took time.Duration)

// maker is one run of Make.
type maker struct {
	lab.State
	Options
	report Report

	tenant   *authority.Set
	provider *authority.Set
	init     orchestrator.InitResult

	componentKey, platformKey, inventoryKey ed25519.PrivateKey
}

// Make makes the ground, or what of it is missing.
func Make(ctx context.Context, state lab.State, o Options, report Report) error {
	m := &maker{State: state, Options: o, report: report}
	for _, part := range []struct {
		what string
		make func(context.Context) error
	}{
		{"make the tenant's authorities and keys", m.makeTenant},
		{"make the provider's authority and keys", m.makeProvider},
		{"issue certificates to daemons", m.issueAll},
		{"write configurations", m.configureAll},
		{"make the host's TPM", m.makeTPM},
		{"install the platform release", m.installRelease},
		{"enrol the host, publish the inventory", m.publish},
		{"write the operator's context", m.writeContext},
	} {
		began := time.Now()
		if err := part.make(ctx); err != nil {
			return fmt.Errorf("%s: %w", part.what, err)
		}
		report(part.what, time.Since(began))
	}
	return nil
}

func (m *maker) makeTenant(ctx context.Context) (err error) {
	dir := m.Tenant("orchestrator")
	if m.init, err = orchestrator.Init(ctx, dir); err != nil {
		return err
	}
	if _, m.tenant, err = orchestrator.Open(dir); err != nil {
		return err
	}
	if err := folders(m.Tenant("offline"), m.Tenant("tls"), m.Tenant("operator")); err != nil {
		return err
	}
	if m.componentKey, err = signingkey.Ensure(m.ComponentKeyFile()); err != nil {
		return err
	}
	m.platformKey, err = signingkey.Ensure(m.Tenant("offline", "platform.key"))
	return err
}

// ComponentKeyFile is the organisation's off-line key for boot components.
func (m *maker) ComponentKeyFile() string { return m.Tenant("offline", "component.key") }

func (m *maker) makeProvider(context.Context) (err error) {
	if err := folders(m.Provider("offline"), m.Provider("tls"), m.Provider("state")); err != nil {
		return err
	}
	if m.provider, err = openProvider(m.Provider("authority")); err != nil {
		return err
	}
	m.inventoryKey, err = signingkey.Ensure(m.Provider("offline", "inventory.key"))
	return err
}

func (m *maker) writeContext(context.Context) error {
	operator := authority.Request{Identity: mtls.Identity{Role: mtls.Operator, Name: "lab"}, Usage: authority.Client, Lifetime: lifetime}
	files, err := m.tenant.WriteFiles(m.Tenant("operator"), "operator", authority.Operator, operator)
	if err != nil {
		return err
	}
	return client.Write(m.Context(), client.Context{
		Name: "lab", Server: m.API, CA: files.CA, Cert: files.Cert, Key: files.Key,
		ComponentKey: m.ComponentKeyFile(), Cache: m.Cache, Templates: m.Tenant("templates"),
		Guest:  filepath.Join(m.Binaries, "foothold-guest"),
		Volume: client.VolumeEncrypted, // authenticating each sector takes an emulated VM seconds; `--volume` overrides it
	})
}

func publicOf(key ed25519.PrivateKey) ed25519.PublicKey { return key.Public().(ed25519.PublicKey) }

func folders(dirs ...string) error {
	for _, dir := range dirs {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make folder: %w", err)
		}
	}
	return nil
}

// hand copies a public file from one organisation's folder to another's.
func hand(from, to string) error {
	f, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("hand over: %w", err)
	}
	defer f.Close()
	return durable.Write(to, 0o644, func(w *os.File) error {
		_, err := io.Copy(w, f)
		return err
	})
}
