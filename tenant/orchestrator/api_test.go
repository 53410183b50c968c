package orchestrator

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/audit"
	"foothold/protocol/bootmsg"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/signed"
	"foothold/protocol/token"
	"foothold/protocol/upstream"
	"foothold/protocol/zone"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
)

// TestOperatorRefusals: what operators send is refused with its own reason, and never
// sent back.
func TestOperatorRefusals(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config) { c.Limits.VMs = 3; c.Network.Last = c.Network.First.Next() })
	const marker = "fht1_should-not-come-back"
	refused := func(name, method, path, in string, status int, want event.Reason) {
		t.Helper()
		got, p := w.call(method, path, []byte(in), nil)
		if got != status || p.Reason != want || p.Next == "" {
			t.Errorf("%s: %d %+v, want %d %s", name, got, p, status, want)
		}
		if strings.Contains(p.Detail+p.Next, marker) {
			t.Errorf("%s: what was submitted comes back: %s", name, p.Detail)
		}
	}
	refused("no template at all", "POST", "/v1/vms", `{"name":"a"}`, 404, event.UnknownTemplate)
	w.template("debian")
	for name, in := range map[string]string{
		"no body":        ``,
		"not JSON":       `{"name":` + marker,
		"unknown field":  `{"name":"a","` + marker + `":1}`,
		"duplicate key":  `{"name":"a","Name":"` + marker + `"}`,
		"trailing data":  `{"name":"a"} {"x":"` + marker + `"}`,
		"wrong type":     `{"name":["` + marker + `"]}`,
		"malformed name": `{"name":"` + marker + `!"}`,
		"an id as name":  `{"name":"00000000-0000-4000-8000-000000000000"}`,
		"deep":           strings.Repeat(`{"a":`, 100) + "1" + strings.Repeat("}", 100),
		"bad kind":       `{"name":"a","workload":{"sha256":"` + digest.Of(nil).String() + `","size":1,"kind":"` + marker + `"}}`,
		"path outside":   `{"name":"a","workload":{"sha256":"` + digest.Of(nil).String() + `","size":1,"kind":"tar","entry":"../x"}}`,
	} {
		got, p := w.call("POST", "/v1/vms", []byte(in), nil)
		if got != http.StatusBadRequest && got != http.StatusUnprocessableEntity || p.Reason != event.BadRequest {
			t.Errorf("%s: %d %+v", name, got, p)
		}
		if strings.Contains(p.Detail+p.Next, marker) && name != "duplicate key" && name != "unknown field" { // those name the key
			t.Errorf("%s: what was submitted comes back: %s", name, p.Detail)
		}
	}
	if got, _ := w.call("POST", "/v1/vms", []byte(`{"name":"`+strings.Repeat("a", 2<<20)+`"}`), nil); got != http.StatusRequestEntityTooLarge {
		t.Errorf("oversized: %d", got)
	}
	refused("size", "POST", "/v1/vms", `{"name":"a","size":"`+marker+`"}`, 400, event.UnknownSize)
	refused("template", "POST", "/v1/vms", `{"name":"a","template":"other"}`, 404, event.UnknownTemplate)
	refused("workload", "POST", "/v1/vms", `{"name":"a","workload":{"sha256":"`+digest.Of([]byte("x")).String()+`","size":1,"kind":"executable"}}`, 404, event.UnknownWorkload)
	refused("VM", "GET", "/v1/vms/none", "", 404, event.UnknownVM)
	refused("delete", "DELETE", "/v1/vms/none", "", 404, event.UnknownVM)
	w.create(api.CreateVM{Name: "a"})
	refused("taken", "POST", "/v1/vms", `{"name":"a"}`, 409, event.NameTaken)
	refused("template in use", "DELETE", "/v1/templates/debian", "", 409, event.InUse)
	w.create(api.CreateVM{Name: "b"})
	refused("pool", "POST", "/v1/vms", `{"name":"c"}`, 409, event.PoolEmpty)
	if got, _ := w.call("GET", "/v1/vms?nonsense=1", nil, nil); got != http.StatusUnprocessableEntity && got != http.StatusBadRequest {
		t.Errorf("unknown query: %d", got)
	}
}

