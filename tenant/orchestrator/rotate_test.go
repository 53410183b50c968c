package orchestrator

import (
	"encoding/json"
	"errors"
	"math"
	"net/http"
	"strings"
	"testing"
	"time"

	"foothold/internal/luks"
	"foothold/internal/secret"
	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
	"foothold/tenant/vault"
)

// rotation is a next version of "debian": the same system as another ciphertext.
func (w *world) rotation(mark string, change ...func(*api.RegisterTemplate)) (req api.RegisterTemplate, image []byte) {
	req, image = w.registration("debian")
	image = append([]byte(mark), image[len(mark):]...)
	req.SHA256, req.Rotate = digest.Of(image), true
	for _, f := range change {
		f(&req)
	}
	return req, image
}

// register hands a registration in; secrets print as nothing, so the key goes in by hand.
func (w *world) register(req api.RegisterTemplate) (view api.Template, p api.Problem, ok bool) {
	w.t.Helper()
	status, p := w.call("POST", "/v1/templates", must[[]byte](w.t)(json.Marshal(req)), &view)
	return view, p, status == http.StatusCreated
}

func (w *world) rotate(mark string) (api.Template, secret.Bytes) {
	w.t.Helper()
	req, image := w.rotation(mark)
	view, p, ok := w.register(req)
	if !ok {
		w.t.Fatalf("rotate: %+v", p)
	}
	if status, p := w.call("PUT", "/v1/templates/debian/image", image, nil); status != http.StatusOK {
		w.t.Fatalf("put image: %d %+v", status, p)
	}
	return view, req.VolumeKey
}

func (w *world) versions() map[int]api.Template {
	w.t.Helper()
	var list []api.Template
	w.call("GET", "/v1/templates", nil, &list)
	byVersion := map[int]api.Template{}
	for _, t := range list {
		byVersion[t.Version] = t
	}
	return byVersion
}

func (w *world) hostHas(sum digest.SHA256) bool {
	w.host.mu.Lock()
	defer w.host.mu.Unlock()
	_, ok := w.host.templates[sum]
	return ok
}

// TestRotation: a VM that runs keeps its version, its next start takes the new one with
// the volume's data, and then the old one is withdrawn: key, ciphertext and row.
func TestRotation(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	old := w.computing("web")
	first := w.versions()[1]
	oldPass, _ := old.passphrases()
	oldKey := must[secret.Bytes](t)(luks.Unlock(old.hand.Template.Header, oldPass))

	view, _ := w.rotate("two")
	if view.Version != 2 || view.State != api.TemplateCurrent {
		t.Errorf("rotated: %+v", view)
	}
	w.o.withdrawSuperseded(t.Context())
	if v := w.versions(); len(v) != 2 || v[1].State != api.TemplateSuperseded || v[1].VMs != 1 || v[2].VMs != 0 || !w.hostHas(first.SHA256) {
		t.Errorf("while a VM runs on it: %+v", v)
	}
	if _, why := old.say(old.withAudit); why != "" {
		t.Errorf("the running VM's audit is judged by the other version: %q", why)
	}
	if vm := w.vm("web"); vm.TemplateVersion != 1 || vm.NextVersion != 2 {
		t.Errorf("%+v", vm)
	}
	w.fits("with two versions")

	w.host.stop(old.id, event.VMStopped)
	w.waitPhase("web", reservation.Stopped)
	w.ask("start", "web")
	g := w.takeStart(old.id, 2)
	if g.vm.spec.Template != view.SHA256 || g.vm.spec.Volume != old.vm.spec.Volume {
		t.Errorf("the next start is of %+v", g.vm.spec)
	}
	g.pass()
	if g.hand.Volume.Format {
		t.Error("the volume is formatted again")
	}
	newPass, _ := g.passphrases()
	if key := must[secret.Bytes](t)(luks.Unlock(g.hand.Template.Header, newPass)); key.Equal(oldKey) {
		t.Error("the new version has the old one's key")
	}
	if vm := w.vm("web"); vm.TemplateVersion != 2 || vm.NextVersion != 0 {
		t.Errorf("%+v", vm)
	}
	w.o.withdrawSuperseded(t.Context())
	w.waitOneVersion()
	if v := w.versions(); len(v) != 1 || v[2].VMs != 1 || w.hostHas(first.SHA256) || !w.hostHas(view.SHA256) {
		t.Errorf("after its last start has ended: %+v", v)
	}
	if has, err := w.o.vault.Has(templateKeyName(ledger.Template{Name: "debian", Version: 1})); has || err != nil {
		t.Errorf("the old key is in the vault: %v", err)
	}
	if kinds := w.journal("template.withdrawn"); len(kinds) != 1 {
		t.Errorf("journalled %v", kinds)
	}
	w.fits("after the withdrawal")
}

// TestWithdrawalGoesOn: whatever stops a withdrawal - a host that is away, a crash after
// each step - it is finished later, and no start takes the version meanwhile.
func TestWithdrawalGoesOn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	first := w.versions()[1]
	w.rotate("two")
	const removal = "DELETE /v1/templates/{sum}"
	w.host.failing(removal, math.MaxInt) // until it is back: the sweep tries too
	w.o.withdrawSuperseded(t.Context())
	v := w.versions()
	if has, err := w.o.vault.Has(templateKeyName(ledger.Template{Name: "debian", Version: 1})); has || err != nil {
		t.Errorf("a host that is away keeps the key alive: %v", err)
	}
	if v[1].State != api.TemplateWithdrawn || !w.hostHas(first.SHA256) {
		t.Errorf("with its host away: %+v", v[1])
	}
	w.fits("in the middle of a withdrawal")
	if g := w.take(w.create(api.CreateVM{Name: "new"}).ID); g.vm.spec.Template == first.SHA256 {
		t.Error("a start takes what is being withdrawn")
	}
	w.host.failing(removal, 0)
	w.restart()
	w.o.withdrawSuperseded(t.Context())
	w.waitOneVersion()
	if w.hostHas(first.SHA256) {
		t.Error("after a restart its host has it still")
	}
}

