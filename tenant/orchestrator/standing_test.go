package orchestrator

import (
	"context"
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/api"
	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/platform"
	"foothold/protocol/signed"
	"foothold/tenant/ledger"
	"foothold/tenant/reservation"
	"foothold/tenant/verify"
)

// reference is the reference values of the world's release, from a beginning that tells
// documents apart.
func (w *world) reference(from time.Duration) (platform.Manifest, []byte) {
	w.t.Helper()
	doc := platform.Manifest{Name: "release-1", Profile: platform.Lab, ValidFrom: time.Now().Add(from).UTC().Truncate(time.Second),
		ValidUntil: time.Now().Add(30 * 24 * time.Hour).UTC().Truncate(time.Second), Files: w.host.files, Firmware: w.host.firmware}
	return doc, w.document(w.platform, signed.Platform, doc)
}

func (w *world) importPlatform(data []byte) api.Platform {
	w.t.Helper()
	var p api.Platform
	if status, why := w.post2("/v1/platforms", api.ImportDocument{Document: data}, &p); status != http.StatusOK {
		w.t.Fatalf("import reference values: %d %+v", status, why)
	}
	return p
}

func (w *world) withdraw(sum digest.SHA256) api.Platform {
	w.t.Helper()
	var p api.Platform
	if status, why := w.post2("/v1/platforms/"+sum.String()+"/withdraw", api.WithdrawPlatform{Why: "a hole in its QEMU"}, &p); status != http.StatusOK {
		w.t.Fatalf("withdraw: %d %+v", status, why)
	}
	return p
}

func (w *world) platformList() (list []api.Platform) {
	w.t.Helper()
	w.call("GET", "/v1/platforms", nil, &list)
	return list
}

// TestHostThatVanishes: a host that left the inventory gets no VM from then on; who runs
// there is told of, closed at once, and destroyed there all the same. It comes back with
// another proof of its keys, and then the VM starts again.
func TestHostThatVanishes(t *testing.T) {
	w := newWorld(t)
	second := w.addHost("host-2")
	w.restart()
	w.publish(2, w.host.entry, second.entry)
	w.template("debian")
	g := w.take(w.create(api.CreateVM{Name: "web", Restart: string(reservation.Always)}).ID)
	g.pass()
	if vm := w.vm("web"); vm.Host != "host-1" {
		t.Fatalf("it is at %s", vm.Host)
	}
	out := w.publish(3, second.entry)
	want := api.Alert{VM: "web", Host: "host-1", Reason: event.HostLost, Detail: "host host-1 is not in inventory 3", Action: api.ActionClosed}
	if len(out.Alerts) != 1 || out.Alerts[0] != want {
		t.Errorf("alerts: %+v", out.Alerts)
	}
	vm := w.waitPhase("web", reservation.Stopped)
	if vm.Reason != event.HostLost || !vm.NextStart.IsZero() {
		t.Errorf("stopped with %q, next start %v: %s", vm.Reason, vm.NextStart, vm.Explanation)
	}
	w.waitFlows(g.id)
	w.waitGone(g.id) // at a host that is in no inventory that counts
	if kinds := w.events("web"); !slices.Contains(kinds, "vm.host-lost") || !slices.Contains(kinds, "vm.stopped") {
		t.Errorf("events: %v", kinds)
	}
	w.wait("web", "gone", func(vm api.VM) bool { return vm.Cleanup == "" || vm.Cleanup == api.CleanupDone })

	other := w.create(api.CreateVM{Name: "other"})
	if vm := w.waitPhase(other.ID, reservation.Booting); vm.Host != "host-2" {
		t.Errorf("a new VM went to %s", vm.Host)
	}
	w.call("POST", "/v1/vms/web/start", nil, nil)
	w.wait("web", "refused its start", func(vm api.VM) bool { return vm.Reason == event.NoHost })
	w.restart()
	if vm := w.vm("web"); vm.Phase != string(reservation.Stopped) {
		t.Errorf("after a restart it is %s", vm.Phase)
	}
	for _, h := range w.publish(4, w.host.entry, second.entry).Hosts {
		if h.Keys != api.KeysValidated {
			t.Errorf("host %s came back as %s: %s", h.Name, h.Keys, h.Reason)
		}
	}
	w.call("POST", "/v1/vms/web/start", nil, nil)
	w.takeStart(g.id, 2).pass()
}