func TestQuota(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config) { c.Limits.VMs = 1 })
	w.template("debian")
	w.create(api.CreateVM{Name: "a"})
	if status, p := w.call("POST", "/v1/vms", []byte(`{"name":"b"}`), nil); status != http.StatusConflict || p.Reason != event.QuotaExceeded {
		t.Errorf("over the quota: %d %+v", status, p)
	}
}

// TestTemplateIsRenewed: a template that was built anew around the same image counts from
// then on, unless a VM has the old one.
func TestTemplateIsRenewed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	reg, _ := w.registration("debian")
	key, err := w.o.vault.Get(templateKeyName(ledger.Template{Name: "debian"}))
	check(t, err)
	reg.VolumeKey = key
	expected := guestExpectations()
	register := func() (view api.Template, status int, p api.Problem) {
		t.Helper()
		reg.Audit = must[[]byte](t)(expected.Encode())
		status, p = w.call("POST", "/v1/templates", must[[]byte](t)(json.Marshal(reg)), &view)
		return view, status, p
	}
	expected.AuthenticatedVolume = true
	view, status, p := register()
	if status != http.StatusCreated || !view.AuthenticatedVolume || len(view.Hosts) != 1 {
		t.Fatalf("renewed: %d %+v %+v", status, p, view)
	}
	g := w.take(w.create(api.CreateVM{Name: "a"}).ID)
	if why := g.boot(); why != "" {
		t.Fatal(why)
	}
	g.tweak.first = func(r *audit.Report) {
		r.Disks = append(r.Disks, audit.Disk{Name: "ram0", Number: "1:0", Size: 4096})
	}
	g.door()
	if why := g.ready(); why != "" {
		t.Fatal(why)
	}
	w.waitPhase("a", reservation.Connecting)
	if !g.hand.Volume.Authenticated || g.hand.Template.Authenticated || !g.hand.Volume.Format {
		t.Errorf("the VM is not told of its volume's tags: %+v", g.hand.Volume)
	}
	if _, status, p := register(); status != http.StatusCreated {
		t.Errorf("the same again: %d %+v", status, p)
	}
	for what, change := range map[string]func(){
		"expectations": func() { expected.AuthenticatedVolume = false },
		"components":   func() { reg.Components = w.signedComponents("another initramfs", "r2") },
		"initramfs alone, under the same release": func() { reg.Components = w.signedComponents("a third initramfs", "r1") },
	} {
		before, was := reg.Components, expected
		change()
		if _, status, p := register(); status != http.StatusConflict || p.Reason != event.TemplateTaken || !strings.HasSuffix(p.Detail, ": a") {
			t.Errorf("other %s under a VM: %d %+v", what, status, p)
		}
		reg.Components, expected = before, was
	}
	w.call("DELETE", "/v1/vms/a", nil, nil)
	reg.Components = w.signedComponents("another initramfs", "r2")
	want := digest.Of([]byte("another initramfs"))
	if view, status, p := register(); status != http.StatusCreated || view.Release != "r2" || len(view.Boot) != 2 || view.Boot[1].SHA256 != want {
		t.Errorf("renewed: %d %+v %+v", status, p, view)
	}
	g = w.take(w.create(api.CreateVM{Name: "a"}).ID)
	if why := g.boot(); why != "" {
		t.Fatal(why)
	}
	if vm := w.vm("a"); !slices.ContainsFunc(vm.Components, func(c bootmsg.Component) bool { return c.SHA256 == want }) {
		t.Errorf("a VM of the renewed template gets %+v", vm.Components)
	}
	renewed := 0
	for _, kind := range w.events("") {
		if kind == "template.renewed" {
			renewed++
		}
	}
	if renewed != 2 {
		t.Errorf("the journal tells of %d renewals, want 2", renewed)
	}
}

// signedComponents are a release with that initramfs, signed and in the store.
func (w *world) signedComponents(initramfs, release string) signed.Envelope {
	w.t.Helper()
	k, i := w.putObject([]byte("kernel debian")), w.putObject([]byte(initramfs))
	k.Name, i.Name = "kernel", "initramfs"
	return signed.Seal(w.component, signed.Components, must[[]byte](w.t)(json.Marshal(bootmsg.Components{Release: release, Created: time.Now().UTC(), Kernel: k, Initramfs: i})))
}

