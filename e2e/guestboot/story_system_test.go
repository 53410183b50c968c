//go:build system

package guestboot

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/internal/bootimage"
	"foothold/internal/luks"
	"foothold/internal/mtls"
	"foothold/internal/secret"
	"foothold/internal/wg"
	"foothold/protocol/agentmsg"
	"foothold/protocol/audit"
	"foothold/protocol/bootmsg"
	"foothold/protocol/bundle"
	"foothold/protocol/channel"
	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/frame"
	"foothold/protocol/signed"
	"foothold/protocol/unlockmsg"
	"foothold/protocol/vmcert"
	"foothold/tenant/expect"
	"foothold/tenant/unlock"
)

const account = "fh-test"

// host plays foothold-host's side of the channel.
func (w *world) host(c net.Conn) {
	challenge := bytes.Repeat([]byte{4}, channel.ChallengeLen)
	say := func(m channel.Message) { _ = frame.Write(c, channel.MaxFrame, m) }
	for {
		var m channel.Message
		if frame.Read(c, channel.MaxFrame, &m) != nil {
			return
		}
		switch m.Type {
		case channel.TunnelUp:
			say(channel.Message{Type: channel.AskTunnel, Challenge: challenge})
		case channel.Tunnel:
			say(channel.Message{Type: channel.Ready})
		case channel.Command:
			say(channel.Message{Type: channel.Response, Data: m.Data})
		case channel.Handover:
			say(channel.Message{Type: channel.Released})
		case channel.Failed:
			w.t.Errorf("the loader fails: %s", m.Reason)
			return
		}
	}
}

// bootServer plays acts 4 to 7.
func (w *world) bootServer() {
	conf := &tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{w.ca.server(w.t, mtls.BootServer)}, ClientAuth: tls.RequireAnyClientCert, SessionTicketsDisabled: true}
	nonce := make([]byte, evidence.NonceLen)
	rand.Read(nonce)
	var tunnel digest.SHA256
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+bootmsg.PathOpen, func(rw http.ResponseWriter, r *http.Request) {
		var in bootmsg.OpenRequest
		if decode(r, &in) != nil || in.Token.Digest() != w.t1.Digest() {
			http.Error(rw, "refused", http.StatusForbidden)
			return
		}
		w.mu.Lock()
		w.vmKey = in.VMKey
		w.mu.Unlock()
		exporter, _ := r.TLS.ExportKeyingMaterial(evidence.ExporterLabel, evidence.ExporterContext(w.spec.Reservation, nonce), evidence.ExporterLen)
		tunnel = evidence.Tunnel(digest.Of(exporter), conf.Certificates[0].Certificate[0], r.TLS.PeerCertificates[0].Raw, in.VMKey)
		answer(rw, bootmsg.OpenResponse{Reservation: w.spec.Reservation, Nonce: nonce})
	})
	files := map[string][]byte{}
	for path, file := range map[string]string{bootmsg.PathKernel: w.template.Kernel(), bootmsg.PathInitramfs: w.template.Initramfs()} {
		data, err := os.ReadFile(file)
		check(w.t, err)
		files[path] = data
	}
	files[bootmsg.PathUnique] = w.unique()
	for path, data := range files {
		mux.HandleFunc("GET "+path, func(rw http.ResponseWriter, r *http.Request) {
			rw.Header().Set("Content-Length", fmt.Sprint(len(data)))
			rw.Write(data)
		})
	}
	asked := false
	mux.HandleFunc("POST "+bootmsg.PathAttest, func(rw http.ResponseWriter, r *http.Request) {
		if !asked {
			asked = true
			answer(rw, bootmsg.AttestResponse{Command: []byte("command")})
			return
		}
		shared, err := w.template.SignedComponents(w.component.Public().(ed25519.PublicKey))
		if err != nil {
			w.t.Error(err)
		}
		m := bootmsg.Manifest{Reservation: w.spec.Reservation, Start: 1, VMKey: w.vmKey, Tunnel: tunnel, Kernel: w.template.Components.Kernel, Initramfs: w.template.Components.Initramfs,
			Unique:  bootmsg.Component{Name: "unique", SHA256: digest.Of(files[bootmsg.PathUnique]), Size: int64(len(files[bootmsg.PathUnique]))},
			Cmdline: bootimage.GuestCmdline, Expires: time.Now().Add(time.Minute)}
		data, _ := json.Marshal(m)
		answer(rw, bootmsg.AttestResponse{Grant: &bootmsg.Grant{Manifest: signed.Seal(w.manifest, signed.Manifest, data), Components: shared}})
	})
	mux.HandleFunc("POST "+bootmsg.PathDone, func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, "{}") })
	mux.HandleFunc("POST "+bootmsg.PathReady, func(rw http.ResponseWriter, r *http.Request) {
		var e signed.Envelope
		var report bootmsg.Report
		if decode(r, &e) != nil || e.Open(w.vmKey, signed.Report, &report) != nil || report.T2.Digest() != w.t2.Digest() || report.Kernel != w.template.Release {
			w.t.Errorf("report %+v", report)
			http.Error(rw, "refused", http.StatusForbidden)
			return
		}
		io.WriteString(rw, "{}")
		close(w.ready)
	})
	w.serve(bootAddr.String()+":443", conf, mux)
}

