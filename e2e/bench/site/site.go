// Package site is a tenant, its DMZ's boot server and store, and a provider's hosts in
// one process and on loopback, for measurements that need no VM: [Open] brings it up,
// [Site.Reserve] makes VMs that are about to boot, and [Site.Dial] is such a VM's loader.
//
// Orchestrator, boot server and store are the daemons themselves, with their certificates,
// their state on disk and their TLS. Each host has a TPM process of its own behind the
// provider's broker; it starts no QEMU, so what it says of a VM is a row. The VMs have
// addresses of 127.1.0.0/16, because the boot server tells VMs apart by address.
package site

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"time"

	"foothold/dmz/bootserver"
	"foothold/dmz/store"
	"foothold/dmz/upstream"
	"foothold/internal/durable"
	"foothold/internal/mtls"
	"foothold/internal/tpm/swtpm"
	"foothold/protocol/bootmsg"
	"foothold/protocol/digest"
	"foothold/protocol/inventory"
	"foothold/protocol/platform"
	"foothold/protocol/platform/platformtest"
	"foothold/protocol/signed"
	"foothold/protocol/vmspec"
	"foothold/provider/enroll"
	"foothold/tenant/authority"
	"foothold/tenant/orchestrator"
	"foothold/tenant/vault"
	"foothold/tenant/verify"
)

const (
	tenantName = "bench"
	release    = "bench"
	bootDNS    = "boot.foothold.internal"
	storeDNS   = "store.foothold.internal"
	orchDNS    = "orchestrator.foothold.internal"
	day        = 24 * time.Hour
	// phaseLimit is longer than a measurement, so that no VM's time runs out in one.
	phaseLimit = 30 * time.Minute
)

var (
	loopback = netip.MustParseAddr("127.0.0.1")
	vmPrefix = netip.MustParsePrefix("127.1.0.0/16")
	firstVM  = netip.MustParseAddr("127.1.1.0")
	lastVM   = netip.MustParseAddr("127.1.255.255")
)

// Options say what to bring up.
type Options struct {
	Dir       string // an empty folder for all state
	Hosts     int    // each with a TPM
	Kernel    []byte // what the boot server delivers
	Initramfs []byte
	// OwnSessionKey: boot sessions are salted to the tenant's own key.
	OwnSessionKey bool
	// Lease is that of zone documents; 0 means a minute. The shorter, the sooner the boot
	// server hears of VMs that are reserved.
	Lease time.Duration
	// Production makes the hosts of that profile; nil means the lab's.
	Production *Production
}

// Production is how the hosts of a site boot, and what the tenant wants them to be.
type Production struct {
	Machine   *platformtest.Machine // as which each of them boots
	Boot      []platform.Event      // reference values
	Userspace []platform.Text       // reference values
	Policy    verify.Policies
}

// Site is what runs. Its methods are safe for concurrent use.
type Site struct {
	options  Options
	tenant   *authority.Set
	provider *authority.Set
	init     orchestrator.InitResult
	conf     orchestrator.Config
	boot     netip.AddrPort
	store    netip.AddrPort
	roots    *x509.CertPool
	leaf     string // file of the boot server's certificate
	hosts    []*host
	firmware vmspec.Firmware
	files    []platform.File
	keys     struct{ inventory, platform, component ed25519.PrivateKey }
	image    digest.SHA256

	stop             context.CancelFunc
	running          sync.WaitGroup
	stopOrchestrator func() // ends the orchestrator alone; startOrchestrator begins it anew

	mu    sync.Mutex
	fault error // guarded by mu: of a daemon that ended early
	next  int   // guarded by mu: number of the next reservation
}

// Open brings the site up; Close ends it. What Open began it ends when it fails.
func Open(ctx context.Context, o Options) (s *Site, err error) {
	s = &Site{options: o, image: digest.Of([]byte("template"))}
	ctx, s.stop = context.WithCancel(ctx)
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("bring a site up: %w", err), s.Close())
		}
	}()
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return s, err
	}
	for _, step := range []func(context.Context) error{s.makeAuthorities, s.makeHosts, s.configure, s.start, s.addTemplate} {
		if err := step(ctx); err != nil {
			return s, err
		}
	}
	return s, nil
}

// Close ends the daemons and waits for them. It returns why one ended before.
func (s *Site) Close() error {
	s.stop()
	s.running.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fault
}

func (s *Site) path(name string) string { return filepath.Join(s.options.Dir, name) }

// run runs a daemon until the site ends.
func (s *Site) run(ctx context.Context, name string, f func(context.Context) error) {
	s.running.Go(func() {
		if err := f(ctx); err != nil {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.fault = errors.Join(s.fault, fmt.Errorf("%s: %w", name, err))
		}
	})
}