// TestTemplateOfAnotherKey: after a change of the organisation's component key the list
// still answers, says what is wrong, and the template is mended by registering it again.
func TestTemplateOfAnotherKey(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	_, w.component, _ = ed25519.GenerateKey(rand.Reader)
	w.conf.ComponentKey = hex.EncodeToString(w.component.Public().(ed25519.PublicKey))
	w.restart()
	var list []api.Template
	if status, p := w.call("GET", "/v1/templates", nil, &list); status != http.StatusOK || len(list) != 1 || !strings.Contains(list[0].Problem, string(event.SignatureInvalid)) {
		t.Fatalf("list: %d %+v %+v", status, p, list)
	}
	reg, _ := w.registration("debian")
	key, err := w.o.vault.Get(templateKeyName(ledger.Template{Name: "debian"}))
	check(t, err)
	reg.VolumeKey = key
	var view api.Template
	if status, p := w.call("POST", "/v1/templates", must[[]byte](t)(json.Marshal(reg)), &view); status != http.StatusCreated || view.Problem != "" || len(view.Boot) != 2 {
		t.Errorf("registered under the new key: %d %+v %+v", status, p, view)
	}
}

// TestTemplates: a template counts only with both signed components in the store and
// its very image at a host.
func TestTemplates(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	reg, image := w.registration("debian")
	post := func(r api.RegisterTemplate) (int, api.Problem) {
		t.Helper()
		return w.call("POST", "/v1/templates", must[[]byte](t)(json.Marshal(r)), nil)
	}
	forged := reg
	forged.Components.Payload = append([]byte{' '}, reg.Components.Payload...)
	if status, p := post(forged); p.Reason != event.SignatureInvalid {
		t.Errorf("components of another signature: %d %+v", status, p)
	}
	lax := reg
	lax.Audit = []byte(`{}`)
	if status, p := post(lax); p.Reason != event.BadRequest {
		t.Errorf("expectations that expect nothing: %d %+v", status, p)
	}
	if status, p := post(reg); status != http.StatusCreated {
		t.Fatalf("register: %d %+v", status, p)
	}
	if status, p := post(reg); status != http.StatusCreated {
		t.Errorf("register again: %d %+v", status, p)
	}
	other, _ := w.registration("other")
	other.Name = "debian"
	if status, p := post(other); p.Reason != event.TemplateTaken || !strings.Contains(p.Next, "template rotate") {
		t.Errorf("another image under the same name: %d %+v", status, p)
	}
	if status, p := w.call("POST", "/v1/vms", []byte(`{"name":"a"}`), nil); p.Reason != event.UnknownTemplate {
		t.Errorf("a VM of a template without image: %d %+v", status, p)
	}
	image[0] ^= 1
	if status, p := w.call("PUT", "/v1/templates/debian/image", image, nil); p.Reason != event.DigestMismatch {
		t.Errorf("an altered image: %d %+v", status, p)
	}
	if status, p := w.call("PUT", "/v1/templates/debian/image", image[1:], nil); p.Reason != event.BadRequest {
		t.Errorf("a short image: %d %+v", status, p)
	}
	image[0] ^= 1
	if status, p := w.call("PUT", "/v1/templates/debian/image", image, nil); status != http.StatusOK {
		t.Fatalf("image: %d %+v", status, p)
	}
	if status, p := w.call("DELETE", "/v1/templates/debian", nil, nil); status != http.StatusOK {
		t.Fatalf("delete: %d %+v", status, p)
	}
	if has, _ := w.o.vault.Has(templateKeyName(ledger.Template{Name: "debian"})); has {
		t.Error("the template's key is still in the vault")
	}
}

