package orchestrator

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"foothold/internal/durable"
	"foothold/internal/luks"
	"foothold/internal/mtls"
	"foothold/internal/strictjson"
	"foothold/protocol/api"
	"foothold/protocol/bootmsg"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/inventory"
	"foothold/protocol/platform"
	"foothold/protocol/signed"
	"foothold/protocol/upstream"
	"foothold/protocol/zone"
	"foothold/tenant/authority"
	"foothold/tenant/reservation"
)

// world is an orchestrator with everything around it in this process: a host with a
// real TPM that starts no QEMU, the DMZ's daemons as far as the orchestrator sees them,
// and VMs that speak the real protocols.
type world struct {
	watchEvery time.Duration // from the next start on; 0: the default
	listEvery  time.Duration // the same

	workloadLimit time.Duration // the same
	off           time.Duration // of the orchestrator's clock, from the next start on
	t             *testing.T
	o             *Orchestrator
	conf          Config
	ca            *authority.Set
	host          *fakeHost
	operator      *http.Client
	daemons       map[string]*http.Client // by role, firewalls by name
	api, dmz      string                  // base URLs
	component     ed25519.PrivateKey
	inventory     ed25519.PrivateKey          // the provider's
	platform      ed25519.PrivateKey          // the tenant's, for reference values
	addHost       func(name string) *fakeHost // known to the orchestrator from its next start on
	stop          func()

	mu      sync.Mutex
	dials   map[string]string        // guarded by mu: a VM's address → where it listens
	docs    map[string]zone.Document // guarded by mu: newest of each zone
	deaf    map[string]bool          // guarded by mu: zones whose daemon applies nothing
	objects map[digest.SHA256][]byte // guarded by mu: what the store holds
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		check(t, err)
		return v
	}
}

// limits of tests: short enough to run out in one, long enough for a busy machine.
func testLimits() Limits {
	return Limits{Reserved: 10 * time.Second, Booting: 20 * time.Second, Unlocking: 30 * time.Second, Connecting: 20 * time.Second, Lease: 20 * time.Second,
		VMs: 4, MemoryMiB: 65536, BootsAtOnce: 4, AttestEvery: time.Minute, AttestWithin: 5 * time.Minute}
}

