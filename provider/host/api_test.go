package host

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/internal/mtls"
	"foothold/internal/tpm"
	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/hostapi"
	"foothold/protocol/inventory"
	"foothold/protocol/pcr"
	"foothold/protocol/signed"
	"foothold/protocol/token"
	"foothold/provider/broker"
	"foothold/provider/enroll"

	"github.com/google/go-tpm/tpm2"
)

func TestCreateIsIdempotentAndBound(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	c := w.client("acme-orchestrator")
	req := request("web", 1)
	c.refused("POST", "/v1/vms", req, "unknown-template")
	c.putTemplate()
	var vm, again hostapi.VM
	c.ok("POST", "/v1/vms", req, &vm)
	if vm.State != hostapi.Created || vm.Settings != req.Spec.Digest() || vm.Firmware.LoaderKernel != digest.Of([]byte("this is kernel")) {
		t.Errorf("created %+v", vm)
	}
	c.ok("POST", "/v1/vms", req, &again)
	if again.Created != vm.Created {
		t.Error("a repeated creation made another VM")
	}
	other := req
	other.Spec.MemoryMiB = 512
	c.refused("POST", "/v1/vms", other, "bad-request")
	c.refused("POST", "/v1/vms", request("web", 2), "in-use")
	twin := request("twin", 1)
	twin.Spec.Network.MAC = req.Spec.Network.MAC
	c.refused("POST", "/v1/vms", twin, "in-use")
	path := "/v1/vms/" + req.Spec.Reservation
	var list []hostapi.VM
	c.ok("GET", "/v1/vms", nil, &list)
	if len(list) != 1 || list[0].ID != req.Spec.Reservation {
		t.Errorf("list %+v", list)
	}
	c.refused("DELETE", "/v1/volumes/"+req.Spec.Volume.ID, nil, "in-use")
	c.refused("DELETE", "/v1/templates/"+req.Spec.Template.String(), nil, "in-use")
	c.ok("DELETE", path, nil, nil)
	c.ok("DELETE", path, nil, nil)
	c.refused("GET", path, nil, "unknown-vm")
	c.ok("DELETE", "/v1/volumes/"+req.Spec.Volume.ID, nil, nil)
	c.ok("DELETE", "/v1/templates/"+req.Spec.Template.String(), nil, nil)
	c.refused("POST", "/v1/vms", req, "unknown-template")
}

func TestCreateRefuses(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	c := w.client("acme-orchestrator")
	c.putTemplate()
	for name, try := range map[string]struct {
		change func(*hostapi.CreateRequest)
		reason string
	}{
		"another tenant":      {func(r *hostapi.CreateRequest) { r.Spec.Tenant = "other" }, "not-permitted"},
		"bad settings":        {func(r *hostapi.CreateRequest) { r.Spec.VCPUs = 0 }, "bad-request"},
		"injected MAC":        {func(r *hostapi.CreateRequest) { r.Spec.Network.MAC = "02:f0:00:00:00:01,romfile=/x" }, "bad-request"},
		"another T1":          {func(r *hostapi.CreateRequest) { r.Token = token.New(token.T1) }, "bad-request"},
		"T2 for T1":           {func(r *hostapi.CreateRequest) { r.Token = token.New(token.T2); r.Spec.TokenDigest = r.Token.Digest() }, "bad-request"},
		"no token":            {func(r *hostapi.CreateRequest) { r.Token = token.Token{} }, "bad-request"},
		"unknown template":    {func(r *hostapi.CreateRequest) { r.Spec.Template = digest.Of(nil) }, "unknown-template"},
		"path as id":          {func(r *hostapi.CreateRequest) { r.Spec.Volume.ID = "../../etc/passwd" }, "bad-request"},
		"path as reservation": {func(r *hostapi.CreateRequest) { r.Spec.Reservation = "../x" }, "bad-request"},
	} {
		req := request("web", 1)
		try.change(&req)
		status, data := c.call("POST", "/v1/vms", req)
		if status < 400 || !strings.Contains(string(data), try.reason) {
			t.Errorf("%s: %d %s", name, status, data)
		}
		if text := req.Token.Reveal(); text != "" && strings.Contains(string(data), text) {
			t.Errorf("%s: the refusal tells the token", name)
		}
	}
	c.refused("POST", "/v1/vms", `{"spec":{},"token":"","more":1}`, "bad-request")
	c.refused("POST", "/v1/vms", `{"spec":`+strings.Repeat(" ", hostapi.MaxMessage)+`{}}`, "bad-request")
	resized := request("web", 1)
	c.ok("POST", "/v1/vms", resized, nil)
	c.ok("DELETE", "/v1/vms/"+resized.Spec.Reservation, nil, nil)
	resized.Spec.Volume.SizeMiB = 128
	c.refused("POST", "/v1/vms", resized, "bad-request")
}

