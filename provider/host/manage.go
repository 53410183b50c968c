package host

import (
	"slices"
	"strings"

	"foothold/protocol/event"
	"foothold/protocol/hostapi"
	"foothold/protocol/token"
	"foothold/protocol/vmspec"
)

// maxVMs bounds the VMs of a host.
const maxVMs = 1024

// create makes a VM's disks and settings; it is idempotent by reservation and start.
// A higher start replaces a stopped VM of the same reservation.
func (a *Agent) create(tenant string, req hostapi.CreateRequest) (*vm, error) {
	if err := checkRequest(tenant, req); err != nil {
		return nil, err
	}
	a.admin.Lock()
	defer a.admin.Unlock()
	old := a.byID(req.Spec.Reservation)
	if old != nil {
		if same, err := repeats(old, tenant, req.Spec); same || err != nil {
			return old, err
		}
	} else if a.count() >= maxVMs {
		return nil, event.Refuse(event.QuotaExceeded, "this host has %d VMs", maxVMs)
	}
	if a.macTaken(req.Spec) {
		return nil, event.Refuse(event.InUse, "another VM of this host has the MAC address")
	}
	f, err := a.openTemplate(tenant, req.Spec.Template)
	if err != nil {
		return nil, err
	}
	f.Close()
	if err := a.makeVolume(tenant, req.Spec.Volume); err != nil {
		return nil, err
	}
	v := a.newVM(tenant, req.Spec, req.Token)
	// A crash from here on leaves a VM that a restart calls stopped: T1 is not stored.
	if err := v.write(v.info); err != nil {
		return nil, err
	}
	a.mu.Lock()
	a.vms[req.Spec.Reservation] = v
	a.mu.Unlock()
	v.logger().Info("vm created", "settings", v.info.Settings)
	return v, nil
}

// macTaken reports whether another VM, of any tenant, has the MAC address or will have.
func (a *Agent) macTaken(spec vmspec.Spec) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	for id, v := range a.vms {
		if id != spec.Reservation && v.spec.Network.MAC == spec.Network.MAC && v.describe().State != hostapi.Stopped {
			return true
		}
	}
	return false
}

func checkRequest(tenant string, req hostapi.CreateRequest) error {
	if err := req.Spec.Validate(); err != nil {
		return event.Refuse(event.BadRequest, "%v", err)
	}
	if req.Spec.Tenant != tenant {
		return event.Refuse(event.NotPermitted, "the settings name another tenant")
	}
	if !req.Token.Is(token.T1) || req.Token.Digest() != req.Spec.TokenDigest {
		return event.Refuse(event.BadRequest, "token: want the T1 whose digest the settings hold")
	}
	return nil
}

// repeats reports whether the request only repeats old's creation, and refuses one
// that may not replace it.
func repeats(old *vm, tenant string, spec vmspec.Spec) (bool, error) {
	info := old.describe()
	switch {
	case old.tenant != tenant:
		return false, event.Refuse(event.NotPermitted, "the reservation's id is not this tenant's")
	case info.Start == spec.Start && info.Settings == spec.Digest():
		return true, nil
	case info.Start >= spec.Start:
		return false, event.Refuse(event.BadRequest, "start %d was created with other settings or is over", spec.Start)
	case info.State != hostapi.Stopped:
		return false, event.Refuse(event.InUse, "start %d of the VM has not ended", info.Start)
	}
	return false, nil
}

// destroy stops the VM and forgets it.
func (a *Agent) destroy(v *vm) error {
	v.stop(event.Released, "destroyed as asked")
	a.admin.Lock()
	defer a.admin.Unlock()
	if a.byID(v.spec.Reservation) != v {
		return nil // another start took its place
	}
	if err := v.forget(); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.vms, v.spec.Reservation)
	v.logger().Info("vm destroyed")
	return nil
}

func (a *Agent) byID(id string) *vm {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.vms[id]
}

func (a *Agent) count() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.vms)
}

// find is the tenant's VM of that id, or nil: another tenant's is not found.
func (a *Agent) find(tenant, id string) *vm {
	if v := a.byID(id); v != nil && v.tenant == tenant {
		return v
	}
	return nil
}

// list is the tenant's VMs in the order of their ids.
func (a *Agent) list(tenant string) []*vm {
	a.mu.Lock()
	defer a.mu.Unlock()
	var list []*vm
	for _, v := range a.vms {
		if v.tenant == tenant {
			list = append(list, v)
		}
	}
	slices.SortFunc(list, func(x, y *vm) int { return strings.Compare(x.spec.Reservation, y.spec.Reservation) })
	return list
}