func newWorld(t *testing.T, change ...func(*Config)) *world {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a TPM process")
	}
	w := &world{t: t, daemons: map[string]*http.Client{}, dials: map[string]string{}, docs: map[string]zone.Document{}, deaf: map[string]bool{},
		objects: map[digest.SHA256][]byte{}}
	dir := t.TempDir()
	papers := newPapers(t, dir)
	w.ca = papers.ca
	w.host = newFakeHost(t, papers.of(hostAPI))
	store := w.serveStore(papers.of(objectStore))

	_, invKey, _ := ed25519.GenerateKey(rand.Reader)
	_, platKey, _ := ed25519.GenerateKey(rand.Reader)
	_, w.component, _ = ed25519.GenerateKey(rand.Reader)
	w.inventory, w.platform = invKey, platKey
	w.addHost = func(name string) *fakeHost {
		h := newFakeHost(t, papers.of(hostNamed(name)))
		h.entry.Name = name
		roots := append(must[[]byte](t)(os.ReadFile(w.conf.TPMRoots)), must[[]byte](t)(os.ReadFile(h.roots))...)
		w.conf.TPMRoots = filepath.Join(dir, "roots-with-"+name)
		check(t, os.WriteFile(w.conf.TPMRoots, roots, 0o600))
		w.call("GET", "/v1/status", nil, nil) // it serves: the caller restarts it
		return h
	}
	seal := func(name string, key ed25519.PrivateKey, label string, doc any) string {
		payload := must[[]byte](t)(json.Marshal(doc))
		data := must[[]byte](t)(json.Marshal(signed.Seal(key, label, payload)))
		check(t, durable.WriteFile(filepath.Join(dir, name), data, 0o644))
		return filepath.Join(dir, name)
	}
	now := time.Now()
	hexKey := func(key ed25519.PrivateKey) string { return hex.EncodeToString(key.Public().(ed25519.PublicKey)) }
	w.conf = Config{
		State: papers.state, Profile: platform.Lab, API: "127.0.0.1:0", Upstream: netip.MustParseAddrPort("127.0.0.1:1"), Tenant: "acme",
		OperatorTLS: papers.of(operatorAPI),
		UpstreamTLS: papers.of(upstreamAPI),
		StoreTLS:    papers.of(clientOfStore),
		HostTLS:     papers.of(clientOfHosts),
		Inventory: seal("inventory.json", invKey, signed.Inventory, inventory.Inventory{Provider: "lab", Version: 1, Issued: now, Expires: now.Add(30 * day),
			Hosts: []inventory.Host{w.host.entry}}),
		InventoryKey: hexKey(invKey), TPMRoots: w.host.roots,
		Platform: seal("platform.json", platKey, signed.Platform, platform.Manifest{Name: "release-1", Profile: platform.Lab, ValidFrom: now.Add(-time.Hour),
			ValidUntil: now.Add(30 * day), Files: w.host.files, Firmware: w.host.firmware}),
		PlatformKey: hexKey(platKey), ComponentKey: hexKey(w.component),
		Boot: Boot{netip.MustParseAddrPort("10.81.0.10:443"), "boot.foothold.internal", papers.authority(authority.Boot)},
		Gateway: Gateway{netip.MustParseAddrPort("10.81.0.20:8443"), netip.MustParseAddrPort("10.81.0.20:51820"), "gateway.foothold.internal",
			papers.authority(authority.DMZ), netip.MustParsePrefix("10.84.0.0/16")},
		Store: Store{store, "store.foothold.internal"},
		Network: Network{Prefix: netip.MustParsePrefix("10.82.0.0/24"), Gateway: netip.MustParseAddr("10.82.0.1"), First: netip.MustParseAddr("10.82.0.10"),
			Last: netip.MustParseAddr("10.82.0.13"), MTU: 1500, Self: netip.MustParseAddr("10.80.0.10")},
		Limits:          testLimits(),
		HostLost:        lostClose,
		QuoteRefused:    quoteTerminate, // closed_test.go has the other
		WorkloadClients: []netip.Prefix{netip.MustParsePrefix("10.80.0.0/24")},
	}
	for _, f := range change {
		f(&w.conf)
	}
	check(t, w.conf.Validate())
	client := func(h holder, dns string) *http.Client {
		cert, pool, err := papers.of(h).Load()
		check(t, err)
		return &http.Client{Transport: &http.Transport{TLSClientConfig: mtls.ClientConfig(cert, pool, dns, mtls.Orchestrator), MaxIdleConnsPerHost: 8}}
	}
	w.operator = client(operator, "127.0.0.1")
	for _, h := range dmzDaemons {
		w.daemons[h.name] = client(h, upstreamAPI.dns)
	}
	w.start()
	t.Cleanup(func() { w.stop() })
	return w
}

