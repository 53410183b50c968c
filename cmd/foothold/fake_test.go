package main

import (
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"foothold/internal/strictjson"
	"foothold/protocol/api"
	"foothold/protocol/bootmsg"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/platform"
	"foothold/protocol/zone"
	"foothold/tenant/verify"
)

// fakeAPI is an orchestrator that takes a VM one phase further each time it is asked
// for. The VM's name decides what becomes of it: "taken" exists, "doomed" fails its
// quote, "stuck" stays in booting, the workload of "brief" has
// ended when it is looked at, the host of "undead" does not let go of it, nor that of "held" when
// it is stopped; then it does not start again either.
type fakeAPI struct {
	mu        sync.Mutex
	vms       map[string]*fakeVM       // by name; mu
	objects   map[digest.SHA256]int64  // mu
	templates map[string]*api.Template // mu
	images    map[string]digest.SHA256 // mu
	imported  int                      // mu; inventories beside the first
	withdrawn string                   // mu; why the reference values are
}

type fakeVM struct {
	api.VM
	step int
}

var fakePhases = []string{"reserved", "booting", "unlocking", "connecting", "computing"}

func newFakeAPI() http.Handler {
	f := &fakeAPI{vms: map[string]*fakeVM{}, objects: map[digest.SHA256]int64{},
		templates: map[string]*api.Template{}, images: map[string]digest.SHA256{}}
	mux := http.NewServeMux()
	for pattern, h := range map[string]func(*http.Request) (any, *api.Problem){
		"POST /v1/vms":                    f.create,
		"GET /v1/vms":                     f.list,
		"GET /v1/vms/{name}":              f.get,
		"DELETE /v1/vms/{name}":           f.remove,
		"POST /v1/vms/{name}/stop":        f.stop,
		"POST /v1/vms/{name}/start":       f.start,
		"POST /v1/vms/{name}/restart":     f.start,
		"PUT /v1/vms/{name}/workload":     f.setWorkload,
		"GET /v1/vms/{name}/explain":      f.explain,
		"GET /v1/vms/{name}/rules":        f.rules,
		"PUT /v1/objects/{sha256}":        f.putObject,
		"GET /v1/templates":               f.listTemplates,
		"POST /v1/templates":              f.register,
		"PUT /v1/templates/{n}/image":     f.putImage,
		"DELETE /v1/templates/{n}":        f.deleteTemplate,
		"GET /v1/hosts":                   f.hosts,
		"POST /v1/hosts/{n}/readmit":      f.readmit,
		"GET /v1/platforms":               f.platforms,
		"POST /v1/platforms":              f.importPlatform,
		"POST /v1/platforms/{s}/withdraw": f.withdrawPlatform,
		"GET /v1/inventories":             f.inventories,
		"POST /v1/inventories":            f.importInventory,
		"GET /v1/inventories/{v}":         f.inventory,
		"GET /v1/hosts/{n}/platform":      f.hostPlatform,
		"GET /v1/hosts/{n}/evidence":      f.hostEvidence,
		"POST /v1/platform/try":           f.tryPlatform,
		"GET /v1/status":                  f.status,
		"GET /v1/fsck":                    f.fsck,
		"POST /v1/vms/{name}/attest":      f.attest,
		"GET /v1/vms/{name}/evidence":     f.evidence,
	} {
		mux.HandleFunc(pattern, f.handle(h))
	}
	mux.HandleFunc("GET /v1/vms/{name}/console", func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "booting\x1b]0;owned\x07\nlogin: none\n")
	})
	mux.HandleFunc("GET /v1/events", f.events)
	mux.HandleFunc("GET /v1/vms/{name}/evidence/{digest}", func(w http.ResponseWriter, r *http.Request) {
		for _, b := range keptBundles() {
			if b.Digest.String() == r.PathValue("digest") {
				w.Write(b.data)
			}
		}
	})
	return mux
}

