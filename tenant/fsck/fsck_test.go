package fsck

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/hostapi"
	"foothold/protocol/token"
	"foothold/protocol/vmspec"
	"foothold/protocol/zone"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

var (
	now      = time.Date(2030, 1, 1, 12, 0, 0, 0, time.UTC)
	template = digest.Of([]byte("image"))
	kernel   = digest.Of([]byte("kernel"))
	workload = digest.Of([]byte("workload"))
)

// The VMs of the clean world.
const (
	booting   = iota // reported running
	computing        // with a workload, in its second start
	stopped          // gone
	aborted          // gone, kept
	deleted
	vms
)

func id(i int) string     { return fmt.Sprintf("00000000-0000-4000-8000-%012d", i) }
func volume(i int) string { return fmt.Sprintf("00000000-0000-4000-9000-%012d", i) }
func key(i, start int) ledger.StartKey {
	return ledger.StartKey{Reservation: id(i), Start: start}
}

// world is one in which everything fits, with a VM of each kind at one host.
func world() Snapshot {
	s := Snapshot{Now: now, Ended: map[string]time.Time{}, Limits: Limits{Sweep: 5 * time.Second, CleanUp: time.Minute, Stop: time.Minute, Boots: 4},
		Ledger: ledger.Survey{Latest: map[string]ledger.Start{}, Objects: []digest.SHA256{kernel, workload},
			Templates: []ledger.Template{{Name: "debian", SHA256: template, Size: 4096, Hosts: []string{"alpha"}}}},
		Parts: map[string][]digest.SHA256{"debian": {kernel}}, TemplateKeys: []string{"debian"}}
	alpha := Host{Name: "alpha", Templates: []hostapi.Template{{SHA256: template, Size: 4096, Users: 2}}}
	for i, phase := range []reservation.Phase{reservation.Booting, reservation.Computing, reservation.Stopped, reservation.Aborted, reservation.Released} {
		r := ledger.Reservation{ID: id(i), Name: fmt.Sprintf("vm%d", i), Template: "debian", Phase: phase, Start: 1, Host: "alpha", Volume: volume(i),
			Address: netip.AddrFrom4([4]byte{10, 82, 0, byte(i)}), Formatted: i != booting, Cleanup: ledger.CleanupNone, Gone: i == stopped}
		facts := ledger.Start{Spec: vmspec.Spec{Reservation: id(i), Volume: vmspec.Volume{ID: volume(i), SizeMiB: 64}}, HostStarted: now}
		switch i {
		case booting:
			r.Deadline = now.Add(time.Minute)
			s.Ledger.Tokens = append(s.Ledger.Tokens, ledger.Token{Kind: token.T2, Reservation: id(i), Start: 1, Phase: reservation.Booting})
		case computing:
			r.Start, r.Deadline, r.Workload, facts.Serial = 2, now.Add(time.Minute), &api.Workload{SHA256: workload}, "7"
			s.Ledger.Starts = append(s.Ledger.Starts, key(i, 1))
			s.Ledger.Certificates = append(s.Ledger.Certificates, ledger.Certificate{Serial: "7", Reservation: id(i), Start: 2, Expires: now.Add(time.Hour)})
			s.Ledger.Open = append(s.Ledger.Open, ledger.OpenPhase{StartKey: key(i, 2), Name: "ready"})
		case aborted, deleted:
			r.Cleanup = ledger.CleanupDone
		}
		if i == deleted {
			r.Erase, r.Deleted = true, now
		} else {
			s.Ledger.Latest[r.ID] = facts
			s.VolumeKeys = append(s.VolumeKeys, r.Volume)
			alpha.Volumes = append(alpha.Volumes, hostapi.Volume{ID: r.Volume, Size: 64 << 20, Attached: phase.Running()})
		}
		if r.Live() {
			s.Ledger.Open = append(s.Ledger.Open, ledger.OpenPhase{StartKey: key(i, r.Start), Name: string(phase)})
		}
		if phase.Running() {
			alpha.VMs = append(alpha.VMs, hostapi.VM{ID: r.ID, Start: r.Start, State: hostapi.Running, Settings: facts.Spec.Digest()})
		}
		s.Ledger.Starts = append(s.Ledger.Starts, key(i, r.Start))
		s.Ledger.Nonces = append(s.Ledger.Nonces, ledger.NonceCount{StartKey: key(i, r.Start), Issued: 3})
		s.Ledger.Reservations = append(s.Ledger.Reservations, r)
	}
	s.Hosts, s.Zones = []Host{alpha}, zones()
	return s
}

