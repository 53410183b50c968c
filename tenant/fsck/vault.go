package fsck

import (
	"foothold/protocol/digest"
	"foothold/tenant/ledger"
)

// vault compares the vault's keys of volumes and templates with the ledger. Act 2 makes
// a volume's key before it stores a host, and an erasure destroys it before the VM counts
// as deleted; in between it may be there or not.
func (c *check) vault() {
	volumeKeys, templateKeys := set(c.VolumeKeys), set(c.TemplateKeys)
	for _, r := range c.Ledger.Reservations {
		if r.Host != "" && !r.Erase && r.Deleted.IsZero() && !volumeKeys[r.Volume] {
			c.misfit(VolumeKeyMissing, "key of volume "+r.Volume+" of "+vm(r), "it is in the vault", "it is not")
		}
	}
	for _, id := range c.VolumeKeys {
		if r, ok := c.volumes[id]; !ok || !r.Deleted.IsZero() {
			c.misfit(VolumeKeyUnexpected, "key of volume "+id, "it is destroyed", "it is in the vault; "+holderOf(r, ok))
		}
	}
	registered := map[string]bool{}
	for _, t := range c.Ledger.Templates {
		registered[t.Label()] = !t.Gone
		if !templateKeys[t.Label()] && t.Withdrawn.IsZero() {
			c.misfit(TemplateKeyMissing, "key of template "+t.Label(), "it is in the vault", "it is not")
		}
	}
	for _, name := range c.TemplateKeys {
		if !registered[name] {
			c.misfit(TemplateKeyUnexpected, "key of template "+name, "it is destroyed", "it is in the vault; no such template is registered")
		}
	}
}

// holderOf says whose volume it is, for people.
func holderOf(r ledger.Reservation, known bool) string {
	if !known {
		return "no VM ever had that volume"
	}
	return "the volume is that of " + vm(r)
}

// objects compares what templates and VMs refer to with what was put into the store.
func (c *check) objects() {
	used, stored := map[digest.SHA256]bool{}, set(c.Ledger.Objects)
	need := func(sum digest.SHA256, thing string) {
		if used[sum] = true; !stored[sum] {
			c.misfit(ObjectMissing, thing, "object "+sum.Short()+" is in the store", "it was not put there")
		}
	}
	registered := map[string]bool{}
	for _, t := range c.Ledger.Templates {
		registered[t.Name] = registered[t.Name] || !t.Gone
		if t.Gone {
			continue
		}
		for _, sum := range c.Parts[t.Label()] {
			need(sum, "template "+t.Label())
		}
		if len(t.Hosts) == 0 && t.Withdrawn.IsZero() {
			add(&c.Notes, TemplateUnsent, "template "+t.Label(), "its image lies at a host", "at none", c.Now)
		}
	}
	for _, r := range c.Ledger.Reservations {
		if !r.Deleted.IsZero() {
			continue
		}
		if !registered[r.Template] {
			c.misfit(TemplateUnregistered, vm(r), "its template "+r.Template+" is registered", "it is not")
		}
		if r.Workload != nil {
			need(r.Workload.SHA256, "workload of "+vm(r))
		}
	}
	for _, sum := range c.Ledger.Objects {
		if !used[sum] {
			add(&c.Notes, ObjectUnused, "object "+sum.String(), "something refers to it", "nothing does", c.Now)
		}
	}
}