func (f *fakeAPI) handle(h func(*http.Request) (any, *api.Problem)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		v, p := h(r)
		f.mu.Unlock()
		w.Header().Set("Content-Type", "application/json")
		if p != nil {
			w.WriteHeader(http.StatusConflict)
			json.NewEncoder(w).Encode(p)
			return
		}
		json.NewEncoder(w).Encode(v)
	}
}

func refuse(reason event.Reason, detail, next string) *api.Problem {
	return &api.Problem{Reason: reason, Detail: detail, Next: next}
}

func (f *fakeAPI) create(r *http.Request) (any, *api.Problem) {
	var req api.CreateVM
	if err := strictjson.Read(r.Body, 1<<20, &req); err != nil {
		return nil, refuse(event.BadRequest, err.Error(), "")
	}
	if req.Name == "taken" {
		return nil, refuse(event.NameTaken, "a VM named taken exists", "choose another name, or foothold vm delete taken")
	}
	if w := req.Workload; w != nil {
		if size, ok := f.objects[w.SHA256]; !ok || size != w.Size {
			return nil, refuse(event.UnknownWorkload, "not in the store", "")
		}
	}
	vm := &fakeVM{VM: api.VM{Name: req.Name, ID: "id-" + req.Name, Start: 1, Template: "debian", Size: "small",
		Measured: true, Created: time.Now()}}
	f.vms[req.Name] = vm
	vm.advance()
	return vm.VM, nil
}

// advance takes the VM one step on: each phase is seen running once, then ended.
func (vm *fakeVM) advance() {
	now := time.Now()
	if vm.Ready || vm.Phase == "aborted" || vm.Phase == "stopped" || vm.Name == "stuck" && vm.Phase == "booting" {
		return
	}
	if n := len(vm.Phases); n > 0 {
		p := &vm.Phases[n-1]
		p.End, p.Seconds = now, now.Sub(p.Start).Seconds()
	}
	if vm.Name == "doomed" && vm.Phase == "booting" {
		vm.Phase, vm.Reason = "aborted", event.QuoteRefused
		vm.Explanation = "the host runs a QEMU that is not in the reference values"
		return
	}
	if vm.step == len(fakePhases) && vm.Name == "brief" {
		vm.Reason, vm.Explanation = event.WorkloadFailed, "its workload has ended"
		return
	}
	if vm.step == len(fakePhases) {
		vm.Ready, vm.TunnelAddress = true, netip.MustParseAddr("10.84.0.2")
		vm.WorkloadURL = "http://10.84.0.2:8080/"
		vm.Components = []bootmsg.Component{{Name: "kernel", SHA256: digest.Of([]byte("kernel")), Size: 6}}
		return
	}
	vm.Phase = fakePhases[vm.step]
	vm.step++
	vm.Phases = append(vm.Phases, api.Phase{Name: vm.Phase, Start: now})
}

func (f *fakeAPI) find(r *http.Request) (*fakeVM, *api.Problem) {
	name := r.PathValue("name")
	for _, vm := range f.vms {
		if vm.Name == name || vm.ID == name {
			return vm, nil
		}
	}
	return nil, refuse(event.UnknownVM, "there is no VM "+name, "foothold vm list")
}

func (f *fakeAPI) stop(r *http.Request) (any, *api.Problem) {
	vm, p := f.find(r)
	if p != nil {
		return nil, p
	}
	vm.Phase, vm.Ready, vm.Reason, vm.Explanation = "stopped", false, event.StopAsked, "an operator asked it to stop"
	vm.step = len(fakePhases) + 1
	if vm.Name == "held" {
		vm.Cleanup = api.CleanupPending
	}
	return vm.VM, nil
}

// start begins the next start of a VM that is stopped or was asked to restart.
func (f *fakeAPI) start(r *http.Request) (any, *api.Problem) {
	vm, p := f.find(r)
	if p != nil {
		return nil, p
	}
	if vm.Name == "held" && vm.Phase == "stopped" {
		vm.NextStart = time.Now()
		return vm.VM, nil
	}
	vm.Start, vm.Ready, vm.Reason, vm.Explanation = vm.Start+1, false, "", ""
	vm.Phases, vm.step = nil, 1
	vm.Phase = fakePhases[1]
	return vm.VM, nil
}