// zones are those of the two VMs that run, each reported as it should be.
func zones() []Zone {
	flow := func(i int, name string) zone.Flow {
		return zone.Flow{ID: fmt.Sprintf("%s/1/%s", id(i), name), Reservation: id(i)}
	}
	list := []Zone{
		{Document: zone.Document{Zone: zone.External, Flows: []zone.Flow{{ID: "standing/x"}, flow(booting, "boot"), flow(computing, "wireguard")}}},
		{Document: zone.Document{Zone: zone.Internal, Flows: []zone.Flow{flow(computing, "from")}}},
		{Document: zone.Document{Zone: zone.Gateway, Flows: []zone.Flow{flow(computing, "store")}, Peers: []zone.Peer{{Reservation: id(computing)}}}, Late: 30 * time.Second},
		{Document: zone.Document{Zone: zone.Boot, Boots: []zone.Boots{{Reservation: id(booting)}}}},
	}
	for i := range list {
		z := &list[i]
		z.Document.Epoch, z.Document.Revision, z.Document.Lease = 1, 5, time.Minute
		z.Changed, z.Seen, z.Settle = now.Add(-time.Hour), now, 15*time.Second
		z.Report = zone.Report{Zone: z.Document.Zone, Epoch: 1, Revision: 5}
		for id, w := range asked(z.Document) {
			z.Report.Live = append(z.Report.Live, zone.Live{ID: id, Reservation: w.owner})
		}
	}
	list[0].Report.Live = append(list[0].Report.Live, zone.Live{ID: "bootstrap/1"})
	list[2].Report.Live = append(list[2].Report.Live, zone.Live{ID: "gateway/admission"}, zone.Live{ID: "relay/" + id(computing), Reservation: id(computing)})
	return list
}

// codes lists a list's, sorted.
func codes(list []api.Finding) []Code {
	all := []Code{}
	for _, f := range list {
		all = append(all, Code(f.Code))
	}
	slices.Sort(all)
	return all
}

func TestCleanWorld(t *testing.T) {
	r := Check(world())
	if len(r.Findings) != 0 || len(r.Notes) != 0 {
		t.Errorf("findings %+v, notes %+v", r.Findings, r.Notes)
	}
	if got := codes(r.Motion); !slices.Equal(got, []Code{UnderWay}) { // the one that boots
		t.Errorf("in motion: %+v", r.Motion)
	}
}

