package verify

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"foothold/internal/tpm"
	"foothold/protocol/digest"
	"foothold/protocol/hostaudit"
	"foothold/protocol/inventory"
	"foothold/protocol/signed"

	"github.com/google/go-tpm/tpm2"
)

// audited is one audit with everything right, ordered of w.host; at asks another TPM.
type audited struct {
	w      *world
	expect AuditExpectation
	key    ed25519.PrivateKey
}

func (w *world) auditOf(h *host) audited {
	w.t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	h.must(err)
	ek, err := x509.ParseCertificate(h.entry.EK)
	h.must(err)
	secret := bytes.Repeat([]byte{9}, tpm.SecretLen)
	o := hostaudit.Order{Number: strings.Repeat("0b", 16), Host: h.entry.Name, Nonce: nonce()}
	o.Blob, o.Secret, err = tpm.Challenge(ek, &h.aik.Public, secret)
	h.must(err)
	return audited{w, AuditExpectation{Order: o, Key: public, Answer: digest.Of(secret)}, private}
}

// at makes the report that a medium makes at h.
func (a audited) at(h *host) hostaudit.Report {
	a.w.t.Helper()
	o := a.expect.Order
	r := hostaudit.Report{Number: o.Number, Host: o.Host, EK: h.entry.EK, AIK: h.entry.AIK, Session: h.entry.Session}
	var err error
	if r.Answer, err = tpm.Activate(h.dev, h.aik, o.Blob, o.Secret); err != nil {
		r.Problems = append(r.Problems, err.Error())
	}
	session, err := tpm.ReadKey(h.dev, inventory.SessionHandle)
	h.must(err)
	qualifying := o.Qualifying()
	rsp, err := tpm2.Certify{ObjectHandle: session.Auth(tpm2.PasswordAuth(nil)), SignHandle: h.aik.Auth(tpm2.PasswordAuth(nil)),
		QualifyingData: tpm2.TPM2BData{Buffer: qualifying[:]}, InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull}}.Execute(h.dev)
	h.must(err)
	r.Certify, r.Signed = rsp.CertifyInfo.Bytes(), tpm2.Marshal(rsp.Signature)
	return r
}

func (a audited) seal(r hostaudit.Report) signed.Envelope {
	a.w.t.Helper()
	payload, err := json.Marshal(r)
	a.w.host.must(err)
	return signed.Seal(a.key, signed.HostAudit, payload)
}

func TestHostAudit(t *testing.T) {
	w := newWorld(t)
	inv := w.verifier().inventory
	for what, test := range map[string]struct {
		at     *host
		change func(*hostaudit.Report)
		expect func(*AuditExpectation)
		checks []string
	}{
		"the host":       {},
		"another host's": {at: w.rogue, checks: []string{"certification", "credential", "key", "key", "key", "tpm"}},
		"the keys said, not held": {at: w.rogue, checks: []string{"certification", "credential", "tpm"}, change: func(r *hostaudit.Report) {
			r.EK, r.AIK, r.Session = w.host.entry.EK, w.host.entry.AIK, w.host.entry.Session
		}},
		"the inventory's own certification": {checks: []string{"certification"}, change: func(r *hostaudit.Report) {
			r.Certify, r.Signed = w.host.entry.SessionCertify, w.host.entry.SessionSignature
		}},
		"an earlier order's certification": {checks: []string{"certification"}, change: func(r *hostaudit.Report) {
			earlier := w.auditOf(w.host).at(w.host)
			r.Certify, r.Signed = earlier.Certify, earlier.Signed
		}},
		"no certification": {checks: []string{"certification"}, change: func(r *hostaudit.Report) { r.Certify, r.Signed = nil, nil }},
		"a quote for a certification": {checks: []string{"certification"}, change: func(r *hostaudit.Report) {
			q := w.host.quote(digest.SHA256{1}, []int{0})
			r.Certify, r.Signed = q.Attest, q.Signature
		}},
		"no answer":                    {checks: []string{"credential"}, change: func(r *hostaudit.Report) { r.Answer = nil }},
		"another answer":               {checks: []string{"credential"}, change: func(r *hostaudit.Report) { r.Answer[0] ^= 1 }},
		"an expectation of no answer":  {checks: []string{"credential"}, expect: func(x *AuditExpectation) { x.Answer = digest.SHA256{} }},
		"another attestation key":      {checks: []string{"key"}, change: func(r *hostaudit.Report) { r.AIK = w.rogue.entry.AIK }},
		"no endorsement certificate":   {checks: []string{"key"}, change: func(r *hostaudit.Report) { r.EK = nil }},
		"something could not be asked": {checks: []string{"tpm"}, change: func(r *hostaudit.Report) { r.Problems = []string{"it did not answer"} }},
	} {
		t.Run(what, func(t *testing.T) {
			a := w.auditOf(w.host)
			at := w.host
			if test.at != nil {
				at = test.at
			}
			r := a.at(at)
			if test.change != nil {
				test.change(&r)
			}
			if test.expect != nil {
				test.expect(&a.expect)
			}
			_, findings, err := inv.HostAudit(a.expect, a.seal(r))
			if err != nil {
				t.Fatal(err)
			}
			var have []string
			for _, f := range findings {
				have = append(have, f.Check)
			}
			slices.Sort(have)
			if !slices.Equal(have, test.checks) {
				t.Errorf("failed: %q, want %q: %+v", have, test.checks, findings)
			}
			whole(t, findings)
		})
	}
}

