package orchestrator

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"time"

	"foothold/internal/luks"
	"foothold/internal/mtls"
	"foothold/internal/secret"
	"foothold/internal/strictjson"
	"foothold/protocol/agentmsg"
	"foothold/protocol/api"
	"foothold/protocol/audit"
	"foothold/protocol/bootmsg"
	"foothold/protocol/bundle"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/frame"
	"foothold/protocol/signed"
	"foothold/protocol/token"
	"foothold/protocol/unlockmsg"
	"foothold/protocol/upstream"
	"foothold/tenant/authority"
	"foothold/tenant/expect"

	"github.com/cavaliergopher/cpio"
	"golang.org/x/crypto/ssh"
)

var agentDigest = digest.Of([]byte("agent"))

// guestExpectations fit the reports that guest.report makes.
func guestExpectations() expect.Template {
	return expect.Template{Kernel: "6.1", Agent: agentDigest, OS: expect.Stage{Programs: []expect.Program{{Path: "/sbin/init", SHA256: digest.Of([]byte("systemd"))}}}}
}

// guest is a VM together with the boot server and the gateway as far as they relay for
// it. Its tweaks make one thing wrong.
type guest struct {
	w       *world
	id      string
	vm      hostedVM
	key     ed25519.PrivateKey
	tlsKey  ed25519.PrivateKey
	unique  bootmsg.Unique
	hand    unlockmsg.Handover
	tunnel  netip.Addr
	cmdline string
	seq     int
	nonce   []byte

	tweak tweaks
}

type tweaks struct {
	source      netip.Addr // that the boot server and the gateway report
	key         []byte     // that the boot server reports with the verdict
	otherTunnel bool       // the host measures another tunnel
	rogue       bool       // the host runs other software
	delivered   []bootmsg.Component
	signer      ed25519.PrivateKey // of the ready report
	openDoor    bool               // any key may log in
	hostKey     ed25519.PrivateKey
	process     string // one process too many in the first audit
	first       func(*audit.Report)
	handover    string // reason with which the VM refuses the handover
	failed      int    // logins, as the VM counts them
	password    string
	cert        []byte
	osProcess   string // one too many in the second audit
}

// take takes the VM that the host runs, in its first start.
func (w *world) take(id string) *guest {
	w.t.Helper()
	return w.takeStart(id, 1)
}

func (w *world) takeStart(id string, start int) *guest {
	w.t.Helper()
	g := &guest{w: w, id: id, tunnel: netip.MustParseAddr("10.84.0.2")}
	_, g.key, _ = ed25519.GenerateKey(rand.Reader)
	_, g.tlsKey, _ = ed25519.GenerateKey(rand.Reader)
	w.wait(id, "started at the host", func(api.VM) bool {
		r, s, err := w.o.row(context.Background(), id)
		return err == nil && r.Start == start && !s.HostStarted.IsZero()
	})
	v, ok := w.host.get(id)
	if !ok {
		w.t.Fatalf("VM %s is not at the host", id)
	}
	g.vm = v
	return g
}

func (g *guest) address() netip.Addr {
	if g.tweak.source.IsValid() {
		return g.tweak.source
	}
	return g.vm.spec.Network.Address.Addr()
}

func (g *guest) public() []byte { return g.key.Public().(ed25519.PublicKey) }

// open is act 4.
func (g *guest) open(t1 token.Token) (out upstream.OpenResponse, why event.Reason) {
	why = g.w.post(context.Background(), "bootserver", upstream.PathBootOpen, upstream.OpenRequest{Token: t1, Source: g.address(), VMKey: g.public()}, &out)
	return out, why
}

// boot is acts 4 to 6.
func (g *guest) boot() event.Reason {
	opened, why := g.open(g.vm.t1)
	if why != "" {
		return why
	}
	return g.attest(opened)
}

