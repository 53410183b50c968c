package site

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"foothold/internal/mtls"
	"foothold/internal/strictjson"
	"foothold/internal/tpm"
	"foothold/internal/tpm/swtpm"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/hostapi"
	"foothold/protocol/inventory"
	"foothold/protocol/pcr"
	"foothold/protocol/vmspec"
	"foothold/provider/broker"
	"foothold/provider/enroll"
	"foothold/tenant/authority"
	"foothold/tenant/hostclient"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// turn is how long a VM may take for each of its commands.
const turn = 30 * time.Second

// host speaks hostapi; its TPM and the broker before it are real.
type host struct {
	entry  inventory.Host
	tpm    *swtpm.Process
	broker *broker.Broker // another, when the TPM was powered on again: see current
	bus    *bus
	events []pcr.Event       // by which the TPM was extended since it was powered on
	own    evidence.Platform // its true logs; guarded by mu, once the host serves

	mu  sync.Mutex            // guards broker too, once the host serves
	vms map[string]hostapi.VM // guarded by mu; by reservation
	// quotes answers for static quotes: the broker, or who takes its place.
	quotes func(context.Context, hostapi.QuoteRequest) (hostapi.QuoteResponse, error) // guarded by mu
	// logs are what it gives of itself for boot quotes.
	logs func() evidence.Platform // guarded by mu
}

func (s *Site) newHost(ctx context.Context, name string) (*host, error) {
	h := &host{vms: map[string]hostapi.VM{}}
	dir := s.path(name)
	if err := swtpm.Manufacture(ctx, dir); err != nil {
		return nil, err
	}
	sockets, err := os.MkdirTemp("", "foothold-") // sockets' paths are short
	if err != nil {
		return nil, err
	}
	proc, err := s.power(ctx, dir, sockets)
	if err != nil {
		return nil, err
	}
	h.tpm = proc
	dev, err := tpm.Open(proc.Socket)
	if err != nil {
		return nil, err
	}
	s.running.Go(func() { <-ctx.Done(); dev.Close() })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	h.entry = inventory.Host{Name: name, API: netip.MustParseAddrPort(l.Addr().String()), Location: "bench", Asset: name, Software: release}
	if h.entry.EKChain, err = swtpm.Chain(dir); err != nil {
		return nil, err
	}
	if h.entry, err = enroll.Enroll(dev, h.entry); err != nil {
		return nil, err
	}
	h.events, h.own = s.boots()
	if err := h.measure(ctx, dev); err != nil {
		return nil, err
	}
	keys, err := broker.KeysOf(h.entry)
	if err != nil {
		return nil, err
	}
	h.bus = &bus{TPM: dev}
	if h.broker, err = broker.New(h.bus, keys, turn); err != nil {
		return nil, err
	}
	h.quotes, h.logs = h.quote, h.measured
	files, err := s.issue(s.provider, authority.Provider, mtls.Host, name, authority.Server, hostclient.ServerName(name))
	if err != nil {
		return nil, err
	}
	files.CA = s.tenant.CertFile(authority.Tenant)
	cert, pool, err := files.Load()
	if err != nil {
		return nil, err
	}
	srv := &http.Server{Handler: mtls.Allow(h.handler(), mtls.Orchestrator)}
	s.running.Go(func() { <-ctx.Done(); srv.Close() })
	s.run(ctx, name, func(ctx context.Context) error {
		if err := srv.Serve(tls.NewListener(l, mtls.ServerConfig(cert, pool, mtls.Orchestrator))); ctx.Err() == nil {
			return err
		}
		return nil
	})
	return h, nil
}

// boots is what a host of the site measures while it boots, and the logs of that.
func (s *Site) boots() (events []pcr.Event, logs evidence.Platform) {
	if p := s.options.Production; p != nil {
		return p.Machine.Measured(), p.Machine.Logs()
	}
	for _, f := range s.files {
		events = append(events, pcr.Event{PCR: pcr.Platform, Digest: f.SHA256, Name: f.Name})
	}
	return events, evidence.Platform{Log: events}
}