// TestMisfits plants one thing at a time and wants it named.
func TestMisfits(t *testing.T) {
	row := func(s *Snapshot, i int) *ledger.Reservation { return &s.Ledger.Reservations[i] }
	cases := []struct {
		name  string
		plant func(*Snapshot)
		want  []Code // sorted
		thing string // part of the first one's thing
	}{
		{"journal altered", func(s *Snapshot) { s.Chain = "entry 3" }, []Code{JournalBroken}, "journal"},
		{"start's facts lost", func(s *Snapshot) {
			s.Ledger.Starts = slices.DeleteFunc(s.Ledger.Starts, func(k ledger.StartKey) bool { return k == key(computing, 1) })
		}, []Code{StartMissing}, id(computing)},
		{"facts of a later start", func(s *Snapshot) { s.Ledger.Starts = append(s.Ledger.Starts, key(stopped, 2)) }, []Code{StartUnexpected}, "start 2"},
		{"facts of nobody's start", func(s *Snapshot) { s.Ledger.Starts = append(s.Ledger.Starts, key(77, 1)) }, []Code{StartUnexpected}, id(77)},
		{"no open phase", func(s *Snapshot) {
			s.Ledger.Open = slices.DeleteFunc(s.Ledger.Open, func(p ledger.OpenPhase) bool { return p.Reservation == id(stopped) })
		}, []Code{PhaseHistory}, id(stopped)},
		{"two open phases", func(s *Snapshot) {
			s.Ledger.Open = append(s.Ledger.Open, ledger.OpenPhase{StartKey: key(computing, 2), Name: "connecting"})
		}, []Code{PhaseHistory}, id(computing)},
		{"open phase of an earlier start", func(s *Snapshot) {
			s.Ledger.Open = append(s.Ledger.Open, ledger.OpenPhase{StartKey: key(computing, 1), Name: "computing"})
		}, []Code{PhaseHistory}, id(computing)},
		{"open part of an ended VM", func(s *Snapshot) {
			s.Ledger.Open = append(s.Ledger.Open, ledger.OpenPhase{StartKey: key(aborted, 1), Name: "creating"})
		}, []Code{PhaseHistory}, id(aborted)},
		{"open token of an ended VM", func(s *Snapshot) {
			s.Ledger.Tokens = append(s.Ledger.Tokens, ledger.Token{Kind: token.T1, Reservation: id(aborted), Start: 1, Phase: reservation.Booting})
		}, []Code{TokenOpen}, "T1 of start 1"},
		{"open token of an earlier start", func(s *Snapshot) {
			row(s, booting).Start = 2
			s.Ledger.Starts = append(s.Ledger.Starts, key(booting, 2))
			s.Ledger.Open[0].Start = 2
			s.Hosts[0].VMs[0].Start = 2
		}, []Code{TokenOpen}, "T2 of start 1"},
		{"open token of another phase", func(s *Snapshot) { s.Ledger.Tokens[0].Phase = reservation.Connecting }, []Code{TokenOpen}, id(booting)},
		{"open token of another kind", func(s *Snapshot) { s.Ledger.Tokens[0].Kind = token.T3 }, []Code{TokenOpen}, id(booting)},
		{"open token of nobody", func(s *Snapshot) { s.Ledger.Tokens[0].Reservation = id(77) }, []Code{TokenOpen}, id(77)},
		{"certificate of an ended VM", func(s *Snapshot) {
			s.Ledger.Certificates = append(s.Ledger.Certificates, ledger.Certificate{Serial: "8", Reservation: id(aborted), Start: 1})
		}, []Code{CertificateValid}, "certificate 8"},
		{"certificate of an earlier start", func(s *Snapshot) {
			s.Ledger.Certificates = append(s.Ledger.Certificates, ledger.Certificate{Serial: "6", Reservation: id(computing), Start: 1})
		}, []Code{CertificateValid}, "certificate 6"},
		{"certificate revoked while in use", func(s *Snapshot) { s.Ledger.Certificates = nil }, []Code{CertificateAbsent}, id(computing)},
		{"nonce of no start", func(s *Snapshot) {
			s.Ledger.Nonces = append(s.Ledger.Nonces, ledger.NonceCount{StartKey: key(stopped, 2), Issued: 1})
		}, []Code{NonceOdd}, "start 2"},
		{"nonce used before it was issued", func(s *Snapshot) { s.Ledger.Nonces[0].Odd = 1 }, []Code{NonceOdd}, id(booting)},
		{"address held twice", func(s *Snapshot) { row(s, stopped).Address = row(s, computing).Address }, []Code{HeldTwice}, "address 10.82.0.1"},
		{"name held twice", func(s *Snapshot) { row(s, aborted).Name = "vm1" }, []Code{HeldTwice}, "name vm1"},
		{"volume held twice", func(s *Snapshot) { row(s, deleted).Volume = volume(stopped) }, []Code{HeldTwice}, volume(stopped)},

		{"phase past its deadline", func(s *Snapshot) { row(s, booting).Deadline = now.Add(-6 * time.Second) }, []Code{UnderWay}, id(booting)},
		{"lease past its deadline", func(s *Snapshot) { row(s, computing).Deadline = now.Add(-6 * time.Second) }, []Code{UnderWay}, id(computing)},
		{"stop asked for too long ago", func(s *Snapshot) {
			row(s, computing).Wish, row(s, computing).Wished = ledger.WishStop, now.Add(-2*time.Minute)
		}, []Code{UnderWay}, id(computing)},
		{"start due for too long", func(s *Snapshot) { row(s, stopped).Deadline = now.Add(-6 * time.Second) }, []Code{StartPending}, id(stopped)},
		{"clean-up that does not end", func(s *Snapshot) {
			row(s, aborted).Cleanup, s.Ended[id(aborted)] = ledger.CleanupPending, now.Add(-2*time.Minute)
		}, []Code{CleanUp}, id(aborted)},
		{"stopped instance that does not go", func(s *Snapshot) {
			row(s, stopped).Gone, s.Ended[id(stopped)] = false, now.Add(-2*time.Minute)
		}, []Code{CleanUp}, id(stopped)},

		{"volume key lost", func(s *Snapshot) { s.VolumeKeys = s.VolumeKeys[1:] }, []Code{VolumeKeyMissing}, volume(booting)},
		{"key of a deleted VM", func(s *Snapshot) { s.VolumeKeys = append(s.VolumeKeys, volume(deleted)) }, []Code{VolumeKeyUnexpected}, volume(deleted)},
		{"key of nobody", func(s *Snapshot) { s.VolumeKeys = append(s.VolumeKeys, volume(77)) }, []Code{VolumeKeyUnexpected}, volume(77)},
		{"template key lost", func(s *Snapshot) { s.TemplateKeys = nil }, []Code{TemplateKeyMissing}, "debian"},
		{"template key of nobody", func(s *Snapshot) { s.TemplateKeys = append(s.TemplateKeys, "old") }, []Code{TemplateKeyUnexpected}, "old"},

		{"template gone", func(s *Snapshot) { row(s, stopped).Template = "old" }, []Code{TemplateUnregistered}, id(stopped)},
		{"kernel not in the store", func(s *Snapshot) { s.Ledger.Objects = s.Ledger.Objects[1:] }, []Code{ObjectMissing}, "template debian"},
		{"workload not in the store", func(s *Snapshot) { s.Ledger.Objects = s.Ledger.Objects[:1] }, []Code{ObjectMissing}, id(computing)},

		{"host not in the inventory", func(s *Snapshot) {
			row(s, aborted).Host = "beta"
			s.Hosts[0].Volumes = slices.Delete(s.Hosts[0].Volumes, 3, 4)
		}, []Code{HostUnknown}, id(aborted)},
		{"host does not answer", func(s *Snapshot) { s.Hosts[0] = Host{Name: "alpha", Problem: "no route"} }, []Code{HostSilent}, "alpha"},
		{"VM lost", func(s *Snapshot) { s.Hosts[0].VMs = s.Hosts[0].VMs[:1] }, []Code{VMMissing}, id(computing)},
		{"VM of nobody", func(s *Snapshot) { s.Hosts[0].VMs = append(s.Hosts[0].VMs, hostapi.VM{ID: id(77)}) }, []Code{VMUnexpected}, id(77)},
		{"VM of a stopped one", func(s *Snapshot) {
			s.Hosts[0].VMs = append(s.Hosts[0].VMs, hostapi.VM{ID: id(stopped), Start: 1})
		}, []Code{VMUnexpected}, id(stopped)},
		{"VM of a deleted one", func(s *Snapshot) {
			s.Hosts[0].VMs = append(s.Hosts[0].VMs, hostapi.VM{ID: id(deleted), Start: 1})
		}, []Code{VMUnexpected}, id(deleted)},
		{"VM at another host too", func(s *Snapshot) {
			s.Hosts = append(s.Hosts, Host{Name: "beta", VMs: s.Hosts[0].VMs[1:]})
		}, []Code{VMUnexpected}, "host beta"},
		{"VM in another start", func(s *Snapshot) { s.Hosts[0].VMs[1].Start = 1 }, []Code{VMDiffers}, id(computing)},
		{"VM with other settings", func(s *Snapshot) { s.Hosts[0].VMs[1].Settings = kernel }, []Code{VMDiffers}, id(computing)},
		{"VM that has ended", func(s *Snapshot) { s.Hosts[0].VMs[1].State = hostapi.Stopped }, []Code{VMDiffers}, id(computing)},
		{"volume lost", func(s *Snapshot) { s.Hosts[0].Volumes = s.Hosts[0].Volumes[1:] }, []Code{VolumeMissing}, volume(booting)},
		{"volume of nobody", func(s *Snapshot) {
			s.Hosts[0].Volumes = append(s.Hosts[0].Volumes, hostapi.Volume{ID: volume(77)})
		}, []Code{VolumeUnexpected}, volume(77)},
		{"volume of a deleted VM", func(s *Snapshot) {
			s.Hosts[0].Volumes = append(s.Hosts[0].Volumes, hostapi.Volume{ID: volume(deleted)})
		}, []Code{VolumeUnexpected}, volume(deleted)},
		{"volume at another host too", func(s *Snapshot) {
			s.Hosts = append(s.Hosts, Host{Name: "beta", Volumes: s.Hosts[0].Volumes[:1]})
		}, []Code{VolumeUnexpected}, "host beta"},
		{"volume of another size", func(s *Snapshot) { s.Hosts[0].Volumes[stopped].Size-- }, []Code{VolumeDiffers}, volume(stopped)},
		{"volume attached to nobody", func(s *Snapshot) { s.Hosts[0].Volumes[stopped].Attached = true }, []Code{VolumeDiffers}, volume(stopped)},
		{"template lost at the host", func(s *Snapshot) { s.Hosts[0].Templates = nil }, []Code{TemplateMissing}, "debian"},
		{"template of nobody", func(s *Snapshot) {
			s.Hosts[0].Templates = append(s.Hosts[0].Templates, hostapi.Template{SHA256: kernel})
		}, []Code{TemplateUnexpected}, kernel.Short()},
		{"template that was not sent", func(s *Snapshot) {
			s.Hosts = append(s.Hosts, Host{Name: "beta", Templates: s.Hosts[0].Templates})
		}, []Code{TemplateUnexpected}, "beta"},
		{"template of another size", func(s *Snapshot) { s.Hosts[0].Templates[0].Size++ }, []Code{TemplateDiffers}, template.Short()},

		{"document behind the ledger", func(s *Snapshot) { s.Zones[1].Outdated = true }, []Code{ZoneOutdated}, "internal"},
		{"revision not live in time", func(s *Snapshot) { s.Zones[0].Report.Revision = 4 }, []Code{ZoneBehind}, "external"},
		{"report of another epoch", func(s *Snapshot) { s.Zones[0].Report.Epoch = 2 }, []Code{ZoneBehind}, "external"},
		{"daemon that says nothing", func(s *Snapshot) { s.Zones[3].Seen = now.Add(-2 * time.Minute) }, []Code{ZoneSilent}, "boot"},
		{"daemon that failed", func(s *Snapshot) { s.Zones[0].Report.Error = "no such set" }, []Code{ZoneFault}, "external"},
		{"rule lost", func(s *Snapshot) {
			s.Zones[0].Report.Live = slices.DeleteFunc(s.Zones[0].Report.Live, func(l zone.Live) bool { return l.ID == "standing/x" })
		}, []Code{RuleMissing}, "standing/x"},
		{"rule too many", func(s *Snapshot) {
			s.Zones[1].Report.Live = append(s.Zones[1].Report.Live, zone.Live{ID: "unexpected/x", Rule: "from anywhere"})
		}, []Code{RuleUnexpected}, "unexpected/x"},
		{"rule twice", func(s *Snapshot) {
			s.Zones[1].Report.Live = append(s.Zones[1].Report.Live, s.Zones[1].Report.Live[0])
		}, []Code{RuleUnexpected}, "vm1"},
		{"rule of an ended VM", func(s *Snapshot) {
			s.Zones[0].Report.Live = append(s.Zones[0].Report.Live, zone.Live{ID: id(aborted) + "/1/boot", Reservation: id(aborted)})
		}, []Code{RuleUnexpected}, "vm3"},
		{"address too many at the boot server", func(s *Snapshot) {
			s.Zones[3].Report.Live = append(s.Zones[3].Report.Live, zone.Live{ID: id(stopped), Reservation: id(stopped)})
		}, []Code{RuleUnexpected}, "vm2"},
		{"own rule of another daemon", func(s *Snapshot) {
			s.Zones[3].Report.Live = append(s.Zones[3].Report.Live, zone.Live{ID: "bootstrap/1"})
		}, []Code{RuleUnexpected}, "zone boot"},
		{"tunnel lost", func(s *Snapshot) {
			s.Zones[2].Report.Live = slices.DeleteFunc(s.Zones[2].Report.Live, func(l zone.Live) bool { return l.ID == id(computing) })
		}, []Code{PeerMissing}, id(computing)},
		{"tunnel of nobody", func(s *Snapshot) {
			s.Zones[2].Report.Live = append(s.Zones[2].Report.Live, zone.Live{ID: "unexpected", Rule: "tunnel 10.84.0.9/32"})
		}, []Code{PeerUnexpected}, "unexpected"},
		{"tunnel of a stopped VM", func(s *Snapshot) {
			s.Zones[2].Report.Live = append(s.Zones[2].Report.Live, zone.Live{ID: id(stopped), Reservation: id(stopped)},
				zone.Live{ID: "relay/" + id(stopped), Reservation: id(stopped)})
		}, []Code{PeerUnexpected, RuleUnexpected}, "vm2"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			s := world()
			c.plant(&s)
			got := Check(s).Findings
			if !slices.Equal(codes(got), c.want) {
				t.Fatalf("found %+v, want %q", got, c.want)
			}
			if f := got[0]; !strings.Contains(f.Thing, c.thing) || f.Expected == "" || f.Found == "" || f.Next == "" {
				t.Errorf("finding %+v does not name %q", f, c.thing)
			}
		})
	}
}