// TestOpenAPI: the description is served, without links elsewhere.
func TestOpenAPI(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	resp := must[*http.Response](t)(w.operator.Get(w.api + "/openapi.json"))
	defer resp.Body.Close()
	data := must[[]byte](t)(io.ReadAll(resp.Body))
	for _, want := range []string{`"/v1/vms"`, `"/v1/vms/{name}/explain"`, `"/v1/templates/{name}/image"`, `"/v1/objects/{name}"`, `"/v1/events"`, `"/v1/fsck"`} {
		if !strings.Contains(string(data), want) {
			t.Errorf("the description lacks %s", want)
		}
	}
	if strings.Contains(string(data), "$schema") {
		t.Error("answers carry $schema")
	}
	if status, _ := w.call("GET", "/v1/status", nil, nil); status != http.StatusOK {
		t.Errorf("status: %d", status)
	}
	for _, path := range []string{"/docs", "/schemas/VM.json"} {
		resp := must[*http.Response](t)(w.operator.Get(w.api + path))
		resp.Body.Close()
		if resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %d", path, resp.StatusCode)
		}
	}
}

// TestWhoMayCallWhat: each upstream call is for its one role, and no daemon reaches the
// operators' API.
func TestWhoMayCallWhat(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	may := map[string][]string{
		upstream.PathBootOpen: {"bootserver"}, upstream.PathBootVerdict: {"bootserver"}, upstream.PathBootDone: {"bootserver"}, upstream.PathBootReady: {"bootserver"},
		upstream.PathGatewayAdmit: {"gateway"}, upstream.PathGatewayAgent: {"gateway"},
		upstream.PathZoneReport: {"bootserver", "gateway", "external", "internal"},
		upstream.PathEvents:     {"bootserver", "gateway", "external", "internal", "store"},
	}
	for path, allowed := range may {
		for daemon := range w.daemons {
			why := w.postBytes(t.Context(), daemon, path, []byte(`{"nonsense":1}`), nil)
			want := event.Reason("status 403") // refused before the body is read
			for _, a := range allowed {
				if a == daemon {
					want = event.BadRequest
				}
			}
			if why != want {
				t.Errorf("%s by %s: %q, want %q", path, daemon, why, want)
			}
		}
	}
	for daemon, c := range w.daemons {
		if resp, err := c.Get(w.api + "/v1/vms"); err == nil {
			resp.Body.Close()
			t.Errorf("%s reached the operators' API", daemon)
		}
	}
	if why := w.post(t.Context(), "external", upstream.PathZoneReport, zone.Report{Zone: zone.Internal, Epoch: 1}, nil); why != event.NotPermitted {
		t.Errorf("a report of another's zone: %q", why)
	}
	if why := w.post(t.Context(), "external", upstream.PathZoneReport, zone.Report{Zone: zone.External, Epoch: 1, Revision: 1 << 40}, nil); why != event.BadRequest {
		t.Errorf("a report of a revision that never was: %q", why)
	}
	if why := w.post(t.Context(), "bootserver", upstream.PathEvents, []event.Event{{Kind: "boot.x", Source: "operator/root", Seq: 1}}, nil); why != "" {
		t.Errorf("events: %q", why)
	}
	var list []api.JournalEntry
	w.call("GET", "/v1/events", nil, &list)
	at := slices.IndexFunc(list, func(e api.JournalEntry) bool { return e.Event.Kind == "boot.x" })
	if at < 0 || list[at].Event.Source != "bootserver/bootserver" {
		t.Errorf("the event is not in the journal under its true source: %+v", list)
	}
	forged := "boot.x\n12:00:00.000  orchestrator  vm.ready"
	for name, e := range map[string]event.Event{
		"kind":        {Kind: forged},
		"reason":      {Kind: "boot.x", Reason: event.Reason("\x1b[2J")},
		"detail":      {Kind: "boot.x", Detail: map[string]string{forged: "1"}},
		"reservation": {Kind: "boot.x", Reservation: "x\ny"},
	} {
		if why := w.post(t.Context(), "bootserver", upstream.PathEvents, []event.Event{e}, nil); why != event.BadRequest {
			t.Errorf("an event whose %s is no name: %q", name, why)
		}
	}
}

// TestUnknownToken: a guess ends the VM that is still booting at that address, and no
// other.
func TestUnknownToken(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	g, other := w.take(w.create(api.CreateVM{Name: "a"}).ID), w.take(w.create(api.CreateVM{Name: "b"}).ID)
	if _, why := g.open(token.New(token.T1)); why != event.TokenUnknown {
		t.Errorf("a guess: %q", why)
	}
	if got := w.waitPhase("a", reservation.Aborted); got.Reason != event.TokenUnknown {
		t.Errorf("the VM at that address ended with %q", got.Reason)
	}
	if why := other.boot(); why != "" {
		t.Errorf("the other VM: %q", why)
	}
}

