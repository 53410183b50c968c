package verify

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/imalog"
	"foothold/protocol/inventory"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/platform/platformtest"
	"foothold/protocol/systemdlog"
	"foothold/protocol/tcglog"
)

// Whatever a host in production sends as its logs is judged without a panic, and only logs
// that say what was quoted admit: the same digests in the same registers, the same state of
// secure boot, the same files.
func FuzzProductionLogs(f *testing.F) {
	w := &world{t: f, now: time.Now(), host: &host{}}
	m := newMachine()
	w.files, w.firmware.BIOS, w.firmware.LoaderKernel, w.firmware.LoaderInitramfs = m.Files, digest.Of([]byte("b")), digest.Of([]byte("k")), digest.Of([]byte("i"))
	plat := &Platform{doc: m.manifest(w)}
	plat.doc.Userspace = words("enter-initrd", "9:index", "leave-initrd", "ready")
	plat.index()
	key := selfSigned(f, "aik", nil).key
	v := &Verifier{
		inventory: &Inventory{doc: inventory.Inventory{Expires: w.now.Add(time.Hour)}, hosts: map[string]*hostKeys{
			"host-1": {entry: inventory.Host{Name: "host-1", Software: "release-1", Location: "site 1"}, aik: &key.PublicKey, name: digest.Of([]byte("aik"))},
		}},
		platforms: map[string][]*Platform{"release-1": {plat}}, profile: platform.Production, policies: anywhere, now: func() time.Time { return w.now },
	}
	m.Texts = plat.doc.Userspace[:2]
	regs := pcr.Replay(m.Measured())
	m.Texts = plat.doc.Userspace[:3] // and then came the quote
	logs := m.Logs()
	l, err := tcglog.Parse(logs.Firmware)
	if err != nil {
		f.Fatal(err)
	}
	n := bytes.Repeat([]byte{7}, evidence.NonceLen)
	q := softQuote(f, key, evidence.SurveyBinding("host-1", n), pcr.Composite(pcr.BootSelection(), regs))
	if verdict := v.Current().Survey("host-1", n, Clock{}, StaticEvidence{Quote: q, Platform: logs}); checks(verdict) != "selection " { // the seed quotes a boot's registers
		f.Fatal(verdict.Findings)
	}
	expect := quoteExpectation{selection: pcr.BootSelection(), registers: map[int]digest.SHA256{}}
	judge := func(p evidence.Platform) []Finding {
		j := v.begin(evidence.RoleSurvey, "", 0, "host-1", w.now, plat, p, 0)
		x := expect
		x.static, x.claimed = j.readLogs(j.logs)
		x.binding = evidence.SurveyBinding("host-1", n)
		j.quote(q, x)
		return j.verdict.Findings
	}
	if found := judge(logs); len(found) != 0 {
		f.Fatal(found)
	}
	f.Add(logs.Firmware, logs.Kernel, logs.Userspace)
	f.Add(platformtest.FirmwareLog(m.Events[1:]), logs.Kernel, logs.Userspace)
	f.Add(logs.Firmware, append(bytes.Clone(logs.Kernel), platformtest.Violation("/usr/bin/foothold-host")...), []byte{})
	f.Fuzz(func(t *testing.T, firmware, kernel, userspace []byte) {
		if len(judge(evidence.Platform{Firmware: firmware, Kernel: kernel, Userspace: userspace})) > 0 {
			return
		}
		records, err := systemdlog.Parse(userspace)
		if err != nil {
			t.Fatal(err)
		}
		at := map[int]int{}
		for _, r := range records {
			texts := ofTexts(plat.doc.Userspace, r.PCR)
			if n := at[r.PCR]; slices.Contains(pcr.Static, r.PCR) && (n == len(texts) || r.SHA256 != texts[n].Digest()) {
				t.Fatalf("record %d, %q, was accepted", r.Number, r.Text)
			}
			at[r.PCR]++
		}
		if len(userspace) > 0 && (at[9] < 1 || at[11] < 1) {
			t.Fatalf("a log of %v records was accepted, the quote shows more", at)
		}
		got, err := tcglog.Parse(firmware)
		if err != nil {
			t.Fatal(err)
		}
		for i := range regs {
			if !slices.EqualFunc(ofRegister(got.Events, i), ofRegister(l.Events, i), func(a, b tcglog.Event) bool {
				return bytes.Equal(a.Digest(tcglog.SHA256), b.Digest(tcglog.SHA256))
			}) {
				t.Fatalf("other events of register %d were accepted", i)
			}
		}
		if !slices.ContainsFunc(got.Events, func(e tcglog.Event) bool { return string(e.Data) == platformtest.SecureBoot(1) }) {
			t.Fatal("secure boot was taken for on by other data")
		}
		list, err := imalog.Parse(kernel)
		if err != nil || len(list.Entries) < 1+len(m.Files) {
			t.Fatalf("%d entries, %v", len(list.Entries), err)
		}
	})
}

func ofRegister(events []tcglog.Event, index int) (out []tcglog.Event) {
	for _, e := range events {
		if e.PCR == index {
			out = append(out, e)
		}
	}
	return out
}