func (f *fakeAPI) setWorkload(r *http.Request) (any, *api.Problem) {
	vm, p := f.find(r)
	if p != nil {
		return nil, p
	}
	var w api.Workload
	if err := strictjson.Read(r.Body, 1<<20, &w); err != nil {
		return nil, refuse(event.BadRequest, err.Error(), "")
	}
	if size, ok := f.objects[w.SHA256]; !ok || size != w.Size {
		return nil, refuse(event.UnknownWorkload, "not in the store", "")
	}
	vm.Workload = &w
	return vm.VM, nil
}

func (f *fakeAPI) list(*http.Request) (any, *api.Problem) {
	var list []api.VM // nil when empty: the client must cope with null
	for _, vm := range f.vms {
		list = append(list, vm.VM)
	}
	return list, nil
}

func (f *fakeAPI) get(r *http.Request) (any, *api.Problem) {
	vm, p := f.find(r)
	if p != nil {
		return nil, p
	}
	vm.advance()
	return vm.VM, nil
}

func (f *fakeAPI) remove(r *http.Request) (any, *api.Problem) {
	vm, p := f.find(r)
	if p != nil {
		return nil, p
	}
	delete(f.vms, vm.Name)
	vm.Phase, vm.Ready, vm.Reason, vm.Cleanup = "released", false, event.Released, api.CleanupDone
	if vm.Name == "undead" {
		vm.Cleanup = api.CleanupPending
	}
	return vm.VM, nil
}

func (f *fakeAPI) explain(r *http.Request) (any, *api.Problem) {
	vm, p := f.find(r)
	if p != nil {
		return nil, p
	}
	if vm.Name == "held" {
		return api.Explanation{Name: vm.Name, Phase: vm.Phase, Reason: vm.Reason, Awaited: "the host to \x1b[2Jconfirm that its last instance is gone"}, nil
	}
	return api.Explanation{Name: vm.Name, Phase: vm.Phase, Reason: vm.Reason, What: "a \x1b[31mmeasured file differs",
		Until: time.Now().Add(time.Minute), Awaited: "the quote", Findings: []event.FailedCheck{{Check: "registers", Component: "PCR 10", Expected: "what the log leads to", Seen: "another value", Do: "compare the logs", Detail: "replay differs"}}, Next: "foothold host list"}, nil
}

// kept is a bundle of package verify's test data.
type kept struct {
	api.Verdict
	data []byte
}

// keptBundles are a start's, of which the last is a refusal.
func keptBundles() (list []kept) {
	dir := filepath.Join("..", "..", "tenant", "verify", "testdata", "bundles")
	var chain verify.Chain
	data, err := os.ReadFile(filepath.Join(dir, "chain.json"))
	if err == nil {
		err = json.Unmarshal(data, &chain)
	}
	if err != nil {
		panic(err)
	}
	files, _ := filepath.Glob(filepath.Join(dir, "[0-9]*.json"))
	for i, l := range chain.Links {
		data, err := os.ReadFile(files[i])
		if err != nil {
			panic(err)
		}
		list = append(list, kept{api.Verdict{Role: l.Role, Host: l.Host, At: l.At, Accepted: l.Accepted, Previous: l.Previous, Record: l.Record, Digest: l.Digest(), Kept: l.Role != "connect"}, data})
	}
	return list
}

func (f *fakeAPI) evidence(r *http.Request) (any, *api.Problem) {
	if _, p := f.find(r); p != nil {
		return nil, p
	}
	e := api.Evidence{Name: r.PathValue("name"), ID: "0b6c2f4e-5a7d-4c1b-9e57-3d2a8f60c911", Start: 1}
	for _, b := range keptBundles() {
		e.Verdicts = append(e.Verdicts, b.Verdict)
	}
	return e, nil
}

