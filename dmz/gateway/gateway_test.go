package gateway

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"foothold/dmz/upstream/upstreamtest"
	"foothold/internal/mtls"
	"foothold/internal/nstest"
	"foothold/internal/secret"
	"foothold/internal/wg"
	"foothold/internal/wg/userspace"
	"foothold/protocol/agentmsg"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/signed"
	"foothold/protocol/token"
	wire "foothold/protocol/upstream"
	"foothold/protocol/vmcert"
	"foothold/protocol/zone"

	"github.com/vishvananda/netlink"
)

const (
	gatewayDNS  = "gateway.foothold.internal"
	reservation = "0f0e0d0c-0b0a-4908-8706-050403020100"
)

// TestMain runs the daemon itself when a test starts it as a process.
func TestMain(m *testing.M) {
	os.Exit(upstreamtest.Main(Run, func() int { return nstest.Main(m) }))
}

// world is vm – gateway – tenant, with the orchestrator in the tenant's place.
type world struct {
	t              *testing.T
	vm, gw, tenant *nstest.Place
	orch           *upstreamtest.Orchestrator
	servers, vms   *upstreamtest.CA
	daemon         *upstreamtest.Daemon

	private secret.Bytes // the VM's WireGuard key
	public  [wg.KeyLen]byte
	leave   func() // ends the VM's end of the tunnel

	mu       sync.Mutex
	admitted wire.AdmitRequest   // guarded by mu; last
	asked    int                 // guarded by mu; admissions
	agents   []wire.AgentRequest // guarded by mu
	serial   string              // guarded by mu; of the certificate in use
	ttl      time.Duration
}

func newWorld(t *testing.T) *world {
	w := &world{t: t, vm: nstest.New(t), gw: nstest.New(t), tenant: nstest.New(t), orch: upstreamtest.New(t),
		servers: upstreamtest.NewCA(t, "dmz-servers"), vms: upstreamtest.NewCA(t, "vm"), ttl: time.Minute}
	nstest.Link(t, nstest.End{Place: w.vm, Name: "eth0", Address: "10.82.0.10/24"}, nstest.End{Place: w.gw, Name: "vpc0", Address: "10.82.0.1/24"})
	nstest.Link(t, nstest.End{Place: w.tenant, Name: "eth0", Address: "10.80.0.10/24"}, nstest.End{Place: w.gw, Name: "dmz0", Address: "10.80.0.20/24"})
	w.tenant.Route(t, "10.84.0.0/16", "10.80.0.20")
	w.private, w.public = wg.GenerateKey()
	w.orch.Admit, w.orch.Agent = w.admit, w.agent
	w.orch.Serve(w.tenant.Listen(w.t, "10.80.0.10:8443"))
	self := mtls.Identity{Role: mtls.Gateway, Name: "gw-1"}
	c := Config{State: t.TempDir(), Admission: netip.MustParseAddrPort("10.82.0.1:8443"), WireGuard: netip.MustParseAddrPort("10.82.0.1:51820"),
		TLS:  w.servers.Files(upstreamtest.Leaf{ID: self, Server: true, DNS: gatewayDNS}, w.vms),
		Pool: netip.MustParsePrefix("10.84.0.0/16"), Store: netip.MustParseAddrPort("10.80.0.30:8443"), Upstream: w.orch.Config(mtls.Gateway, "gw-1")}
	w.daemon = upstreamtest.NewDaemon(t, w.gw, c)
	w.start(1)
	return w
}

// start runs the daemon for the nth time and waits until it serves.
func (w *world) start(n int) {
	w.t.Helper()
	w.daemon.Start()
	w.orch.WaitEvent("start of the gateway", func(event.Event) bool {
		started := 0
		for _, e := range w.orch.Events() {
			if e.Kind == "daemon.started" {
				started++
			}
		}
		return started == n
	})
}

