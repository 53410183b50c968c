package fsck

import (
	"fmt"
	"slices"

	"foothold/protocol/digest"
	"foothold/protocol/hostapi"
	"foothold/tenant/ledger"
)

// host compares what one host lists with what should be there.
func (c *check) host(h Host) {
	if h.Problem != "" {
		c.misfit(HostSilent, "host "+h.Name, "it lists VMs, volumes and templates", h.Problem)
		return
	}
	c.instances(h)
	c.disks(h)
	c.templates(h)
}

// placed: what is not deleted lies at a host of the inventory.
func (c *check) placed() {
	for _, r := range c.Ledger.Reservations {
		known := slices.ContainsFunc(c.Hosts, func(h Host) bool { return h.Name == r.Host })
		if r.Host != "" && r.Deleted.IsZero() && !known {
			c.misfit(HostUnknown, vm(r), "its host "+r.Host+" is in the inventory", "it is not")
		}
	}
}

// instances: each start that runs is in its host's listing with its number and settings,
// and nothing else is. A start whose creation is under way, and one that is being
// cleaned up, may be there or not.
func (c *check) instances(h Host) {
	listed := map[string]bool{}
	for _, v := range h.VMs {
		listed[v.ID] = true
		c.instance(h, v)
	}
	for _, r := range c.Ledger.Reservations {
		if r.Host == h.Name && c.running(r) && !listed[r.ID] {
			c.misfit(VMMissing, vm(r)+" at host "+h.Name, fmt.Sprintf("start %d runs", r.Start), "the host does not list it")
		}
	}
}

func (c *check) instance(h Host, v hostapi.VM) {
	r, known := c.by[v.ID]
	spec := c.Ledger.Latest[v.ID].Spec
	thing := c.owner(v.ID) + " at host " + h.Name
	found := fmt.Sprintf("start %d is %s", v.Start, v.State)
	switch {
	case !known || r.Host != h.Name:
		c.misfit(VMUnexpected, thing, "no such VM", found)
	case leaving(r):
	case !r.Phase.Running():
		c.misfit(VMUnexpected, thing, "it is gone: the VM is "+stands(r), found)
	case v.Start != r.Start:
		c.misfit(VMDiffers, thing, fmt.Sprintf("start %d", r.Start), found)
	case v.Settings != spec.Digest():
		c.misfit(VMDiffers, thing, "settings "+spec.Digest().Short(), "settings "+v.Settings.Short())
	case c.running(r) && v.State != hostapi.Running:
		c.misfit(VMDiffers, thing, "it is running", fmt.Sprintf("it is %s, reason %q", v.State, v.Reason))
	}
}

// disks: each volume that holds data, or whose VM has run, lies at its host, and no
// volume lies there of a deleted VM or of none.
func (c *check) disks(h Host) {
	listed := map[string]bool{}
	for _, v := range h.Volumes {
		listed[v.ID] = true
		c.disk(h, v)
	}
	for _, r := range c.Ledger.Reservations {
		made := r.Formatted || !c.Ledger.Latest[r.ID].HostStarted.IsZero()
		if r.Host == h.Name && made && !r.Erase && r.Deleted.IsZero() && !listed[r.Volume] {
			c.misfit(VolumeMissing, "volume "+r.Volume+" of "+vm(r)+" at host "+h.Name, "the host has it", "the host does not list it")
		}
	}
}

func (c *check) disk(h Host, v hostapi.Volume) {
	r, known := c.volumes[v.ID]
	thing := fmt.Sprintf("volume %s at host %s", v.ID, h.Name)
	size := int64(c.Ledger.Latest[r.ID].Spec.Volume.SizeMiB) << 20
	switch {
	case !known || !r.Deleted.IsZero():
		c.misfit(VolumeUnexpected, thing, "it is deleted", fmt.Sprintf("%d bytes; %s", v.Size, holderOf(r, known)))
	case r.Host != h.Name:
		c.misfit(VolumeUnexpected, thing, fmt.Sprintf("it lies at host %q", r.Host), fmt.Sprintf("%d bytes; %s", v.Size, holderOf(r, known)))
	case size != 0 && v.Size != size:
		c.misfit(VolumeDiffers, thing+" of "+vm(r), fmt.Sprintf("%d bytes", size), fmt.Sprintf("%d bytes", v.Size))
	case v.Attached && !r.Phase.Running() && !leaving(r):
		c.misfit(VolumeDiffers, thing+" of "+vm(r), "not attached: the VM is "+stands(r), "attached")
	}
}

// templates: a host has each template that was sent to it, and no other.
func (c *check) templates(h Host) {
	sent := map[digest.SHA256]ledger.Template{}
	for _, t := range c.Ledger.Templates {
		if slices.Contains(t.Hosts, h.Name) {
			sent[t.SHA256] = t
		}
	}
	listed := map[digest.SHA256]bool{}
	for _, v := range h.Templates {
		listed[v.SHA256] = true
		t, ok := sent[v.SHA256]
		thing := fmt.Sprintf("template %s at host %s", v.SHA256.Short(), h.Name)
		switch {
		case !ok:
			c.misfit(TemplateUnexpected, thing, "no such template", fmt.Sprintf("%d bytes, attached to %d VMs", v.Size, v.Users))
		case v.Size != t.Size:
			c.misfit(TemplateDiffers, thing, fmt.Sprintf("%d bytes", t.Size), fmt.Sprintf("%d bytes", v.Size))
		}
	}
	for _, t := range c.Ledger.Templates {
		if slices.Contains(t.Hosts, h.Name) && !listed[t.SHA256] && t.Withdrawn.IsZero() {
			c.misfit(TemplateMissing, fmt.Sprintf("template %s at host %s", t.Label(), h.Name), "the host has it", "the host does not list it")
		}
	}
}