func (f *fakeAPI) attest(r *http.Request) (any, *api.Problem) {
	vm, p := f.find(r)
	if p != nil {
		return nil, p
	}
	if vm.Name == "doomed" {
		return nil, &api.Problem{Reason: event.QuoteRefused, Detail: "the watch quote does not prove what it must", Next: "read the findings", Findings: []event.FailedCheck{
			{Check: "log", Component: "file \"/usr/bin/qemu\"", Expected: "aa", Seen: "bb", Do: "compare", Detail: "it differs"},
			{Check: "clock", Component: "the TPM's counters", Expected: "1", Seen: "2", Do: "find out", Detail: "they differ"}}}
	}
	return keptBundles()[3].Verdict, nil
}

func (f *fakeAPI) rules(r *http.Request) (any, *api.Problem) {
	if _, p := f.find(r); p != nil {
		return nil, p
	}
	return []zone.Live{{ID: "x", Rule: "10.82.0.10 02:00:00:00:00:01 → 10.81.0.10 tcp 443", Remaining: 40 * time.Second, Packets: 7}}, nil
}

func (f *fakeAPI) putObject(r *http.Request) (any, *api.Problem) {
	h := sha256.New()
	n, _ := io.Copy(h, r.Body)
	got := digest.SHA256(h.Sum(nil))
	if got.String() != r.PathValue("sha256") || n != r.ContentLength {
		return nil, refuse(event.DigestMismatch, "the bytes are others", "")
	}
	f.objects[got] = n
	return struct{}{}, nil
}

func (f *fakeAPI) listTemplates(*http.Request) (any, *api.Problem) {
	list := []api.Template{}
	for _, t := range f.templates {
		list = append(list, *t)
	}
	return list, nil
}

func (f *fakeAPI) register(r *http.Request) (any, *api.Problem) {
	var req api.RegisterTemplate
	if err := strictjson.Read(r.Body, 4<<20, &req); err != nil {
		return nil, refuse(event.BadRequest, err.Error(), "")
	}
	t := &api.Template{Name: req.Name, Version: 1, State: api.TemplateCurrent, SHA256: req.SHA256, Size: req.Size, Created: req.Created}
	f.templates[req.Name] = t
	return t, nil
}

func (f *fakeAPI) putImage(r *http.Request) (any, *api.Problem) {
	h := sha256.New()
	io.Copy(h, r.Body)
	t, ok := f.templates[r.PathValue("n")]
	if !ok || digest.SHA256(h.Sum(nil)) != t.SHA256 {
		return nil, refuse(event.DigestMismatch, "the image is another", "")
	}
	t.Hosts = []string{"alpha"}
	return struct{}{}, nil
}

func (f *fakeAPI) deleteTemplate(r *http.Request) (any, *api.Problem) {
	if _, ok := f.templates[r.PathValue("n")]; !ok {
		return nil, refuse(event.UnknownTemplate, "there is no such template", "foothold template list")
	}
	delete(f.templates, r.PathValue("n"))
	return struct{}{}, nil
}

func (f *fakeAPI) hosts(*http.Request) (any, *api.Problem) {
	return []api.Host{{Name: "alpha", API: netip.MustParseAddrPort("10.83.0.10:8443"), Location: "hall 1, rack 7",
		Asset: "A-17", Software: "lab", Standing: "good", VMs: len(f.vms)}}, nil
}

// alpha's agent is another one than the reference values name; beta does not answer.
func (f *fakeAPI) judge(host, by string) api.Judged {
	j := api.Judged{Host: host, Release: "2026-11", By: by, Evidence: api.EvidenceAsked, At: time.Now(), Findings: []event.FailedCheck{}}
	switch host {
	case "alpha":
		j.Findings = []event.FailedCheck{{Check: "log", Detail: "x", Component: "file \"/usr/bin/\x1b[2Jagent\"", Expected: "1111", Seen: "2222", Do: "sign others"},
			{Check: "clock", Component: "the counters", Detail: "the clock went back"}}
	case "beta":
		j.Problem = "host-unreachable: host beta"
	default:
		j.Accepted = true
	}
	return j
}

func (f *fakeAPI) hostPlatform(r *http.Request) (any, *api.Problem) {
	if host := r.PathValue("n"); host != "delta" {
		return f.judge(host, "2026-11"), nil
	}
	return nil, refuse(event.NoHost, "host delta is not in the inventory", "foothold host list")
}

