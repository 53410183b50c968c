package verify

import (
	"crypto/subtle"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/transcript"
	"foothold/protocol/vmspec"

	"github.com/google/go-tpm/tpm2"
)

// maxFindings bounds what one quote can write into the journal, maxTrial what one is said to
// differ by for people: a release of the platform may change thousands of files.
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
}

func (j *judgement) find(check, format string, args ...any) {
	if len(j.verdict.Findings) < max(maxFindings, j.v.most) {
		j.verdict.Findings = append(j.verdict.Findings, Finding{Check: check, Detail: fmt.Sprintf(format, args...)})
	}
}

// differ is a finding about one component.
func (j *judgement) differ(check, component, expected, seen, do string) {
	if len(j.verdict.Findings) < max(maxFindings, j.v.most) {
		j.verdict.Findings = append(j.verdict.Findings, Finding{Check: check, Component: component, Expected: expected, Seen: seen, Do: do,
			Detail: fmt.Sprintf("%s: seen %s, want %s; %s", component, seen, expected, do)})
	}
}

// begin checks what does not depend on the quote: inventory, host, platform.
func (v *Verifier) begin(role, reservation string, start int, host string, at time.Time) *judgement {
	j := &judgement{v: v, verdict: Verdict{Role: role, Reservation: reservation, Start: start, Host: host, At: at}}
	if role != evidence.RoleSurvey && (!vmspec.ValidID(reservation) || start < 1) {
		j.find("input", "there is no start %d of %q", start, reservation)
	}
	// Whatever At a stored verdict names, the inventory must be in force today.
	if err := v.inventory.inForce(v.now()); err != nil {
		j.find("inventory", "%v", err)
	}
	h, ok := v.inventory.hosts[host]
	if !ok {
		j.find("host", "%q is not in the inventory", host)
		return j
	}
	j.host = h
	for _, p := range h.problems {
		j.find("host", "%s", p)
	}
	j.policy = v.policies.of(host)
	j.location()
	p, ok := v.platforms[h.entry.Software]
	if !ok {
		j.find("platform", "there are no reference values for its release %q", h.entry.Software)
		return j
	}
	j.platform = p
	if p.doc.Profile != v.profile {
		j.find("platform", "its release is of profile %q, this installation accepts %q", p.doc.Profile, v.profile)
	}
	if err := p.inForce(v.now()); err != nil {
		j.find("platform", "reference values of %s: %v", p.doc.Name, err)
	}
	return j
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
			j.find("log", "entry %d (%.80q, sha256 %s) is one more than the reference values have", i+1, e.Name, e.Digest)
		case e.Digest != files[i].SHA256:
			j.find("log", "entry %d: %s", i+1, wrongFile(e, files, i))
		}
	}
	for i := len(log); i < len(files); i++ {
		j.find("log", "file %q was not measured", files[i].Name)
	}
}

func wrongFile(e pcr.Event, files []platform.File, i int) string {
	if at := slices.IndexFunc(files, func(f platform.File) bool { return f.SHA256 == e.Digest }); at >= 0 {
		return fmt.Sprintf("file %q was measured where %q belongs", files[at].Name, files[i].Name)
	}
	return fmt.Sprintf("file %q has sha256 %s, its reference value is %s", files[i].Name, e.Digest, files[i].SHA256)
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
}

// quote checks the quoted structure and its signature.
func (j *judgement) quote(q evidence.Quote, want quoteExpectation) {
	if j.host == nil || j.host.aik == nil {
		j.find("signature", "not checked: no attestation key is known for the host")
	} else if err := checkSignature(j.host.aik, q.Attest, q.Signature); err != nil {
		j.find("signature", "%v", err)
	}
	attest, err := parseAttest(q.Attest)
	if err != nil {
		j.find("quote", "%v", err)
		return
	}
	info, err := attest.Attested.Quote()
	if attest.Type != tpm2.TPMSTAttestQuote || err != nil {
		j.find("quote", "the TPM made it for something else than a quote")
		return
	}
	if subtle.ConstantTimeCompare(attest.ExtraData.Buffer, want.binding[:]) != 1 {
		j.find("binding", "it was made for another role, reservation, tunnel, settings, earlier verdict or nonce")
	}
	if list, err := selected(info.PCRSelect); err != nil {
		j.find("selection", "%v", err)
	} else if !slices.Equal(list, want.selection) {
		j.find("selection", "it covers registers %v, want %v", list, want.selection)
	} else {
		j.registers(info.PCRDigest.Buffer, want)
	}
	if j.host != nil {
		j.clock(clockOf(j.host.name, attest.ClockInfo), want.clock)
	}
}

func (j *judgement) clock(now, last Clock) {
	rebooted, err := last.follow(now, j.verdict.Role)
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
	return []string{"the quoted registers differ from the expected ones, and neither the host's log nor its claims lead to them"}
}

// end seals the verdict.
func (j *judgement) end(nonce []byte, previous digest.SHA256, q evidence.Quote, s stored) (*Admitted, Verdict) {
	v := &j.verdict
	v.good = len(v.Findings) == 0
	good := []byte{0}
	if v.good {
		good[0] = 1
	} else {
		v.Clock = Clock{} // of a refused quote nothing is believed
	}
	v.Digest = transcript.Sum("foothold/verdict/v1", []byte(v.Role), []byte(v.Reservation),
		binary.BigEndian.AppendUint64(nil, uint64(v.Start)), []byte(v.Host), nonce, previous[:], q.Attest, q.Signature, good)
	s.At = v.At
	if err := s.encode(&v.Evidence); err != nil {
		// What cannot be stored cannot be verified again.
		v.good = false
		j.find("input", "evidence: %v", err)
		v.Clock = Clock{}
	}
	return admit(*v), *v
}
