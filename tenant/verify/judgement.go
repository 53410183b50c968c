package verify

import (
	"crypto/subtle"
	"fmt"
	"maps"
	"slices"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/event"
	"foothold/protocol/evidence"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/vmspec"
)

// maxFindings bounds what one quote can write into the journal, maxTrial what one is said to
// differ by for people: a release of the platform may change thousands of files. The last
// finding says how many more there were.
const (
	maxFindings = 64
	maxTrial    = 4096
)

// judgement is one quote being judged.
type judgement struct {
	v        *Verifier
	verdict  Verdict
	host     *hostKeys // nil: not in the inventory
	platform *Platform // nil: no reference values
	policy   Policy    // of the host
	logs     evidence.Platform
	kept     Document // the logs, as they enter the bundle
	dropped  int      // bytes of logs that are too large to be read or kept; 0: none
	more     int      // findings beyond maxFindings
}

// find is a finding about what the check is about as a whole; the text says what was seen.
func (j *judgement) find(check, format string, args ...any) {
	about, seen := subjects[check], fmt.Sprintf(format, args...)
	j.add(Finding{Check: check, Component: about.component, Expected: about.expected, Seen: seen, Do: about.do, Detail: seen})
}

// differ is a finding about one component.
func (j *judgement) differ(check, component, expected, seen, do string) {
	j.add(Finding{Check: check, Component: component, Expected: expected, Seen: seen, Do: do,
		Detail: fmt.Sprintf("%s: seen %s, want %s; %s", component, seen, expected, do)})
}

func (j *judgement) add(f Finding) {
	if len(j.verdict.Findings) == j.most() {
		j.more++
		return
	}
	j.verdict.Findings = append(j.verdict.Findings, f)
}

func (j *judgement) most() int { return max(maxFindings, j.v.most) }

// begin checks what does not depend on the quote, as of at: inventory, host, and the
// reference values p, which are nil where the host's release has none.
func (v *Verifier) begin(role, reservation string, start int, host string, at time.Time, p *Platform, logs evidence.Platform, dropped int) *judgement {
	j := &judgement{v: v, verdict: Verdict{Role: role, Reservation: reservation, Start: start, Host: host, At: at}}
	j.logs, j.kept, j.dropped = keepable(logs, dropped)
	if role != evidence.RoleSurvey && (!vmspec.ValidID(reservation) || start < 1) {
		j.find("input", "there is no start %d of %q", start, reservation)
	}
	if j.dropped > 0 {
		j.find("input", "the host's logs have %d bytes, at most %d are read", j.dropped, maxLogs)
	}
	j.standing(host, at, p)
	return j
}

// standing checks what the documents say of a host.
func (j *judgement) standing(host string, at time.Time, p *Platform) {
	v := j.v
	if err := v.inventory.InForce(at); err != nil {
		j.find("inventory", "%v", err)
	}
	h, ok := v.inventory.hosts[host]
	if !ok {
		j.find("host", "%q is not in the inventory", host)
		return
	}
	j.host = h
	for _, problem := range h.problems {
		j.find("host", "%s", problem)
	}
	j.policy = v.policies.of(host)
	j.location()
	if p == nil {
		j.find("platform", "there are no reference values for its release %q", h.entry.Software)
		return
	}
	j.platform, j.verdict.Manifest = p, p.digest
	if p.doc.Profile != v.profile {
		j.find("platform", "its release is of profile %q, this installation accepts %q", p.doc.Profile, v.profile)
	}
	if err := p.InForce(at); err != nil {
		j.find("platform", "reference values of %s: %v", p.doc.Name, err)
	}
}

// references lists the reference values of a host's release that count at a time, those that
// began last first. Where none counts it is the newest, so that the finding says since when;
// nil stands for none at all.
func (v *Verifier) references(host string, at time.Time) []*Platform {
	var all, counting []*Platform
	if h, ok := v.inventory.hosts[host]; ok {
		all = v.platforms[h.entry.Software]
	}
	for _, p := range all {
		if p.InForce(at) == nil {
			counting = append(counting, p)
		}
	}
	switch {
	case len(counting) > 0:
		return counting
	case len(all) > 0:
		return all[:1]
	}
	return []*Platform{nil}
}

