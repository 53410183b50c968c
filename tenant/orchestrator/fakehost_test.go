package orchestrator

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"foothold/internal/mtls"
	"foothold/internal/strictjson"
	"foothold/internal/tpm"
	"foothold/internal/tpm/swtpmtest"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/hostapi"
	"foothold/protocol/inventory"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/token"
	"foothold/protocol/vmspec"

	"github.com/google/go-tpm/tpm2"
)

var one = big.NewInt(1)

// fakeHost speaks hostapi with a real TPM; its VMs are rows.
type fakeHost struct {
	t        testing.TB
	entry    inventory.Host
	files    []platform.File
	firmware vmspec.Firmware
	roots    string // PEM file of its TPM's manufacturer

	tpmMu sync.Mutex
	dev   *tpm.Device
	aik   tpm.Key
	log   []pcr.Event
	liar  bool // guarded by tpmMu: answers challenges wrongly

	mu        sync.Mutex
	vms       map[string]*hostedVM
	volumes   map[string]int64 // size in bytes by id
	templates map[digest.SHA256]int64
	fail      map[string]int // guarded by mu: "METHOD path-prefix" → how many calls fail
	served    hostapi.InventoryDigest
	quoting   func() // guarded by mu: called once, before the next static quote
	undead    bool   // guarded by mu: destroys nothing but says so
	garbled   string // guarded by mu: a pattern whose answers cannot be read
	mute      mute   // guarded by mu: one call that gets no answer
	own       []byte // guarded by mu: the tenant's own session key, which the TPM took
	changed   *sync.Cond
}

func (h *fakeHost) sessionKey() []byte {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.own
}

type hostedVM struct {
	hostapi.VM
	spec vmspec.Spec
	t1   token.Token
}

func newFakeHost(t *testing.T, files mtls.Files) *fakeHost {
	t.Helper()
	h := &fakeHost{t: t, vms: map[string]*hostedVM{}, volumes: map[string]int64{}, templates: map[digest.SHA256]int64{}, fail: map[string]int{}}
	h.changed = sync.NewCond(&h.mu)
	chip := swtpmtest.New(t)
	h.dev, h.roots = chip.Open(), chip.Roots()
	h.aik = h.makeKey(inventory.AIKHandle, tpm.AIKTemplate())
	session := h.makeKey(inventory.SessionHandle, tpm.SessionTemplate())
	rsp, err := tpm2.Certify{ObjectHandle: session.Auth(tpm2.PasswordAuth(nil)), SignHandle: h.aik.Auth(tpm2.PasswordAuth(nil)),
		InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}}.Execute(h.dev)
	check(t, err)
	for _, name := range []string{"foothold-host", "qemu", "bios", "loader-kernel", "loader-initramfs", "host-config"} {
		f := platform.File{Name: name, SHA256: digest.Of([]byte(name))}
		h.files = append(h.files, f)
		h.extend(pcr.Platform, f.SHA256)
		h.log = append(h.log, pcr.Event{PCR: pcr.Platform, Digest: f.SHA256, Name: name})
	}
	h.firmware = vmspec.Firmware{BIOS: h.files[2].SHA256, LoaderKernel: h.files[3].SHA256, LoaderInitramfs: h.files[4].SHA256, LoaderCmdline: "console=ttyS0"}
	l := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	h.entry = inventory.Host{Name: "host-1", API: netip.MustParseAddrPort(l.Addr().String()), Location: "here", Asset: "a1", Software: "release-1",
		AIK: tpm2.Marshal(h.aik.Public), Session: tpm2.Marshal(session.Public),
		SessionCertify: rsp.CertifyInfo.Bytes(), SessionSignature: tpm2.Marshal(rsp.Signature)}
	h.entry.EK, h.entry.EKChain = chip.Endorsement(h.dev)
	cert, pool, err := files.Load()
	check(t, err)
	var calls sync.RWMutex // read by each while it lasts
	closed, answer := false, h.handler()
	srv := &http.Server{Handler: mtls.Allow(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		calls.RLock()
		defer calls.RUnlock()
		if !closed {
			answer.ServeHTTP(w, r)
		}
	}), mtls.Orchestrator)}
	go srv.Serve(tls.NewListener(l, mtls.ServerConfig(cert, pool, mtls.Orchestrator)))
	t.Cleanup(func() {
		srv.Close()
		calls.Lock() // before the TPM goes
		closed = true
		calls.Unlock()
	})
	return h
}