// TestMotion: what is under way and has time left may stand either way.
func TestMotion(t *testing.T) {
	row := func(s *Snapshot, i int) *ledger.Reservation { return &s.Ledger.Reservations[i] }
	facts := func(s *Snapshot, i int, change func(*ledger.Start)) {
		f := s.Ledger.Latest[id(i)]
		change(&f)
		s.Ledger.Latest[id(i)] = f
	}
	notYet := func(s *Snapshot) { facts(s, booting, func(f *ledger.Start) { f.HostStarted = time.Time{} }) }
	cases := []struct {
		name string
		set  func(*Snapshot)
		want []Code // besides that of the VM that boots
	}{
		{"creation asked, the host has nothing yet", func(s *Snapshot) {
			notYet(s)
			s.Hosts[0].VMs, s.Hosts[0].Volumes = s.Hosts[0].VMs[1:], s.Hosts[0].Volumes[1:]
		}, nil},
		{"creation asked, the host has created it", func(s *Snapshot) { notYet(s); s.Hosts[0].VMs[0].State = hostapi.Created }, nil},
		{"reserved, nothing made yet", func(s *Snapshot) {
			*row(s, booting) = ledger.Reservation{ID: id(booting), Name: "vm0", Template: "debian", Phase: reservation.Reserved, Start: 1, Volume: volume(booting),
				Deadline: now.Add(time.Second), Cleanup: ledger.CleanupNone}
			facts(s, booting, func(f *ledger.Start) { *f = ledger.Start{} })
			s.Ledger.Open[0].Name, s.Ledger.Tokens, s.VolumeKeys = "reserved", nil, s.VolumeKeys[1:]
			s.Hosts[0].VMs, s.Hosts[0].Volumes = s.Hosts[0].VMs[1:], s.Hosts[0].Volumes[1:]
		}, nil},
		{"T3 made, its phase not begun", func(s *Snapshot) {
			row(s, booting).Phase, s.Ledger.Open[0].Name = reservation.Unlocking, "unlocking"
			s.Ledger.Tokens[0].Kind, s.Ledger.Tokens[0].Phase = token.T3, reservation.Connecting
		}, nil},
		{"stopped, its instance still listed", func(s *Snapshot) {
			row(s, stopped).Gone, s.Ended[id(stopped)] = false, now.Add(-time.Second)
			s.Hosts[0].VMs = append(s.Hosts[0].VMs, hostapi.VM{ID: id(stopped), Start: 1})
			s.Hosts[0].Volumes[stopped].Attached = true
		}, []Code{CleanUp}},
		{"deletion under way, key destroyed", func(s *Snapshot) {
			row(s, aborted).Erase, row(s, aborted).Cleanup, s.Ended[id(aborted)] = true, ledger.CleanupPending, now.Add(-time.Second)
			s.VolumeKeys = slices.DeleteFunc(s.VolumeKeys, func(v string) bool { return v == volume(aborted) })
		}, []Code{CleanUp}},
		{"deletion under way, volume deleted", func(s *Snapshot) {
			row(s, aborted).Erase, row(s, aborted).Cleanup, s.Ended[id(aborted)] = true, ledger.CleanupPending, now.Add(-time.Second)
			s.Hosts[0].Volumes = slices.Delete(s.Hosts[0].Volumes, aborted, aborted+1)
		}, []Code{CleanUp}},
		{"start due", func(s *Snapshot) { row(s, stopped).Deadline = now.Add(time.Second) }, []Code{StartPending}},
		{"asked to stop", func(s *Snapshot) { row(s, computing).Wish, row(s, computing).Wished = ledger.WishStop, now }, []Code{UnderWay}},
		{"revision just given", func(s *Snapshot) { s.Zones[0].Report.Revision, s.Zones[0].Changed = 4, now.Add(-time.Second) }, []Code{ZoneBehind}},
		{"tunnel admitted, not reported yet", func(s *Snapshot) {
			s.Zones[2].Changed = now.Add(-time.Second)
			s.Zones[2].Report.Live = s.Zones[2].Report.Live[:0]
		}, []Code{PeerMissing, RuleMissing}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			s := world()
			c.set(&s)
			r := Check(s)
			want := append(slices.Clone(c.want), UnderWay)
			slices.Sort(want)
			if len(r.Findings) != 0 || !slices.Equal(codes(r.Motion), want) {
				t.Errorf("findings %+v, in motion %+v, want %q", r.Findings, r.Motion, want)
			}
		})
	}
}

