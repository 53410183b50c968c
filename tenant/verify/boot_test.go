package verify

import (
	"slices"
	"strings"
	"testing"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"

	"github.com/google/go-tpm/tpm2"
)

func TestBoot(t *testing.T) {
	w := newWorld(t)
	v := w.verifier()

	t.Run("everything right", func(t *testing.T) {
		a := w.attempt()
		a.quote()
		admitted, verdict := v.Boot(a.expect, a.ev)
		if err := verdict.Err(); err != nil || !verdict.Good() {
			t.Fatal(err)
		}
		if err := admitted.Check(vmID, 1, "booting", w.now); err != nil {
			t.Error(err)
		}
		if verdict.Digest.IsZero() || verdict.Tunnel != a.tunnel || string(verdict.VMKey) != string(w.vmKey) || verdict.Clock == (Clock{}) {
			t.Errorf("verdict %+v", verdict)
		}
	})

	// Each case changes one thing; the verdict must name the check that fails for it and,
	// where says is set, explain it with those words. Other checks may fail with it.
	flip := func(b []byte, at int) []byte { c := slices.Clone(b); c[at] ^= 1; return c }
	bootServers := func(a *attempt) {
		a.tunnel = evidence.Tunnel(a.ev.ExporterHash, a.ev.ServerLeaf, a.ev.LoaderLeaf, a.ev.VMKey)
	}
	for what, c := range map[string]struct {
		before func(*attempt) // the host quotes
		after  func(*attempt)
		check  string
		says   string
	}{
		"another host's TPM":        {before: func(a *attempt) { a.onHost = w.rogue }, check: "signature"},
		"another host acknowledged": {before: func(a *attempt) { a.expect.Host = "host-2" }, check: "signature"},
		"host not in the inventory": {before: func(a *attempt) { a.expect.Host = "host-9" }, check: "host", says: "not in the inventory"},
		"wrong nonce":               {before: func(a *attempt) { a.nonce = nonce() }, check: "binding"},
		"replayed quote":            {after: func(a *attempt) { a.expect.Nonce = nonce() }, check: "binding"},
		"short nonce":               {before: func(a *attempt) { a.expect.Nonce = a.nonce[:16]; a.nonce = a.expect.Nonce }, check: "input"},
		"zero nonce":                {before: func(a *attempt) { a.expect.Nonce = make([]byte, 32); a.nonce = a.expect.Nonce }, check: "input"},
		"no nonce":                  {before: func(a *attempt) { a.expect.Nonce = nil; a.nonce = nil }, check: "input"},
		"another reservation":       {after: func(a *attempt) { a.expect.Reservation = "1b6c2f4e-5a7d-4c1b-9e57-3d2a8f60c911" }, check: "binding"},
		"another start":             {after: func(a *attempt) { a.expect.Start = 2 }, check: "input"},
		"start zero":                {after: func(a *attempt) { a.expect.Start = 0 }, check: "input"},
		"selection too small":       {before: func(a *attempt) { a.selection[0].PCRSelect = bitmap(pcr.StaticSelection()) }, check: "selection"},
		"selection too large":       {before: func(a *attempt) { a.selection[0].PCRSelect = bitmap(append(pcr.BootSelection(), 15)) }, check: "selection"},
		"no register":               {before: func(a *attempt) { a.selection[0].PCRSelect = bitmap(nil) }, check: "selection"},
		"no bank":                   {before: func(a *attempt) { a.selection = nil }, check: "selection"},
		"log empty":                 {before: func(a *attempt) { a.ev.Platform.Log = nil }, check: "log", says: `"foothold-host" was not measured`},
		"log cut":                   {before: func(a *attempt) { a.ev.Platform.Log = a.ev.Platform.Log[:3] }, check: "log", says: `"host-config" was not measured`},
		"log altered":               {before: func(a *attempt) { a.ev.Platform.Log[1].Digest[0] ^= 1 }, check: "log", says: `"qemu-system-x86_64" has sha256`},
		"log in another order": {before: func(a *attempt) {
			a.ev.Platform.Log[0], a.ev.Platform.Log[1] = a.ev.Platform.Log[1], a.ev.Platform.Log[0]
		}, check: "log", says: "measured where"},
		"log extended":              {before: func(a *attempt) { a.ev.Platform.Log = append(a.ev.Platform.Log, a.ev.Platform.Log[0]) }, check: "log", says: "one more"},
		"log of another register":   {before: func(a *attempt) { a.ev.Platform.Log = append(a.ev.Platform.Log, pcr.Event{PCR: 16}) }, check: "log", says: "register 16"},
		"log over its limit":        {before: func(a *attempt) { a.ev.Platform.Log = make([]pcr.Event, pcr.MaxEvents+1) }, check: "log", says: "at most"},
		"altered settings":          {before: func(a *attempt) { a.settings.MemoryMiB = 2048; a.claims() }, check: "registers", says: "settings digest is"},
		"altered network":           {before: func(a *attempt) { a.settings.Network.MAC = "02:00:00:00:00:0b" }, check: "registers"},
		"another token":             {before: func(a *attempt) { a.settings.TokenDigest = digest.Of([]byte("x")) }, check: "registers"},
		"altered loader":            {before: func(a *attempt) { a.firmware.LoaderInitramfs[0] ^= 1; a.claims() }, check: "registers", says: "loader initramfs is"},
		"altered loader, unclaimed": {before: func(a *attempt) { a.firmware.LoaderInitramfs[0] ^= 1 }, check: "registers", says: "neither the host's log nor its claims"},
		"altered loader arguments":  {before: func(a *attempt) { a.firmware.LoaderCmdline += " init=/bin/sh"; a.claims() }, check: "registers", says: "init=/bin/sh"},
		"altered firmware":          {before: func(a *attempt) { a.firmware.BIOS[0] ^= 1; a.claims() }, check: "registers", says: "firmware is"},
		"other exporter":            {after: func(a *attempt) { a.ev.ExporterHash[0] ^= 1 }, check: "binding"},
		"other server certificate":  {after: func(a *attempt) { a.ev.ServerLeaf = selfSigned(t, "boot.foothold.internal", &w.ca).der }, check: "binding"},
		"other loader certificate":  {after: func(a *attempt) { a.ev.LoaderLeaf = selfSigned(t, "loader", nil).der }, check: "binding"},
		"other VM key":              {after: func(a *attempt) { a.ev.VMKey = flip(a.ev.VMKey, 0) }, check: "binding"},
		"server of another CA":      {before: func(a *attempt) { a.ev.ServerLeaf = selfSigned(t, "boot.foothold.internal", nil).der; bootServers(a) }, check: "input", says: "boot server's certificate"},
		"server of another name": {before: func(a *attempt) {
			a.ev.ServerLeaf = selfSigned(t, "gateway.foothold.internal", &w.ca).der
			bootServers(a)
		}, check: "input"},
		"no loader certificate":      {before: func(a *attempt) { a.ev.LoaderLeaf = nil; bootServers(a) }, check: "input"},
		"loader certificate garbled": {before: func(a *attempt) { a.ev.LoaderLeaf = []byte("leaf"); bootServers(a) }, check: "input"},
		"VM key too long":            {before: func(a *attempt) { a.ev.VMKey = make([]byte, 33); bootServers(a) }, check: "input"},
		"no exporter":                {before: func(a *attempt) { a.ev.ExporterHash = digest.SHA256{}; bootServers(a) }, check: "input"},
		"settings malformed":         {before: func(a *attempt) { a.settings.VCPUs = 0; a.expect.Settings = a.settings }, check: "input"},
		"signature altered":          {after: func(a *attempt) { a.ev.Quote.Signature = flip(a.ev.Quote.Signature, len(a.ev.Quote.Signature)-1) }, check: "signature"},
		"signature with a tail":      {after: func(a *attempt) { a.ev.Quote.Signature = append(a.ev.Quote.Signature, 0) }, check: "signature", says: "exactly one"},
		"signature missing":          {after: func(a *attempt) { a.ev.Quote.Signature = nil }, check: "signature"},
		"signature huge":             {after: func(a *attempt) { a.ev.Quote.Signature = make([]byte, maxQuote+1) }, check: "signature"},
		"quote altered":              {after: func(a *attempt) { a.ev.Quote.Attest = flip(a.ev.Quote.Attest, len(a.ev.Quote.Attest)-1) }, check: "signature"},
		"quote with a tail":          {after: func(a *attempt) { a.ev.Quote.Attest = append(a.ev.Quote.Attest, 0) }, check: "quote", says: "exactly one"},
		"quote missing":              {after: func(a *attempt) { a.ev.Quote.Attest = nil }, check: "quote"},
		"quote of no TPM":            {after: func(a *attempt) { a.ev.Quote.Attest = flip(a.ev.Quote.Attest, 0) }, check: "quote"},
		"certification as quote": {after: func(a *attempt) {
			a.ev.Quote = evidence.Quote{Attest: w.host.entry.SessionCertify, Signature: w.host.entry.SessionSignature}
		}, check: "quote", says: "something else"},
		"clock of another AIK":  {after: func(a *attempt) { a.expect.Clock = Clock{AIK: digest.Of([]byte("x"))} }, check: "clock"},
		"clock went back":       {after: func(a *attempt) { a.expect.Clock = a.clock(); a.expect.Clock.Millis += 1 << 30 }, check: "clock", says: "clock went back"},
		"reset count went back": {after: func(a *attempt) { a.expect.Clock = a.clock(); a.expect.Clock.Resets++ }, check: "clock", says: "reset count went back by 1"},
		"restart count changed": {after: func(a *attempt) { a.expect.Clock = a.clock(); a.expect.Clock.Restarts++ }, check: "clock", says: "suspended"},
	} {
		t.Run(what, func(t *testing.T) {
			a := w.attempt()
			if c.before != nil {
				c.before(a)
			}
			a.quote()
			if c.after != nil {
				c.after(a)
			}
			admitted, verdict := v.Boot(a.expect, a.ev)
			if admitted != nil || verdict.Good() {
				t.Fatal("admitted")
			}
			if admitted.Check(vmID, 1, "booting", w.now) == nil {
				t.Fatal("the refused permission holds")
			}
			err := verdict.Err()
			if event.ReasonOf(err) != event.QuoteRefused {
				t.Errorf("reason of %v", err)
			}
			if !slices.ContainsFunc(verdict.Findings, func(f Finding) bool { return f.Check == c.check && strings.Contains(f.Detail, c.says) }) {
				t.Errorf("want a finding of %q saying %q, got %v", c.check, c.says, verdict.Findings)
			}
			if verdict.Clock != (Clock{}) {
				t.Error("a refused quote's clock is believed")
			}
		})
	}

	t.Run("all findings at once", func(t *testing.T) {
		a := w.attempt()
		a.onHost, a.nonce, a.ev.Platform.Log = w.rogue, nonce(), nil
		a.selection[0].PCRSelect = bitmap(pcr.StaticSelection())
		a.ev.VMKey = nil
		a.quote()
		_, verdict := v.Boot(a.expect, a.ev)
		for _, check := range []string{"signature", "binding", "selection", "log", "input"} {
			if !strings.Contains(checks(verdict), check) {
				t.Errorf("no finding of %q in %v", check, verdict.Findings)
			}
		}
	})

	t.Run("two banks", func(t *testing.T) {
		a := w.attempt()
		both := append(a.selection, tpm2.TPMSPCRSelection{Hash: tpm2.TPMAlgSHA1, PCRSelect: bitmap(pcr.BootSelection())})
		if _, err := selected(both); err == nil {
			t.Error("two banks were accepted")
		}
		if _, err := selected(both[1:]); err == nil {
			t.Error("the SHA-1 bank was accepted")
		}
	})

	t.Run("expired", func(t *testing.T) {
		a := w.attempt()
		a.quote()
		later := w.now.Add(time.Hour)
		if _, verdict := w.verifierAt(&later).Boot(a.expect, a.ev); verdict.Good() || !strings.Contains(checks(verdict), "inventory") {
			t.Errorf("expired inventory: %v", verdict.Findings)
		}
		later = w.now.Add(2 * time.Hour)
		if _, verdict := w.verifierAt(&later).Boot(a.expect, a.ev); verdict.Good() || !strings.Contains(checks(verdict), "platform") {
			t.Errorf("expired reference values: %v", verdict.Findings)
		}
	})

	t.Run("unknown release", func(t *testing.T) {
		a := w.attempt()
		a.quote()
		w.host.entry.Software = "release-2"
		defer func() { w.host.entry.Software = "release-1" }()
		if _, verdict := w.verifier().Boot(a.expect, a.ev); verdict.Good() || !strings.Contains(checks(verdict), "platform") {
			t.Errorf("unknown release: %v", verdict.Findings)
		}
	})
}