func (g *guest) attest(opened upstream.OpenResponse) event.Reason {
	serverPublic, _, _ := ed25519.GenerateKey(rand.Reader)
	server, err := g.w.ca.Issue(authority.Boot, authority.Request{Identity: mtls.Identity{Role: mtls.BootServer, Name: "bootserver"},
		DNS: []string{"boot.foothold.internal"}, Usage: authority.Server, Lifetime: time.Hour, PublicKey: serverPublic})
	check(g.w.t, err)
	in := upstream.VerdictRequest{Reservation: opened.Reservation, Source: g.address(), ExporterHash: digest.Of([]byte("exporter")),
		ServerLeaf: server, LoaderLeaf: certificateOf(g.w.t), VMKey: g.public()}
	if g.tweak.key != nil {
		in.VMKey = g.tweak.key
	}
	tunnel := evidence.Tunnel(in.ExporterHash, in.ServerLeaf, in.LoaderLeaf, g.public())
	measured := tunnel
	if g.tweak.otherTunnel {
		measured = digest.Of([]byte("another tunnel"))
	}
	if g.tweak.rogue {
		g.w.host.measureRogue()
	}
	in.Quote = g.w.host.bootQuote(g.vm.spec, measured, evidence.Binding(evidence.RoleBoot, opened.Reservation, tunnel, opened.Settings, opened.Nonce))
	var out upstream.VerdictResponse
	if why := g.w.post(context.Background(), "bootserver", upstream.PathBootVerdict, in, &out); why != "" {
		return why
	}
	g.readGrant(out, tunnel)
	done := upstream.DoneRequest{Reservation: opened.Reservation, Delivered: []bootmsg.Component{
		{Name: "unique", SHA256: digest.Of(out.Unique), Size: int64(len(out.Unique))}, out.Kernel, out.Initramfs}}
	if g.tweak.delivered != nil {
		done.Delivered = g.tweak.delivered
	}
	return g.w.post(context.Background(), "bootserver", upstream.PathBootDone, done, nil)
}

// readGrant checks what the loader checks.
func (g *guest) readGrant(out upstream.VerdictResponse, tunnel digest.SHA256) {
	t := g.w.t
	t.Helper()
	var m bootmsg.Manifest
	check(t, out.Grant.Manifest.Open(g.vm.spec.Boot.ManifestKey, signed.Manifest, &m))
	var c bootmsg.Components
	check(t, out.Grant.Components.Open(g.vm.spec.Boot.ComponentKey, signed.Components, &c))
	if m.Reservation != g.id || m.Start != g.vm.spec.Start || !bytes.Equal(m.VMKey, g.public()) || m.Tunnel != tunnel || m.Kernel != c.Kernel || m.Initramfs != c.Initramfs ||
		m.Unique.SHA256 != digest.Of(out.Unique) || m.Unique.Size != int64(len(out.Unique)) || !m.Expires.After(time.Now()) || m.Cmdline == "" {
		t.Fatalf("manifest: %+v", m)
	}
	g.cmdline = m.Cmdline
	r := cpio.NewReader(bytes.NewReader(out.Unique))
	for {
		h, err := r.Next()
		check(t, err)
		if h.Name != bundle.UniquePath {
			continue
		}
		check(t, strictjson.Read(r, 1<<16, &g.unique))
		return
	}
}

// ready is act 7.
func (g *guest) ready() event.Reason {
	payload := must[[]byte](g.w.t)(json.Marshal(bootmsg.Report{Reservation: g.id, Start: g.vm.spec.Start, T2: g.unique.T2, Kernel: "6.1"}))
	key := g.key
	if g.tweak.signer != nil {
		key = g.tweak.signer
	}
	return g.w.post(context.Background(), "bootserver", upstream.PathBootReady,
		upstream.ReadyRequest{Source: g.address(), Report: signed.Seal(key, signed.Report, payload)}, nil)
}