func TestNotes(t *testing.T) {
	s := world()
	s.Ledger.Objects = append(s.Ledger.Objects, digest.Of([]byte("old workload")))
	s.Ledger.Templates[0].Hosts, s.Hosts[0].Templates = nil, nil
	r := Check(s)
	if got := codes(r.Notes); !slices.Equal(got, []Code{ObjectUnused, TemplateUnsent}) || len(r.Findings) != 0 {
		t.Errorf("notes %+v, findings %+v", r.Notes, r.Findings)
	}
}

// TestConfirm: a finding of one snapshot alone was in motion.
func TestConfirm(t *testing.T) {
	stays, came, went := api.Finding{Code: "a", Thing: "x"}, api.Finding{Code: "a", Thing: "y"}, api.Finding{Code: "b", Thing: "x"}
	r := Confirm(Report{Findings: []api.Finding{stays, went}}, Report{Findings: []api.Finding{stays, came}})
	if !slices.Equal(r.Findings, []api.Finding{stays}) || !slices.Equal(r.Motion, []api.Finding{came}) {
		t.Errorf("%+v", r)
	}
	first, second := world(), world()
	for _, s := range []*Snapshot{&first, &second} {
		s.Zones[0].Outdated, s.Zones[1].Outdated = true, true
	}
	second.Zones[0].Document.Revision++ // made anew in between
	second.Zones[0].Report.Revision++
	r = Confirm(Check(first), Check(second))
	if len(r.Findings) != 1 || r.Findings[0].Thing != "zone internal" || !slices.ContainsFunc(r.Motion, func(f api.Finding) bool { return f.Code == string(ZoneOutdated) && f.Thing == "zone external" }) {
		t.Errorf("outdated documents: %+v", r)
	}
}

// TestBounds: a host that lists a million VMs with long names fills no memory.
func TestBounds(t *testing.T) {
	s := world()
	for i := range 2 * maxList {
		s.Hosts[0].VMs = append(s.Hosts[0].VMs, hostapi.VM{ID: strings.Repeat("ü", maxText) + fmt.Sprint(i)})
	}
	r := Check(s)
	if len(r.Findings) != maxList || len(r.Findings[0].Thing) > maxText+3 || strings.ContainsRune(r.Findings[0].Thing, '\uFFFD') {
		t.Errorf("%d findings, the first %q", len(r.Findings), r.Findings[0].Thing)
	}
}

func TestEveryCodeHasAMeaning(t *testing.T) {
	for code, m := range Codes() {
		if code == "" || m.What == "" || m.Next == "" {
			t.Errorf("%q: %+v", code, m)
		}
	}
}
