package orchestrator

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/hostapi"
	"foothold/protocol/inventory"
	"foothold/protocol/signed"
	"foothold/tenant/ledger"
)

// document seals a document as its signer's command does.
func (w *world) document(key ed25519.PrivateKey, label string, doc any) []byte {
	w.t.Helper()
	payload := must[[]byte](w.t)(json.Marshal(doc))
	return must[[]byte](w.t)(json.MarshalIndent(signed.Seal(key, label, payload), "", "  "))
}

// listing is a version of the provider's inventory.
func (w *world) listing(version int, hosts ...inventory.Host) inventory.Inventory {
	now := time.Now()
	return inventory.Inventory{Provider: "lab", Version: version, Issued: now, Expires: now.Add(30 * 24 * time.Hour), Hosts: hosts}
}

func (w *world) post2(path string, in, out any) (int, api.Problem) {
	w.t.Helper()
	return w.call("POST", path, must[[]byte](w.t)(json.Marshal(in)), out)
}

// publish has the provider sign a version, and imports it.
func (w *world) publish(version int, hosts ...inventory.Host) api.InventoryImport {
	w.t.Helper()
	var out api.InventoryImport
	if status, p := w.post2("/v1/inventories", api.ImportDocument{Document: w.document(w.inventory, signed.Inventory, w.listing(version, hosts...))}, &out); status != http.StatusOK {
		w.t.Fatalf("import inventory %d: %d %+v", version, status, p)
	}
	return out
}

// counts is the version and digest of the inventory that counts.
func (w *world) counts() api.Inventory {
	w.t.Helper()
	var out api.Inventory
	if status, p := w.call("GET", "/v1/inventories/0", nil, &out); status != http.StatusOK {
		w.t.Fatalf("show inventory: %d %+v", status, p)
	}
	return out
}

// kinds lists the kinds in the whole journal.
func (w *world) kinds() (kinds []string) {
	w.t.Helper()
	var list []api.JournalEntry
	w.call("GET", "/v1/events?limit=10000", nil, &list)
	for _, e := range list {
		kinds = append(kinds, e.Event.Kind)
	}
	return kinds
}