// measure extends the host's TPM, which was just powered on, as firmware, kernel and system do.
func (h *host) measure(ctx context.Context, dev *tpm.Device) error {
	launched := false
	for _, e := range h.events {
		var err error
		switch {
		case e.PCR == pcr.Launch && !launched:
			err, launched = h.tpm.Launch(ctx, e.Name), true
		case slices.Contains(pcr.Dynamic, e.PCR):
			err = errors.Join(h.tpm.Locality(ctx, 2), extend(dev, e.PCR, e.Digest), h.tpm.Locality(ctx, 0))
		default:
			err = extend(dev, e.PCR, e.Digest)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// bus is the way between a host's broker and its TPM.
type bus struct {
	transport.TPM
	// before, if set, is called with each command before it goes on: by whoever else can
	// reach the TPM. It is set while nothing is under way.
	before func(tpm transport.TPM, command []byte)
}

func (b *bus) Send(command []byte) ([]byte, error) {
	if b.before != nil {
		b.before(b.TPM, command)
	}
	return b.TPM.Send(command)
}

// power starts a TPM on a thread that lives as long as it: it dies with its thread.
func (s *Site) power(ctx context.Context, dir, sockets string) (*swtpm.Process, error) {
	type started struct {
		proc *swtpm.Process
		err  error
	}
	done := make(chan started, 1)
	s.running.Go(func() {
		defer os.RemoveAll(sockets)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		proc, err := swtpm.StartControlled(ctx, dir, filepath.Join(sockets, "tpm"), filepath.Join(sockets, "control"))
		done <- started{proc, err}
		if err == nil {
			<-ctx.Done()
			proc.Stop()
		}
	})
	r := <-done
	return r.proc, r.err
}

// TPMTime is the processor time that all hosts' TPMs have taken so far.
func (s *Site) TPMTime() (time.Duration, error) {
	var ticks int64
	for _, h := range s.hosts {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", h.tpm.PID()))
		if err != nil {
			return 0, fmt.Errorf("read the TPM's time: %w", err)
		}
		own, err := ticksOf(string(data))
		if err != nil {
			return 0, fmt.Errorf("read the TPM's time: %w", err)
		}
		ticks += own
	}
	return time.Duration(ticks) * tick, nil
}

// tick is the unit of times in /proc/PID/stat, USER_HZ of Linux on every machine we run on.
const tick = 10 * time.Millisecond

// ticksOf reads utime and stime, fields 14 and 15 (proc_pid_stat(5)); the name before them
// may hold anything but ends with the last parenthesis.
func ticksOf(stat string) (int64, error) {
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	const state = 3 // number of the first field behind the name
	if len(fields) <= 15-state {
		return 0, errors.New("it is cut short")
	}
	user, err1 := strconv.ParseInt(fields[14-state], 10, 64)
	system, err2 := strconv.ParseInt(fields[15-state], 10, 64)
	return user + system, errors.Join(err1, err2)
}

func extend(dev transport.TPM, register int, d digest.SHA256) error {
	_, err := tpm2.PCRExtend{PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(register), Auth: tpm2.PasswordAuth(nil)},
		Digests: tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: d[:]}}}}.Execute(dev)
	return err
}

// add gives the host a running VM.
func (h *host) add(spec vmspec.Spec, firmware vmspec.Firmware) {
	now := time.Now()
	h.mu.Lock()
	defer h.mu.Unlock()
	h.vms[spec.Reservation] = hostapi.VM{ID: spec.Reservation, Start: spec.Start, Name: spec.Name, Host: h.entry.Name, State: hostapi.Running,
		Settings: spec.Digest(), Firmware: firmware, Created: now, Started: now}
}

// current is the broker of the TPM as it is now.
func (h *host) current() *broker.Broker {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.broker
}

// quote is an honest static quote.
func (h *host) quote(ctx context.Context, in hostapi.QuoteRequest) (hostapi.QuoteResponse, error) {
	q, err := h.current().StaticQuote(ctx, tenantName, in.QualifyingData)
	return hostapi.QuoteResponse{Quote: q, Platform: h.measured()}, err
}

// measured are the honest logs.
func (h *host) measured() evidence.Platform {
	h.mu.Lock()
	defer h.mu.Unlock()
	return evidence.Platform{Log: slices.Clone(h.own.Log), Firmware: bytes.Clone(h.own.Firmware), Kernel: bytes.Clone(h.own.Kernel), Userspace: bytes.Clone(h.own.Userspace)}
}

func (h *host) handler() http.Handler {
	mux := http.NewServeMux()
	answer := func(w http.ResponseWriter, out any, why event.Reason) {
		w.Header().Set("Content-Type", "application/json")
		if why != "" {
			w.WriteHeader(http.StatusConflict)
			p := hostapi.Problem{Reason: why}
			if err, ok := out.(error); ok {
				p.Detail = err.Error()
			}
			out = p
		}
		_ = json.NewEncoder(w).Encode(out) // the caller notices
	}
	mux.HandleFunc("GET /v1/platform", func(w http.ResponseWriter, _ *http.Request) {
		h.mu.Lock()
		logs := h.logs
		h.mu.Unlock()
		answer(w, logs(), "")
	})
	mux.HandleFunc("POST /v1/quote", func(w http.ResponseWriter, r *http.Request) {
		var in hostapi.QuoteRequest
		if strictjson.Read(r.Body, hostapi.MaxMessage, &in) != nil {
			answer(w, nil, event.BadRequest)
			return
		}
		h.mu.Lock()
		quotes := h.quotes
		h.mu.Unlock()
		out, err := quotes(r.Context(), in)
		if err != nil {
			answer(w, nil, event.HostRefused)
			return
		}
		answer(w, out, "")
	})
	mux.HandleFunc("GET /v1/vms/{id}", func(w http.ResponseWriter, r *http.Request) {
		h.mu.Lock()
		vm, ok := h.vms[r.PathValue("id")]
		h.mu.Unlock()
		if !ok {
			answer(w, nil, event.UnknownVM)
			return
		}
		answer(w, vm, "")
	})
	mux.HandleFunc("DELETE /v1/vms/{id}", func(w http.ResponseWriter, r *http.Request) {
		h.mu.Lock()
		delete(h.vms, r.PathValue("id"))
		h.mu.Unlock()
		answer(w, struct{}{}, "")
	})
	mux.HandleFunc("POST /v1/activate", func(w http.ResponseWriter, r *http.Request) {
		var in hostapi.ActivateRequest
		if strictjson.Read(r.Body, hostapi.MaxMessage, &in) != nil {
			answer(w, nil, event.BadRequest)
			return
		}
		credential, err := h.current().Activate(r.Context(), tenantName, in.Blob, in.Secret)
		if err != nil {
			answer(w, err, event.BadRequest)
			return
		}
		answer(w, hostapi.ActivateResponse{Credential: credential}, "")
	})
	return mux
}
