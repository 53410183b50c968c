// Package orchestrator decides. It takes a VM from wish to work, one file an act:
//
//	basis.go    0  take up the inventory and the reference values, and swap them
//	imports.go  0  import an inventory; import and withdraw reference values
//	standing.go 0  whether a host may have VMs, and what becomes of those it has
//	ground.go   0  check that each host's attestation key lies in its TPM
//	reserve.go  1  store a reservation
//	create.go   2  ask the provider for the VM, and watch it there
//	places.go   2  so many at a host at once, in order
//	anew.go     2  the same again after a crash
//	boot.go     4  spend T1, hand out a nonce
//	attest.go   5  verify the quote
//	deliver.go  6  sign this VM's manifest, make its unique part with T2
//	ready.go    7  spend T2
//	unlock.go   8  probe, audit, hand over the secrets
//	connect.go  9  spend T3, admit the tunnel, audit again
//	compute.go  10 open the network, workload, heartbeats
//	restart.go  -  stop, and start again from act 2
//	end.go      11 withdraw everything
//	elsewhere.go -  end a VM that another host than its own lists
//	dropped.go  -  tell of frames that its host's bridge dropped of a VM
//	fsck.go     -  hold everything against everything
//
// Acts 4 to 7, 9 and 10 answer calls of the DMZ's daemons; acts 2 and 8 are driven
// from here, by one goroutine for each live reservation. The ledger holds all that
// must not get lost; every effect follows the stored intent, and a restart takes the
// live rows up again where they stand. What releases components, secrets, certificates
// or a tunnel takes a verify.Admitted and checks it.
//
// The zone documents are made from the ledger alone (zones.go), so whatever ends or
// moves a reservation changes the rules by publishing again.
package orchestrator

import (
	"context"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"foothold/internal/mtls"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/tenant/authority"
	"foothold/tenant/ledger"
	"foothold/tenant/policy"
	"foothold/tenant/reservation"
	"foothold/tenant/vault"
)

// dialVMTimeout bounds one try to reach a VM.
const dialVMTimeout = 3 * time.Second

// Orchestrator is a running orchestrator.
type Orchestrator struct {
	conf    Config
	letGo   func() // of the state directory
	ledger  *ledger.Ledger
	vault   *vault.Vault
	ca      *authority.Set
	limits  reservation.Limits
	network policy.Network
	zones   *zones
	trust   trust
	current atomic.Pointer[basis]
	own     *ownKey // nil: boot sessions are salted to the inventory's keys
	ground  ground
	version string // of this program, for people
	store   *storeClient
	now     func() time.Time
	// dial reaches VMs: their SSH port, and their workload through the tunnel.
	dial func(ctx context.Context, network, address string) (net.Conn, error)
	// watchEvery lies between static quotes of a computing VM's host; without a good one for
	// attestWithin, it ends.
	watchEvery, attestWithin time.Duration
	// listEvery lies between looks at what hosts list.
	listEvery time.Duration
	// workloadLimit is from computing to the workload's first answer.
	workloadLimit time.Duration

	tasks sync.WaitGroup // goroutines that end with the context of Run

	rebasing    sync.Mutex // one document at a time makes another basis
	registering sync.Mutex // a template's row and key change together
	cleaning    turns      // by reservation
	releases    releases   // of shared components
	places      bell       // rings when fewer VMs boot
	journalled  limiter    // of what daemons write into the journal
	dropped     dropped    // frames at hosts' bridges that were told

	mu   sync.Mutex
	ctx  context.Context // of Run; runs are made under it
	runs map[string]*run // guarded by mu; live reservations by id
	// starting holds the stopped VMs whose next start is being begun.
	starting map[string]bool // guarded by mu
	owed     map[ending]fate // guarded by mu; ends that could not be stored yet
	// ending holds the documents that were told to end soon.
	ending map[digest.SHA256]bool // guarded by mu
}

// run is the work on one live reservation. Its context ends with the reservation.
type run struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	quotes sync.Mutex // static quotes of one start follow each other
	// due holds one wish to have the host quoted before its turn, for the watch to take when
	// it has begun. Its capacity is 1.
	due chan struct{}
}

// ground is what was read once at the start and pins everything else.
type ground struct {
	bootCA       []byte // DER
	gatewayCA    []byte // DER
	manifestKey  ed25519.PrivateKey
	componentKey ed25519.PublicKey
}

// New opens the state and reads what the configuration names. The clock is the
// machine's; deadlines are compared with it in the ledger.
func New(ctx context.Context, conf Config) (*Orchestrator, error) {
	return newAt(ctx, conf, time.Now)
}

