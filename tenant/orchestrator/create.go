package orchestrator

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"foothold/internal/luks"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/hostapi"
	"foothold/protocol/token"
	"foothold/protocol/vmspec"
	"foothold/tenant/hostclient"
	"foothold/tenant/ledger"
	"foothold/tenant/policy"
	"foothold/tenant/reservation"
	"foothold/tenant/vault"
)

// Pauses between calls to a host.
const (
	watchPause = 200 * time.Millisecond // between answers of a host that does not hold them
	retryPause = 2 * time.Second        // after a host did not answer
)

// volumeKey begins the vault's names of volumes' keys.
const volumeKey = "volume-"

func volumeKeyName(volume string) string { return volumeKey + volume }

// create is act 2.
func (o *Orchestrator) create(ctx context.Context, id string) error {
	r, _, err := o.row(ctx, id)
	if err != nil {
		return err
	}
	// 1. The volume's key. After a crash here it is found and used.
	if err := o.ensureVolumeKey(r); err != nil {
		return err
	}
	// 2. T1's digest, the settings and the move to booting, in one transaction, as soon
	// as a host has a place; the phase's deadline bounds the wait. The
	// plain T1 lives in this process alone: after a crash the row is booting under a T1
	// that no VM may have, and recovery makes it anew.
	t1 := token.New(token.T1)
	spec, err := o.beginInTurn(ctx, r, t1.Digest())
	if err != nil {
		return errors.Join(err, o.eraseLate(context.WithoutCancel(ctx), id))
	}
	return o.bringUp(ctx, spec, t1)
}

// bringUp is the rest of act 2, behind the stored intent.
func (o *Orchestrator) bringUp(ctx context.Context, spec hostedSpec, t1 token.Token) error {
	id, start := spec.Reservation, spec.Start
	h, err := o.host(spec.host)
	if err != nil {
		return err
	}
	// 3. The host's TPM has shown, once, that the inventoried AIK lies in it.
	if err := o.ensureActivated(ctx, spec.host); err != nil {
		return err
	}
	if err := o.giveOwnKey(ctx, h, spec.host); err != nil {
		return err
	}
	// 4. Create and start, each idempotent by reservation and start. After a crash the
	// VM may exist; recovery destroys it.
	created, err := h.Create(ctx, hostapi.CreateRequest{Spec: spec.Spec, Token: t1})
	if err != nil {
		return err
	}
	if created.ID != id || created.Start != start || created.Settings != spec.Spec.Digest() {
		return event.Refuse(event.HostRefused, "host %s acknowledged another VM or other settings", spec.host)
	}
	started, err := h.Start(ctx, id)
	if err != nil {
		return err
	}
	if started.State != hostapi.Running {
		if started, err = awaitState(ctx, h, id, hostapi.Running); err != nil {
			return err
		}
	}
	// 5. The rules follow from the stored fact.
	if err := o.started(ctx, id, start); err != nil {
		return err
	}
	o.task(func() { o.watch(o.liveRun(id).ctx, h, id, start) })
	return nil
}

// eraseLate destroys the key of a volume whose VM was released, and the key destroyed,
// while create was about to make it.
func (o *Orchestrator) eraseLate(ctx context.Context, id string) error {
	r, err := o.findAny(ctx, id)
	if err != nil || r.Live() {
		return err
	}
	return o.erase(r)
}

type hostedSpec struct {
	vmspec.Spec
	host string
}

// beginInTurn is begin as soon as it is this VM's turn.
func (o *Orchestrator) beginInTurn(ctx context.Context, r ledger.Reservation, t1 digest.SHA256) (hostedSpec, error) {
	for {
		rung := o.places.next() // before looking, so that no ring is missed
		spec, err := o.begin(ctx, r, t1)
		if !errors.Is(err, errNoPlace) {
			return spec, err
		}
		if err := await(ctx, rung); err != nil {
			return spec, err
		}
	}
}