// certificate is what the orchestrator issued for this start.
func (w *world) certificate(change ...func(*vmcert.Info)) tls.Certificate {
	info := vmcert.Info{Reservation: reservation, Start: 1, Address: netip.MustParseAddr("10.82.0.10"), WireGuardKey: w.public[:]}
	for _, f := range change {
		f(&info)
	}
	ext, err := vmcert.Extension(info)
	if err != nil {
		w.t.Fatal(err)
	}
	cert := w.vms.Issue(upstreamtest.Leaf{ID: mtls.Identity{Role: mtls.VM, Name: info.Reservation}, Extensions: []pkix.Extension{ext}})
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		w.t.Fatal(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.serial == "" {
		w.serial = leaf.SerialNumber.String()
	}
	return cert
}

// post sends one message from the VM over a connection of its own.
func (w *world) post(addr, path string, cert tls.Certificate, in, out any) (tls.ConnectionState, int, error) {
	w.t.Helper()
	var raw net.Conn
	var err error
	w.vm.Do(w.t, func() error { raw, err = net.DialTimeout("tcp4", addr, 20*time.Second); return nil })
	if err != nil {
		return tls.ConnectionState{}, 0, err
	}
	defer raw.Close()
	raw.SetDeadline(time.Now().Add(20 * time.Second))
	c := tls.Client(raw, mtls.ClientConfig(cert, w.servers.Pool(), gatewayDNS, mtls.Gateway))
	data, err := json.Marshal(in)
	if err != nil {
		w.t.Fatal(err)
	}
	req, err := http.NewRequest(http.MethodPost, "https://"+gatewayDNS+path, bytes.NewReader(data))
	if err != nil {
		w.t.Fatal(err)
	}
	tr := &http.Transport{DialTLSContext: func(context.Context, string, string) (net.Conn, error) { return c, nil }}
	defer tr.CloseIdleConnections()
	res, err := tr.RoundTrip(req)
	if err != nil {
		return tls.ConnectionState{}, 0, err
	}
	defer res.Body.Close()
	if res.StatusCode == 200 {
		err = json.NewDecoder(res.Body).Decode(out)
	}
	return c.ConnectionState(), res.StatusCode, err
}

func (w *world) request() agentmsg.AdmitRequest {
	return agentmsg.AdmitRequest{T3: token.New(token.T3), User: "vm", Password: secret.Random(24)}
}

func (w *world) admit(r wire.AdmitRequest) (wire.AdmitResponse, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.admitted = r
	w.asked++
	return wire.AdmitResponse{Reservation: reservation, Start: 1, Serial: w.serial, PublicKey: w.public[:], TTL: w.ttl}, nil
}

func (w *world) agent(r wire.AgentRequest) (signed.Envelope, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.agents = append(w.agents, r)
	return signed.Envelope{Payload: []byte("down")}, nil
}

// join goes through an admission and brings the VM's end of the tunnel up.
func (w *world) join(cert tls.Certificate) agentmsg.AdmitResponse {
	w.t.Helper()
	var out agentmsg.AdmitResponse
	state, status, err := w.post("10.82.0.1:8443", agentmsg.PathAdmit, cert, w.request(), &out)
	if err != nil || status != 200 {
		w.t.Fatalf("admission: status %d, %v", status, err)
	}
	psk, err := state.ExportKeyingMaterial(evidence.PSKLabel, []byte(reservation), evidence.PSKLen)
	if err != nil {
		w.t.Fatal(err)
	}
	w.tunnel(out, psk)
	return out
}

func (w *world) tunnel(a agentmsg.AdmitResponse, psk []byte) {
	w.t.Helper()
	w.vm.Do(w.t, func() error {
		d, err := wg.Open(wg.Config{Name: "tun0", PrivateKey: w.private, ListenPort: agentmsg.TunnelPort, MTU: a.MTU, Address: []netip.Prefix{netip.PrefixFrom(a.Address, 32)}, Fallback: userspace.Start})
		if err != nil {
			return err
		}
		w.leave = sync.OnceFunc(func() { d.Close() })
		w.t.Cleanup(w.leave)
		p := wg.Peer{PresharedKey: secret.New(psk), Endpoint: a.Endpoint, Keepalive: time.Duration(a.Keepalive) * time.Second, AllowedIPs: []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")}}
		copy(p.PublicKey[:], a.GatewayKey)
		if err := d.AddPeer(p); err != nil {
			return err
		}
		link, err := netlink.LinkByName("tun0")
		if err != nil {
			return err
		}
		_, all, _ := net.ParseCIDR("0.0.0.0/0")
		return netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Dst: all})
	})
}

func (w *world) document(revision int64, a agentmsg.AdmitResponse, quarantined bool, flows ...zone.Flow) zone.Document {
	return zone.Document{Zone: zone.Gateway, Epoch: 1, Revision: revision, Lease: time.Minute, Flows: flows,
		Peers: []zone.Peer{{Reservation: reservation, Start: 1, Serial: w.serial, PublicKey: w.public[:], Address: a.Address,
			Source: netip.MustParseAddr("10.82.0.10"), Quarantined: quarantined, TTL: time.Minute}}}
}

