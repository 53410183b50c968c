package verify

import (
	"bytes"
	"crypto/ed25519"
	"crypto/subtle"
	"errors"
	"fmt"

	"foothold/internal/tpm"
	"foothold/protocol/digest"
	"foothold/protocol/hostaudit"
	"foothold/protocol/signed"

	"github.com/google/go-tpm/tpm2"
)

// AuditExpectation is what the tenant knows of a host audit that it ordered.
type AuditExpectation struct {
	Order  hostaudit.Order
	Key    ed25519.PublicKey // of the order's medium
	Answer digest.SHA256     // of the secret that the host's TPM alone can decrypt
}

// ErrAudit is returned for what is no report on this order: nothing is learnt of the host.
var ErrAudit = errors.New("it is no report on this order")

// HostAudit holds what the medium found in a host's TPM against the inventory. Every check
// that fails is a finding; none is left out because another failed. An error means that
// the medium did not make the report, or made it for another order.
func (inv *Inventory) HostAudit(x AuditExpectation, env signed.Envelope) (hostaudit.Report, []Finding, error) {
	var r hostaudit.Report
	if err := env.Open(x.Key, signed.HostAudit, &r); err != nil {
		return r, nil, fmt.Errorf("%w: %w", ErrAudit, err)
	}
	if r.Number != x.Order.Number || r.Host != x.Order.Host {
		return r, nil, fmt.Errorf("%w: it is on another", ErrAudit)
	}
	h, ok := inv.hosts[r.Host]
	if !ok {
		a := audit{}
		a.find("host", "%q is not in the inventory", r.Host)
		return r, a.findings, nil
	}
	a := audit{}
	for _, p := range h.problems {
		a.find("host", "in the inventory: %s", p)
	}
	a.same("endorsement certificate", h.entry.EK, r.EK)
	a.same("attestation key", h.entry.AIK, r.AIK)
	a.same("session key", h.entry.Session, r.Session)
	if sum := digest.Of(r.Answer); x.Answer.IsZero() || subtle.ConstantTimeCompare(sum[:], x.Answer[:]) != 1 {
		a.find("credential", "the TPM did not decrypt the challenge for the inventory's endorsement and attestation keys together; the TPM in this machine is another")
	}
	if err := certified(h, r, x.Order.Qualifying()); err != nil {
		a.find("certification", "of the session key, made for this order: %v", err)
	}
	for _, p := range r.Problems { // however many there are, they crowd nothing out
		a.find("tpm", "%s", p)
	}
	return r, a.findings, nil
}

// findMachine is what to do when the TPM is not, or may not be, the inventory's.
const findMachine = "find out which machine stands there, and what became of the host's TPM; until then no VM is placed on it"

// auditSubjects has every check of a host audit but that of keys, whose findings name theirs.
var auditSubjects = map[string]subject{
	"host":          subjects["host"],
	"tpm":           {"the host's TPM, as the medium asked it", "an answer to each question", "boot the medium again on this host; if its TPM answers no better, have the provider examine it and enrol the host again"},
	"credential":    {"the endorsement and attestation keys together", "the order's challenge decrypted, as the inventory's TPM alone can", findMachine},
	"certification": {"the session key's certification", "one by the inventory's attestation key, made for this order", findMachine},
}

// audit is one being judged.
type audit struct{ findings []Finding }

// find is a finding about what the check is about as a whole; the text says what was seen.
func (a *audit) find(check, format string, args ...any) {
	if len(a.findings) < maxFindings {
		about, seen := auditSubjects[check], fmt.Sprintf(format, args...)
		a.findings = append(a.findings, Finding{Check: check, Component: about.component, Expected: about.expected, Seen: seen, Do: about.do, Detail: seen})
	}
}

// same compares one of the inventory's keys with the TPM's.
func (a *audit) same(component string, want, have []byte) {
	if len(want) > 0 && bytes.Equal(want, have) {
		return
	}
	f := Finding{Check: "key", Component: component, Expected: "sha256 " + digest.Of(want).String(), Seen: "none", Do: findMachine}
	if len(have) > 0 {
		f.Seen = "sha256 " + digest.Of(have).String()
	}
	f.Detail = fmt.Sprintf("%s: in the TPM is %s, in the inventory %s", component, f.Seen, f.Expected)
	a.findings = append(a.findings, f)
}

// certified demands that the inventory's AIK certified the inventory's session key for
// this order: so both lie in the TPM that was asked, now.
func certified(h *hostKeys, r hostaudit.Report, qualifying digest.SHA256) error {
	attest, err := parseAttest(r.Certify)
	if err != nil {
		return err
	}
	if err := checkSignature(h.aik, r.Certify, r.Signed); err != nil {
		return err
	}
	if subtle.ConstantTimeCompare(attest.ExtraData.Buffer, qualifying[:]) != 1 {
		return errors.New("it is of another order")
	}
	if attest.Type != tpm2.TPMSTAttestCertify {
		return errors.New("it is of another kind")
	}
	info, err := attest.Attested.Certify()
	if err != nil {
		return errors.New("it is of another kind")
	}
	public, err := tpm.ParsePublic(h.entry.Session)
	if err != nil {
		return fmt.Errorf("the inventory's session key: %w", err)
	}
	if name, err := tpm2.ObjectName(public); err != nil || !bytes.Equal(info.Name.Buffer, name.Buffer) {
		return errors.New("it is of another key")
	}
	return nil
}