// start starts the orchestrator on its state, and the daemons that watch its zones.
func (w *world) start() {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	off := w.off
	o := must[*Orchestrator](w.t)(newAt(ctx, w.conf, func() time.Time { return time.Now().Add(off) }))
	o.dial = w.dialVM
	if w.watchEvery > 0 {
		o.watchEvery = w.watchEvery
	}
	if w.workloadLimit > 0 {
		o.workloadLimit = w.workloadLimit
	}
	if w.listEvery > 0 {
		o.listEvery = w.listEvery
	}
	operators := must[net.Listener](w.t)(net.Listen("tcp", "127.0.0.1:0"))
	dmz := must[net.Listener](w.t)(net.Listen("tcp", "127.0.0.1:0"))
	w.o, w.api, w.dmz = o, "https://"+operators.Addr().String(), "https://"+dmz.Addr().String()
	var running sync.WaitGroup
	running.Go(func() {
		if err := o.serve(ctx, operators, dmz); err != nil {
			w.t.Errorf("orchestrator: %v", err)
		}
	})
	for name, zoneName := range map[string]string{"bootserver": zone.Boot, "gateway": zone.Gateway, zone.External: zone.External, zone.Internal: zone.Internal} {
		running.Go(func() { w.keepZone(ctx, name, zoneName) })
	}
	w.stop = sync.OnceFunc(func() {
		cancel()
		running.Wait()
		for _, c := range w.daemons {
			c.CloseIdleConnections()
		}
		w.operator.CloseIdleConnections()
		if err := o.Close(); err != nil {
			w.t.Errorf("close: %v", err)
		}
	})
}

func (w *world) restart() {
	w.stop()
	w.start()
}

// keepZone is a daemon that makes every document so and reports it.
func (w *world) keepZone(ctx context.Context, daemon, name string) {
	for ctx.Err() == nil {
		req, _ := http.NewRequestWithContext(ctx, http.MethodGet, w.upstreamURL(upstream.PathZone), nil)
		resp, err := w.daemons[daemon].Do(req)
		if err != nil {
			pause(ctx, 20*time.Millisecond)
			continue
		}
		in := bufio.NewReader(resp.Body)
		for {
			line, err := in.ReadBytes('\n')
			if err != nil {
				break
			}
			var e signed.Envelope
			var doc zone.Document
			if err := strictjson.Unmarshal(line, &e); err != nil {
				w.t.Errorf("zone %s: %v", name, err)
			}
			if err := e.Open(w.ca.Public(authority.ZoneKey), signed.Zone, &doc); err != nil || doc.Zone != name {
				w.t.Errorf("zone %s: %v", name, err)
			}
			w.mu.Lock()
			if old := w.docs[name]; doc.Revision <= old.Revision {
				w.t.Errorf("zone %s: revision %d came after %d", name, doc.Revision, old.Revision)
			}
			w.docs[name] = doc
			deaf := w.deaf[name]
			w.mu.Unlock()
			if deaf {
				continue
			}
			r := zone.Report{Zone: name, Epoch: doc.Epoch, Revision: doc.Revision, Document: digest.Of(e.Payload)}
			for _, f := range doc.Flows {
				r.Live = append(r.Live, zone.Live{ID: f.ID, Reservation: f.Reservation, Rule: f.Proto})
			}
			for _, p := range doc.Peers {
				r.Live = append(r.Live, zone.Live{ID: p.Reservation, Reservation: p.Reservation, Rule: "tunnel " + p.Address.String()})
			}
			for _, b := range doc.Boots {
				r.Live = append(r.Live, zone.Live{ID: b.Reservation, Reservation: b.Reservation, Rule: b.Address.String() + " may connect"})
			}
			w.post(ctx, daemon, upstream.PathZoneReport, r, nil)
		}
		resp.Body.Close()
	}
}

func (w *world) upstreamURL(path string) string {
	_, port, _ := net.SplitHostPort(w.dmz[len("https://"):])
	return "https://127.0.0.1:" + port + path
}

// post makes a daemon's call and returns the refusal's reason, "" for success.
func (w *world) post(ctx context.Context, daemon, path string, in, out any) event.Reason {
	data, err := json.Marshal(in)
	if err != nil {
		w.t.Error(err)
	}
	return w.postBytes(ctx, daemon, path, data, out)
}