// whole demands that each finding names its component, what was expected and seen, and
// what to do.
func whole(t *testing.T, findings []Finding) {
	t.Helper()
	for _, f := range findings {
		if f.Check == "" || f.Component == "" || f.Expected == "" || f.Seen == "" || f.Do == "" || f.Detail == "" {
			t.Errorf("half a finding: %+v", f)
		}
	}
}

// TestHostAuditSaysAll: of a host that the inventory has dropped, or has something against,
// and however much the medium complains.
func TestHostAuditSaysAll(t *testing.T) {
	w := newWorld(t)
	a := w.auditOf(w.host)
	r := a.at(w.host)
	inv := w.verifier().inventory
	known := inv.hosts[w.host.entry.Name]
	inv.hosts = map[string]*hostKeys{}
	check := func(what string, r hostaudit.Report, want ...string) {
		t.Helper()
		_, findings, err := inv.HostAudit(a.expect, a.seal(r))
		if err != nil {
			t.Fatal(err)
		}
		whole(t, findings)
		for _, c := range want {
			if !slices.ContainsFunc(findings, func(f Finding) bool { return f.Check == c }) {
				t.Errorf("%s: no finding of %s in %+v", what, c, findings)
			}
		}
	}
	check("dropped", r, "host")
	spoilt := *known
	spoilt.problems = []string{"shares a TPM key with host host-9"}
	inv.hosts[w.host.entry.Name] = &spoilt
	r.Answer = nil
	r.Problems = slices.Repeat([]string{"it did not answer"}, 2*maxFindings)
	check("spoilt", r, "host", "credential", "tpm")
}

// TestHostAuditOfOthersSaysNothing: what the order's medium did not sign, or signed for
// another order, is no report, good or bad.
func TestHostAuditOfOthersSaysNothing(t *testing.T) {
	w := newWorld(t)
	inv := w.verifier().inventory
	a, other := w.auditOf(w.host), w.auditOf(w.host)
	r := a.at(w.host)
	renamed, renumbered := r, r
	renamed.Host, renumbered.Number = "host-2", strings.Repeat("0c", 16)
	altered := a.seal(r)
	altered.Payload = bytes.Replace(altered.Payload, []byte(`"host"`), []byte(`"HOST"`), 1)
	wrongLabel := signed.Seal(a.key, signed.Report, a.seal(r).Payload)
	for what, env := range map[string]signed.Envelope{
		"another medium's": other.seal(r), "another host's": a.seal(renamed), "another order's": a.seal(renumbered),
		"altered": altered, "signed as something else": wrongLabel, "nothing": {},
	} {
		if _, findings, err := inv.HostAudit(a.expect, env); !errors.Is(err, ErrAudit) || findings != nil {
			t.Errorf("%s: %v, %v", what, findings, err)
		}
	}
}
