package orchestrator

import (
	"context"
	"errors"
	"net/netip"
	"path"

	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/protocol/vmspec"
	"foothold/tenant/ledger"
	"foothold/tenant/policy"
	"foothold/tenant/reservation"

	"github.com/google/uuid"
)

// Bounds of a workload.
const (
	maxWorkload = 1 << 30 // bytes
	defaultPort = 8080
)

// Reserve is act 1: it checks the wish against policy and stores the reservation. When
// it returns, the row is durable and its first deadline runs; act 2 goes on in the
// background. A crash right after it leaves a reserved row, which recovery takes up.
func (o *Orchestrator) Reserve(ctx context.Context, want api.CreateVM, by string) (ledger.Reservation, error) {
	size, err := checkWish(&want)
	if err != nil {
		return ledger.Reservation{}, err
	}
	restart, err := reservation.ParseRestart(want.Restart)
	if err != nil {
		return ledger.Reservation{}, event.Refuse(event.BadRequest, "restart: %v", err)
	}
	r := ledger.Reservation{ID: uuid.NewString(), Name: want.Name, Size: size.Name, MemoryMiB: size.MemoryMiB, Workload: want.Workload,
		Phase: reservation.Reserved, Start: 1, Volume: uuid.NewString(), Cleanup: ledger.CleanupNone, Restart: restart}
	err = o.ledger.Write(ctx, func(t *ledger.Tx) error {
		if err := o.admitWish(t, want, size, &r); err != nil {
			return err
		}
		r.Created, r.Deadline = t.Now, t.Now.Add(o.limits.Reserved)
		if err := t.AddReservation(r); err != nil {
			return err
		}
		if err := t.PutStart(r.ID, r.Start, ledger.Start{}); err != nil {
			return err
		}
		return t.Journal(event.Event{Kind: "vm.reserved", Reservation: r.ID, Detail: map[string]string{
			"name": r.Name, "template": r.Template, "size": r.Size, "address": r.Address.String(), "by": by}})
	})
	if err != nil {
		return ledger.Reservation{}, err
	}
	o.zones.journalled()
	o.drive(r.ID, r.Start, "create", func(ctx context.Context) error { return o.create(ctx, r.ID) })
	return r, nil
}

// checkWish checks what needs no ledger and fills in the defaults.
func checkWish(want *api.CreateVM) (policy.Size, error) {
	if !vmspec.ValidName(want.Name) {
		return policy.Size{}, event.Refuse(event.BadRequest, "name: want a lower-case DNS label: letters, digits, hyphens, at most 63")
	}
	if vmspec.ValidID(want.Name) { // names and ids stand for each other in calls
		return policy.Size{}, event.Refuse(event.BadRequest, "name: it has the form of an id")
	}
	if want.Workload != nil {
		if err := checkWorkloadForm(want.Workload); err != nil {
			return policy.Size{}, err
		}
	}
	return policy.SizeOf(want.Size)
}

// checkWorkloadForm checks what needs no ledger and fills in the default port.
func checkWorkloadForm(w *api.Workload) error {
	if w.Port == 0 {
		w.Port = defaultPort
	}
	switch {
	case w.SHA256.IsZero():
		return event.Refuse(event.BadRequest, "workload.sha256: want the digest of an object in the store")
	case w.Size <= 0 || w.Size > maxWorkload:
		return event.Refuse(event.BadRequest, "workload.size: want 1 byte to 1 GiB")
	case w.Kind != "executable" && w.Kind != "tar":
		return event.Refuse(event.BadRequest, "workload.kind: want executable or tar")
	case w.Kind == "executable" && w.Entry != "":
		return event.Refuse(event.BadRequest, "workload.entry: an executable has none")
	case w.Kind == "tar" && !localPath(w.Entry):
		return event.Refuse(event.BadRequest, "workload.entry: want the path of the executable inside the tar")
	case w.Port < 1 || w.Port > 65535:
		return event.Refuse(event.BadRequest, "workload.port: want 1 to 65535")
	}
	return nil
}

// localPath accepts a clean relative path that leads nowhere else.
func localPath(p string) bool {
	return p != "" && len(p) <= 255 && path.Clean(p) == p && !path.IsAbs(p) && p != "." && p != ".." && (len(p) < 3 || p[:3] != "../")
}

// admitWish checks the wish against the ledger and picks address and template.
func (o *Orchestrator) admitWish(t *ledger.Tx, want api.CreateVM, size policy.Size, r *ledger.Reservation) error {
	if _, err := t.Find(want.Name); err == nil {
		return event.Refuse(event.NameTaken, "a VM called %s exists", want.Name)
	} else if !errors.Is(err, ledger.ErrNotFound) {
		return err
	}
	tpl, err := t.Template(want.Template)
	if errors.Is(err, ledger.ErrNotFound) {
		if want.Template == "" {
			return event.Refuse(event.UnknownTemplate, "no template is registered")
		}
		return event.Refuse(event.UnknownTemplate, "%s is not registered", named("template", want.Template))
	}
	if err != nil {
		return err
	}
	if hosts, err := t.TemplateHosts(tpl.Name); err != nil || len(hosts) == 0 {
		return errors.Join(err, event.Refuse(event.UnknownTemplate, "the image of %s lies at no host yet", tpl.Name))
	}
	r.Template = tpl.Name
	if err := checkWorkload(t, want.Workload); err != nil {
		return err
	}
	return o.pickAddress(t, size, r)
}

func checkWorkload(t *ledger.Tx, w *api.Workload) error {
	if w == nil {
		return nil
	}
	size, err := t.Object(w.SHA256)
	switch {
	case errors.Is(err, ledger.ErrNotFound):
		return event.Refuse(event.UnknownWorkload, "object %s is not in the store", w.SHA256.Short())
	case err != nil:
		return err
	case size != w.Size:
		return event.Refuse(event.UnknownWorkload, "object %s has %d bytes", w.SHA256.Short(), size)
	}
	return nil
}

// pickAddress checks the quota and takes an address that no VM can still be using.
func (o *Orchestrator) pickAddress(t *ledger.Tx, size policy.Size, r *ledger.Reservation) error {
	holding, err := t.Holding()
	if err != nil {
		return err
	}
	taken := map[netip.Addr]bool{}
	live, memory := 0, 0
	for _, h := range holding {
		taken[h.Address] = true
		if h.Live() {
			live, memory = live+1, memory+h.MemoryMiB
		}
	}
	if err := (policy.Quota{VMs: o.conf.Limits.VMs, MemoryMiB: o.conf.Limits.MemoryMiB}).Check(live, memory, size); err != nil {
		return err
	}
	last, err := t.LastAddress()
	if err != nil {
		return err
	}
	if r.Address, err = o.conf.pool().Pick(last, taken); err != nil {
		return err
	}
	r.MAC = policy.MAC(r.Address)
	return nil
}