// begin chooses the host, stores settings and T1's digest, and moves to booting. A VM
// that starts again stays where its volume lies.
func (o *Orchestrator) begin(ctx context.Context, r ledger.Reservation, t1 digest.SHA256) (hostedSpec, error) {
	var out hostedSpec
	err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		tpl, err := o.place(t, r)
		if err != nil {
			return err
		}
		out.host = tpl.host
		again := r.Phase == reservation.Stopped
		if again {
			if err := o.again(t, r); err != nil {
				return err
			}
			r.Start++
		}
		out.Spec = o.spec(r, tpl.SHA256, t1)
		if err := out.Spec.Validate(); err != nil {
			return fmt.Errorf("settings: %w", err)
		}
		if !again {
			if err := t.Move(r.ID, r.Start, reservation.Reserved, reservation.Booting, t.Now.Add(o.limits.Booting)); err != nil {
				return err
			}
		}
		return errors.Join(
			t.SetPlace(r.ID, out.host, tpl.Version),
			t.PutStart(r.ID, r.Start, ledger.Start{Spec: out.Spec, HostKeys: o.basis().keys(out.host)}),
			t.AddToken(ledger.Token{Digest: t1, Kind: token.T1, Reservation: r.ID, Start: r.Start, Phase: reservation.Booting, Source: r.Address}),
			t.BeginPart(r.ID, r.Start, partCreating),
			t.Journal(event.Event{Kind: "vm.create-asked", Reservation: r.ID, Detail: map[string]string{
				"host": out.host, "settings": out.Spec.Digest().String(), "template": tpl.Label()}}))
	})
	o.zones.journalled()
	return out, err
}

// placed is the version of its template that a start is of, and where.
type placed struct {
	ledger.Template
	host string
}

// place chooses a host for a VM's first start, and for every start the newest version of
// its template there: so VMs take a rotated template at their next start.
func (o *Orchestrator) place(t *ledger.Tx, r ledger.Reservation) (placed, error) {
	holding, err := t.TemplateHosts(r.Template)
	if err != nil {
		return placed{}, err
	}
	p := placed{host: r.Host}
	b := o.basis()
	switch {
	case len(holding) == 0:
		return p, event.Refuse(event.UnknownTemplate, "template %s is gone", r.Template)
	case r.Phase != reservation.Stopped:
		p.host, err = o.chooseHost(t, b, r, holding)
	case !slices.Contains(holding, r.Host):
		err = event.Refuse(event.NoHost, "host %s has the VM's volume, but not template %s", r.Host, r.Template)
	default:
		err = b.mayHost(t, r.Host)
	}
	if err != nil {
		return p, err
	}
	if p.Template, err = t.TemplateAt(r.Template, p.host); err != nil {
		return p, err
	}
	if has, err := o.vault.Has(templateKeyName(p.Template)); err != nil || !has {
		return p, errors.Join(err, event.Refuse(event.UnknownTemplate, "the vault has no key of template %s", p.Label()))
	}
	return p, nil
}

// spec is the VM's settings: what the host is told and what PCR 16 is predicted from.
func (o *Orchestrator) spec(r ledger.Reservation, template, t1 digest.SHA256) vmspec.Spec {
	size, _ := policy.SizeOf(r.Size) // was checked when it was stored; a zero size does not validate
	return vmspec.Spec{
		Reservation: r.ID, Start: r.Start, Tenant: o.conf.Tenant, Name: r.Name, VCPUs: size.VCPUs, MemoryMiB: size.MemoryMiB,
		Network: vmspec.Network{MAC: r.MAC, Address: netip.PrefixFrom(r.Address, o.conf.Network.Prefix.Bits()),
			Gateway: o.conf.Network.Gateway, MTU: o.conf.Network.MTU},
		Boot: vmspec.Boot{URL: "https://" + o.conf.Boot.Address.String(), ServerName: o.conf.Boot.ServerName, CA: o.ground.bootCA,
			ManifestKey: publicOf(o.ground.manifestKey), ComponentKey: o.ground.componentKey},
		TokenDigest: t1, Template: template, Volume: vmspec.Volume{ID: r.Volume, SizeMiB: size.VolumeMiB},
	}
}