// door is act 8 from the VM's side: one login, one conversation.
func (g *guest) door() {
	t := g.w.t
	l := g.w.listenFor(netip.AddrPortFrom(g.vm.spec.Network.Address.Addr(), 22))
	spent := make(chan struct{}, 1)
	conf := &ssh.ServerConfig{MaxAuthTries: 3, PublicKeyCallback: func(meta ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
		right := meta.User() == g.unique.Account && bytes.Equal(key.Marshal(), g.unique.AuthorizedKey)
		if right || g.tweak.openDoor {
			return &ssh.Permissions{}, nil
		}
		return nil, errors.New("no")
	}, VerifiedPublicKeyCallback: func(_ ssh.ConnMetadata, _ ssh.PublicKey, p *ssh.Permissions, _ string) (*ssh.Permissions, error) {
		if g.tweak.openDoor {
			return p, nil
		}
		select {
		case spent <- struct{}{}:
			return p, nil
		default:
			return nil, errors.New("spent")
		}
	}}
	key := g.key
	if g.tweak.hostKey != nil {
		key = g.tweak.hostKey
	}
	signer, err := ssh.NewSignerFromKey(key)
	check(t, err)
	conf.AddHostKey(signer)
	go func() {
		for {
			raw, err := l.Accept()
			if err != nil {
				return
			}
			go g.visit(raw, conf)
		}
	}()
}

func (g *guest) visit(raw net.Conn, conf *ssh.ServerConfig) {
	defer raw.Close()
	conn, chans, reqs, err := ssh.NewServerConn(raw, conf)
	if err != nil {
		return
	}
	defer conn.Close()
	go ssh.DiscardRequests(reqs)
	asked, ok := <-chans
	if !ok {
		return
	}
	channel, requests, err := asked.Accept()
	if err != nil {
		return
	}
	if r, ok := <-requests; ok {
		r.Reply(r.Type == "subsystem", nil)
	}
	go ssh.DiscardRequests(requests)
	g.converse(channel)
}

func (g *guest) converse(c io.ReadWriter) {
	var ask unlockmsg.AuditRequest
	if frame.Read(c, unlockmsg.MaxFrame, &ask) != nil {
		return
	}
	csr, _ := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, g.tlsKey)
	r := g.report(audit.Initramfs, ask.Nonce)
	if g.tweak.process != "" {
		r.Processes = append(r.Processes, audit.Process{PID: 77, Exe: g.tweak.process, SHA256: digest.Of([]byte(g.tweak.process))})
	}
	if g.tweak.first != nil {
		g.tweak.first(&r)
	}
	if frame.Write(c, unlockmsg.MaxFrame, unlockmsg.AuditReply{Report: r, Request: csr, WireGuardKey: bytes.Repeat([]byte{7}, 32)}) != nil {
		return
	}
	if frame.Read(c, unlockmsg.MaxFrame, &g.hand) != nil {
		return
	}
	for _, d := range []unlockmsg.Disk{g.hand.Template, g.hand.Volume} {
		if err := luks.Check(d.Header); err != nil || d.Passphrase.Len() != 32 {
			g.w.t.Errorf("header of %s: %v", d.Device, err)
		}
	}
	frame.Write(c, unlockmsg.MaxFrame, unlockmsg.HandoverReply{OK: g.tweak.handover == "", Reason: g.tweak.handover, FailedLogins: g.tweak.failed})
}

// report is an audit with nothing too much.
func (g *guest) report(stage string, nonce []byte) audit.Report {
	n := g.vm.spec.Network
	r := audit.Report{Stage: stage, Nonce: nonce, Kernel: "6.1", Cmdline: g.cmdline, Hostname: g.vm.spec.Name,
		Processes:  []audit.Process{{PID: 1, Exe: "/init", SHA256: agentDigest}},
		Interfaces: []audit.Interface{{Name: "eth0", MAC: n.MAC, Addresses: []string{n.Address.String()}, Up: true}},
		Disks: []audit.Disk{{Name: "vda", Number: "254:0", Size: int64(4096 * 16 * len("ciphertext debian") / 4096 * 4096), ReadOnly: true},
			{Name: "vdb", Number: "254:16", Size: int64(g.vm.spec.Volume.SizeMiB) << 20}},
	}
	template, volume := r.Disks[0].Size, r.Disks[1].Size
	if stage == audit.Initramfs {
		r.Listeners = []audit.Listener{{Proto: "tcp", Address: "0.0.0.0", Port: 22, Exe: "/init"}}
		return r
	}
	r.Disks = append(r.Disks,
		audit.Disk{Name: "dm-0", Number: "253:0", Mapped: "template", Size: template, ReadOnly: true, Table: fmt.Sprintf("0 %d crypt aes-xts-plain64 - 0 254:0 0 1 sector_size:4096", template/512)},
		audit.Disk{Name: "dm-1", Number: "253:1", Mapped: "os", ReadOnly: true, Table: fmt.Sprintf("0 128 verity 1 253:0 253:0 4096 4096 1 1 sha256 %s -", digest.Of([]byte("root")))},
		audit.Disk{Name: "dm-2", Number: "253:2", Mapped: "volume", Size: volume, Table: fmt.Sprintf("0 %d crypt aes-xts-plain64 - 0 254:16 0 1 sector_size:4096", volume/512)})
	r.Mounts = []audit.Mount{{Source: "/dev/mapper/os", Target: "/", Type: "erofs", Options: "ro"}}
	r.Processes = append(r.Processes, audit.Process{PID: 9, Exe: "/sbin/init", SHA256: digest.Of([]byte("systemd"))})
	r.Interfaces = append(r.Interfaces, audit.Interface{Name: "wg0", Addresses: []string{g.tunnel.String() + "/32"}, Up: true})
	r.Routes = []string{"default dev wg0"}
	if g.tweak.osProcess != "" {
		r.Processes = append(r.Processes, audit.Process{PID: 99, Exe: g.tweak.osProcess, SHA256: digest.Of([]byte(g.tweak.osProcess))})
	}
	return r
}