// claims lets the host say truthfully what it started.
func (a *attempt) claims() {
	a.expect.Claim = &Claim{Settings: a.settings.Digest(), Firmware: a.firmware}
}

// clock is what the quote says.
func (a *attempt) clock() Clock {
	attest, err := parseAttest(a.ev.Quote.Attest)
	if err != nil {
		panic(err)
	}
	return clockOf(digest.Of(a.onHost.entry.AIK), attest.ClockInfo)
}

// A host that ran other files than the release's is refused, and told which, whether
// its log tells the truth or not; so is one that extended something unlogged.
func TestAlteredPlatform(t *testing.T) {
	w := newWorld(t)
	v := w.verifier()
	w.host.reboot()
	altered := slices.Clone(w.files)
	altered[1] = platform.File{Name: "qemu-system-x86_64", SHA256: digest.Of([]byte("trojan"))}
	w.host.boot(altered)

	a := w.attempt()
	a.quote()
	_, verdict := v.Boot(a.expect, a.ev)
	if text := verdict.Err().Error(); !strings.Contains(text, `"qemu-system-x86_64" has sha256`) || !strings.Contains(text, "as the host's log says") {
		t.Errorf("true log: %v", verdict.Findings)
	}

	a = w.attempt()
	a.ev.Platform.Log = append([]pcr.Event{}, w.rogue.log...) // the log of a good host
	a.quote()
	if _, verdict = v.Boot(a.expect, a.ev); verdict.Good() || strings.TrimSpace(checks(verdict)) != "registers" {
		t.Errorf("false log: %v", verdict.Findings)
	}

	w.host.reboot()
	w.host.boot(w.files)
	a = w.attempt()
	a.quote()
	if _, verdict = v.Boot(a.expect, a.ev); !verdict.Good() {
		t.Errorf("after a good boot: %v", verdict.Err())
	}
	for _, register := range []int{0, 7, 10, 14} {
		w.host.reboot()
		w.host.boot(w.files)
		w.host.extend(register, digest.Of([]byte("unlogged")))
		a = w.attempt()
		a.quote()
		if _, verdict = v.Boot(a.expect, a.ev); verdict.Good() || !strings.Contains(checks(verdict), "registers") {
			t.Errorf("register %d extended unlogged: %v", register, verdict.Findings)
		}
	}
}