func (w *world) unique() []byte {
	n := w.spec.Network
	data, err := json.Marshal(bootmsg.Unique{Reservation: w.spec.Reservation, Start: 1, Name: w.spec.Name, Account: account, AuthorizedKey: w.login.PublicKey().Marshal(), T2: w.t2,
		Network: bootmsg.Network{MAC: n.MAC, Address: n.Address, Gateway: n.Gateway, MTU: n.MTU}, BootURL: w.spec.Boot.URL, ServerName: w.spec.Boot.ServerName, BootCA: w.ca.der,
		ManifestKey: w.manifest.Public().(ed25519.PublicKey), Orchestrator: orchAddr})
	check(w.t, err)
	archive, err := bundle.Archive(bundle.File{Path: bundle.UniquePath, Data: data})
	check(w.t, err)
	return archive
}

func (w *world) instance(nonce []byte) expect.Instance {
	return expect.Instance{Name: w.spec.Name, Nonce: nonce, Cmdline: bootimage.GuestCmdline, Network: w.spec.Network, BootServer: bootAddr, Orchestrator: orchAddr, Gateway: gatewayAddr,
		TemplateSize: w.template.Size, VolumeSize: volumeMiB << 20, RootHash: w.template.RootHash, Tunnel: tunnelVM, TunnelPrefix: tunnelPrefix}
}

// unlockVM is act 8 with the orchestrator's own code.
func (w *world) unlockVM() {
	dial := func(ctx context.Context) (net.Conn, error) {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: orchAddr.AsSlice()}, Timeout: 5 * time.Second}
		return d.DialContext(ctx, "tcp", netip.AddrPortFrom(vmAddr, 22).String())
	}
	ctx, cancel := context.WithTimeout(w.t.Context(), 2*time.Minute)
	defer cancel()
	result, err := unlock.Run(ctx, unlock.Target{Dial: dial, Account: account, Signer: w.login, HostKey: w.vmKey}, w.decide)
	for _, p := range result.Probes {
		fmt.Fprintf(os.Stderr, "probe %s %s: %s in %s\n", p.Stage, p.Kind, p.Outcome, p.Took)
	}
	check(w.t, err)
}