func (f *fakeAPI) hostEvidence(*http.Request) (any, *api.Problem) {
	return evidence.Platform{Firmware: []byte("firmware"), Kernel: []byte("kernel")}, nil
}

func (f *fakeAPI) tryPlatform(r *http.Request) (any, *api.Problem) {
	var in api.TryPlatform
	var doc platform.Manifest
	if strictjson.Read(r.Body, 1<<20, &in) != nil || strictjson.Unmarshal(in.Manifest, &doc) != nil {
		return nil, refuse(event.BadRequest, "no manifest", "")
	}
	if host := r.URL.Query().Get("host"); host != "" {
		return []api.Judged{f.judge(host, doc.Name)}, nil
	}
	stored := f.judge("alpha", doc.Name)
	stored.Evidence, stored.VM, stored.Role = api.EvidenceStored, "web", "watch"
	return []api.Judged{f.judge("alpha", doc.Name), stored, f.judge("beta", doc.Name), f.judge("gamma", doc.Name)}, nil
}

func (f *fakeAPI) readmit(r *http.Request) (any, *api.Problem) {
	if r.PathValue("n") != "alpha" {
		return nil, refuse(event.NoHost, "it is not in the inventory", "")
	}
	return api.Host{Name: "alpha", Standing: "good"}, nil
}

// fakePlatform counts until it is withdrawn.
func (f *fakeAPI) fakePlatform() api.Platform {
	p := api.Platform{SHA256: digest.Of([]byte("values")), Release: "2026-11", Profile: "lab", ValidFrom: time.Now().Add(-time.Hour),
		ValidUntil: time.Now().Add(time.Hour), Counts: f.withdrawn == "", VMs: 1, Why: f.withdrawn}
	if f.withdrawn != "" {
		p.Withdrawn, p.WithdrawnBy = time.Now(), "operator/alice"
	}
	return p
}

func (f *fakeAPI) platforms(*http.Request) (any, *api.Problem) {
	return []api.Platform{f.fakePlatform()}, nil
}

func (f *fakeAPI) importPlatform(r *http.Request) (any, *api.Problem) {
	var in api.ImportDocument
	if err := strictjson.Read(r.Body, 1<<20, &in); err != nil {
		return nil, refuse(event.BadRequest, err.Error(), "")
	}
	if string(in.Document) != "values\n" {
		return nil, refuse(event.DocumentRefused, "reference values: signature does not verify", "compare")
	}
	return f.fakePlatform(), nil
}

func (f *fakeAPI) withdrawPlatform(r *http.Request) (any, *api.Problem) {
	var in api.WithdrawPlatform
	if err := strictjson.Read(r.Body, 1<<20, &in); err != nil || in.Why == "" {
		return nil, refuse(event.BadRequest, "why", "")
	}
	if r.PathValue("s") != digest.Of([]byte("values")).String() {
		return nil, refuse(event.UnknownDocument, "they were not imported", "")
	}
	f.withdrawn = in.Why
	p := f.fakePlatform()
	p.Alerts = []api.Alert{{VM: "web", Host: "alpha", Reason: event.ValuesWithdrawn, Detail: "reference values", Action: api.ActionNone}}
	return p, nil
}

// fakeInventory is version 1, and version 2 once it was imported.
func (f *fakeAPI) fakeInventory(version int) api.Inventory {
	inv := api.Inventory{Version: version, SHA256: digest.Of([]byte{byte(version)}), Provider: "hall", Expires: time.Now().Add(time.Hour),
		Imported: time.Now(), ImportedBy: "configuration", Current: version == 1+f.imported, HostCount: 1,
		Hosts: []api.HostEntry{{Name: "alpha", API: netip.MustParseAddrPort("10.83.0.10:8443"), Software: "2026-11", Keys: api.KeysValidated}}}
	if version == 2 {
		inv.HostCount = 2
		inv.Hosts = append(inv.Hosts, api.HostEntry{Name: "beta", Keys: api.KeysFailed, Reason: "its TPM \x1b[2Jdoes not hold the key"})
	}
	return inv
}