// TestHostThatIsAnother: a host under the same name with other keys, or whose endorsement
// certificate is nobody's, is another host, and host_lost decides.
func TestHostThatIsAnother(t *testing.T) {
	for name, c := range map[string]struct {
		policy, action string
		phase          reservation.Phase
	}{
		"alert":     {lostAlert, api.ActionNone, reservation.Computing},
		"close":     {lostClose, api.ActionClosed, reservation.Stopped},
		"terminate": {lostTerminate, api.ActionTerminated, reservation.Aborted},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, func(conf *Config) { conf.HostLost = c.policy })
			second := w.addHost("host-2")
			w.watchEvery = 100 * time.Millisecond
			w.restart()
			w.template("debian")
			g := w.computing("web")
			changed := second.entry // another TPM
			changed.Name, changed.API = w.host.entry.Name, w.host.entry.API
			if name == "terminate" {
				changed = w.host.entry
				changed.EK = certificateOf(t) // of no manufacturer
			}
			out := w.publish(2, changed)
			if len(out.Alerts) != 1 || out.Alerts[0].Action != c.action || out.Alerts[0].Reason != event.HostLost {
				t.Errorf("alerts: %+v", out.Alerts)
			}
			if len(out.Changes) != 1 || out.Changes[0].What != "keys" || out.Hosts[0].Keys != api.KeysFailed {
				t.Errorf("changes %+v, found %+v", out.Changes, out.Hosts)
			}
			if c.phase == reservation.Computing {
				for range 3 { // beats go on, quotes do not
					pause(t.Context(), 2*w.watchEvery)
					if _, why := g.say(); why != "" {
						t.Errorf("heartbeat: %s", why)
					}
				}
				if got := w.count("web", "vm.host-lost"); got != 2 { // at the import, and by the watch
					t.Errorf("%d alerts", got)
				}
			}
			vm := w.wait("web", string(c.phase), func(vm api.VM) bool { return vm.Phase == string(c.phase) })
			if vm.Reason != event.HostLost || !strings.Contains(vm.Explanation, "host-1") {
				t.Errorf("%q: %s", vm.Reason, vm.Explanation)
			}
			if c.phase != reservation.Computing {
				w.waitFlows(g.id)
				w.waitGone(g.id)
			}
			fresh := w.create(api.CreateVM{Name: "fresh"})
			if vm := w.waitPhase(fresh.ID, reservation.Aborted); vm.Reason != event.NoHost || !strings.Contains(vm.Explanation, "host host-1: ") {
				t.Errorf("a new VM: %q %s", vm.Reason, vm.Explanation)
			}
		})
	}
}

// TestHostDroppedWhileItAnswers: an import that comes between question and answer of a static
// quote decides by the documents. The answer, of a key that is in none of them any more, is
// no judgement: it neither ends a VM that host_lost lets run nor bars the host.
func TestHostDroppedWhileItAnswers(t *testing.T) {
	w := newWorld(t, func(conf *Config) { conf.HostLost = lostAlert })
	second := w.addHost("host-2")
	w.restart()
	w.template("debian")
	g := w.computing("web")
	changed := second.entry
	changed.Name, changed.API = w.host.entry.Name, w.host.entry.API
	w.host.mu.Lock()
	w.host.quoting = func() { w.publish(2, changed) }
	w.host.mu.Unlock()
	told := ""
	if err := w.o.attestWatched(t.Context(), g.id, &told); err != nil {
		t.Errorf("the watch: %v", err)
	}
	if vm := w.vm("web"); vm.Phase != string(reservation.Computing) || vm.Reason != event.HostLost || !strings.Contains(told, "other keys") {
		t.Errorf("%s, %q, told %q", vm.Phase, vm.Reason, told)
	}
	w.host.mu.Lock()
	w.host.quoting = func() { w.publish(3, w.host.entry) } // as it was, while nobody can tell yet
	w.host.mu.Unlock()
	if _, err := w.o.attestAgain(t.Context(), g.id, evidence.RoleWatch); err != nil {
		t.Errorf("after it came back: %v", err)
	}
	var state ledger.HostState
	check(t, w.o.ledger.Read(t.Context(), func(tx *ledger.Tx) (err error) { state, err = tx.Host("host-1"); return err }))
	if state.Barred != "" {
		t.Errorf("the host is barred: %s", state.Barred)
	}
	if vm := w.vm("web"); vm.Phase != string(reservation.Computing) || vm.Reason != "" {
		t.Errorf("%s, %q", vm.Phase, vm.Reason)
	}
}

// count is how many entries of a kind the journal has of a VM.
func (w *world) count(name, kind string) (n int) {
	w.t.Helper()
	for _, k := range w.events(name) {
		if k == kind {
			n++
		}
	}
	return n
}

