package orchestrator

import (
	"bytes"
	"database/sql"
	"net/http"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"foothold/internal/luks"
	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/hostapi"
	"foothold/protocol/token"
	"foothold/protocol/upstream"
	"foothold/protocol/zone"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// nobodys is the id of a VM or volume that nobody reserved.
const nobodys = "00000000-0000-4000-8000-000000000077"

func (w *world) fsck() (f api.Fsck) {
	w.t.Helper()
	if status, p := w.call("GET", "/v1/fsck", nil, &f); status != http.StatusOK {
		w.t.Fatalf("fsck: %d %+v", status, p)
	}
	return f
}

// fits wants no finding, and returns the codes of what is in motion.
func (w *world) fits(when string) (motion []string) {
	w.t.Helper()
	f := w.fsck()
	if !f.Clean || len(f.Findings) != 0 {
		w.t.Errorf("%s: %+v", when, f.Findings)
	}
	for _, m := range f.Motion {
		motion = append(motion, m.Code)
	}
	return motion
}

// TestFsckFits: at no point of a VM's story, its stop, its end or its failure is there
// anything that does not fit.
func TestFsckFits(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.fits("before anything")
	w.template("debian")
	object := w.putObject([]byte("workload"))
	vm := w.create(api.CreateVM{Name: "web", Workload: &api.Workload{SHA256: object.SHA256, Size: object.Size, Kind: "executable"}, Restart: "never"})
	w.fits("just created")
	g := w.take(vm.ID)
	if motion := w.fits("booting"); !slices.Contains(motion, "under-way") {
		t.Errorf("booting: in motion: %q", motion)
	}
	g.serveWorkload(8080)
	g.pass()
	w.wait("web", "ready", func(vm api.VM) bool { return vm.Ready })
	w.fits("computing")
	f := w.fsck()
	if f.Looked.VMs != 1 || f.Looked.Hosts != 1 || f.Looked.Instances != 1 || f.Looked.Volumes != 1 || f.Looked.Templates != 1 ||
		f.Looked.Keys != 2 || f.Looked.Rules < 5 || f.Looked.Entries < 10 || len(f.Notes) != 0 {
		t.Errorf("looked at %+v, notes %+v", f.Looked, f.Notes)
	}

	w.ask("stop", "web")
	if motion := w.fits("asked to stop"); !slices.Contains(motion, "under-way") {
		t.Errorf("asked to stop: in motion: %q", motion)
	}
	w.host.stop(vm.ID, event.GuestPoweredOff)
	w.fits("while it stops")
	w.waitPhase("web", reservation.Stopped)
	w.waitGone(vm.ID)
	w.fits("stopped")
	w.ask("start", "web")
	w.fits("starting again")
	g = w.takeStart(vm.ID, 2)
	g.tunnel = g.tunnel.Next()
	g.pass()
	w.fits("computing again")

	w.restart()
	w.fits("after the orchestrator's restart")
	w.host.failing("DELETE /v1/vms/{id}", 1)
	w.call("DELETE", "/v1/vms/web", nil, nil)
	if motion := w.fits("while the host does not let go"); !slices.Contains(motion, "clean-up") {
		t.Errorf("deleted but not gone: in motion: %q", motion)
	}
	w.call("DELETE", "/v1/vms/web", nil, nil)
	w.fits("deleted")
	if f := w.fsck(); f.Looked.VMs != 0 || f.Looked.Volumes != 0 || len(f.Notes) != 1 || f.Notes[0].Code != "object-unused" {
		t.Errorf("deleted: looked at %+v, notes %+v", f.Looked, f.Notes)
	}

	bad := w.take(w.create(api.CreateVM{Name: "bad"}).ID)
	bad.tweak.openDoor = true
	if why := bad.boot(); why != "" {
		t.Fatal(why)
	}
	bad.door()
	bad.ready()
	w.waitPhase(bad.id, reservation.Aborted)
	w.fits("just aborted")
	w.waitGone(bad.id)
	w.fits("aborted")
	w.call("DELETE", "/v1/vms/bad", nil, nil)
	w.call("DELETE", "/v1/templates/debian", nil, nil)
	if f := w.fsck(); !f.Clean || len(f.Motion) != 0 || f.Looked.Keys != 0 || f.Looked.Templates != 0 {
		t.Errorf("nothing is left: %+v", f)
	}
}

// TestFsckNames plants one misfit after another in a world with a VM that computes and
// one that is stopped, and wants each named, and nothing else.
func TestFsckNames(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config) { c.Limits.Lease = 10 * time.Minute }) // nobody sends heartbeats
	w.template("debian")
	g := w.computing("web")
	idle := w.take(w.create(api.CreateVM{Name: "idle", Restart: string(reservation.Never)}).ID)
	idle.tunnel = idle.tunnel.Next()
	idle.pass()
	w.host.stop(idle.id, event.GuestPoweredOff)
	w.waitPhase("idle", reservation.Stopped)
	w.waitGone(idle.id)
	w.fits("before anything is planted")
	h := w.host
	host := func(f func()) func() {
		return func() {
			h.mu.Lock()
			defer h.mu.Unlock()
			f()
		}
	}
	volume, size := g.vm.spec.Volume.ID, int64(g.vm.spec.Volume.SizeMiB)<<20
	image := g.vm.spec.Template
	stored := h.templates[image]
	for _, c := range []struct {
		name, code  string
		plant, mend func()
	}{
		{"VM that nobody reserved", "vm-unexpected",
			host(func() { h.vms[nobodys] = &hostedVM{VM: hostapi.VM{ID: nobodys, Start: 1, State: hostapi.Running}} }),
			host(func() { delete(h.vms, nobodys) })},
		{"VM with other settings", "vm-differs",
			host(func() { h.vms[g.id].Settings = digest.Of([]byte("other")) }),
			host(func() { h.vms[g.id].Settings = g.vm.spec.Digest() })},
		{"stopped VM that runs", "vm-unexpected",
			host(func() { v := idle.vm; v.State = hostapi.Stopped; h.vms[idle.id] = &v }),
			host(func() { delete(h.vms, idle.id) })},
		{"host that lost a volume", "volume-missing", host(func() { delete(h.volumes, volume) }), host(func() { h.volumes[volume] = size })},
		{"volume that nobody has", "volume-unexpected", host(func() { h.volumes[nobodys] = 1 << 20 }), host(func() { delete(h.volumes, nobodys) })},
		{"host that lost the template", "template-missing", host(func() { delete(h.templates, image) }), host(func() { h.templates[image] = stored })},
		{"host that does not answer", "host-silent", func() { h.failing("GET /v1/volumes", 2) }, func() {}},
		{"key of nobody", "volume-key-unexpected",
			func() { check(t, w.o.vault.Put(volumeKeyName(nobodys), luks.NewKey())) },
			func() { check(t, w.o.vault.Destroy(volumeKeyName(nobodys))) }},
		{"key of no template", "template-key-unexpected",
			func() { check(t, w.o.vault.Put(templateKeyName(ledger.Template{Name: "old"}), luks.NewKey())) },
			func() { check(t, w.o.vault.Destroy(templateKeyName(ledger.Template{Name: "old"}))) }},
		{"rule too many", "rule-unexpected",
			func() { w.reportExternal(zone.Live{ID: "unexpected/x", Rule: "anywhere → anywhere tcp 22"}) },
			func() { w.reportExternal() }},
		{"document that was not made", "zone-outdated", func() { w.peerKey(g, 8) }, func() { w.peerKey(g, 7) }},
		{"altered journal", "journal-broken",
			func() { w.harm(`UPDATE journal SET hash = substr(hash, 2) || substr(hash, 1, 1) WHERE seq = 3`) },
			func() { w.harm(`UPDATE journal SET hash = substr(hash, 64) || substr(hash, 1, 63) WHERE seq = 3`) }},
		{"token left open", "token-open",
			func() {
				check(t, w.o.ledger.Write(t.Context(), func(tx *ledger.Tx) error {
					return tx.AddToken(ledger.Token{Digest: digest.Of([]byte("token")), Kind: token.T1, Reservation: idle.id, Start: 1, Phase: reservation.Booting, Source: idle.address()})
				}))
			},
			func() { w.call("DELETE", "/v1/vms/idle", nil, nil) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.plant()
			f := w.fsck()
			if f.Clean || len(f.Findings) != 1 || f.Findings[0].Code != c.code || f.Findings[0].Next == "" {
				t.Errorf("found %+v, want %s", f.Findings, c.code)
			}
			c.mend()
			w.fits("mended")
		})
	}
}