// byAny judges by each of the reference values that count until one admits. Where none
// does, the verdict is by the one that is missed least, of equals the newest.
func (v *Verifier) byAny(host string, at time.Time, judge func(*Platform) Verdict) Verdict {
	var closest Verdict
	for i, p := range v.references(host, at) {
		verdict := judge(p)
		if verdict.Good() {
			return verdict
		}
		if i == 0 || len(verdict.Findings) < len(closest.Findings) {
			closest = verdict
		}
	}
	return closest
}

// Host is nil for a host that nothing in the documents speaks against now: it is in the
// inventory with its keys in order, and its release has reference values that count. What
// it runs, a quote alone tells.
func (v *Verifier) Host(name string) error {
	j := &judgement{v: v}
	at := v.now()
	j.standing(name, at, v.references(name, at)[0])
	if len(j.verdict.Findings) == 0 {
		return nil
	}
	refusal := event.Refuse(event.HostLost, "host %s", name)
	refusal.Findings = j.verdict.Findings
	return refusal
}

func (j *judgement) nonce(nonce []byte) {
	if len(nonce) != evidence.NonceLen || slices.Max(nonce) == 0 {
		j.find("input", "the nonce is not one of ours")
	}
}

// log holds the host's log against the reference values: the same digests in the same
// order, nothing missing, nothing more. Names in the log are claims and only quoted.
func (j *judgement) log(log []pcr.Event) {
	if len(log) > pcr.MaxEvents {
		j.find("log", "it has %d entries, at most %d are read", len(log), pcr.MaxEvents)
		return
	}
	var files []platform.File
	if j.platform != nil {
		files = j.platform.doc.Files
	}
	for i, e := range log {
		switch {
		case e.PCR != pcr.Platform:
			j.find("log", "entry %d (%.80q) extends register %d, for which there are no reference values", i+1, e.Name, e.PCR)
		case i >= len(files):
			j.add(Finding{Check: "log", Component: fmt.Sprintf("%.80q, by its own name", e.Name), Expected: "not to be there", Seen: e.Digest.String(), Do: changedPlatform,
				Detail: fmt.Sprintf("entry %d (%.80q, sha256 %s) is one more than the reference values have", i+1, e.Name, e.Digest)})
		case e.Digest != files[i].SHA256:
			j.wrongFile(e, files, i)
		}
	}
	for i := len(log); i < len(files); i++ {
		j.add(Finding{Check: "log", Component: fmt.Sprintf("file %q", files[i].Name), Expected: files[i].SHA256.String(), Seen: "it was not measured", Do: changedPlatform,
			Detail: fmt.Sprintf("file %q was not measured", files[i].Name)})
	}
}

func (j *judgement) wrongFile(e pcr.Event, files []platform.File, i int) {
	f := Finding{Check: "log", Component: fmt.Sprintf("file %q", files[i].Name), Expected: files[i].SHA256.String(), Seen: e.Digest.String(), Do: changedPlatform,
		Detail: fmt.Sprintf("entry %d: file %q has sha256 %s, its reference value is %s", i+1, files[i].Name, e.Digest, files[i].SHA256)}
	if at := slices.IndexFunc(files, func(f platform.File) bool { return f.SHA256 == e.Digest }); at >= 0 {
		f.Seen = fmt.Sprintf("file %q in its place", files[at].Name)
		f.Detail = fmt.Sprintf("entry %d: file %q was measured where %q belongs", i+1, files[at].Name, files[i].Name)
	}
	j.add(f)
}

// candidate is a value that a register may hold instead of the expected one.
type candidate struct {
	value digest.SHA256
	says  string
}

type quoteExpectation struct {
	binding   digest.SHA256
	selection []int
	static    measured              // what the static registers must hold
	registers map[int]digest.SHA256 // beside them
	claimed   measured              // for the explanation: the static ones by the host's word
	others    map[int][]candidate   // for the explanation
	clock     Clock
	ran       bool // BootExpectation.Ran
}