func certificateOf(t testing.TB) []byte {
	public, key, err := ed25519.GenerateKey(rand.Reader)
	check(t, err)
	now := time.Now()
	tmpl := &x509.Certificate{SerialNumber: one, Subject: pkix.Name{CommonName: "x"}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(24 * time.Hour)}
	return must[[]byte](t)(x509.CreateCertificate(rand.Reader, tmpl, tmpl, public, key))
}

func (h *fakeHost) makeKey(handle tpm2.TPMHandle, template tpm2.TPMTPublic) tpm.Key {
	rsp, err := tpm2.CreatePrimary{PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		InPublic: tpm2.New2B(template)}.Execute(h.dev)
	check(h.t, err)
	_, err = tpm2.EvictControl{Auth: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		ObjectHandle: &tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name}, PersistentHandle: handle}.Execute(h.dev)
	check(h.t, err)
	_, err = tpm2.FlushContext{FlushHandle: rsp.ObjectHandle}.Execute(h.dev)
	check(h.t, err)
	return must[tpm.Key](h.t)(tpm.ReadKey(h.dev, handle))
}

func (h *fakeHost) extend(register int, d digest.SHA256) {
	_, err := tpm2.PCRExtend{PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(register), Auth: tpm2.PasswordAuth(nil)},
		Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: d[:]}}}}.Execute(h.dev)
	if err != nil {
		h.t.Error(err)
	}
}

// measureRogue extends the static registers by a file that is no reference value, as a
// host does that starts other software; the log shows it.
func (h *fakeHost) measureRogue() {
	h.tpmMu.Lock()
	defer h.tpmMu.Unlock()
	d := digest.Of([]byte("rogue"))
	h.extend(pcr.Platform, d)
	h.log = append(h.log, pcr.Event{PCR: pcr.Platform, Digest: d, Name: "rogue"})
}

// bootQuote holds the TPM for a VM and quotes.
func (h *fakeHost) bootQuote(spec vmspec.Spec, tunnel, qualifying digest.SHA256) evidence.Quote {
	h.tpmMu.Lock()
	defer h.tpmMu.Unlock()
	for _, i := range []int{pcr.VM, pcr.Tunnel} {
		if _, err := (tpm2.PCRReset{PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(i), Auth: tpm2.PasswordAuth(nil)}}).Execute(h.dev); err != nil {
			h.t.Error(err)
		}
	}
	for _, e := range vmspec.Measurements(h.firmware, spec.Digest()) {
		h.extend(e.PCR, e.Digest)
	}
	h.extend(pcr.Tunnel, tunnel)
	return h.quote(qualifying, pcr.BootSelection())
}

func (h *fakeHost) quote(qualifying digest.SHA256, selection []int) evidence.Quote {
	bits := make([]byte, 3)
	for _, i := range selection {
		bits[i/8] |= 1 << (i % 8)
	}
	rsp, err := tpm2.Quote{SignHandle: h.aik.Auth(tpm2.PasswordAuth(nil)), QualifyingData: tpm2.TPM2BData{Buffer: qualifying[:]},
		InScheme:  tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: bits}}}}.Execute(h.dev)
	if err != nil {
		h.t.Error(err)
		return evidence.Quote{}
	}
	return evidence.Quote{Attest: rsp.Quoted.Bytes(), Signature: tpm2.Marshal(rsp.Signature)}
}

func (h *fakeHost) has(id string) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.vms[id] != nil
}

func (h *fakeHost) get(id string) (hostedVM, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if v := h.vms[id]; v != nil {
		return *v, true
	}
	return hostedVM{}, false
}

// stop ends a VM by itself.
func (h *fakeHost) stop(id string, why event.Reason) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if v := h.vms[id]; v != nil {
		v.State, v.Reason, v.Detail, v.Ended = hostapi.Stopped, why, "what the host saw", time.Now()
	}
	h.changed.Broadcast()
}

// giveUp is the last word of a VM's agent, as its host passes it on.
func (h *fakeHost) giveUp(id string, why event.Reason) {
	h.mu.Lock()
	if v := h.vms[id]; v != nil {
		v.Boot = hostapi.Delivered
	}
	h.mu.Unlock()
	h.stop(id, why)
}

func (h *fakeHost) failing(what string, times int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.fail[what] = times
}

// unreadable is what a host answers that is garbled.
const unreadable = `{"log": "no list`

func (h *fakeHost) garble(pattern string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.garbled = pattern
}

// mute is a call that the host never answers.
type mute struct {
	pattern string
	done    bool          // it is carried out all the same
	came    chan struct{} // closed when it has come, and been carried out
}