// TestLostWhileAway: what the orchestrator could not do about an import before it died, its
// next start does.
func TestLostWhileAway(t *testing.T) {
	w := newWorld(t)
	second := w.addHost("host-2")
	w.restart()
	w.template("debian")
	g := w.computing("web")
	data := w.document(w.inventory, signed.Inventory, w.listing(2, second.entry))
	next := must[*verify.Inventory](t)(verify.ParseInventory(data, w.o.trust.provider, w.o.trust.makers, time.Now()))
	check(t, w.o.ledger.Write(t.Context(), func(tx *ledger.Tx) error { return w.o.storeInventory(tx, next, data, "test") }))
	w.restart()
	if vm := w.waitPhase("web", reservation.Stopped); vm.Reason != event.HostLost {
		t.Errorf("%q: %s", vm.Reason, vm.Explanation)
	}
	w.waitGone(g.id)
	if w.counts().Version != 2 {
		t.Error("the stored version does not count")
	}
}

// TestRefusedStaticQuoteBars: a host whose own answer is wrong gets no VM until an operator
// readmits it, and all who run there are told of.
func TestRefusedStaticQuoteBars(t *testing.T) {
	w := newWorld(t)
	w.template("debian")
	a, b := w.computing("a"), w.take(w.create(api.CreateVM{Name: "b"}).ID)
	w.host.measureRogue()
	if _, err := w.o.attestAgain(t.Context(), a.id, evidence.RoleWatch); event.ReasonOf(err) != event.QuoteRefused {
		t.Fatalf("the quote: %v", err)
	}
	if got := w.count("b", "vm.host-lost"); got != 1 {
		t.Errorf("the neighbour has %d alerts", got)
	}
	if why := b.boot(); why != event.QuoteRefused {
		t.Errorf("the neighbour boots: %q", why)
	}
	create := func(name string) api.VM {
		t.Helper()
		vm := w.create(api.CreateVM{Name: name})
		return w.wait(vm.ID, "placed or refused", func(vm api.VM) bool { return vm.Phase != string(reservation.Reserved) })
	}
	bad := w.create(api.CreateVM{Name: "c"})
	if vm := w.waitPhase(bad.ID, reservation.Aborted); vm.Reason != event.NoHost || !strings.Contains(vm.Explanation, "watch quote was refused") {
		t.Errorf("%s, %q: %s", vm.Phase, vm.Reason, vm.Explanation)
	}
	w.restart()
	var hosts []api.Host
	w.call("GET", "/v1/hosts", nil, &hosts)
	if len(hosts) != 1 || !strings.Contains(hosts[0].Standing, "watch quote was refused") {
		t.Errorf("hosts: %+v", hosts)
	}
	var readmitted api.Host
	if status, p := w.call("POST", "/v1/hosts/host-1/readmit", nil, &readmitted); status != http.StatusOK || readmitted.Standing != "good" {
		t.Errorf("readmit: %d %+v %+v", status, p, readmitted)
	}
	if status, p := w.call("POST", "/v1/hosts/host-9/readmit", nil, nil); status != http.StatusConflict || p.Reason != event.NoHost {
		t.Errorf("readmit of an unknown host: %d %+v", status, p)
	}
	if vm := create("d"); vm.Host != "host-1" || vm.Phase != string(reservation.Booting) {
		t.Errorf("after it was readmitted: %s at %q: %s", vm.Phase, vm.Host, vm.Explanation)
	}
}

// TestNeighboursOfARefusedQuote: what one quote shows of a host has every other VM there
// quoted at once, not at its next turn: a static quote, and a boot quote by the host's log.
// One whose host does not answer then is asked again soon.
func TestNeighboursOfARefusedQuote(t *testing.T) {
	t.Parallel()
	for name, refuse := range map[string]func(t *testing.T, w *world, c *guest){
		"static": func(t *testing.T, w *world, c *guest) {
			if _, err := w.o.attestAgain(t.Context(), c.id, evidence.RoleWatch); event.ReasonOf(err) != event.QuoteRefused {
				t.Fatalf("the quote: %v", err)
			}
		},
		"boot": func(t *testing.T, w *world, _ *guest) {
			w.host.failing("POST /v1/quote", 2) // the first of each neighbour
			if why := w.take(w.create(api.CreateVM{Name: "new"}).ID).boot(); why != event.QuoteRefused {
				t.Fatalf("the boot quote: %q", why)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.template("debian")
			w.watchEvery = time.Hour
			w.restart()
			a := w.computing("a")
			b := w.take(w.create(api.CreateVM{Name: "b"}).ID)
			b.tunnel = b.tunnel.Next()
			b.pass()
			w.host.measureRogue()
			refuse(t, w, b)
			closed := []*guest{a}
			if name == "boot" {
				closed = append(closed, b)
			}
			for _, g := range closed {
				if vm := w.waitPhase(g.id, reservation.Aborted); vm.Reason != event.QuoteRefused || len(vm.Findings) == 0 {
					t.Errorf("%s: %+v", vm.Name, vm)
				}
				w.waitFlows(g.id)
				w.waitGone(g.id)
			}
		})
	}
}