func flow(id, from, to string, port int) zone.Flow {
	return zone.Flow{ID: id, Reservation: reservation, Phase: "computing", Proto: "tcp", Port: port, TTL: time.Minute,
		From: zone.Endpoint{Prefix: netip.MustParsePrefix(from)}, To: zone.Endpoint{Prefix: netip.MustParsePrefix(to)}}
}

func TestTunnelFromAdmissionToEnd(t *testing.T) {
	w := newWorld(t)
	w.tenant.Echo(w.t, "10.80.0.10:80")
	w.tenant.Echo(w.t, "10.80.0.10:81")
	cert := w.certificate()
	a := w.join(cert)
	if a.Relay != netip.MustParseAddrPort("10.84.0.1:8443") || !netip.MustParsePrefix("10.84.0.0/16").Contains(a.Address) {
		t.Fatalf("admitted: %+v", a)
	}
	w.mu.Lock()
	asked := w.admitted
	w.mu.Unlock()
	if asked.Source.String() != "10.82.0.10" || asked.Address != a.Address || !bytes.Equal(asked.Certificate, cert.Certificate[0]) || !asked.T3.Is(token.T3) || asked.User != "vm" || asked.Password.Len() != 24 {
		t.Errorf("asked: source %s address %s user %q", asked.Source, asked.Address, asked.User)
	}

	// Quarantine: the relay, and nothing else.
	w.relays(a, cert)
	w.gw.Echo(w.t, "10.84.0.1:9999")
	flows := []zone.Flow{flow("dest", a.Address.String()+"/32", "10.80.0.10/32", 80), flow("clients", "10.80.0.0/24", a.Address.String()+"/32", 8080)}
	w.vm.Echo(w.t, a.Address.String()+":8080")
	w.orch.Publish(w.document(1, a, true, flows...))
	w.orch.WaitReport("quarantined peer", live(1, reservation))
	w.vm.Blocked(w.t, "10.84.0.1:9999")
	w.vm.Blocked(w.t, "10.80.0.10:80")
	w.tenant.Blocked(w.t, a.Address.String()+":8080")

	// Open: exactly the document's flows.
	w.orch.Publish(w.document(2, a, false, flows...))
	w.orch.WaitReport("open tunnel", live(2, reservation, "dest", "clients"))
	out := w.vm.Passes(w.t, "10.80.0.10:80")
	w.tenant.Passes(w.t, a.Address.String()+":8080")
	w.vm.Blocked(w.t, "10.80.0.10:81")
	w.vm.Blocked(w.t, "10.84.0.1:9999")

	// Another's flow and one to more than a tunnel do not open anything.
	other := flow("other", a.Address.String()+"/32", "10.80.0.10/32", 81)
	other.Reservation = "another"
	w.orch.Publish(w.document(3, a, false, append(flows, other)...))
	w.orch.WaitReport("without the other's flow", live(3, reservation, "dest", "clients"))
	w.vm.Blocked(w.t, "10.80.0.10:81")
	w.orch.Publish(w.document(4, a, false, append(flows, flow("wide", "10.84.0.0/16", "10.80.0.10/32", 81))...))
	w.orch.WaitReport("refused document", func(r zone.Report) bool { return r.Revision == 4 && r.Error != "" })
	w.vm.Blocked(w.t, "10.80.0.10:81")
	if err := nstest.Ping(out, 5*time.Second); err != nil {
		t.Errorf("a document that was not applied broke the tunnel: %v", err)
	}

	// Withdrawn: rules, peer and relay go.
	last := w.document(5, a, false)
	last.Peers = nil
	w.orch.Publish(last)
	w.orch.WaitReport("withdrawn", live(5))
	if err := nstest.Ping(out, 500*time.Millisecond); err == nil {
		t.Error("connection outlives its tunnel")
	}
	w.vm.Blocked(w.t, a.Relay.String())
	w.orch.WaitEvent("end", func(e event.Event) bool { return e.Kind == "tunnel.ended" && e.Reservation == reservation })
	w.daemon.Stop(syscall.SIGTERM)
}

// live: the gateway's own flows and relays aside, exactly ids.
func live(revision int64, ids ...string) func(zone.Report) bool {
	return func(r zone.Report) bool {
		have := map[string]bool{}
		for _, l := range r.Live {
			if own := len(l.ID) > 8 && l.ID[:8] == "gateway/" || len(l.ID) > 6 && l.ID[:6] == "relay/"; !own {
				have[l.ID] = true
			}
		}
		for _, id := range ids {
			if !have[id] {
				return false
			}
		}
		return r.Revision == revision && r.Error == "" && len(have) == len(ids)
	}
}