// peerKey changes what a document should say, and publishes nothing.
func (w *world) peerKey(g *guest, of byte) {
	w.t.Helper()
	check(w.t, w.o.ledger.Write(w.t.Context(), func(tx *ledger.Tx) error {
		return tx.ChangeStart(g.id, g.vm.spec.Start, func(s *ledger.Start) { s.WireGuardKey = bytes.Repeat([]byte{of}, 32) })
	}))
}

// TestFsckWaitsForDocuments: a document whose making takes its time, as under a crowd, is
// waited for, and not named.
func TestFsckWaitsForDocuments(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	g := w.computing("web")
	w.o.zones.publishing.Lock()
	var under sync.WaitGroup
	under.Go(func() { w.peerKey(g, 8); w.o.publish(t.Context()) })
	for asked := w.o.zones.asked.Load(); w.o.zones.asked.Load() == asked; {
		check(t, pause(t.Context(), time.Millisecond))
	}
	answered := make(chan api.Fsck)
	go func() { answered <- w.fsck() }()
	select {
	case f := <-answered:
		t.Errorf("answered while a document was under way: %+v", f)
	case <-time.After(2 * secondLook):
	}
	w.o.zones.publishing.Unlock()
	if f := <-answered; !f.Clean {
		t.Errorf("a document that was under way: %+v", f.Findings)
	}
	under.Wait()
}

// reportExternal reports the external firewall's newest document as it should be, with
// more.
func (w *world) reportExternal(more ...zone.Live) {
	w.t.Helper()
	state := w.o.zones.compared(zone.External, nil)
	r := state.Report
	r.Live = nil
	for _, f := range state.Document.Flows {
		r.Live = append(r.Live, zone.Live{ID: f.ID, Reservation: f.Reservation})
	}
	r.Live = append(r.Live, more...)
	if why := w.post(w.t.Context(), zone.External, upstream.PathZoneReport, r, nil); why != "" {
		w.t.Fatalf("report: %s", why)
	}
}

// harm changes the ledger's file behind the orchestrator's back.
func (w *world) harm(statement string) {
	w.t.Helper()
	db := must[*sql.DB](w.t)(sql.Open("sqlite", "file:"+filepath.Join(w.conf.State, ledgerFile)+"?_pragma=busy_timeout(5000)"))
	defer db.Close()
	_, err := db.ExecContext(w.t.Context(), statement)
	check(w.t, err)
}