// admit is act 9 at the gateway.
func (g *guest) admit() event.Reason {
	in := upstream.AdmitRequest{T3: g.hand.T3, User: g.hand.User, Password: g.hand.Password, Certificate: g.hand.Certificate, Source: g.address(), Address: g.tunnel}
	if g.tweak.password != "" {
		in.Password = secret.New([]byte(g.tweak.password))
	}
	if g.tweak.cert != nil {
		in.Certificate = g.tweak.cert
	}
	var out upstream.AdmitResponse
	why := g.w.post(context.Background(), "gateway", upstream.PathGatewayAdmit, in, &out)
	if why == "" && (!bytes.Equal(out.PublicKey, bytes.Repeat([]byte{7}, 32)) || out.Reservation != g.id || out.TTL <= 0) {
		g.w.t.Errorf("admission: %+v", out)
	}
	return why
}

func (g *guest) serial() string {
	cert, err := x509.ParseCertificate(g.hand.Certificate)
	if err != nil {
		return ""
	}
	return cert.SerialNumber.String()
}

// say sends one message through the relay.
func (g *guest) say(change ...func(*agentmsg.Up)) (agentmsg.Down, event.Reason) {
	g.seq++
	up := agentmsg.Up{Reservation: g.id, Start: g.vm.spec.Start, Seq: g.seq, Nonce: g.nonce}
	for _, f := range change {
		f(&up)
	}
	return g.relay(signed.Seal(g.key, signed.AgentUp, must[[]byte](g.w.t)(json.Marshal(up))))
}

func (g *guest) relay(e signed.Envelope) (agentmsg.Down, event.Reason) {
	var out signed.Envelope
	why := g.w.post(context.Background(), "gateway", upstream.PathGatewayAgent, upstream.AgentRequest{Address: g.tunnel, Serial: g.serial(), Envelope: e}, &out)
	var down agentmsg.Down
	if why == "" {
		check(g.w.t, out.Open(g.unique.ManifestKey, signed.AgentDown, &down))
		g.nonce = down.Nonce
	}
	return down, why
}

func (g *guest) withAudit(up *agentmsg.Up) {
	r := g.report(audit.OS, up.Nonce)
	up.Audit = &r
}

// serveWorkload answers in the tunnel.
func (g *guest) serveWorkload(port uint16) {
	l := g.w.listenFor(netip.AddrPortFrom(g.tunnel, port))
	go http.Serve(l, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") }))
}

// stranger is what does not belong to a VM.
type stranger struct {
	addr       netip.Addr
	key        ed25519.PrivateKey
	components []bootmsg.Component
}

func (w *world) stranger() stranger {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	check(w.t, err)
	c := bootmsg.Component{Name: "kernel", SHA256: digest.Of([]byte("other")), Size: 5}
	return stranger{netip.MustParseAddr("10.82.0.99"), key, []bootmsg.Component{c, c, c}}
}