// muteNext makes the host leave the next call of that pattern without an answer.
func (h *fakeHost) muteNext(pattern string, done bool) (came chan struct{}) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.mute = mute{pattern, done, make(chan struct{})}
	return h.mute.came
}

func (h *fakeHost) takeMute(pattern string) (m mute) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.mute.pattern == pattern {
		m, h.mute = h.mute, mute{}
	}
	return m
}

func (h *fakeHost) handler() http.Handler {
	mux := http.NewServeMux()
	on := func(pattern string, f func(r *http.Request) (any, event.Reason)) {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			h.mu.Lock()
			failing := h.fail[pattern] > 0
			h.fail[pattern]--
			garbled := h.garbled == pattern
			h.mu.Unlock()
			if garbled {
				io.WriteString(w, unreadable)
				return
			}
			m := h.takeMute(pattern)
			var out any
			why := event.InternalError
			if !failing && (m.pattern == "" || m.done) {
				out, why = f(r)
			}
			if m.pattern != "" {
				close(m.came)
				io.Copy(io.Discard, r.Body) // only behind it the caller's going away is seen
				<-r.Context().Done()
				return
			}
			if why != "" {
				w.WriteHeader(http.StatusConflict)
				out = hostapi.Problem{Reason: why, Detail: "hook"}
			}
			json.NewEncoder(w).Encode(out)
		})
	}
	on("POST /v1/vms", h.create)
	on("POST /v1/vms/{id}/start", h.start)
	on("GET /v1/vms", func(*http.Request) (any, event.Reason) {
		h.mu.Lock()
		defer h.mu.Unlock()
		list := []hostapi.VM{}
		for v := range maps.Values(h.vms) {
			list = append(list, v.VM)
		}
		return list, ""
	})
	on("GET /v1/vms/{id}", h.show)
	mux.HandleFunc("GET /v1/vms/{id}/console", func(w http.ResponseWriter, r *http.Request) {
		if !h.has(r.PathValue("id")) {
			w.WriteHeader(http.StatusNotFound)
			json.NewEncoder(w).Encode(hostapi.Problem{Reason: event.UnknownVM})
			return
		}
		io.WriteString(w, "last words")
	})
	on("DELETE /v1/vms/{id}", func(r *http.Request) (any, event.Reason) {
		h.mu.Lock()
		defer h.mu.Unlock()
		if !h.undead {
			delete(h.vms, r.PathValue("id"))
		}
		h.changed.Broadcast()
		return struct{}{}, ""
	})
	on("GET /v1/volumes", func(*http.Request) (any, event.Reason) {
		h.mu.Lock()
		defer h.mu.Unlock()
		list := []hostapi.Volume{}
		for id, size := range h.volumes {
			list = append(list, hostapi.Volume{ID: id, Size: size, Attached: h.attached(id)})
		}
		return list, ""
	})
	on("GET /v1/templates", func(*http.Request) (any, event.Reason) {
		h.mu.Lock()
		defer h.mu.Unlock()
		list := []hostapi.Template{}
		for sum, size := range h.templates {
			list = append(list, hostapi.Template{SHA256: sum, Size: size})
		}
		return list, ""
	})
	on("DELETE /v1/templates/{sum}", func(r *http.Request) (any, event.Reason) {
		sum, err := digest.Parse(r.PathValue("sum"))
		if err != nil {
			return nil, event.BadRequest
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.templates, sum)
		return struct{}{}, ""
	})
	on("DELETE /v1/volumes/{id}", func(r *http.Request) (any, event.Reason) {
		h.mu.Lock()
		defer h.mu.Unlock()
		delete(h.volumes, r.PathValue("id"))
		return struct{}{}, ""
	})
	on("POST /v1/quote", func(r *http.Request) (any, event.Reason) {
		var in hostapi.QuoteRequest
		if strictjson.Read(r.Body, hostapi.MaxMessage, &in) != nil {
			return nil, event.BadRequest
		}
		h.mu.Lock()
		first := h.quoting
		h.quoting = nil
		h.mu.Unlock()
		if first != nil {
			first()
		}
		h.tpmMu.Lock()
		defer h.tpmMu.Unlock()
		return hostapi.QuoteResponse{Quote: h.quote(in.QualifyingData, pcr.StaticSelection()), Platform: evidence.Platform{Log: slices.Clone(h.log)}}, ""
	})
	on("POST /v1/activate", func(r *http.Request) (any, event.Reason) {
		var in hostapi.ActivateRequest
		if strictjson.Read(r.Body, hostapi.MaxMessage, &in) != nil {
			return nil, event.BadRequest
		}
		h.tpmMu.Lock()
		defer h.tpmMu.Unlock()
		credential, err := tpm.Activate(h.dev, h.aik, in.Blob, in.Secret)
		if err != nil {
			return nil, event.BadRequest
		}
		if h.liar {
			credential[0] ^= 1
		}
		return hostapi.ActivateResponse{Credential: credential}, ""
	})
	on("PUT /v1/session-key", func(r *http.Request) (any, event.Reason) {
		var in hostapi.MigratedKey
		if strictjson.Read(r.Body, hostapi.MaxMessage, &in) != nil {
			return nil, event.BadRequest
		}
		h.tpmMu.Lock()
		defer h.tpmMu.Unlock()
		parent, err1 := tpm.ReadKey(h.dev, inventory.SessionHandle)
		public, err2 := tpm.ParsePublic(in.Public)
		if errors.Join(err1, err2) != nil {
			return nil, event.BadRequest
		}
		if _, err := tpm.Import(h.dev, parent, public, in.Duplicate, in.Seed); err != nil {
			return nil, event.BadRequest
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		h.own = in.Public
		return struct{}{}, ""
	})
	on("GET /v1/platform", func(*http.Request) (any, event.Reason) {
		h.tpmMu.Lock()
		defer h.tpmMu.Unlock()
		return evidence.Platform{Log: slices.Clone(h.log)}, ""
	})
	on("GET /v1/inventory/digest", func(*http.Request) (any, event.Reason) {
		h.mu.Lock()
		defer h.mu.Unlock()
		return h.served, ""
	})
	on("PUT /v1/templates/{sum}", func(r *http.Request) (any, event.Reason) {
		data, _ := io.ReadAll(r.Body)
		if digest.Of(data).String() != r.PathValue("sum") {
			return nil, event.DigestMismatch
		}
		h.mu.Lock()
		defer h.mu.Unlock()
		h.templates[digest.Of(data)] = int64(len(data))
		return struct{}{}, ""
	})
	return mux
}