func newAt(ctx context.Context, conf Config, now func() time.Time) (_ *Orchestrator, err error) {
	o := &Orchestrator{conf: conf, limits: conf.phaseLimits(), network: conf.policyNetwork(), now: now, runs: map[string]*run{}, starting: map[string]bool{}, owed: map[ending]fate{}, ending: map[digest.SHA256]bool{},
		dial: (&net.Dialer{Timeout: dialVMTimeout}).DialContext, watchEvery: conf.Limits.AttestEvery, attestWithin: conf.Limits.AttestWithin, listEvery: listEvery, workloadLimit: workloadLimit}
	if o.letGo, err = lockState(ctx, conf.State); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			o.letGo()
		}
	}()
	if o.vault, o.ca, err = Open(conf.State); err != nil {
		return nil, err
	}
	if err := o.readGround(); err != nil {
		return nil, err
	}
	if err := o.readOwnKey(); err != nil {
		return nil, err
	}
	if err := o.readTrust(); err != nil {
		return nil, err
	}
	if o.store, err = newStoreClient(conf); err != nil {
		return nil, err
	}
	if o.ledger, err = ledger.Open(ctx, filepath.Join(conf.State, ledgerFile), o.now); err != nil {
		return nil, err
	}
	if o.zones, err = o.newZones(ctx); err == nil {
		err = o.openBasis(ctx)
	}
	if err != nil {
		o.ledger.Close()
		return nil, err
	}
	return o, nil
}

func (o *Orchestrator) readGround() (err error) {
	if o.ground.bootCA, err = mtls.LoadDER(o.conf.Boot.CA); err != nil {
		return err
	}
	if o.ground.gatewayCA, err = mtls.LoadDER(o.conf.Gateway.CA); err != nil {
		return err
	}
	if o.ground.componentKey, err = publicKey(o.conf.ComponentKey); err != nil {
		return fmt.Errorf("component_key: %w", err)
	}
	o.ground.manifestKey = o.ca.Signer(authority.ManifestKey)
	return nil
}

// run returns the work on a live reservation, making it if need be.
func (o *Orchestrator) run(id string) *run {
	o.mu.Lock()
	defer o.mu.Unlock()
	r, ok := o.runs[id]
	if !ok {
		r = &run{due: make(chan struct{}, 1)}
		r.ctx, r.cancel = context.WithCancelCause(o.ctx)
		o.runs[id] = r
	}
	return r
}

// liveRun is run for a reservation that may have ended meanwhile: then its context has
// ended too. The end stores its state before it stops the run, so one of the two sees
// the other.
func (o *Orchestrator) liveRun(id string) *run {
	r := o.run(id)
	row, err := o.findAny(context.WithoutCancel(r.ctx), id)
	if err != nil || !row.Live() {
		o.stopRun(id, errEnded)
	}
	return r
}

// stopRun ends the work on a reservation.
func (o *Orchestrator) stopRun(id string, why error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if r, ok := o.runs[id]; ok {
		r.cancel(why)
		delete(o.runs, id)
	}
}

// quoteSoon has the watch over a VM's host ask for a quote at once, or as it begins.
func (o *Orchestrator) quoteSoon(id string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if r, ok := o.runs[id]; ok {
		select {
		case r.due <- struct{}{}:
		default: // it is wished for already
		}
	}
}

// task runs f until it returns; Run waits for it.
func (o *Orchestrator) task(f func()) {
	o.tasks.Go(f)
}

// drive runs one act of a start in the background and ends what the act's failure is
// about. A failure that the end itself caused changes nothing.
func (o *Orchestrator) drive(id string, start int, what string, act func(context.Context) error) {
	r := o.liveRun(id)
	o.task(func() {
		err := untilRoom(r.ctx, id, what, act)
		if err == nil || r.ctx.Err() != nil && !reservation.Damning(*refusalOf(err)) {
			return
		}
		slog.Warn("act failed", "reservation", id, "act", what, "error", err)
		o.abort(context.WithoutCancel(r.ctx), id, start, err)
	})
}

// row reads a reservation with its latest start.
func (o *Orchestrator) row(ctx context.Context, id string) (r ledger.Reservation, s ledger.Start, err error) {
	err = o.ledger.Read(ctx, func(t *ledger.Tx) error {
		if r, err = t.Reservation(id); err != nil {
			return err
		}
		s, err = t.Start(id, r.Start)
		return err
	})
	return r, s, err
}

// journal appends one entry on its own.
func (o *Orchestrator) journal(ctx context.Context, e event.Event) {
	if err := o.ledger.Write(ctx, func(t *ledger.Tx) error { return t.Journal(e) }); err != nil {
		slog.Error("journal", "kind", e.Kind, "error", err)
	}
	o.zones.journalled()
}

// loadTLS reads a certificate, its key and the authority of the other side.
func loadTLS(f mtls.Files, what string) (tls.Certificate, *x509.CertPool, error) {
	cert, pool, err := f.Load()
	if err != nil {
		return cert, nil, fmt.Errorf("%s: %w", what, err)
	}
	return cert, pool, nil
}

// Close closes the ledger and lets go of the state directory.
func (o *Orchestrator) Close() error {
	defer o.letGo()
	return o.ledger.Close()
}

func removeAll(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("clear %s: %w", dir, err)
	}
	var errs []error
	for _, e := range entries {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, e.Name())))
	}
	return errors.Join(errs...)
}