// quote checks the quoted structure and its signature.
func (j *judgement) quote(q evidence.Quote, want quoteExpectation) {
	if j.host == nil || j.host.aik == nil {
		j.find("signature", "not checked: no attestation key is known for the host")
	} else if err := checkSignature(j.host.aik, q.Attest, q.Signature); err != nil {
		j.find("signature", "%v", err)
	}
	quoted, err := parseQuote(q.Attest)
	if err != nil {
		j.find("quote", "%v", err)
		return
	}
	if subtle.ConstantTimeCompare(quoted.extra, want.binding[:]) != 1 {
		j.find("binding", "it was made for another role, reservation, tunnel, settings, earlier verdict or nonce")
	}
	if list, err := selected(quoted.selection); err != nil {
		j.find("selection", "%v", err)
	} else if !slices.Equal(list, want.selection) {
		j.find("selection", "it covers registers %v, want %v", list, want.selection)
	} else {
		j.registers(quoted.digest, want)
	}
	if j.host != nil {
		j.clock(clockOf(j.host.name, quoted.clock), want)
	}
}

func (j *judgement) clock(now Clock, want quoteExpectation) {
	rebooted, err := want.clock.follow(now, j.verdict.Role)
	if err == nil && rebooted && want.ran {
		err = fmt.Errorf("the host has booted %d times since this VM was started there, or its TPM alone was reset", booted(want.clock, now))
	}
	if err != nil {
		j.find("clock", "%v", err)
	}
	j.verdict.Clock, j.verdict.Rebooted = now, rebooted
}

// registers compares the quoted digest with the one that the expected registers have.
func (j *judgement) registers(got []byte, want quoteExpectation) {
	if j.platform == nil {
		j.find("registers", "not checked: no reference values")
		return
	}
	if want.static.leads(want.selection, want.registers, got) {
		return
	}
	for _, text := range explain(got, want) {
		j.find("registers", "%s", text)
	}
}

// explain tries which other values lead to the quoted digest: static registers by the
// host's own word, the VM's by each candidate. It says so where nothing known does.
func explain(got []byte, want quoteExpectation) []string {
	type option struct {
		static measured
		others map[int]digest.SHA256
		says   []string
	}
	options := []option{
		{want.static, want.registers, nil},
		{measured{regs: map[int]digest.SHA256{}}, want.registers, []string{"the static registers are empty: the TPM was started, or reset, after the host was measured; the host must boot, which measures it anew"}},
		{want.claimed, want.registers, []string{"the static registers are as the host's log says, and not as the reference values want"}},
	}
	for _, reg := range slices.Sorted(maps.Keys(want.others)) {
		for _, o := range options {
			for _, c := range want.others[reg] {
				others := maps.Clone(o.others)
				others[reg] = c.value
				options = append(options, option{o.static, others, append(slices.Clone(o.says), fmt.Sprintf("PCR %d %s", reg, c.says))})
			}
		}
	}
	for _, o := range options {
		if len(o.says) > 0 && o.static.leads(want.selection, o.others, got) {
			return o.says
		}
	}
	if says := explainTexts(got, want); says != "" {
		return []string{says}
	}
	return []string{"the quoted registers differ from the expected ones, and neither the host's log nor its claims lead to them"}
}

// end seals the verdict: what it rests on and what was found are its record.
func (j *judgement) end(r Record) Verdict {
	v := &j.verdict
	if j.more > 0 {
		v.Findings = v.Findings[:j.most()-1]
		j.find("more", "%d more findings", j.more+1)
	}
	if v.good = len(v.Findings) == 0; !v.good {
		v.Clock = Clock{} // of a refused quote nothing is believed
	}
	r.Profile, r.At, r.Accepted, r.Findings, r.Dropped = j.v.profile, v.At, v.good, append([]Finding{}, v.Findings...), j.dropped
	if j.host != nil && (j.v.profile == platform.Production || len(j.policy.Locations) > 0) {
		r.Policy = &j.policy
	}
	r.Inventory = ReadInventory{SHA256: j.v.inventory.digest, Version: j.v.inventory.doc.Version, Read: j.v.inventory.read}
	v.Parts.Inventory = j.v.inventory.signed
	if p := j.platform; p != nil {
		r.Platform = &ReadPlatform{SHA256: p.digest, Name: p.doc.Name, Read: p.read}
		v.Parts.Platform = p.signed
	}
	if err := v.Parts.seal(v, r, j.kept); err != nil {
		// What cannot be kept cannot be shown to anybody.
		v.good, v.Clock, v.Parts = false, Clock{}, Parts{}
		v.Findings = append(v.Findings, Finding{Check: "input", Component: subjects["input"].component, Expected: subjects["input"].expected,
			Seen: err.Error(), Do: subjects["input"].do, Detail: err.Error()})
	}
	return *v
}
