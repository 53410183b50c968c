package orchestrator

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/zone"
	"foothold/tenant/fsck"
	"foothold/tenant/hostclient"
	"foothold/tenant/ledger"
	"foothold/tenant/policy"
)

// Times of fsck.
const (
	secondLook    = time.Second      // after a first one that found something
	sweepGrace    = 5 * time.Second  // behind a deadline; the sweep comes every half second
	cleanUpWithin = 2 * cleanupLimit // two tries at a host that answers
)

// fsck reads everything and compares it. What a first look finds is looked for a second
// time, so that what merely moved in between is not named; before that the documents that
// are being made are waited for, however long the line is.
func (o *Orchestrator) fsck(ctx context.Context) (api.Fsck, error) {
	s, err := o.snapshot(ctx)
	if err != nil {
		return api.Fsck{}, fmt.Errorf("fsck: %w", err)
	}
	report := fsck.Check(s)
	if len(report.Findings) > 0 {
		if err := pause(ctx, secondLook); err != nil {
			return api.Fsck{}, err
		}
		if err := o.zones.settle(ctx); err != nil {
			return api.Fsck{}, err
		}
		if s, err = o.snapshot(ctx); err != nil {
			return api.Fsck{}, fmt.Errorf("fsck: %w", err)
		}
		report = fsck.Confirm(report, fsck.Check(s))
	}
	return api.Fsck{Clean: len(report.Findings) == 0, Time: s.Now.UTC(), Looked: looked(s),
		Findings: append([]api.Finding{}, report.Findings...), Motion: append([]api.Finding{}, report.Motion...), Notes: append([]api.Finding{}, report.Notes...)}, nil
}

// looked counts what is in a snapshot.
func looked(s fsck.Snapshot) api.Looked {
	l := api.Looked{Keys: len(s.VolumeKeys) + len(s.TemplateKeys), Entries: s.Ledger.Entries}
	for _, r := range s.Ledger.Reservations {
		if r.Deleted.IsZero() {
			l.VMs++
		}
	}
	for _, h := range s.Hosts {
		if h.Problem == "" {
			l.Hosts++
		}
		l.Instances += len(h.VMs)
		l.Volumes += len(h.Volumes)
		l.Templates += len(h.Templates)
	}
	for _, z := range s.Zones {
		l.Rules += len(z.Report.Live)
	}
	return l
}

// snapshot reads the journal, the hosts, vault and ledger, and the zones, in this order.
func (o *Orchestrator) snapshot(ctx context.Context) (fsck.Snapshot, error) {
	s := fsck.Snapshot{Ended: map[string]time.Time{}, Parts: map[string][]digest.SHA256{},
		Limits: fsck.Limits{Sweep: sweepGrace, CleanUp: cleanUpWithin, Stop: stopGrace, Boots: o.conf.Limits.BootsAtOnce}}
	if err := o.readChain(ctx, &s); err != nil {
		return s, err
	}
	s.Hosts = o.askHosts(ctx)
	if err := o.readOwn(ctx, &s); err != nil {
		return s, err
	}
	for _, t := range s.Ledger.Templates {
		if c, err := o.components(t.Components); err == nil { // else its listing says so
			s.Parts[t.Label()] = []digest.SHA256{c.Kernel.SHA256, c.Initramfs.SHA256}
		}
	}
	var err error
	s.Zones, err = o.readZones(s.Ledger, s.Now)
	return s, err
}

// readOwn reads vault and ledger. A template's row and key change together under
// registering; a volume's key is made while its row is reserved, and destroyed while it
// is being cleaned up.
func (o *Orchestrator) readOwn(ctx context.Context, s *fsck.Snapshot) error {
	o.registering.Lock()
	defer o.registering.Unlock()
	names, err := o.vault.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		if id, ok := strings.CutPrefix(name, volumeKey); ok {
			s.VolumeKeys = append(s.VolumeKeys, id)
		}
		if template, ok := strings.CutPrefix(name, templateKey); ok {
			s.TemplateKeys = append(s.TemplateKeys, template)
		}
	}
	return o.ledger.Read(ctx, func(t *ledger.Tx) error {
		s.Now = t.Now
		if s.Ledger, err = t.Survey(); err != nil {
			return err
		}
		return readEnds(t, s)
	})
}

// readChain verifies the journal, apart from the rest: it is long, and its entries do
// not change.
func (o *Orchestrator) readChain(ctx context.Context, s *fsck.Snapshot) error {
	err := o.ledger.Read(ctx, (*ledger.Tx).VerifyJournal)
	if errors.Is(err, ledger.ErrBroken) {
		s.Chain, err = err.Error(), nil
	}
	return err
}

// readEnds looks up since when each reservation is being cleaned up.
func readEnds(t *ledger.Tx, s *fsck.Snapshot) error {
	unclean, err := t.Unclean()
	if err != nil {
		return err
	}
	for _, r := range unclean {
		if s.Ended[r.ID], err = t.LastEntry(r.ID, "vm.aborted", "vm.released", "vm.stopped", "vm.release-asked"); err != nil {
			return err
		}
	}
	return nil
}

// askHosts asks all inventoried hosts at once.
func (o *Orchestrator) askHosts(ctx context.Context) []fsck.Host {
	var asked sync.WaitGroup
	list, b := []fsck.Host{}, o.basis()
	for _, h := range b.inventory.Hosts() {
		list = append(list, fsck.Host{Name: h.Host.Name})
	}
	for i := range list {
		asked.Go(func() {
			if err := askHost(ctx, b.hosts[list[i].Name], &list[i]); err != nil {
				list[i] = fsck.Host{Name: list[i].Name, Problem: err.Error()}
			}
		})
	}
	asked.Wait()
	return list
}

// askHost has one host list what it has of ours.
func askHost(ctx context.Context, c *hostclient.Client, h *fsck.Host) (err error) {
	if h.VMs, err = c.VMs(ctx); err != nil {
		return err
	}
	if h.Volumes, err = c.Volumes(ctx); err != nil {
		return err
	}
	h.Templates, err = c.Templates(ctx)
	return err
}

// readZones reads each zone's document and last report, and compares the document with
// the one that the ledger asks for.
func (o *Orchestrator) readZones(l ledger.Survey, now time.Time) ([]fsck.Zone, error) {
	var vms []policy.VM
	for _, r := range l.Reservations {
		if start, ok := l.Latest[r.ID]; ok && r.Live() {
			vms = append(vms, zoneVM(r, start))
		}
	}
	docs := o.network.Documents(vms, now)
	var list []fsck.Zone
	for _, name := range zoneNames {
		plain, err := json.Marshal(timeless(docs[name]))
		if err != nil {
			return nil, fmt.Errorf("zone %s: %w", name, err)
		}
		z := o.zones.compared(name, plain)
		if z.Settle = liveWait; name == zone.Gateway {
			// A tunnel that was admitted but is in no document stays until the document
			// after next, which is due when half the lease is over.
			z.Late = liveWait + o.network.Lease/2
		}
		list = append(list, z)
	}
	return list, nil
}

// compared is a zone's state, and whether plain is another document than its newest.
func (z *zones) compared(name string, plain []byte) fsck.Zone {
	z.mu.Lock()
	defer z.mu.Unlock()
	s := z.state[name]
	out := fsck.Zone{Document: s.document, Changed: s.changed, Report: s.report, Seen: s.seen, Outdated: !bytes.Equal(s.plain, plain)}
	out.Document.Zone = name
	return out
}