// TestWithdrawnReferenceValues: the next decision does without them, and whose last verdict
// rests on them is told of. They stay withdrawn across a restart, though the configuration
// names their file.
func TestWithdrawnReferenceValues(t *testing.T) {
	w := newWorld(t)
	w.template("debian")
	g := w.computing("web")
	first := w.platformList()
	if len(first) != 1 || !first[0].Counts || first[0].VMs != 1 || first[0].ImportedBy != byConfiguration {
		t.Fatalf("to begin with: %+v", first)
	}
	doc, data := w.reference(-2 * time.Hour) // older than the first: the first decides
	second := w.importPlatform(data)
	if again := w.importPlatform(data); again.SHA256 != second.SHA256 || len(w.platformList()) != 2 {
		t.Error("the same again made another")
	}

	// 1. One is withdrawn while another counts: the VM is told of until its next quote.
	gone := w.withdraw(first[0].SHA256)
	want := api.Alert{VM: "web", Host: "host-1", Reason: event.ValuesWithdrawn, Detail: "reference values with sha256 " + first[0].SHA256.String(), Action: api.ActionNone}
	if len(gone.Alerts) != 1 || gone.Alerts[0] != want || gone.Counts || gone.Why == "" {
		t.Errorf("withdrawn: %+v", gone)
	}
	if vm := w.vm("web"); vm.Reason != event.ValuesWithdrawn || vm.Phase != string(reservation.Computing) {
		t.Errorf("%s, %q", vm.Phase, vm.Reason)
	}
	if w.count("web", "vm.values-withdrawn") != 1 {
		t.Errorf("events: %v", w.events("web"))
	}
	if _, err := w.o.attestAgain(t.Context(), g.id, evidence.RoleWatch); err != nil {
		t.Errorf("by the other one: %v", err)
	}
	if vm := w.vm("web"); vm.Reason != "" {
		t.Errorf("after its next quote: %q %s", vm.Reason, vm.Explanation)
	}
	rests := func(verdict digest.SHA256) (on digest.SHA256) {
		check(t, w.o.ledger.Read(t.Context(), func(tx *ledger.Tx) error {
			parts, err := tx.Bundle(g.id, verdict)
			if err != nil {
				return err
			}
			var record verify.Record
			if err := json.Unmarshal(parts.Record, &record); err != nil || record.Platform == nil {
				t.Errorf("%v: %s", err, parts.Record)
				return err
			}
			on = record.Platform.SHA256
			return nil
		}))
		return on
	}
	var verdicts []ledger.BundleRow
	check(t, w.o.ledger.Read(t.Context(), func(tx *ledger.Tx) (err error) { verdicts, err = tx.Bundles(g.id, 1); return err }))
	if on := rests(verdicts[0].Digest); on != first[0].SHA256 {
		t.Errorf("the boot verdict rests on %s", on)
	}
	if on := rests(verdicts[len(verdicts)-1].Digest); on != second.SHA256 {
		t.Errorf("the last verdict rests on %s", on)
	}

	// 2. None is left: no new VM; a boot that is under way is refused.
	booting := w.take(w.create(api.CreateVM{Name: "booting"}).ID)
	opened, why := booting.open(booting.vm.t1)
	if why != "" {
		t.Fatal(why)
	}
	w.withdraw(second.SHA256)
	if why := booting.attest(opened); why != event.QuoteRefused {
		t.Errorf("a boot under way was told %q", why)
	}
	vm := w.create(api.CreateVM{Name: "late"})
	if vm := w.waitPhase(vm.ID, reservation.Aborted); vm.Reason != event.NoHost || !strings.Contains(vm.Explanation, "no reference values") {
		t.Errorf("a new VM: %q %s", vm.Reason, vm.Explanation)
	}

	// 3. The next look at the computing VM's host closes it, and a restart changes nothing.
	w.watchEvery = 50 * time.Millisecond
	w.restart()
	for _, p := range w.platformList() {
		if p.Counts || p.Withdrawn.IsZero() {
			t.Errorf("after a restart: %+v", p)
		}
	}
	if vm := w.waitPhase("web", reservation.Stopped); vm.Reason != event.HostLost {
		t.Errorf("%q %s", vm.Reason, vm.Explanation)
	}
	w.waitGone(g.id)

	// 4. What was withdrawn comes back only under another signature.
	if status, p := w.post2("/v1/platforms", api.ImportDocument{Document: data}, nil); p.Reason != event.DocumentRefused || !strings.Contains(p.Detail, "a hole in its QEMU") {
		t.Errorf("%d %+v", status, p)
	}
	doc.ValidFrom = doc.ValidFrom.Add(time.Second)
	w.importPlatform(w.document(w.platform, signed.Platform, doc))
	w.call("POST", "/v1/vms/web/start", nil, nil)
	w.takeStart(g.id, 2).pass()
}