// TestInventoryImportRefuses: a document that is not the provider's next word changes
// nothing, not even across a restart.
func TestInventoryImportRefuses(t *testing.T) {
	w := newWorld(t)
	w.publish(5, w.host.entry)
	before := w.counts()
	if before.Version != 5 || !before.Current || before.ImportedBy == byConfiguration {
		t.Fatalf("%+v", before)
	}
	_, stranger, _ := ed25519.GenerateKey(rand.Reader)
	good := w.document(w.inventory, signed.Inventory, w.listing(6, w.host.entry))
	doc := func(change func(*inventory.Inventory)) []byte {
		list := w.listing(6, w.host.entry)
		change(&list)
		return w.document(w.inventory, signed.Inventory, list)
	}
	other := digest.Of([]byte("another"))
	for what, c := range map[string]struct {
		in     api.ImportDocument
		reason event.Reason
		says   string
	}{
		"forged":           {api.ImportDocument{Document: w.document(stranger, signed.Inventory, w.listing(6, w.host.entry))}, event.DocumentRefused, "signature"},
		"of another kind":  {api.ImportDocument{Document: w.document(w.inventory, signed.Platform, w.listing(6, w.host.entry))}, event.DocumentRefused, "signature"},
		"altered":          {api.ImportDocument{Document: bytes.Replace(good, []byte(`"payload": "e`), []byte(`"payload": "f`), 1)}, event.DocumentRefused, "signature"},
		"truncated":        {api.ImportDocument{Document: good[:len(good)/2]}, event.DocumentRefused, ""},
		"empty":            {api.ImportDocument{}, event.DocumentRefused, ""},
		"with a tail":      {api.ImportDocument{Document: append(slices.Clone(good), "{}"...)}, event.DocumentRefused, "trailing"},
		"with a key twice": {api.ImportDocument{Document: bytes.Replace(good, []byte("{"), []byte(`{"payload": "",`), 1)}, event.DocumentRefused, "duplicate"},
		"expired":          {api.ImportDocument{Document: doc(func(i *inventory.Inventory) { i.Expires = time.Now().Add(-time.Minute) })}, event.DocumentRefused, "expired"},
		"of the future":    {api.ImportDocument{Document: doc(func(i *inventory.Inventory) { i.Issued = time.Now().Add(time.Hour) })}, event.DocumentRefused, "ahead"},
		"rolled back":      {api.ImportDocument{Document: doc(func(i *inventory.Inventory) { i.Version = 4 })}, event.DocumentRefused, "older than 5"},
		"version again":    {api.ImportDocument{Document: doc(func(i *inventory.Inventory) { i.Version = 5 })}, event.DocumentRefused, "two documents of one version"},
		"another provider": {api.ImportDocument{Document: doc(func(i *inventory.Inventory) { i.Provider = "cellar" })}, event.DocumentRefused, "cellar"},
		"a host twice":     {api.ImportDocument{Document: doc(func(i *inventory.Inventory) { i.Hosts = append(i.Hosts, i.Hosts[0]) })}, event.DocumentRefused, "listed twice"},
		"not as published": {api.ImportDocument{Document: good, SHA256: &other}, event.DigestMismatch, other.String()},
	} {
		status, p := w.post2("/v1/inventories", c.in, nil)
		if p.Reason != c.reason || !strings.Contains(p.Detail, c.says) {
			t.Errorf("%s: %d %+v", what, status, p)
		}
		if now := w.counts(); now.Version != before.Version || now.SHA256 != before.SHA256 {
			t.Errorf("%s: version %d counts now", what, now.Version)
		}
	}
	w.restart()
	if now := w.counts(); now.Version != 5 || now.SHA256 != before.SHA256 || now.Imported != before.Imported {
		t.Errorf("after a restart: %+v", now)
	}
	// A ledger that has seen a higher version, though its document was lost.
	check(t, w.o.ledger.Write(t.Context(), func(tx *ledger.Tx) error { return tx.Rise("inventory", 9) }))
	if status, p := w.post2("/v1/inventories", api.ImportDocument{Document: good}, nil); p.Reason != event.DocumentRefused || !strings.Contains(p.Detail, "older than 9") {
		t.Errorf("below the highest version seen: %d %+v", status, p)
	}
	var list []api.Inventory
	w.call("GET", "/v1/inventories", nil, &list)
	if len(list) != 2 || list[0].Version != 5 || list[1].Version != 1 || list[1].ImportedBy != byConfiguration || list[1].Current {
		t.Errorf("kept are %+v", list)
	}
	if status, p := w.call("GET", "/v1/inventories/3", nil, nil); status != http.StatusNotFound || p.Reason != event.UnknownDocument {
		t.Errorf("a version that was never imported: %d %+v", status, p)
	}
}

// TestServedInventoryIsCompared: that hosts serve a newer one, or another of the version that
// counts, is in the journal once each; an older one, which the provider has yet to spread, is not.
func TestServedInventoryIsCompared(t *testing.T) {
	w := newWorld(t)
	w.publish(5, w.host.entry)
	now := w.counts()
	told := newTold()
	other := digest.Of([]byte("another"))
	for _, c := range []struct {
		served       hostapi.InventoryDigest
		newer, other int
	}{
		{hostapi.InventoryDigest{Version: 5, SHA256: now.SHA256}, 0, 0},
		{hostapi.InventoryDigest{Version: 4, SHA256: other}, 0, 0},
		{hostapi.InventoryDigest{Version: 6, SHA256: other}, 1, 0},
		{hostapi.InventoryDigest{Version: 5, SHA256: other}, 1, 1},
		{hostapi.InventoryDigest{Version: 6, SHA256: other}, 1, 1},
		{hostapi.InventoryDigest{Version: 7, SHA256: other}, 2, 1},
		{hostapi.InventoryDigest{Version: 8, SHA256: other}, 2, 1}, // one host makes them up
	} {
		w.host.mu.Lock()
		w.host.served = c.served
		w.host.mu.Unlock()
		w.o.compareServed(t.Context(), told)
		got := map[string]int{}
		for _, k := range w.kinds() {
			got[k]++
		}
		if got["inventory.newer-served"] != c.newer || got["inventory.other-served"] != c.other {
			t.Errorf("%+v: %d newer, %d other", c.served, got["inventory.newer-served"], got["inventory.other-served"])
		}
	}
}

