package site

import (
	"bytes"
	"crypto/ed25519"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/client"
	"foothold/internal/tpm"
	"foothold/protocol/api"
	"foothold/protocol/event"
	"foothold/protocol/inventory"
	"foothold/protocol/signed"
	"foothold/tenant/ledger"
	"foothold/tenant/verify"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// published is an inventory as a file, whatever stands in it.
func published(t *testing.T, key ed25519.PrivateKey, provider string, version int, issued time.Time, hosts ...inventory.Host) []byte {
	t.Helper()
	issued = issued.UTC().Truncate(time.Second)
	payload, err := json.Marshal(inventory.Inventory{Provider: provider, Version: version, Issued: issued, Expires: issued.Add(day), Hosts: hosts})
	if err != nil {
		t.Fatal(err)
	}
	data, err := json.Marshal(signed.Seal(key, signed.Inventory, payload))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestInventoriesThatLie: what is wrong with the document is refused as a whole by the
// running orchestrator, enters the journal and changes nothing: the VM boots on.
func TestInventoriesThatLie(t *testing.T) {
	s := openSite(t, 2)
	c := operator(t, s)
	a := attack{t, s, reserve(t, s, 1)[0], nil}
	l := a.opened("")
	hosts := []inventory.Host{s.hosts[0].entry, s.hosts[1].entry}
	now := time.Now()
	if _, err := c.ImportInventory(t.Context(), api.ImportDocument{Document: published(t, s.keys.inventory, "bench", 3, now, hosts...)}); err != nil {
		t.Fatal(err)
	}
	_, stranger, err := ed25519.GenerateKey(nil)
	if err != nil {
		t.Fatal(err)
	}
	good := published(t, s.keys.inventory, "bench", 4, now, hosts...)
	var env signed.Envelope
	if err := json.Unmarshal(good, &env); err != nil {
		t.Fatal(err)
	}
	altered := env
	altered.Payload = bytes.Replace(env.Payload, []byte("host-2"), []byte("host-9"), 1)
	again, err := json.Marshal(altered)
	if err != nil {
		t.Fatal(err)
	}
	relabelled, err := json.Marshal(signed.Seal(s.keys.inventory, signed.Platform, env.Payload))
	if err != nil {
		t.Fatal(err)
	}
	short, err := json.Marshal(signed.Envelope{Payload: env.Payload[:len(env.Payload)/2], Signature: env.Signature})
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string]struct {
		document []byte
		says     string
	}{
		"forged":                           {published(t, stranger, "bench", 4, now, hosts...), "signature"},
		"altered":                          {again, "signature"},
		"signed as something else":         {relabelled, "signature"},
		"expired":                          {published(t, s.keys.inventory, "bench", 4, now.Add(-2*day), hosts...), "expired"},
		"not issued yet":                   {published(t, s.keys.inventory, "bench", 4, now.Add(day), hosts...), ""},
		"rolled back":                      {published(t, s.keys.inventory, "bench", 2, now, hosts...), "older than 3"},
		"two of one version":               {published(t, s.keys.inventory, "bench", 3, now, hosts[0]), "two documents of one version"},
		"of another provider":              {published(t, s.keys.inventory, "other", 4, now, hosts...), "provider"},
		"truncated":                        {good[:len(good)/2], ""},
		"payload truncated":                {short, "signature"},
		"empty":                            {nil, ""},
		"with data behind it":              {append(bytes.Clone(good), "{}"...), "trailing data"},
		"with a duplicate key":             {bytes.Replace(good, []byte("{"), []byte(`{"payload":"",`), 1), "duplicate key"},
		"with a duplicate key, signed":     {resealed(t, s.keys.inventory, bytes.Replace(env.Payload, []byte(`"version":4`), []byte(`"version":4,"version":9`), 1)), "duplicate key"},
		"with data behind it, signed":      {resealed(t, s.keys.inventory, append(bytes.Clone(env.Payload), "{}"...)), "trailing data"},
		"with a host twice, signed":        {resealed(t, s.keys.inventory, bytes.Replace(env.Payload, []byte(`"host-2"`), []byte(`"host-1"`), 1)), "twice"},
		"a gigabyte by its own word":       {append([]byte(`{"payload":"`), bytes.Repeat([]byte("A"), api.MaxDocument)...), ""},
		"with an unknown field, signed":    {resealed(t, s.keys.inventory, bytes.Replace(env.Payload, []byte(`{`), []byte(`{"trusted":true,`), 1)), "trusted"},
		"without a version, signed":        {resealed(t, s.keys.inventory, bytes.Replace(env.Payload, []byte(`"version":4`), []byte(`"version":0`), 1)), ""},
		"by digest other than was printed": {good, "sha256"},
	} {
		t.Run(name, func(t *testing.T) {
			doc, want := api.ImportDocument{Document: bad.document}, event.DocumentRefused
			if bad.says == "sha256" {
				other := s.image
				doc.SHA256, want = &other, event.DigestMismatch
			}
			before := len(a.journal(""))
			_, err := c.ImportInventory(t.Context(), doc)
			var refusal *client.Refusal
			if !errors.As(err, &refusal) || refusal.Reason != want && !(name == "a gigabyte by its own word" && refusal.Reason == event.BadRequest) || !strings.Contains(err.Error(), bad.says) {
				t.Errorf("it is answered %v", err)
			}
			told := a.journal("")[before:]
			if !slices.ContainsFunc(told, func(e event.Event) bool {
				return e.Kind == "request.refused" && refusal != nil && e.Reason == refusal.Reason
			}) {
				t.Error("the journal does not tell of the refusal")
			}
			for _, e := range told { // the boot server tells late what it dropped before
				if e.Kind != "request.refused" && e.Kind != "boot.dropped" {
					t.Errorf("the journal has %s", e.Kind)
				}
			}
			if inv, err := c.Inventory(t.Context(), 0); err != nil || inv.Version != 3 || inv.HostCount != 2 {
				t.Errorf("version %d of %d hosts counts (%v)", inv.Version, inv.HostCount, err)
			}
		})
	}
	if err := l.Attest(t.Context(), s); err != nil {
		t.Errorf("a good VM afterwards: %v", err)
	}
}

func resealed(t *testing.T, key ed25519.PrivateKey, payload []byte) []byte {
	t.Helper()
	data, err := json.Marshal(signed.Seal(key, signed.Inventory, payload))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// certifiedBy makes an entry of a host whose attestation key is another key of its TPM,
// which has certified the session key.
func certifiedBy(t *testing.T, h *host, change func(*tpm2.TPMTPublic)) inventory.Host {
	t.Helper()
	var dev transport.TPM = h.bus.TPM
	key := unrestricted(t, dev, change)
	_, session := h.broker.Keys()
	rsp, err := tpm2.Certify{ObjectHandle: session.Auth(tpm2.PasswordAuth(nil)), SignHandle: key.Auth(tpm2.PasswordAuth(nil)), InScheme: keysScheme}.Execute(dev)
	if err != nil {
		t.Fatal(err)
	}
	entry := h.entry
	entry.AIK, entry.SessionCertify, entry.SessionSignature = tpm2.Marshal(key.Public), rsp.CertifyInfo.Bytes(), tpm2.Marshal(rsp.Signature)
	return entry
}

// TestKeysThatLie: the provider itself signs an inventory in which hosts' keys are not what
// they should be. The VMs there end, none begins there, and why is told.
func TestKeysThatLie(t *testing.T) {
	otherKey := func(change func(*tpm2.TPMTPublic)) func(*testing.T, *host) inventory.Host {
		return func(t *testing.T, h *host) inventory.Host { return certifiedBy(t, h, change) }
	}
	s := openSite(t, 10)
	donor := s.hosts[9]
	stranger, err := s.newHost(t.Context(), "stranger")
	if err != nil {
		t.Fatal(err)
	}
	attributes := func(t *testing.T, entry inventory.Host, restricted bool) inventory.Host {
		public, err := tpm.ParsePublic(entry.AIK)
		if err != nil {
			t.Fatal(err)
		}
		public.ObjectAttributes.Restricted = restricted
		entry.AIK = tpm2.Marshal(public)
		return entry
	}
	const form = "attestation key: attributes or parameters are not those of its template"
	cases := []struct {
		name  string
		entry func(*testing.T, *host) inventory.Host
		says  string
	}{
		{"attestation key that is not restricted", otherKey(notRestricted), form},
		{"attestation key that may leave its TPM", otherKey(func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedTPM, p.ObjectAttributes.FixedParent = false, false }), form},
		{"attestation key that is not restricted, and is said to be", func(t *testing.T, h *host) inventory.Host {
			return attributes(t, certifiedBy(t, h, notRestricted), true)
		}, "activate credential"},
		{"the right attestation key, with other attributes", func(t *testing.T, h *host) inventory.Host { return attributes(t, h.entry, false) }, form},
		{"endorsement certificate of another TPM", func(_ *testing.T, h *host) inventory.Host {
			entry := h.entry
			entry.EK, entry.EKChain = donor.entry.EK, donor.entry.EKChain
			return entry
		}, "activate credential"},
		{"endorsement certificate of no manufacturer that is trusted", func(_ *testing.T, h *host) inventory.Host {
			entry := h.entry
			entry.EK, entry.EKChain = stranger.entry.EK, stranger.entry.EKChain
			return entry
		}, "unknown authority"},
		{"session key of another TPM", func(_ *testing.T, h *host) inventory.Host {
			entry := h.entry
			entry.Session = donor.entry.Session
			return entry
		}, "session key's certification is of another key"},
		{"attestation and session key of another TPM", func(_ *testing.T, h *host) inventory.Host {
			entry := stranger.entry
			entry.Name, entry.API, entry.EK, entry.EKChain = h.entry.Name, h.entry.API, h.entry.EK, h.entry.EKChain
			return entry
		}, "activate credential"},
	}
	c := operator(t, s)
	version := 1
	take := func(entries ...inventory.Host) api.InventoryImport {
		t.Helper()
		version++
		out, err := c.ImportInventory(t.Context(), api.ImportDocument{Document: published(t, s.keys.inventory, "bench", version, time.Now(), entries...)})
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	var honest []inventory.Host
	for _, h := range s.hosts {
		honest = append(honest, h.entry)
	}
	for _, h := range take(honest...).Hosts {
		if h.Keys != ledger.KeysValidated {
			t.Fatalf("the own keys of %s are %s: %s", h.Name, h.Keys, h.Reason)
		}
	}
	vms := reserve(t, s, len(s.hosts)) // one at each host
	for _, vm := range vms {
		attack{t, s, vm, nil}.begun()
	}

	// One host answers in the place of another, where the inventory says that this one is.
	t.Run("host that answers in another's place", func(t *testing.T) {
		a := attack{t, s, vms[8], nil}
		moved := append([]inventory.Host{}, honest...)
		moved[8].API = donor.entry.API
		donor.add(a.vm.spec, s.firmware)
		take(moved...)
		if err := a.opened("").Attest(t.Context(), s); err == nil || !strings.Contains(err.Error(), "403") {
			t.Errorf("a genuine quote whose host's claims are another's: %v", err)
		}
		take(honest...) // the VM is destroyed where it runs
		a.ended(event.HostUnreachable, "")
	})

	lying := []inventory.Host{}
	loaders := []*Loader{}
	for i, bad := range cases {
		lying = append(lying, bad.entry(t, s.hosts[i]))
		loaders = append(loaders, attack{t, s, vms[i], nil}.opened(""))
	}
	gone := attack{t, s, vms[9], nil}.opened("")
	out := take(lying...)
	for i, bad := range cases {
		t.Run(bad.name, func(t *testing.T) {
			if k := out.Hosts[i]; k.Keys != ledger.KeysFailed || !strings.Contains(k.Reason, bad.says) {
				t.Errorf("its keys are %s: %q, want %q", k.Keys, k.Reason, bad.says)
			}
			attack{t, s, vms[i], nil}.ended(event.HostLost, "host "+s.hosts[i].entry.Name)
			if err := loaders[i].Attest(t.Context(), s); err == nil {
				t.Error("the VM there gets its components")
			}
		})
	}
	t.Run("host that vanished", func(t *testing.T) {
		attack{t, s, vms[9], nil}.ended(event.HostLost, "is not in inventory")
		if err := gone.Attest(t.Context(), s); err == nil {
			t.Error("the VM there gets its components")
		}
	})
	t.Run("a new VM", func(t *testing.T) {
		l, err := s.ledger(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if err := l.Write(t.Context(), func(tx *ledger.Tx) (err error) {
			tpl, err := tx.Template(template)
			for _, h := range s.hosts {
				err = errors.Join(err, tx.AddTemplateHost(tpl, h.entry.Name))
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
		made, err := c.CreateVM(t.Context(), api.CreateVM{Name: "new"})
		if err != nil {
			t.Fatal(err)
		}
		vm := &VM{host: s.hosts[0]}
		vm.spec.Reservation = made.ID
		attack{t, s, vm, nil}.ended(event.NoHost, "")
	})
}

// begun notes the keys that the VM's host has when the VM is begun.
func (a attack) begun() {
	a.t.Helper()
	l, err := a.s.ledger(a.t.Context())
	if err != nil {
		a.t.Fatal(err)
	}
	defer l.Close()
	if err := l.Write(a.t.Context(), func(t *ledger.Tx) error {
		return t.ChangeStart(a.vm.spec.Reservation, 1, func(start *ledger.Start) { start.HostKeys = verify.Standing{Host: a.vm.host.entry}.Keys() })
	}); err != nil {
		a.t.Fatal(err)
	}
}