// A version lies at no host until its image is there: VMs take the old one so long, and
// it is not withdrawn.
func TestRotationWithoutItsImage(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	first := w.versions()[1]
	req, image := w.rotation("two")
	if _, p, ok := w.register(req); !ok {
		t.Fatalf("%+v", p)
	}
	w.o.withdrawSuperseded(t.Context())
	if g := w.take(w.create(api.CreateVM{Name: "web"}).ID); g.vm.spec.Template != first.SHA256 {
		t.Errorf("a VM is of %s", g.vm.spec.Template)
	}
	// The same call again changes nothing, and the upload ends it.
	if view, p, ok := w.register(req); !ok || view.Version != 2 {
		t.Errorf("again: %+v %+v", view, p)
	}
	if status, p := w.call("PUT", "/v1/templates/debian/image", image, nil); status != http.StatusOK {
		t.Fatalf("put image: %d %+v", status, p)
	}
	if g := w.take(w.create(api.CreateVM{Name: "other"}).ID); g.vm.spec.Template != req.SHA256 {
		t.Errorf("a VM is of %s", g.vm.spec.Template)
	}
}

func TestRotationRefusals(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	req, _ := w.rotation("two")
	if _, p, ok := w.register(req); ok || p.Reason != event.UnknownTemplate {
		t.Errorf("nothing to rotate: %+v", p)
	}
	w.template("debian")
	first := w.versions()[1]
	req, _ = w.rotation("two", func(r *api.RegisterTemplate) { r.Rotate = false })
	if _, p, ok := w.register(req); ok || p.Reason != event.TemplateTaken {
		t.Errorf("another image, unasked: %+v", p)
	}
	w.create(api.CreateVM{Name: "web"})
	req, _ = w.rotation("two", func(r *api.RegisterTemplate) {
		e := guestExpectations()
		e.AuthenticatedVolume = true
		r.Audit = must[[]byte](t)(e.Encode())
	})
	if _, p, ok := w.register(req); ok || p.Reason != event.TemplateTaken || !strings.Contains(p.Detail, "volumes of the other kind") {
		t.Errorf("another kind of volume: %+v", p)
	}
	w.rotate("two")
	req, _ = w.registration("debian")
	req.Rotate, req.SHA256 = true, first.SHA256
	if _, p, ok := w.register(req); ok || p.Reason != event.TemplateTaken || !strings.Contains(p.Detail, "is version 1") {
		t.Errorf("back to an old image: %+v", p)
	}
	if v := w.versions(); len(v) != 2 {
		t.Errorf("%+v", v)
	}
}

// A version that was withdrawn does not come back: whoever kept its key could read it.
func TestWithdrawnStaysWithdrawn(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	old, _ := w.registration("debian")
	w.rotate("two")
	w.o.withdrawSuperseded(t.Context())
	w.waitOneVersion()
	old.Rotate = true
	if view, p, ok := w.register(old); ok || p.Reason != event.TemplateTaken {
		t.Errorf("it came back: %+v %+v", view, p)
	}
}

// The newest version is the one with the highest number, whatever date its maker gives it.
func TestNewestIsNotByDate(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	w.template("other")
	req, _ := w.rotation("two", func(r *api.RegisterTemplate) { r.Created = r.Created.AddDate(-1, 0, 0) })
	if view, p, ok := w.register(req); !ok || view.Version != 2 || view.State != api.TemplateCurrent {
		t.Errorf("%+v %+v", view, p)
	}
	if view, _ := w.rotate("three"); view.Version != 3 {
		t.Errorf("%+v", view)
	}
}

// A host that still has the old ciphertext, and lost the new, gives no start: its word is
// not taken for the other.
func TestVersionThatItsHostLost(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.template("debian")
	view, _ := w.rotate("two")
	w.host.mu.Lock()
	delete(w.host.templates, view.SHA256)
	w.host.mu.Unlock()
	w.create(api.CreateVM{Name: "web"})
	w.waitPhase("web", reservation.Aborted)
	check(t, w.o.vault.Destroy(templateKeyName(ledger.Template{Name: "debian", Version: 2})))
	w.create(api.CreateVM{Name: "other"})
	if vm := w.waitPhase("other", reservation.Aborted); vm.Reason != event.UnknownTemplate || !strings.Contains(vm.Explanation, "the vault has no key of template debian.2") {
		t.Errorf("without its key: %+v", vm)
	}
	if _, err := w.o.vault.Get(templateKeyName(ledger.Template{Name: "debian", Version: 2})); !errors.Is(err, vault.ErrAbsent) {
		t.Error(err)
	}
}

// waitOneVersion waits for a withdrawal, which the sweep may be at.
func (w *world) waitOneVersion() {
	w.t.Helper()
	for end := time.Now().Add(20 * time.Second); len(w.versions()) != 1; pause(w.t.Context(), 10*time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatalf("%+v", w.versions())
		}
	}
}