// TestReferenceValuesRefused: nothing but the tenant's own, of this profile, not yet ended.
func TestReferenceValuesRefused(t *testing.T) {
	w := newWorld(t)
	good, data := w.reference(-time.Minute)
	change := func(f func(*platform.Manifest)) []byte {
		doc := good
		f(&doc)
		return w.document(w.platform, signed.Platform, doc)
	}
	other := digest.Of([]byte("another"))
	for what, c := range map[string]struct {
		in     api.ImportDocument
		reason event.Reason
	}{
		"by the provider":  {api.ImportDocument{Document: w.document(w.inventory, signed.Platform, good)}, event.DocumentRefused},
		"truncated":        {api.ImportDocument{Document: data[:len(data)-20]}, event.DocumentRefused},
		"with a tail":      {api.ImportDocument{Document: append(slices.Clone(data), '1')}, event.DocumentRefused},
		"another profile":  {api.ImportDocument{Document: change(func(m *platform.Manifest) { m.Profile = platform.Production })}, event.DocumentRefused},
		"ended":            {api.ImportDocument{Document: change(func(m *platform.Manifest) { m.ValidUntil = time.Now().Add(-time.Second) })}, event.DocumentRefused},
		"without files":    {api.ImportDocument{Document: change(func(m *platform.Manifest) { m.Files = nil })}, event.DocumentRefused},
		"not as announced": {api.ImportDocument{Document: data, SHA256: &other}, event.DigestMismatch},
	} {
		if status, p := w.post2("/v1/platforms", c.in, nil); p.Reason != c.reason {
			t.Errorf("%s: %d %+v", what, status, p)
		}
	}
	if list := w.platformList(); len(list) != 1 {
		t.Errorf("stored were %+v", list)
	}
	if status, p := w.post2("/v1/platforms/"+other.String()+"/withdraw", api.WithdrawPlatform{Why: "x"}, nil); p.Reason != event.UnknownDocument {
		t.Errorf("withdraw what was never imported: %d %+v", status, p)
	}
	if status, p := w.post2("/v1/platforms/"+w.platformList()[0].SHA256.String()+"/withdraw", api.WithdrawPlatform{}, nil); p.Reason != event.BadRequest {
		t.Errorf("withdraw without a reason: %d %+v", status, p)
	}
	// One of the future is kept, and counts when its time comes.
	later := w.importPlatform(change(func(m *platform.Manifest) { m.ValidFrom = time.Now().Add(time.Hour) }))
	if later.Counts {
		t.Error("it counts before its beginning")
	}
	w.off = 2 * time.Hour
	w.restart()
	if list := w.platformList(); len(list) != 2 || !list[0].Counts {
		t.Errorf("two hours later: %+v", list)
	}
}