// TestImportedKeysAreProvedAndKept: new hosts prove their keys by credential activation;
// what failed is kept with its reason, and tried again by the same import.
func TestImportedKeysAreProvedAndKept(t *testing.T) {
	w := newWorld(t)
	second, third := w.addHost("host-2"), w.addHost("host-3")
	w.restart()
	third.tpmMu.Lock()
	third.liar = true
	third.tpmMu.Unlock()
	away, unknown := second.entry, second.entry
	away.Name, unknown.Name = "host-4", "host-5"
	unknown.EK = certificateOf(t)
	list := w.listing(2, w.host.entry, second.entry, third.entry, unknown)
	in := api.ImportDocument{Document: w.document(w.inventory, signed.Inventory, list)}
	sum := digest.Of(must[[]byte](t)(json.Marshal(list)))
	in.SHA256 = &sum
	var out api.InventoryImport
	if status, p := w.post2("/v1/inventories", in, &out); status != http.StatusOK {
		t.Fatalf("%d %+v", status, p)
	}
	states := func(hosts []api.HostEntry) map[string]string {
		m := map[string]string{}
		for _, h := range hosts {
			m[h.Name] = h.Keys + ": " + h.Reason
		}
		return m
	}
	// host-5 has the keys of host-2: that puts both in doubt.
	want := map[string]string{"host-1": "validated: ", "host-2": "failed: shares a TPM key with host host-5", "host-3": "failed: host host-3: its TPM does not hold", "host-5": "failed: "}
	for name, state := range want {
		if got := states(out.Hosts)[name]; !strings.HasPrefix(got, state) {
			t.Errorf("%s is %q, want %q", name, got, state)
		}
	}
	for name, want := range map[string]event.Reason{"host-1": "", "host-2": event.NoHost, "host-3": event.NoHost, "host-5": event.NoHost} {
		err := w.o.ledger.Read(t.Context(), func(tx *ledger.Tx) error { return w.o.basis().mayHost(tx, name) })
		if got := event.ReasonOf(err); (err != nil) != (want != "") || err != nil && got != want {
			t.Errorf("a VM at %s: %v, want %q", name, err, want)
		}
	}
	if out.Before != 1 || len(out.Changes) != 3 || out.Changes[0] != (api.HostChange{Host: "host-2", What: "new"}) {
		t.Errorf("changes: %+v", out.Changes)
	}
	// The provider corrects it; host-3 tells the truth now.
	third.tpmMu.Lock()
	third.liar = false
	third.tpmMu.Unlock()
	out = w.publish(3, w.host.entry, second.entry, third.entry)
	for name, got := range states(out.Hosts) {
		if got != "validated: " {
			t.Errorf("%s is %q", name, got)
		}
	}
	w.restart()
	for name, got := range states(w.counts().Hosts) {
		if got != "validated: " {
			t.Errorf("after a restart %s is %q", name, got)
		}
	}
	var before api.Inventory
	w.call("GET", "/v1/inventories/2", nil, &before)
	if got := states(before.Hosts)["host-5"]; !strings.HasPrefix(got, "failed: ") || len(got) < 20 {
		t.Errorf("the failed keys of a host that is gone: %q", got)
	}
	// A host that was struck out and comes back has to prove its keys again.
	second.tpmMu.Lock()
	second.liar = true
	second.tpmMu.Unlock()
	w.publish(4, w.host.entry)
	if got := states(w.publish(5, w.host.entry, second.entry).Hosts)["host-2"]; !strings.HasPrefix(got, "failed: ") {
		t.Errorf("host-2 came back as %q", got)
	}
}