func (w *world) postBytes(ctx context.Context, daemon, path string, data []byte, out any) event.Reason {
	req, _ := http.NewRequestWithContext(ctx, http.MethodPost, w.upstreamURL(path), bytes.NewReader(data))
	resp, err := w.daemons[daemon].Do(req)
	if err != nil {
		return event.Reason("no answer: " + err.Error())
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		var p upstream.Problem
		if err := strictjson.Read(resp.Body, 1<<16, &p); err != nil {
			return event.Reason(fmt.Sprintf("status %d", resp.StatusCode))
		}
		return p.Reason
	}
	if out == nil {
		io.Copy(io.Discard, resp.Body)
		return ""
	}
	if err := strictjson.Read(resp.Body, 8<<20, out); err != nil {
		w.t.Errorf("%s: %v", path, err)
	}
	return ""
}

// call makes an operator's call; it returns the status and, for a refusal, the problem.
func (w *world) call(method, path string, in []byte, out any) (int, api.Problem) {
	w.t.Helper()
	req := must[*http.Request](w.t)(http.NewRequest(method, w.api+path, bytes.NewReader(in)))
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp := must[*http.Response](w.t)(w.operator.Do(req))
	defer resp.Body.Close()
	var p api.Problem
	if resp.StatusCode >= 300 {
		check(w.t, strictjson.Read(resp.Body, 1<<20, &p))
	} else if out != nil {
		check(w.t, strictjson.Read(resp.Body, 32<<20, out))
	}
	return resp.StatusCode, p
}

func (w *world) vm(name string) (vm api.VM) {
	w.t.Helper()
	if status, p := w.call("GET", "/v1/vms/"+name, nil, &vm); status != http.StatusOK {
		w.t.Fatalf("show %s: %d %+v", name, status, p)
	}
	return vm
}

// wait polls a VM until it is as wanted.
func (w *world) wait(name, what string, ok func(api.VM) bool) api.VM {
	w.t.Helper()
	for end := time.Now().Add(40 * time.Second); ; {
		vm := w.vm(name)
		if ok(vm) {
			return vm
		}
		if time.Now().After(end) || reservation.Phase(vm.Phase).Terminal() {
			w.t.Fatalf("%s did not become %s: %+v", name, what, vm)
		}
		pause(w.t.Context(), 10*time.Millisecond)
	}
}

func (w *world) waitPhase(name string, p reservation.Phase) api.VM {
	w.t.Helper()
	return w.wait(name, string(p), func(vm api.VM) bool { return vm.Phase == string(p) })
}

// waitGone waits until an ended VM is cleaned up at the host.
func (w *world) waitGone(id string) {
	w.t.Helper()
	for end := time.Now().Add(20 * time.Second); w.host.has(id); {
		if time.Now().After(end) {
			w.t.Fatalf("VM %s is still at the host", id)
		}
		pause(w.t.Context(), 10*time.Millisecond)
	}
}

func (w *world) dialVM(ctx context.Context, network, address string) (net.Conn, error) {
	w.mu.Lock()
	to, ok := w.dials[address]
	w.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("nobody listens at %s", address)
	}
	return (&net.Dialer{}).DialContext(ctx, network, to)
}

func (w *world) listenFor(address netip.AddrPort) net.Listener {
	l := must[net.Listener](w.t)(net.Listen("tcp", "127.0.0.1:0"))
	w.mu.Lock()
	w.dials[address.String()] = l.Addr().String()
	w.mu.Unlock()
	w.t.Cleanup(func() { l.Close() })
	return l
}

func (w *world) serveStore(files mtls.Files) netip.AddrPort {
	cert, pool, err := files.Load()
	check(w.t, err)
	l := must[net.Listener](w.t)(net.Listen("tcp", "127.0.0.1:0"))
	srv := &http.Server{Handler: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		data, _ := io.ReadAll(r.Body)
		if r.Method != http.MethodPut || filepath.Base(r.URL.Path) != digest.Of(data).String() {
			http.Error(rw, "refused", http.StatusForbidden)
			return
		}
		w.mu.Lock()
		defer w.mu.Unlock()
		w.objects[digest.Of(data)] = data
	})}
	go srv.Serve(tls.NewListener(l, mtls.ServerConfig(cert, pool, mtls.Orchestrator)))
	w.t.Cleanup(func() { srv.Close() })
	return netip.MustParseAddrPort(l.Addr().String())
}