func (f *fakeAPI) inventories(*http.Request) (any, *api.Problem) {
	list := []api.Inventory{}
	for v := 1 + f.imported; v > 0; v-- {
		list = append(list, f.fakeInventory(v))
	}
	return list, nil
}

func (f *fakeAPI) inventory(r *http.Request) (any, *api.Problem) {
	version, _ := strconv.Atoi(r.PathValue("v"))
	if version > 1+f.imported {
		return nil, refuse(event.UnknownDocument, "it was not imported", "")
	}
	if version == 0 {
		version = 1 + f.imported
	}
	return f.fakeInventory(version), nil
}

// importInventory takes whatever says so.
func (f *fakeAPI) importInventory(r *http.Request) (any, *api.Problem) {
	var in api.ImportDocument
	if err := strictjson.Read(r.Body, 1<<20, &in); err != nil {
		return nil, refuse(event.BadRequest, err.Error(), "")
	}
	if in.SHA256 != nil && *in.SHA256 != digest.Of(in.Document) {
		return nil, refuse(event.DigestMismatch, "published is another", "")
	}
	if string(in.Document) != "version 2\n" {
		return nil, refuse(event.DocumentRefused, "inventory: signature does not verify", "compare")
	}
	f.imported = 1
	return api.InventoryImport{Inventory: f.fakeInventory(2), Before: 1, Changes: []api.HostChange{{Host: "beta", What: "new"}},
		Alerts: []api.Alert{{VM: "web", Host: "gamma", Reason: event.HostLost, Detail: "it is not in the inventory", Action: "closed"}}}, nil
}

func (f *fakeAPI) status(*http.Request) (any, *api.Problem) {
	return api.Status{Version: "v0", Profile: "lab", Epoch: 1, VMs: len(f.vms),
		Zones:    []api.ZoneState{{Zone: zone.External, Wanted: 4, Live: 3, Seen: time.Now()}},
		Refusals: []api.Refusals{{Source: "orchestrator", Kind: "token.rejected", Reason: event.TokenSpent, Count: 2}}}, nil
}

// fsck finds what does not fit as soon as there is a VM.
func (f *fakeAPI) fsck(*http.Request) (any, *api.Problem) {
	out := api.Fsck{Clean: len(f.vms) == 0, Time: time.Now(), Looked: api.Looked{VMs: len(f.vms), Hosts: 1, Rules: 12, Entries: 1},
		Motion: []api.Finding{{Code: "zone-behind", Thing: "zone external", Found: "revision 3 is live", Until: time.Now().Add(time.Second)}},
		Notes:  []api.Finding{{Code: "object-unused", Thing: "object x", Found: "nothing does"}}}
	for name := range f.vms {
		out.Findings = append(out.Findings, api.Finding{Code: "vm-missing", Thing: "VM " + name, Expected: "start 1 runs",
			Found: "the host does \x1b[2Jnot list it", Next: "foothold vm restart " + name})
	}
	return out, nil
}

// events holds two entries and answers them one at a time; when following, two more.
func (f *fakeAPI) events(w http.ResponseWriter, r *http.Request) {
	entry := func(seq int64) api.JournalEntry {
		return api.JournalEntry{Seq: seq, VM: r.URL.Query().Get("vm"), Event: event.Event{Seq: seq, Time: time.Now(),
			Source: "orchestrator/main", Kind: "vm.reserved", Detail: map[string]string{"address": "10.82.0.10"}}}
	}
	if r.URL.Query().Get("follow") != "true" {
		page := []api.JournalEntry{}
		if after, _ := strconv.ParseInt(r.URL.Query().Get("after"), 10, 64); after < 2 {
			page = append(page, entry(after+1))
		}
		json.NewEncoder(w).Encode(page)
		return
	}
	for seq := int64(1); seq <= 4; seq++ {
		line, _ := json.Marshal(entry(seq))
		fmt.Fprintf(w, "%s\n\n", line)
		w.(http.Flusher).Flush()
	}
}