func TestTenantsDoNotSeeEachOther(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	acme, other := w.client("acme-orchestrator"), w.client("other-orchestrator")
	acme.putTemplate()
	req := request("web", 1)
	acme.ok("POST", "/v1/vms", req, nil)
	path := "/v1/vms/" + req.Spec.Reservation
	for _, call := range [][2]string{{"GET", path}, {"GET", path + "/console"}, {"POST", path + "/start"}} {
		other.refused(call[0], call[1], nil, "unknown-vm")
	}
	other.ok("DELETE", path, nil, nil) // absent, as far as it can see
	other.ok("DELETE", "/v1/volumes/"+req.Spec.Volume.ID, nil, nil)
	other.ok("DELETE", "/v1/templates/"+req.Spec.Template.String(), nil, nil)
	var vms []hostapi.VM
	var templates []hostapi.Template
	var volumes []hostapi.Volume
	other.ok("GET", "/v1/vms", nil, &vms)
	other.ok("GET", "/v1/templates", nil, &templates)
	other.ok("GET", "/v1/volumes", nil, &volumes)
	if len(vms) != 0 || len(templates) != 0 || len(volumes) != 0 {
		t.Errorf("the other tenant sees %v, %v, %v", vms, templates, volumes)
	}
	theirs := request("web", 1)
	theirs.Spec.Tenant = "other"
	other.refused("POST", "/v1/vms", theirs, "not-permitted")
	acme.ok("GET", path, nil, nil)
	acme.ok("GET", "/v1/templates", nil, &templates)
	if len(templates) != 1 || templates[0].Users != 1 || templates[0].Size != int64(len(templateBytes)) {
		t.Errorf("templates %+v", templates)
	}
}