func (w *world) decide(ctx context.Context, reply unlockmsg.AuditReply, nonce []byte) (unlockmsg.Handover, error) {
	for _, f := range expect.Initramfs(w.expected, w.instance(nonce), reply.Report) {
		w.t.Errorf("first audit: %s", f)
	}
	key, err := w.template.VolumeKey()
	check(w.t, err)
	disk := func(device string, size int64, key secret.Bytes) unlockmsg.Disk {
		pass := secret.Random(32)
		header, err := luks.Header(ctx, size, key, pass)
		check(w.t, err)
		return unlockmsg.Disk{Device: device, Header: header, Passphrase: pass}
	}
	h := unlockmsg.Handover{Template: disk("vda", w.template.Size, key), Volume: disk("vdb", volumeMiB<<20, w.volumeKey), T3: w.t3, User: "user", Password: secret.New(bytes.Clone(w.password.Reveal())),
		Verity:  unlockmsg.Verity{RootHash: w.template.RootHash, HashOffset: w.template.HashOffset},
		Gateway: unlockmsg.Gateway{Address: netip.AddrPortFrom(gatewayAddr, 8443), ServerName: "gateway.foothold.internal", CA: w.ca.der}}
	h.Volume.Format, h.Volume.Authenticated = true, true
	csr, err := x509.ParseCertificateRequest(reply.Request)
	check(w.t, err)
	ext, err := vmcert.Extension(vmcert.Info{Reservation: w.spec.Reservation, Start: 1, Address: vmAddr, WireGuardKey: reply.WireGuardKey})
	check(w.t, err)
	name, _ := url.Parse(mtls.Identity{Role: mtls.VM, Name: w.spec.Reservation}.URI())
	tmpl := &x509.Certificate{URIs: []*url.URL{name}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	tmpl.ExtraExtensions = append(tmpl.ExtraExtensions, ext)
	h.Certificate = w.ca.issue(w.t, tmpl, csr.PublicKey)
	return h, nil
}

// gateway plays admission, relay and store.
func (w *world) gateway() {
	conf := mtls.ServerConfig(w.ca.server(w.t, mtls.Gateway), w.ca.pool, mtls.VM)
	admission := http.NewServeMux()
	admission.HandleFunc("POST "+agentmsg.PathAdmit, func(rw http.ResponseWriter, r *http.Request) {
		var in agentmsg.AdmitRequest
		info, err := vmcert.Parse(r.TLS.PeerCertificates[0])
		if decode(r, &in) != nil || err != nil || in.T3.Digest() != w.t3.Digest() || !in.Password.Equal(w.password) || in.User != "user" {
			http.Error(rw, "refused", http.StatusForbidden)
			return
		}
		psk, _ := r.TLS.ExportKeyingMaterial(evidence.PSKLabel, []byte(w.spec.Reservation), evidence.PSKLen)
		peer := wg.Peer{PresharedKey: secret.New(psk), AllowedIPs: []netip.Prefix{netip.PrefixFrom(tunnelVM, 32)}}
		copy(peer.PublicKey[:], info.WireGuardKey)
		if err := w.wg.AddPeer(peer); err != nil {
			w.t.Error(err)
		}
		public := w.wg.PublicKey()
		answer(rw, agentmsg.AdmitResponse{Address: tunnelVM, GatewayKey: public[:], Endpoint: netip.AddrPortFrom(gatewayAddr, 51820),
			Relay: netip.AddrPortFrom(tunnelSelf, 8443), MTU: 1420, Keepalive: 5})
		close(w.admit)
	})
	w.serve(gatewayAddr.String()+":8443", conf, admission)
	relay := http.NewServeMux()
	relay.HandleFunc("POST "+agentmsg.PathAgent, w.relay)
	w.serve(tunnelSelf.String()+":8443", conf, relay)
	store := http.NewServeMux()
	store.HandleFunc("GET /v1/objects/"+digest.Of(w.web).String(), func(rw http.ResponseWriter, r *http.Request) { rw.Write(w.web) })
	w.serve(storeAddr.String()+":8443", mtls.ServerConfig(w.ca.server(w.t, mtls.Store), w.ca.pool, mtls.VM), store)
}

// relay plays the orchestrator: an audit first, then the workload, then the end.
func (w *world) relay(rw http.ResponseWriter, r *http.Request) {
	var e signed.Envelope
	var up agentmsg.Up
	if decode(r, &e) != nil || e.Open(w.vmKey, signed.AgentUp, &up) != nil {
		http.Error(rw, "refused", http.StatusForbidden)
		return
	}
	for _, line := range up.Events {
		fmt.Fprintln(os.Stderr, "event:", line)
	}
	down := agentmsg.Down{Reservation: up.Reservation, Seq: up.Seq, Nonce: bytes.Repeat([]byte{byte(up.Seq)}, 32), Interval: 2}
	workload := &agentmsg.Workload{SHA256: digest.Of(w.web), Size: int64(len(w.web)), Kind: "executable", Store: netip.AddrPortFrom(storeAddr, 8443),
		StoreName: "store.foothold.internal", Port: 8080, Env: []string{`QUOTED=a "b" $c`}}
	select {
	case <-w.audited:
		down.Workload = workload
	default:
		if up.Audit == nil {
			down.Audit = true
		} else {
			w.judge(up.Audit, up.Nonce, nil)
			down.Workload = workload
			close(w.audited)
		}
	}
	if s := up.Workload; s != nil {
		fmt.Fprintf(os.Stderr, "workload %s %s\n", s.State, s.Detail)
		if s.State == "running" && !closed(w.running) {
			close(w.running)
		}
	}
	if closed(w.running) && !closed(w.again) {
		if up.Audit == nil {
			down.Audit = true
		} else {
			w.judge(up.Audit, up.Nonce, &expect.Workload{SHA256: workload.SHA256, Port: workload.Port})
			close(w.again)
		}
	}
	down.Stop = closed(w.stop)
	data, _ := json.Marshal(down)
	answer(rw, signed.Seal(w.manifest, signed.AgentDown, data))
}

func (w *world) judge(r *audit.Report, nonce []byte, workload *expect.Workload) {
	instance := w.instance(nonce)
	instance.Workload = workload
	for _, f := range expect.OS(w.expected, instance, *r) {
		w.t.Errorf("audit of the OS: %s", f)
	}
	for _, p := range r.Processes {
		fmt.Fprintf(os.Stderr, "process %d %s %q\n", p.PID, p.Exe, p.Args)
	}
}

func closed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// await waits for a milestone and says when it was reached.
func (w *world) await(what string, c chan struct{}, limit time.Duration) {
	w.t.Helper()
	select {
	case <-c:
		fmt.Fprintf(os.Stderr, "%.1f s: %s\n", w.since(), what)
	case <-w.ended:
		if !closed(c) {
			w.t.Fatalf("the VM ended before: %s", what)
		}
	case <-time.After(limit):
		w.t.Fatalf("not within %s: %s", limit, what)
	}
}

func TestOneVMFromFirmwareToWorkload(t *testing.T) {
	w := newWorld(t)
	w.bootServer()
	w.gateway()
	go w.host(w.qemu())
	w.await("reported ready", w.ready, 90*time.Second)
	if c, err := net.DialTimeout("tcp", netip.AddrPortFrom(vmAddr, 22).String(), time.Second); err == nil {
		c.Close()
		t.Error("the SSH port is open to another address than the orchestrator's")
	}
	w.unlockVM()
	w.await("admitted", w.admit, time.Minute)
	w.await("audited", w.audited, 2*time.Minute)
	if c, err := net.DialTimeout("tcp", netip.AddrPortFrom(tunnelVM, 22).String(), time.Second); err == nil {
		c.Close()
		t.Error("something listens on port 22 through the tunnel")
	}
	w.await("workload runs", w.running, time.Minute)
	page := get(t, "http://"+tunnelVM.String()+":8080/")
	if !strings.Contains(page, "Hello from web1") {
		t.Errorf("page: %q", page)
	}
	fmt.Fprintf(os.Stderr, "%.1f s: page\n", w.since())
	w.await("audited again, with the workload", w.again, time.Minute)
	if c, err := net.DialTimeout("tcp", netip.AddrPortFrom(vmAddr, 8080).String(), time.Second); err == nil {
		c.Close()
		t.Error("the workload is reached beside the tunnel")
	}
	close(w.stop)
	select {
	case <-w.ended:
	case <-time.After(30 * time.Second):
		t.Error("the VM does not stop when told")
	}
	secrets := []string{w.t1.Reveal(), w.t2.Reveal(), w.t3.Reveal()}
	if text := w.console.text(); slices.ContainsFunc(secrets, func(s string) bool { return strings.Contains(text, s) }) {
		t.Error("a token shows on the console")
	}
}

// get asks until the workload, which has only been started, answers.
func get(t *testing.T, address string) string {
	t.Helper()
	client := &http.Client{Timeout: 10 * time.Second}
	for give := time.Now().Add(30 * time.Second); ; {
		resp, err := client.Get(address)
		if err == nil {
			defer resp.Body.Close()
			body, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
			return string(body)
		}
		if time.Now().After(give) {
			t.Error(err)
			return ""
		}
		time.Sleep(200 * time.Millisecond)
	}
}