// attached reports whether a VM that has not ended has the volume. The caller holds mu.
func (h *fakeHost) attached(volume string) bool {
	for _, v := range h.vms {
		if v.spec.Volume.ID == volume && v.State != hostapi.Stopped {
			return true
		}
	}
	return false
}

func (h *fakeHost) create(r *http.Request) (any, event.Reason) {
	var in hostapi.CreateRequest
	if err := strictjson.Read(r.Body, hostapi.MaxMessage, &in); err != nil || in.Spec.Validate() != nil || in.Token.Digest() != in.Spec.TokenDigest {
		return nil, event.BadRequest
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, ok := h.templates[in.Spec.Template]; !ok {
		return nil, event.UnknownTemplate
	}
	if old := h.vms[in.Spec.Reservation]; old != nil && old.State != hostapi.Stopped {
		return nil, event.InUse
	}
	h.volumes[in.Spec.Volume.ID] = int64(in.Spec.Volume.SizeMiB) << 20
	v := &hostedVM{VM: hostapi.VM{ID: in.Spec.Reservation, Start: in.Spec.Start, Name: in.Spec.Name, Host: h.entry.Name, State: hostapi.Created,
		Settings: in.Spec.Digest(), Firmware: h.firmware, Created: time.Now()}, spec: in.Spec, t1: in.Token}
	h.vms[v.ID] = v
	return v.VM, ""
}

func (h *fakeHost) start(r *http.Request) (any, event.Reason) {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.vms[r.PathValue("id")]
	if v == nil {
		return nil, event.UnknownVM
	}
	v.State, v.Boot, v.Started, v.TPMHeld = hostapi.Running, hostapi.Waiting, time.Now(), 120*time.Millisecond
	h.changed.Broadcast()
	return v.VM, ""
}

func (h *fakeHost) show(r *http.Request) (any, event.Reason) {
	h.mu.Lock()
	defer h.mu.Unlock()
	defer time.AfterFunc(1100*time.Millisecond, h.changed.Broadcast).Stop()
	defer context.AfterFunc(r.Context(), func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.changed.Broadcast()
	})()
	for end := time.Now().Add(time.Second); ; {
		v := h.vms[r.PathValue("id")]
		if v == nil {
			return nil, event.UnknownVM
		}
		want := r.URL.Query().Get("wait")
		if want == "" || v.State == want || !time.Now().Before(end) || r.Context().Err() != nil {
			return v.VM, ""
		}
		h.changed.Wait()
	}
}