// TestVolumesAreListed: a volume outlives the VM that it was made for, and is listed
// until it is deleted.
func TestVolumesAreListed(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	c := w.client("acme-orchestrator")
	c.putTemplate()
	req := request("web", 1)
	list := func() (volumes []hostapi.Volume) {
		t.Helper()
		c.ok("GET", "/v1/volumes", nil, &volumes)
		return volumes
	}
	if got := list(); len(got) != 0 {
		t.Errorf("before any VM: %+v", got)
	}
	c.ok("POST", "/v1/vms", req, nil)
	want := hostapi.Volume{ID: req.Spec.Volume.ID, Size: int64(req.Spec.Volume.SizeMiB) << 20, Attached: true}
	if got := list(); !slices.Equal(got, []hostapi.Volume{want}) {
		t.Errorf("of a VM: %+v, want %+v", got, want)
	}
	folder := w.conf.State + "/volumes/acme"
	if err := os.WriteFile(folder+"/half-written", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c.ok("DELETE", "/v1/vms/"+req.Spec.Reservation, nil, nil)
	want.Attached = false
	if got := list(); !slices.Equal(got, []hostapi.Volume{want}) {
		t.Errorf("after the VM's end: %+v, want %+v", got, want)
	}
	c.ok("DELETE", "/v1/volumes/"+want.ID, nil, nil)
	if got := list(); len(got) != 0 {
		t.Errorf("after its deletion: %+v", got)
	}
	w.client("stranger").refused("GET", "/v1/volumes", nil, "not-permitted")
}

func TestOnlyTenantsCall(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	w.client("stranger").refused("GET", "/v1/platform", nil, "not-permitted")
	for name, c := range map[string]*client{
		"another role":      w.clientOf(w.tenants, mtls.Identity{Role: mtls.Gateway, Name: "acme-orchestrator"}),
		"another authority": w.clientOf(newAuthority(t), mtls.Identity{Role: mtls.Orchestrator, Name: "acme-orchestrator"}),
	} {
		if status, data := c.call("GET", "/v1/platform", nil); status != 0 {
			t.Errorf("%s: %d %s", name, status, data)
		}
	}
}

func TestTemplateMustHashToItsName(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	c := w.client("acme-orchestrator")
	c.refused("PUT", "/v1/templates/"+digest.Of([]byte("else")).String(), templateBytes, "digest-mismatch")
	c.refused("PUT", "/v1/templates/..%2F..%2Fx", templateBytes, "bad-request")
	var list []hostapi.Template
	c.ok("GET", "/v1/templates", nil, &list)
	if len(list) != 0 {
		t.Errorf("a refused template is stored: %v", list)
	}
}

func TestStaticQuoteComesWithItsLog(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	c := w.client("acme-orchestrator")
	var rsp hostapi.QuoteResponse
	nonce := digest.Of([]byte("nonce"))
	c.ok("POST", "/v1/quote", hostapi.QuoteRequest{QualifyingData: nonce}, &rsp)
	attest, err := tpm2.Unmarshal[tpm2.TPMSAttest](rsp.Quote.Attest)
	if err != nil {
		t.Fatal(err)
	}
	info, err := attest.Attested.Quote()
	if err != nil {
		t.Fatal(err)
	}
	want := pcr.Composite(pcr.StaticSelection(), pcr.Replay(rsp.Platform.Log))
	if !bytes.Equal(info.PCRDigest.Buffer, want[:]) || !bytes.Equal(attest.ExtraData.Buffer, nonce[:]) || len(rsp.Platform.Log) != 6 {
		t.Error("the log does not replay to the quote")
	}
	var platform evidence.Platform
	c.ok("GET", "/v1/platform", nil, &platform)
	if len(platform.Log) != len(rsp.Platform.Log) {
		t.Error("two logs differ")
	}
	c.refused("POST", "/v1/quote", hostapi.QuoteRequest{}, "bad-request")
	c.ok("GET", "/v1/inventory", nil, nil)
}

// TestInventoryIsServedWithItsDigest: of the file as it is now, though the provider
// replaced it while the agent runs.
func TestInventoryIsServedWithItsDigest(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	c := w.client("acme-orchestrator")
	_, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	for version := 1; version <= 2; version++ {
		env, err := enroll.Publish(key, "hall", version, time.Now(), time.Hour, []inventory.Host{w.entry})
		if err != nil {
			t.Fatal(err)
		}
		data, err := json.Marshal(env)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(w.conf.Inventory, data, 0o600); err != nil {
			t.Fatal(err)
		}
		var got hostapi.InventoryDigest
		c.ok("GET", "/v1/inventory/digest", nil, &got)
		if got.Version != version || got.SHA256 != digest.Of(env.Payload) {
			t.Errorf("%+v of version %d", got, version)
		}
		var served signed.Envelope
		c.ok("GET", "/v1/inventory", nil, &served)
		if digest.Of(served.Payload) != got.SHA256 {
			t.Error("the inventory served is not the one of the digest")
		}
	}
}

func TestActivationProvesTheAIK(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	c := w.client("acme-orchestrator")
	cert, err := x509.ParseCertificate(w.entry.EK)
	if err != nil {
		t.Fatal(err)
	}
	aik, err := tpm.ParsePublic(w.entry.AIK)
	if err != nil {
		t.Fatal(err)
	}
	secret := bytes.Repeat([]byte{7}, tpm.SecretLen)
	blob, encrypted, err := tpm.Challenge(cert, aik, secret)
	if err != nil {
		t.Fatal(err)
	}
	var rsp hostapi.ActivateResponse
	c.ok("POST", "/v1/activate", hostapi.ActivateRequest{Blob: blob, Secret: encrypted}, &rsp)
	if !bytes.Equal(rsp.Credential, secret) {
		t.Error("the TPM recovered something else")
	}
	blob[0] ^= 1
	c.refused("POST", "/v1/activate", hostapi.ActivateRequest{Blob: blob, Secret: encrypted}, "bad-request")
}

func TestAgentRefusesWhatWasNotMeasured(t *testing.T) {
	for _, name := range []string{"qemu", "module", "bios", "kernel", "initramfs", "configuration"} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil)
			switch path := map[string]string{"qemu": w.conf.QEMU, "module": w.conf.QEMUModule, "bios": w.conf.BIOS, "kernel": w.conf.LoaderKernel, "initramfs": w.conf.LoaderInitramfs}[name]; path {
			case "":
				w.sum[0] ^= 1
			default:
				if err := os.WriteFile(path, []byte("this is "+name+"!"), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := Run(context.Background(), w.conf, w.sum); err == nil || !strings.Contains(err.Error(), "measure") {
				t.Errorf("it ran: %v", err)
			}
		})
	}
}

// TestSessionKeysAreTheirTenants: a tenant gives its own key, which survives the agent; what
// was made for another TPM is refused.
func TestSessionKeysAreTheirTenants(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	give := func(entry inventory.Host) hostapi.MigratedKey {
		key, err := tpm.NewMigrated()
		if err != nil {
			t.Fatal(err)
		}
		public, err := tpm.MigratedPublic(key)
		if err != nil {
			t.Fatal(err)
		}
		parent, err := tpm.ParsePublic(entry.Session)
		if err != nil {
			t.Fatal(err)
		}
		m := hostapi.MigratedKey{Public: tpm2.Marshal(public)}
		if m.Duplicate, m.Seed, err = tpm.Duplicate(parent, key); err != nil {
			t.Fatal(err)
		}
		return m
	}
	c := w.client("acme-orchestrator")
	c.refused("PUT", "/v1/session-key", give(newWorld(t, nil).entry), "bad-request")
	c.refused("PUT", "/v1/session-key", hostapi.MigratedKey{}, "bad-request")
	file := w.conf.State + "/sessionkeys/acme.json"
	if _, err := os.Stat(file); err == nil {
		t.Error("a refused key was stored")
	}
	c.ok("PUT", "/v1/session-key", give(w.entry), nil)
	first, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	w.stop()
	w.run()
	c = w.client("acme-orchestrator")
	c.ok("PUT", "/v1/session-key", give(w.entry), nil)
	if second, err := os.ReadFile(file); err != nil || bytes.Equal(first, second) {
		t.Errorf("another key does not take its place: %v", err)
	}
	if _, err := os.Stat(w.conf.State + "/sessionkeys/other.json"); err == nil {
		t.Error("another tenant has it")
	}
}