// chooseHost takes, among the hosts that hold the template and are in good standing, one
// whose last quote was accepted and that has room for another boot, with the fewest VMs. Where there is none, one whose last quote was refused gets another chance:
// nothing is released to its VMs without a new quote, and a boot server that spoils
// quotes cannot shut a host out.
func (o *Orchestrator) chooseHost(t *ledger.Tx, b *basis, r ledger.Reservation, holding []string) (string, error) {
	var good, poor []string
	var why error
	for _, name := range holding {
		if err := b.mayHost(t, name); unfit(err) {
			why = err
			continue
		} else if err != nil {
			return "", err
		}
		h, err := t.Host(name)
		if err != nil {
			return "", err
		}
		if h.Standing == "" {
			good = append(good, name)
		} else {
			poor = append(poor, name)
		}
	}
	if len(good) == 0 {
		good = poor
	}
	if len(good) == 0 {
		return "", event.Refuse(event.NoHost, "of %d hosts that hold the template none is in good standing: %s", len(holding), detailOf(why))
	}
	live, err := t.Live()
	if err != nil {
		return "", err
	}
	room, err := placesFor(r, live, good, o.conf.Limits.BootsAtOnce, t.Now)
	if err != nil {
		return "", err
	}
	burden := map[string]int{}
	for _, other := range live {
		burden[other.Host]++
	}
	return slices.MinFunc(room, func(a, b string) int { return burden[a] - burden[b] }), nil
}

// again moves a stopped VM to booting at its host, if that has room.
func (o *Orchestrator) again(t *ledger.Tx, r ledger.Reservation) error {
	now, err := t.Reservation(r.ID)
	if err != nil {
		return err
	}
	live, err := t.Live()
	if err != nil {
		return err
	}
	if _, err := placesFor(now, live, []string{r.Host}, o.conf.Limits.BootsAtOnce, t.Now); err != nil {
		return err
	}
	return t.Again(r.ID, r.Start, t.Now.Add(o.limits.Booting))
}

// ensureVolumeKey makes the key of a new volume. One that holds data has its key, or is
// not started: under another it would be formatted by nobody and opened by nobody.
func (o *Orchestrator) ensureVolumeKey(r ledger.Reservation) error {
	if r.Formatted {
		has, err := o.vault.Has(volumeKeyName(r.Volume))
		if err == nil && !has {
			err = fmt.Errorf("the vault has no key of volume %s", r.Volume)
		}
		return err
	}
	key := luks.NewKey()
	defer key.Wipe()
	if err := o.vault.Put(volumeKeyName(r.Volume), key); err != nil && !errors.Is(err, vault.ErrExists) {
		return fmt.Errorf("store volume key: %w", err)
	}
	return nil
}

// started records that the host reported the VM running, and opens its way to the
// boot server.
func (o *Orchestrator) started(ctx context.Context, id string, start int) error {
	err := o.ledger.Write(ctx, func(t *ledger.Tx) error {
		return errors.Join(
			t.ChangeStart(id, start, func(s *ledger.Start) { s.HostStarted = t.Now }),
			t.EndPart(id, start, partCreating),
			t.Journal(event.Event{Kind: "vm.started", Reservation: id}))
	})
	if err != nil {
		return err
	}
	o.zones.journalled()
	return o.publish(ctx)
}

// awaitState waits until a host reports a state, or that the VM has stopped.
func awaitState(ctx context.Context, h *hostclient.Client, id, state string) (hostapi.VM, error) {
	for {
		vm, err := h.VM(ctx, id, state)
		switch {
		case err != nil:
			return vm, err
		case vm.State == state:
			return vm, nil
		case vm.State == hostapi.Stopped:
			return vm, stopped(vm)
		}
		if err := pause(ctx, watchPause); err != nil {
			return vm, err
		}
	}
}