// TestHostFails: a host that refuses to create or to start ends the reservation; a host
// that only says that it destroyed a VM keeps its address taken.
func TestHostFails(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	for _, call := range []string{"POST /v1/vms", "POST /v1/vms/{id}/start"} {
		w.host.failing(call, 1)
		vm := w.create(api.CreateVM{Name: "a"})
		if got := w.waitPhase(vm.ID, reservation.Aborted); got.Reason != event.HostRefused {
			t.Errorf("%s fails: ended with %q", call, got.Reason)
		}
		w.waitGone(vm.ID)
		w.call("DELETE", "/v1/vms/a", nil, nil)
	}
	for _, call := range []string{"GET /v1/platform", "POST /v1/quote"} {
		w.host.failing(call, 1)
		g := w.take(w.create(api.CreateVM{Name: "a"}).ID)
		if g.boot() == "" {
			g.door()
			g.ready()
		}
		if got := w.waitPhase(g.id, reservation.Aborted); got.Reason != event.HostRefused {
			t.Errorf("%s fails: ended with %q", call, got.Reason)
		}
		w.waitGone(g.id)
		w.call("DELETE", "/v1/vms/a", nil, nil)
	}
	g := w.take(w.create(api.CreateVM{Name: "a"}).ID)
	w.host.mu.Lock()
	w.host.undead = true
	w.host.mu.Unlock()
	var ended api.VM
	if status, _ := w.call("DELETE", "/v1/vms/a", nil, &ended); status != http.StatusOK || ended.Cleanup != api.CleanupPending {
		t.Errorf("the caller is told %d, cleanup %q", status, ended.Cleanup)
	}
	r, err := w.o.findAny(t.Context(), g.id)
	check(t, err)
	if r.Phase != reservation.Released || r.Cleanup != ledger.CleanupPending || !r.Deleted.IsZero() {
		t.Errorf("a VM that its host does not destroy: %+v", r)
	}
	if has, err := w.o.vault.Has(volumeKeyName(r.Volume)); err != nil || has {
		t.Errorf("the host keeps the volume's key alive: %v %v", has, err)
	}
	if status, p := w.call("POST", "/v1/vms", []byte(`{"name":"a"}`), nil); status != http.StatusConflict || p.Reason != event.NameTaken {
		t.Errorf("its name: %d %+v", status, p)
	}
	if other := w.create(api.CreateVM{Name: "b"}); other.Address == r.Address {
		t.Error("its address was given to another VM")
	}
}

// TestRulesNotLive: nothing is tried over a path that a firewall has not opened.
func TestRulesNotLive(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config) { c.Limits.Unlocking = liveWait * 2 })
	w.template("debian")
	g := w.take(w.create(api.CreateVM{Name: "a"}).ID)
	if why := g.boot(); why != "" {
		t.Fatal(why)
	}
	w.mu.Lock()
	w.deaf[zone.Internal] = true
	w.mu.Unlock()
	g.door()
	if why := g.ready(); why != "" {
		t.Fatal(why)
	}
	if got := w.waitPhase("a", reservation.Aborted); got.Reason != event.ZoneNotApplied {
		t.Errorf("ended with %q: %s", got.Reason, got.Explanation)
	}
	if g.hand.User != "" {
		t.Error("secrets were handed over")
	}
}

// TestKeyNotInTheTPM: a host whose TPM does not prove that it holds the inventoried
// attestation key gets no VM.
func TestKeyNotInTheTPM(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	w.host.tpmMu.Lock()
	w.host.liar = true
	w.host.tpmMu.Unlock()
	check(t, w.o.ledger.Write(t.Context(), func(tx *ledger.Tx) error { return tx.PutHost("host-1", ledger.HostState{}) }))
	vm := w.create(api.CreateVM{Name: "a"})
	if got := w.waitPhase(vm.ID, reservation.Aborted); got.Reason != event.NoHost {
		t.Errorf("ended with %q: %s", got.Reason, got.Explanation)
	}
	if w.host.has(vm.ID) {
		t.Error("the host got the VM")
	}
}