func (s *Site) makeAuthorities(ctx context.Context) (err error) {
	if s.init, err = orchestrator.Init(ctx, s.path("tenant")); err != nil {
		return err
	}
	if _, s.tenant, err = orchestrator.Open(s.path("tenant")); err != nil {
		return err
	}
	v, err := vault.Create(s.path("provider-vault"), s.path("provider-key"))
	if err != nil {
		return err
	}
	if s.provider, err = authority.Create(v, s.path("provider"), authority.Provider); err != nil {
		return err
	}
	if s.roots, err = s.tenant.Pool(authority.Boot); err != nil {
		return err
	}
	for _, key := range []*ed25519.PrivateKey{&s.keys.inventory, &s.keys.platform, &s.keys.component} {
		if _, *key, err = ed25519.GenerateKey(nil); err != nil {
			return err
		}
	}
	for _, name := range []string{"foothold-host", "qemu", "bios", "loader-kernel", "loader-initramfs", "host-config"} {
		s.files = append(s.files, platform.File{Name: name, SHA256: digest.Of([]byte(name))})
	}
	s.firmware = vmspec.Firmware{BIOS: s.files[2].SHA256, LoaderKernel: s.files[3].SHA256, LoaderInitramfs: s.files[4].SHA256, LoaderCmdline: "console=ttyS0"}
	return nil
}

// issue makes a certificate; the file names its holder and direction.
func (s *Site) issue(set *authority.Set, name authority.Name, role, holder string, usage authority.Usage, dns ...string) (mtls.Files, error) {
	req := authority.Request{Identity: mtls.Identity{Role: role, Name: holder}, Usage: usage, Lifetime: day, DNS: dns}
	return set.WriteFiles(s.options.Dir, fmt.Sprintf("%s-%s-%s-%d", name, role, holder, usage), name, req)
}

// makeHosts powers the TPMs on and enrols them.
func (s *Site) makeHosts(ctx context.Context) error {
	s.hosts = make([]*host, s.options.Hosts)
	failed := make([]error, len(s.hosts))
	var wg sync.WaitGroup
	for i := range s.hosts {
		wg.Go(func() { s.hosts[i], failed[i] = s.newHost(ctx, fmt.Sprintf("host-%d", i+1)) })
	}
	wg.Wait()
	return errors.Join(failed...)
}

// seal writes a signed document and returns its file.
func (s *Site) seal(name string, e signed.Envelope) (string, error) {
	data, err := json.Marshal(e)
	if err != nil {
		return "", fmt.Errorf("write %s: %w", name, err)
	}
	return s.path(name), durable.WriteFile(s.path(name), data, 0o644)
}

// tpmRoots is the file of the TPMs' manufacturers.
const tpmRoots = "tpm-roots.pem"

func (s *Site) configure(context.Context) error {
	var entries []inventory.Host
	var roots []byte // each software TPM has a manufacturer of its own
	for _, h := range s.hosts {
		entries = append(entries, h.entry)
		root, err := os.ReadFile(filepath.Join(s.path(h.entry.Name), swtpm.RootFile))
		if err != nil {
			return err
		}
		roots = append(roots, root...)
	}
	if err := durable.WriteFile(s.path(tpmRoots), roots, 0o644); err != nil {
		return err
	}
	now := time.Now()
	listed, err := enroll.Publish(s.keys.inventory, "bench", 1, now, day, entries)
	if err != nil {
		return err
	}
	inventoryFile, err := s.seal("inventory.json", listed)
	if err != nil {
		return err
	}
	doc := platform.Manifest{Name: release, Profile: platform.Lab, ValidFrom: now.Add(-time.Hour), ValidUntil: now.Add(day), Files: s.files, Firmware: s.firmware}
	var policy verify.Policies
	if p := s.options.Production; p != nil {
		doc.Profile, doc.Files, doc.Boot, doc.Userspace, policy = platform.Production, p.Machine.Files, p.Boot, p.Userspace, p.Policy
	}
	manifest, err := json.Marshal(doc)
	if err != nil {
		return err
	}
	platformFile, err := s.seal("platform.json", signed.Seal(s.keys.platform, signed.Platform, manifest))
	if err != nil {
		return err
	}
	addresses, err := freeAddresses(4)
	if err != nil {
		return err
	}
	s.boot, s.store = addresses[0], addresses[1]
	hexKey := func(key ed25519.PrivateKey) string { return hex.EncodeToString(key.Public().(ed25519.PublicKey)) }
	operator, e1 := s.issue(s.tenant, authority.Operator, mtls.Orchestrator, "o", authority.Server, "localhost")
	daemons, e2 := s.issue(s.tenant, authority.DMZ, mtls.Orchestrator, "o", authority.Server, orchDNS)
	stores, e3 := s.issue(s.tenant, authority.DMZ, mtls.Orchestrator, "o", authority.Client)
	hosts, e4 := s.issue(s.tenant, authority.Tenant, mtls.Orchestrator, tenantName, authority.Client)
	hosts.CA = s.provider.CertFile(authority.Provider)
	s.conf = orchestrator.Config{
		OwnSessionKey: s.options.OwnSessionKey,
		State:         s.path("tenant"), Profile: doc.Profile, HostPolicy: policy, API: addresses[3].String(), Upstream: addresses[2], Tenant: tenantName,
		OperatorTLS: operator, UpstreamTLS: daemons, StoreTLS: stores, HostTLS: hosts,
		Inventory: inventoryFile, InventoryKey: hexKey(s.keys.inventory), TPMRoots: s.path(tpmRoots), Platform: platformFile, PlatformKey: hexKey(s.keys.platform),
		ComponentKey: hexKey(s.keys.component), HostLost: "close", QuoteRefused: "terminate",
		Boot: orchestrator.Boot{Address: s.boot, ServerName: bootDNS, CA: s.init.Authorities["boot"]},
		Gateway: orchestrator.Gateway{Admission: netip.AddrPortFrom(loopback, 1), WireGuard: netip.AddrPortFrom(loopback, 2),
			ServerName: "gateway.foothold.internal", CA: s.init.Authorities["dmz"], Pool: netip.MustParsePrefix("10.84.0.0/16")},
		Store:   orchestrator.Store{Address: s.store, ServerName: storeDNS},
		Network: orchestrator.Network{Prefix: vmPrefix, Gateway: vmPrefix.Addr().Next(), First: firstVM, Last: lastVM, MTU: 1500, Self: loopback},
		Limits: orchestrator.Limits{Reserved: phaseLimit, Booting: phaseLimit, Unlocking: phaseLimit, Connecting: phaseLimit, Lease: cmp.Or(s.options.Lease, time.Minute),
			VMs: 1 << 16, MemoryMiB: 1 << 30, BootsAtOnce: 1 << 16, AttestEvery: time.Minute, AttestWithin: 5 * time.Minute},
	}
	return errors.Join(e1, e2, e3, e4, s.conf.Validate())
}