func (w *world) relays(a agentmsg.AdmitResponse, cert tls.Certificate) {
	w.t.Helper()
	var down signed.Envelope
	_, status, err := w.post(a.Relay.String(), agentmsg.PathAgent, cert, signed.Envelope{Payload: []byte("up")}, &down)
	if err != nil || status != 200 || string(down.Payload) != "down" {
		w.t.Fatalf("relay: status %d, %v", status, err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	got := w.agents[len(w.agents)-1]
	if got.Address != a.Address || got.Serial != w.serial || string(got.Envelope.Payload) != "up" {
		w.t.Errorf("relayed: %+v", got)
	}
}

// resumeWithin is how soon after a gateway's start its tunnels must carry traffic.
const resumeWithin = 5 * time.Second

func TestTunnelSurvivesTheGatewaysRestart(t *testing.T) {
	w := newWorld(t)
	w.tenant.Echo(w.t, "10.80.0.10:80")
	cert := w.certificate()
	a := w.join(cert)
	w.orch.Publish(w.document(1, a, false, flow("dest", a.Address.String()+"/32", "10.80.0.10/32", 80)))
	w.orch.WaitReport("open tunnel", live(1, reservation, "dest"))
	c := w.vm.Passes(w.t, "10.80.0.10:80")
	w.daemon.Stop(syscall.SIGKILL)
	w.vm.Blocked(w.t, "10.80.0.10:80") // which is traffic under the lost session
	began := time.Now()
	w.start(2)
	for err := errors.New("not tried"); err != nil; {
		_, err = w.vm.Dial(w.t, "10.80.0.10:80", 500*time.Millisecond)
		if time.Since(began) > resumeWithin {
			t.Fatalf("no traffic within %s of a restart: %v", resumeWithin, err)
		}
	}
	t.Logf("traffic again %s after the start", time.Since(began))
	if err := nstest.Ping(c, resumeWithin); err != nil {
		t.Errorf("connection from before the restart: %v", err)
	}
	w.relays(a, cert)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.asked != 1 {
		t.Errorf("%d admissions, want the first alone", w.asked)
	}
}

// The document that names a peer may come before the orchestrator's answer does.
func TestDocumentBeforeTheAnswer(t *testing.T) {
	w := newWorld(t)
	w.tenant.Echo(w.t, "10.80.0.10:80")
	w.orch.Admit = func(r wire.AdmitRequest) (wire.AdmitResponse, error) {
		out, err := w.admit(r)
		a := agentmsg.AdmitResponse{Address: r.Address}
		w.orch.Publish(w.document(1, a, false, flow("dest", r.Address.String()+"/32", "10.80.0.10/32", 80)))
		w.orch.WaitReport("document without its peer", live(1))
		return out, err
	}
	w.join(w.certificate())
	w.vm.Passes(w.t, "10.80.0.10:80")
}

func TestTimeEndsTheTunnelWithoutTheOrchestrator(t *testing.T) {
	w := newWorld(t)
	w.ttl = 8 * time.Second
	cert := w.certificate()
	a := w.join(cert)
	start := time.Now()
	w.relays(a, cert)
	w.orch.WaitEvent("end in time", func(e event.Event) bool { return e.Kind == "tunnel.ended" && e.Reason == event.DeadlinePassed })
	if d := time.Since(start); d > 12*time.Second {
		t.Errorf("ended after %s", d)
	}
	w.vm.Blocked(w.t, a.Relay.String())
}

// TestAdmissionRefusals: each is refused by its own check, without a word of why to the VM,
// and told to the journal once under its reason.
func TestAdmissionRefusals(t *testing.T) {
	w := newWorld(t)
	refused := func(name string, cert tls.Certificate, in any, want event.Reason, says string) {
		t.Helper()
		before := w.told("admission.refused", want)
		if _, status, err := w.post("10.82.0.1:8443", agentmsg.PathAdmit, cert, in, &struct{}{}); err != nil || status != http.StatusForbidden {
			t.Errorf("%s: status %d, %v", name, status, err)
		}
		w.orch.WaitEvent(name, func(e event.Event) bool {
			return w.told("admission.refused", want) == before+1 && e.Kind == "admission.refused" && e.Reason == want && strings.Contains(e.Detail["error"], says)
		})
	}
	refused("another address", w.certificate(func(i *vmcert.Info) { i.Address = netip.MustParseAddr("10.82.0.11") }), w.request(), event.CertificateInvalid, "10.82.0.11")
	bad := w.request()
	bad.T3 = token.New(token.T2)
	refused("wrong kind of token", w.certificate(), bad, event.BadRequest, "T3")
	refused("no password", w.certificate(), agentmsg.AdmitRequest{T3: token.New(token.T3), User: "vm"}, event.BadRequest, "password")
	refused("unknown field", w.certificate(), map[string]string{"t4": "x"}, event.BadRequest, "t4")
	refused("no extension", w.vms.Issue(upstreamtest.Leaf{ID: mtls.Identity{Role: mtls.VM, Name: reservation}}), w.request(), event.CertificateInvalid, "extension")
	w.mu.Lock()
	if w.admitted.User != "" {
		t.Error("the orchestrator was asked")
	}
	w.mu.Unlock()

	w.mu.Lock()
	w.serial = ""
	w.mu.Unlock()
	cert := w.certificate() // the one that the answers are about
	say := func(change func(*wire.AdmitResponse)) {
		w.orch.Admit = func(r wire.AdmitRequest) (wire.AdmitResponse, error) {
			out, err := w.admit(r)
			change(&out)
			return out, err
		}
	}
	say(func(r *wire.AdmitResponse) { r.PublicKey = make([]byte, 32) })
	refused("another key", cert, w.request(), event.AdmissionRefused, "another VM, start, certificate or key")
	say(func(r *wire.AdmitResponse) { r.Start = 2 })
	refused("another start", cert, w.request(), event.AdmissionRefused, "another VM, start, certificate or key")
	say(func(r *wire.AdmitResponse) { r.TTL = 0 })
	refused("no time", cert, w.request(), event.AdmissionRefused, "another VM, start, certificate or key")
	w.orch.Admit = func(wire.AdmitRequest) (wire.AdmitResponse, error) {
		return wire.AdmitResponse{}, event.Refuse(event.CertificateRevoked, "revoked")
	}
	refused("orchestrator says no", cert, w.request(), event.CertificateRevoked, "revoked")
	w.orch.Publish(zone.Document{Zone: zone.Gateway, Epoch: 1, Revision: 1, Lease: time.Minute})
	w.orch.WaitReport("no peer", live(1))
}

func TestRelayTakesOnlyThePeersOwnCertificate(t *testing.T) {
	w := newWorld(t)
	cert := w.certificate()
	a := w.join(cert)
	w.relays(a, cert)
	for name, other := range map[string]tls.Certificate{
		"another reservation": w.certificate(func(i *vmcert.Info) { i.Reservation = "11111111-0b0a-4908-8706-050403020100" }),
		"another serial":      w.certificate(),
		"another start":       w.certificate(func(i *vmcert.Info) { i.Start = 2 }),
	} {
		before := w.told("agent.refused", event.CertificateInvalid)
		_, status, err := w.post(a.Relay.String(), agentmsg.PathAgent, other, signed.Envelope{Payload: []byte("up")}, &signed.Envelope{})
		if err != nil || status != 403 {
			t.Errorf("%s: status %d, %v", name, status, err)
		}
		w.orch.WaitEvent(name, func(event.Event) bool { return w.told("agent.refused", event.CertificateInvalid) == before+1 })
	}
	// One VM's flood is its own trouble.
	limited := false
	for range 2 * burst {
		_, status, err := w.post(a.Relay.String(), agentmsg.PathAgent, cert, signed.Envelope{Payload: []byte("up")}, &signed.Envelope{})
		if err != nil {
			t.Fatal(err)
		}
		limited = limited || status == 403
	}
	if !limited {
		t.Error("no limit")
	}
}

func TestPick(t *testing.T) {
	pool := netip.MustParsePrefix("10.84.0.0/29") // .1 is the gateway's, .7 broadcast
	var s peersState
	var got []string
	for range 7 {
		a, ok := s.pick(pool, nil)
		if !ok {
			t.Fatal("none")
		}
		s.Last = a
		got = append(got, a.String())
	}
	if want := "[10.84.0.2 10.84.0.3 10.84.0.4 10.84.0.5 10.84.0.6 10.84.0.2 10.84.0.3]"; fmt.Sprint(got) != want {
		t.Errorf("got %v", got)
	}
	taken := map[netip.Addr]bool{}
	for i := 2; i <= 6; i++ {
		a := netip.AddrFrom4([4]byte{10, 84, 0, byte(i)})
		if i%2 == 0 {
			taken[a] = true
		} else {
			s.Peers = append(s.Peers, &peer{Address: a})
		}
	}
	if a, ok := s.pick(pool, taken); ok {
		t.Errorf("a full pool gives %s", a)
	}
}
