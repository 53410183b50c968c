package orchestrator

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/platform"
	"foothold/tenant/reservation"
)

func (w *world) release(change func(*platform.Manifest)) platform.Manifest {
	now := time.Now()
	doc := platform.Manifest{Name: "release-2", Profile: platform.Lab, ValidFrom: now.Add(24 * time.Hour), ValidUntil: now.Add(48 * time.Hour),
		Files: slices.Clone(w.host.files), Firmware: w.host.firmware}
	change(&doc)
	return doc
}

func tryBody(t *testing.T, doc platform.Manifest) []byte {
	return must[[]byte](t)(json.Marshal(api.TryPlatform{Manifest: must[[]byte](t)(json.Marshal(doc))}))
}

// try tries reference values; it fails the test unless they are tried.
func (w *world) try(doc platform.Manifest, host string) (list []api.Judged) {
	w.t.Helper()
	path := "/v1/platform/try"
	if host != "" {
		path += "?host=" + host
	}
	if status, p := w.call("POST", path, tryBody(w.t, doc), &list); status != 200 {
		w.t.Fatalf("try: %d %+v", status, p)
	}
	return list
}

func (w *world) hostPlatform() (j api.Judged) {
	w.t.Helper()
	if status, p := w.call("GET", "/v1/hosts/host-1/platform", nil, &j); status != 200 {
		w.t.Fatalf("host platform: %d %+v", status, p)
	}
	return j
}

// TestPlatformIsTriedBeforeItCounts: other reference values are held against what the host
// answers now and what its VM's quote proved, and nothing comes of it.
func TestPlatformIsTriedBeforeItCounts(t *testing.T) {
	w := newWorld(t)
	w.template("debian")
	if list := w.try(w.release(func(*platform.Manifest) {}), ""); len(list) != 1 || !list[0].Accepted || list[0].Evidence != api.EvidenceAsked {
		t.Errorf("a host without a VM: %+v", list)
	}
	w.computing("web")
	subjects := func(list []api.Judged) (out []string) {
		for _, j := range list {
			if j.Host != "host-1" || j.Release != "release-1" || j.By != "release-2" || j.At.IsZero() || j.Problem != "" {
				t.Errorf("%+v", j)
			}
			out = append(out, strings.TrimSpace(j.Evidence+" "+j.VM+" "+j.Role))
		}
		return out
	}
	list := w.try(w.release(func(*platform.Manifest) {}), "")
	if got := subjects(list); !slices.Equal(got, []string{"asked", "stored web connect"}) || !list[0].Accepted || !list[1].Accepted {
		t.Errorf("the same files: %+v", list)
	}
	list = w.try(w.release(func(d *platform.Manifest) { d.Files[1].SHA256 = digest.Of([]byte("another qemu")) }), "host-1")
	if got := subjects(list); !slices.Equal(got, []string{"asked", "stored web connect"}) {
		t.Errorf("judged %v", got)
	}
	for _, j := range list {
		if j.Accepted || !slices.ContainsFunc(j.Findings, func(f event.FailedCheck) bool { return f.Check == "log" && strings.Contains(f.Detail, `"qemu"`) }) {
			t.Errorf("another QEMU: %+v", j)
		}
	}
	if vm := w.vm("web"); vm.Phase != "computing" {
		t.Errorf("the VM is %s since", vm.Phase)
	}
	var hosts []api.Host
	if w.call("GET", "/v1/hosts", nil, &hosts); hosts[0].Standing != "good" {
		t.Errorf("the host's standing: %s", hosts[0].Standing)
	}
	if tried := w.journal("platform.tried"); len(tried) != 3 || tried[2].Detail["not_accepted"] != "2" {
		t.Errorf("journalled %+v", tried)
	}
	// A host that is away is judged by what it proved last.
	w.host.failing("POST /v1/quote", 1)
	if list := w.try(w.release(func(*platform.Manifest) {}), ""); len(list) != 2 || list[0].Problem == "" || list[0].Accepted || !list[1].Accepted {
		t.Errorf("a host that does not answer: %+v", list)
	}
	for name, c := range map[string]struct {
		path   string
		change func(*platform.Manifest)
		reason event.Reason
	}{
		"another profile":  {"", func(d *platform.Manifest) { d.Profile = platform.Production }, event.BadRequest},
		"no files":         {"", func(d *platform.Manifest) { d.Files = nil }, event.BadRequest},
		"an unknown host":  {"?host=host-9", func(*platform.Manifest) {}, event.NoHost},
		"an unknown query": {"?enforce=true", func(*platform.Manifest) {}, event.BadRequest},
	} {
		in := tryBody(t, w.release(c.change))
		if status, p := w.call("POST", "/v1/platform/try"+c.path, in, nil); status < 400 || p.Reason != c.reason {
			t.Errorf("%s: %d %+v", name, status, p)
		}
	}
}

// TestWhatAHostMeasures says so in the words of the reference values, and by the last proof
// where the host gives no new one.
func TestWhatAHostMeasures(t *testing.T) {
	w := newWorld(t)
	w.template("debian")
	if j := w.hostPlatform(); !j.Accepted || j.By != "release-1" || j.Evidence != api.EvidenceAsked {
		t.Errorf("as the release is: %+v", j)
	}
	w.host.failing("POST /v1/quote", 1)
	if j := w.hostPlatform(); j.Accepted || j.Problem == "" {
		t.Errorf("no answer and nothing stored: %+v", j)
	}
	w.computing("web")
	w.host.failing("POST /v1/quote", 1)
	if j := w.hostPlatform(); !j.Accepted || j.Problem == "" || j.Evidence != api.EvidenceStored || j.VM != "web" {
		t.Errorf("no answer, and one stored: %+v", j)
	}
	w.host.measureRogue()
	j := w.hostPlatform()
	if j.Accepted || !slices.ContainsFunc(j.Findings, func(f event.FailedCheck) bool { return strings.Contains(f.Detail, "rogue") }) {
		t.Errorf("with another file: %+v", j)
	}
	var p evidence.Platform
	if status, _ := w.call("GET", "/v1/hosts/host-1/evidence", nil, &p); status != 200 || len(p.Log) != len(w.host.files)+1 {
		t.Errorf("evidence: %d, %d events", status, len(p.Log))
	}
	for _, path := range []string{"platform", "evidence"} {
		if status, p := w.call("GET", "/v1/hosts/host-9/"+path, nil, nil); status != 409 || p.Reason != event.NoHost {
			t.Errorf("%s of an unknown host: %d %+v", path, status, p)
		}
	}
}

// TestNoVMWhereNoneMayBe: a host outside its policy is not chosen, and says why.
func TestNoVMWhereNoneMayBe(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.HostPolicy.Default.Locations = []string{"elsewhere"} })
	w.template("debian")
	w.create(api.CreateVM{Name: "web"})
	vm := w.waitPhase("web", reservation.Aborted)
	if vm.Reason != event.NoHost || w.host.has(vm.ID) {
		t.Errorf("ended with %q (%s); the host has it: %v", vm.Reason, vm.Explanation, w.host.has(vm.ID))
	}
	j := w.hostPlatform()
	if j.Accepted || len(j.Findings) != 1 || j.Findings[0].Check != "policy" || j.Findings[0].Component != "location" {
		t.Errorf("the host's diff: %+v", j)
	}
}