// freeAddresses are n that nobody listens on.
func freeAddresses(n int) (list []netip.AddrPort, err error) {
	for range n {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		list = append(list, netip.MustParseAddrPort(l.Addr().String()))
	}
	return list, nil
}

// start starts the daemons, each of which waits for the others by itself.
func (s *Site) start(ctx context.Context) error {
	if err := s.startOrchestrator(ctx); err != nil {
		return err
	}
	objects := s.path("objects")
	if err := os.Mkdir(objects, 0o700); err != nil {
		return err
	}
	for _, data := range [][]byte{s.options.Kernel, s.options.Initramfs} {
		if err := os.WriteFile(filepath.Join(objects, digest.Of(data).String()), data, 0o600); err != nil {
			return err
		}
	}
	storeTLS, e1 := s.issue(s.tenant, authority.DMZ, mtls.Store, "store", authority.Server, storeDNS)
	self, e2 := s.issue(s.tenant, authority.DMZ, mtls.BootServer, "bootserver", authority.Client)
	serving, e3 := s.issue(s.tenant, authority.Boot, mtls.BootServer, "bootserver", authority.Server, bootDNS)
	if err := errors.Join(e1, e2, e3); err != nil {
		return err
	}
	s.leaf = serving.Cert
	s.run(ctx, "store", func(ctx context.Context) error {
		return store.Run(ctx, store.Config{State: objects, Listen: s.store, TLS: storeTLS, VMCA: s.init.Authorities["vm"]})
	})
	state := s.path("bootserver")
	if err := os.Mkdir(state, 0o700); err != nil {
		return err
	}
	s.run(ctx, "boot server", func(ctx context.Context) error {
		return bootserver.Run(ctx, bootserver.Config{State: state, Listen: s.boot, Cert: serving.Cert, Key: serving.Key, Store: s.store, StoreName: storeDNS, StoreTLS: self,
			Upstream: upstream.Config{Address: s.conf.Upstream, ServerName: orchDNS, TLS: self, ZoneKey: s.init.ZoneKey}})
	})
	return nil
}

// startOrchestrator starts it on its state, until the site ends or stopOrchestrator.
func (s *Site) startOrchestrator(ctx context.Context) error {
	o, err := orchestrator.New(ctx, s.conf)
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	ended := make(chan struct{})
	s.stopOrchestrator = func() { stop(); <-ended }
	s.run(ctx, "orchestrator", func(ctx context.Context) error {
		defer close(ended)
		return errors.Join(o.Run(ctx), o.Close())
	})
	return nil
}

// component names what the boot server delivers.
func component(name string, data []byte) bootmsg.Component {
	return bootmsg.Component{Name: name, SHA256: digest.Of(data), Size: int64(len(data))}
}

// ServerKeyPair names the files of the boot server's certificate and key, for a peer that
// is to have one of the same kind.
func (s *Site) ServerKeyPair() (cert, key string) {
	return s.leaf, s.leaf[:len(s.leaf)-len("crt")] + "key"
}

// Roots believe the boot server's certificate, whose name is ServerName.
func (s *Site) Roots() *x509.CertPool { return s.roots }

// ServerName is the DNS name in the boot server's certificate.
const ServerName = bootDNS