// TestAgentWantsItsInventoryEntry: the TPM's keys are those that the provider published for
// this host, or nothing runs.
func TestAgentWantsItsInventoryEntry(t *testing.T) {
	_, stranger, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	other := newWorld(t, nil)
	for name, c := range map[string]struct {
		change func(w *world)
		why    string
	}{
		"signed by somebody else":  {func(w *world) { w.publish(stranger, w.entry) }, "signature"},
		"without this host":        {func(w *world) { w.publish(w.inventoryKey) }, "no host host-1"},
		"with another host's keys": {func(w *world) { w.publish(w.inventoryKey, other.entry) }, broker.ErrOtherKey.Error()},
		"with another session key": {func(w *world) {
			entry := w.entry
			entry.Session = other.entry.Session
			w.publish(w.inventoryKey, entry)
		}, broker.ErrOtherKey.Error()},
		"with an AIK for sessions": {func(w *world) {
			entry := w.entry
			entry.Session = entry.AIK
			w.publish(w.inventoryKey, entry)
		}, "session key"},
		"no inventory": {func(w *world) {
			if err := os.WriteFile(w.conf.Inventory, []byte("{}"), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "read inventory"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, nil)
			c.change(w)
			if err := Run(context.Background(), w.conf, w.sum); err == nil || !strings.Contains(err.Error(), c.why) {
				t.Errorf("it ran: %v", err)
			}
		})
	}
}

func TestConfigIsChecked(t *testing.T) {
	good := newWorld(t, nil).conf
	if _, err := good.check(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Config){
		"no tenants":    func(c *Config) { c.Tenants = nil },
		"tenant twice":  func(c *Config) { c.Tenants = append(c.Tenants, c.Tenants[0]) },
		"no TPM":        func(c *Config) { c.TPM = "" },
		"accelerator":   func(c *Config) { c.Accel = "xen" },
		"negative time": func(c *Config) { c.HoldTimeout = "-1s" },
		"no duration":   func(c *Config) { c.BootTimeout = "soon" },
		"no module":     func(c *Config) { c.QEMUModule = "" },
		"no key":        func(c *Config) { c.InventoryKey = "" },
		"name":          func(c *Config) { c.Name = "Host 1" },
		"no log":        func(c *Config) { c.Log = "" },
		"both logs":     func(c *Config) { c.FirmwareLog, c.KernelList = "f", "k" },
		"half a log":    func(c *Config) { c.Log, c.FirmwareLog = "", "f" },
		"a third log":   func(c *Config) { c.UserspaceLog = "u" },
	} {
		c := good
		change(&c)
		if _, err := c.check(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestRestartFindsVMsStopped(t *testing.T) {
	w := newWorld(t, nil)
	w.run()
	c := w.client("acme-orchestrator")
	c.putTemplate()
	req := request("web", 1)
	c.ok("POST", "/v1/vms", req, nil)
	record, err := os.ReadFile(w.conf.State + "/vms/" + req.Spec.Reservation + ".json")
	if err != nil || bytes.Contains(record, []byte(req.Token.Reveal())) {
		t.Fatalf("T1 lies on disk (%v)", err)
	}
	w.stop()
	w.run()
	c = w.client("acme-orchestrator")
	var vm hostapi.VM
	c.ok("GET", "/v1/vms/"+req.Spec.Reservation, nil, &vm)
	if vm.State != hostapi.Stopped || vm.Reason != "vm-stopped" {
		t.Errorf("after a restart %+v", vm)
	}
	c.refused("POST", "/v1/vms/"+req.Spec.Reservation+"/start", nil, "vm-stopped")
	c.refused("POST", "/v1/vms", func() hostapi.CreateRequest { r := req; r.Spec.Name = "changed"; return r }(), "bad-request")
	c.ok("POST", "/v1/vms", request("web", 2), &vm)
	if vm.State != hostapi.Created || vm.Start != 2 {
		t.Errorf("the next start %+v", vm)
	}
}