// watch holds on to the host's view of a VM until the reservation ends. A VM that
// stops before it was asked to ends its reservation at once, with the host's reason.
func (o *Orchestrator) watch(ctx context.Context, h *hostclient.Client, id string, start int) {
	for ctx.Err() == nil {
		vm, err := h.VM(ctx, id, hostapi.Stopped)
		if ctx.Err() != nil {
			return
		}
		if event.ReasonOf(err) == event.UnknownVM {
			o.abort(context.WithoutCancel(ctx), id, start, event.Refuse(event.VMStopped, "its host no longer knows it"))
			return
		}
		if err != nil { // the host may be restarting; the deadline or the lease decides
			slog.Warn("watch VM", "reservation", id, "error", err)
			if pause(ctx, retryPause) != nil {
				return
			}
			continue
		}
		if vm.TPMHeld > 0 {
			o.recordHold(ctx, id, start, vm.TPMHeld)
		}
		if vm.State == hostapi.Stopped || vm.Start != start {
			why := stopped(vm)
			if r, _, err := o.row(ctx, id); err == nil && r.Phase == reservation.Computing && byAgent[event.ReasonOf(why)] {
				why = event.Refuse(event.VMStopped, "host %s reports that it gave up for %q, which no VM does that computes", vm.Host, vm.Reason)
			}
			o.abort(context.WithoutCancel(ctx), id, start, why)
			return
		}
		if pause(ctx, watchPause) != nil {
			return
		}
	}
}

func (o *Orchestrator) recordHold(ctx context.Context, id string, start int, held time.Duration) {
	_, s, err := o.row(ctx, id)
	if err != nil || s.TPMHeld == held {
		return
	}
	err = o.ledger.Write(ctx, func(t *ledger.Tx) error {
		return t.ChangeStart(id, start, func(s *ledger.Start) { s.TPMHeld = held })
	})
	if err != nil {
		slog.Warn("record TPM hold", "reservation", id, "error", err)
	}
}

// byAgent are the reasons for which a VM's agent gives up that nobody else would tell of.
// They come through host and VM, so they are outages alone: none of the two ends a VM for
// good by its word. Of others the orchestrator knows from its own conversation with the VM,
// or because it refused itself. In a VM that computes there is no such agent: whoever took
// it over accuses nobody by its channel.
var byAgent = map[event.Reason]bool{
	event.BootServerFailed: true, event.ServerUntrusted: true, event.SSHFailed: true, event.GatewayFailed: true,
}

// stopped is why a VM that a host reports as ended failed. The host's own reason is
// taken if it is one that a host can know.
func stopped(vm hostapi.VM) error {
	if vm.Boot == hostapi.Delivered && byAgent[vm.Reason] {
		return event.Refuse(vm.Reason, "the VM's agent gave up, says host %s", vm.Host)
	}
	switch vm.Reason {
	case event.GuestReset, event.GuestCrashed, event.GuestPoweredOff:
		return event.Refuse(vm.Reason, "as host %s saw it", vm.Host)
	case event.ChannelMisuse, event.TPMCommandRefused, event.TPMBusy, event.TPMLost, event.LoaderFailed, event.DigestMismatch,
		event.SignatureInvalid, event.QuoteRefused, event.DeadlinePassed, event.BootServerFailed, event.ServerUntrusted:
		return event.Refuse(vm.Reason, "host %s ended the VM in boot stage %q: %q", vm.Host, vm.Boot, vm.Detail[:min(len(vm.Detail), hostapi.MaxDetail)])
	}
	return event.Refuse(event.VMStopped, "host %s reports it %s, boot stage %q, reason %q", vm.Host, vm.State, vm.Boot, vm.Reason)
}

// pause waits, or returns why ctx ended.
func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return nil
	}
}