// putObject uploads as an operator does.
func (w *world) putObject(data []byte) bootmsg.Component {
	w.t.Helper()
	c := bootmsg.Component{SHA256: digest.Of(data), Size: int64(len(data))}
	if status, p := w.call("PUT", "/v1/objects/"+c.SHA256.String(), data, nil); status != http.StatusOK {
		w.t.Fatalf("put object: %d %+v", status, p)
	}
	return c
}

// registration is a template whose VMs the fake guest can imitate.
func (w *world) registration(name string) (api.RegisterTemplate, []byte) {
	image := bytes.Repeat([]byte("ciphertext "+name), 4096*16)
	image = image[:len(image)/4096*4096]
	kernel, initramfs := w.putObject([]byte("kernel "+name)), w.putObject([]byte("initramfs "+name))
	kernel.Name, initramfs.Name = "kernel", "initramfs"
	payload := must[[]byte](w.t)(json.Marshal(bootmsg.Components{Release: "r1", Created: time.Now().UTC(), Kernel: kernel, Initramfs: initramfs}))
	return api.RegisterTemplate{Name: name, SHA256: digest.Of(image), Size: int64(len(image)), RootHash: digest.Of([]byte("root")), HashOffset: 4096,
		VolumeKey: luks.NewKey(), Components: signed.Seal(w.component, signed.Components, payload),
		Audit: must[[]byte](w.t)(guestExpectations().Encode()), Created: time.Now().UTC()}, image
}

func (w *world) template(name string) {
	w.t.Helper()
	reg, image := w.registration(name)
	if status, p := w.call("POST", "/v1/templates", must[[]byte](w.t)(json.Marshal(reg)), nil); status != http.StatusCreated {
		w.t.Fatalf("register: %d %+v", status, p)
	}
	if status, p := w.call("PUT", "/v1/templates/"+name+"/image", image, nil); status != http.StatusOK {
		w.t.Fatalf("put image: %d %+v", status, p)
	}
}

func (w *world) create(req api.CreateVM) api.VM {
	w.t.Helper()
	var vm api.VM
	if status, p := w.call("POST", "/v1/vms", must[[]byte](w.t)(json.Marshal(req)), &vm); status != http.StatusCreated {
		w.t.Fatalf("create: %d %+v", status, p)
	}
	return vm
}

// events lists the kinds in the journal of one VM; the chain must verify.
func (w *world) events(name string) []string {
	w.t.Helper()
	var list []api.JournalEntry
	w.call("GET", "/v1/events?vm="+name, nil, &list)
	var kinds []string
	for _, e := range list {
		kinds = append(kinds, e.Event.Kind)
	}
	return kinds
}

// flows lists, as "zone: id", what the newest documents let pass for a VM.
func (w *world) flows(id string) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var list []string
	for name, d := range w.docs {
		for _, f := range d.Flows {
			if f.Reservation == id {
				list = append(list, name+": "+f.ID[len(id)+3:])
			}
		}
		for _, p := range d.Peers {
			if p.Reservation == id {
				list = append(list, fmt.Sprintf("%s: peer quarantined=%v", name, p.Quarantined))
			}
		}
		for _, b := range d.Boots {
			if b.Reservation == id {
				list = append(list, name+": boots")
			}
		}
	}
	slices.Sort(list)
	return list
}

// waitFlows waits until the daemons have what is wanted.
func (w *world) waitFlows(id string, want ...string) {
	w.t.Helper()
	slices.Sort(want)
	for end := time.Now().Add(10 * time.Second); ; {
		got := w.flows(id)
		if slices.Equal(got, want) {
			return
		}
		if time.Now().After(end) {
			w.t.Fatalf("flows: %q, want %q", got, want)
		}
		pause(w.t.Context(), 5*time.Millisecond)
	}
}