// TestEndsAreToldOf: three days ahead, once for each document, and of reference values only
// if no others of the release last longer.
func TestEndsAreToldOf(t *testing.T) {
	w := newWorld(t)
	told := func(when string, inventories, platforms int) {
		t.Helper()
		w.o.tellExpiry(t.Context())
		w.o.tellExpiry(t.Context())
		got := map[string]int{}
		for _, k := range w.kinds() {
			got[k]++
		}
		if got["inventory.ends-soon"] != inventories || got["platform.ends-soon"] != platforms {
			t.Errorf("%s: %d and %d", when, got["inventory.ends-soon"], got["platform.ends-soon"])
		}
	}
	told("both end in a month", 0, 0)
	list := w.listing(2, w.host.entry)
	list.Expires = time.Now().Add(24 * time.Hour)
	if status, p := w.post2("/v1/inventories", api.ImportDocument{Document: w.document(w.inventory, signed.Inventory, list)}, nil); status != http.StatusOK {
		t.Fatalf("%d %+v", status, p)
	}
	doc, _ := w.reference(-time.Minute)
	doc.ValidUntil = time.Now().Add(24 * time.Hour)
	w.importPlatform(w.document(w.platform, signed.Platform, doc))
	told("the inventory ends tomorrow, and one of two reference values", 1, 0)
	for _, p := range w.platformList() {
		if p.ValidUntil.After(time.Now().Add(48 * time.Hour)) {
			w.withdraw(p.SHA256)
		}
	}
	told("those that last are withdrawn", 1, 1)
}

// TestSwapWhileJudging: a verdict that was reached by documents that count no more when it
// would be stored is not stored, and its quote is judged again.
func TestSwapWhileJudging(t *testing.T) {
	w := newWorld(t)
	w.template("debian")
	g := w.computing("web")
	sum := w.platformList()[0].SHA256
	before := w.count("web", "quote.accepted")
	r, s, err := w.o.row(t.Context(), g.id)
	check(t, err)
	x := verify.StaticExpectation{Role: evidence.RoleWatch, Reservation: g.id, Start: 1, Host: r.Host, Previous: s.Verdict}
	check(t, json.Unmarshal(s.Clock, &x.Clock))
	check(t, w.o.ledger.Write(t.Context(), func(tx *ledger.Tx) (err error) { x.Nonce, err = tx.NewNonce(g.id, 1, x.Role); return err }))
	h, err := w.o.host(r.Host)
	check(t, err)
	q, err := h.Quote(context.Background(), evidence.StaticBinding(x.Role, g.id, s.Verdict, x.Nonce))
	check(t, err)
	judged := 0
	err = w.o.judge(func(v *verify.Verifier) (*verify.Admitted, verify.Verdict) {
		admitted, verdict := v.Static(x, verify.StaticEvidence{Quote: q.Quote, Platform: q.Platform})
		if judged++; judged == 1 {
			if !verdict.Good() {
				t.Errorf("before the withdrawal: %v", verdict.Err())
			}
			w.withdraw(sum)
		}
		return admitted, verdict
	}, func(b *basis, _ *verify.Admitted, v verify.Verdict) error {
		return w.o.keepVerdict(t.Context(), r, b, v, nil)
	})
	if event.ReasonOf(err) != event.QuoteRefused || judged != 2 {
		t.Errorf("judged %d times: %v", judged, err)
	}
	if after := w.count("web", "quote.accepted"); after != before {
		t.Errorf("%d verdicts were stored", after-before)
	}
}

// TestHostWithAnotherKeysClock: what was quoted by a key that the host had before refuses
// nothing, and its own key's clock goes on counting beside it.
func TestHostWithAnotherKeysClock(t *testing.T) {
	w := newWorld(t)
	w.template("debian")
	clocks := func(change func(verify.Clocks) verify.Clocks) (found verify.Clocks) {
		t.Helper()
		check(t, w.o.ledger.Write(t.Context(), func(tx *ledger.Tx) error {
			state, err := tx.Host("host-1")
			if err != nil {
				return err
			}
			if found, err = verify.ParseClocks(state.Clock); err != nil {
				return err
			}
			if change == nil {
				return nil
			}
			if state.Clock, err = json.Marshal(change(found)); err != nil {
				return err
			}
			return tx.PutHost("host-1", state)
		}))
		return found
	}
	former := verify.Clock{AIK: digest.Of([]byte("the key before")), Resets: 90}
	clocks(func(verify.Clocks) verify.Clocks { return verify.Clocks{former} })
	if why := w.take(w.create(api.CreateVM{Name: "a"}).ID).boot(); why != "" {
		t.Errorf("the first boot with the new key: %q", why)
	}
	now := clocks(func(c verify.Clocks) verify.Clocks {
		c = slices.Clone(c)
		c[len(c)-1].Resets += 3
		return c
	})
	if len(now) != 2 || now[0] != former || now[1].AIK != digest.Of(w.host.entry.AIK) {
		t.Errorf("stored: %+v", now)
	}
	if why := w.take(w.create(api.CreateVM{Name: "b"}).ID).boot(); why != event.QuoteRefused {
		t.Errorf("a TPM whose count of boots went back: %q", why)
	}
}
