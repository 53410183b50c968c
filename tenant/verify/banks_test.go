package verify

import (
	"slices"
	"strings"
	"testing"

	"foothold/protocol/digest"
	"foothold/protocol/pcr"

	"github.com/google/go-tpm/tpm2"
)

// TestOtherBanksAndAlgorithms: a real TPM's quotes over another bank, over the right
// registers in two parts and another order, and with SHA-1 anywhere.
func TestOtherBanksAndAlgorithms(t *testing.T) {
	w := newWorld(t)
	v := w.verifier()
	w.host.allocate("sha1,sha256,sha384") // of a bank that a TPM has not, its quotes name no register
	w.host.boot(w.files)
	part := func(alg tpm2.TPMIAlgHash, registers ...int) tpm2.TPMSPCRSelection {
		return tpm2.TPMSPCRSelection{Hash: alg, PCRSelect: bitmap(registers)}
	}
	for what, selection := range map[string][]tpm2.TPMSPCRSelection{
		"SHA-1 bank":                    {part(tpm2.TPMAlgSHA1, pcr.BootSelection()...)},
		"SHA-384 bank":                  {part(tpm2.TPMAlgSHA384, pcr.BootSelection()...)},
		"SHA-1 bank behind it":          {part(tpm2.TPMAlgSHA256, pcr.BootSelection()...), part(tpm2.TPMAlgSHA1, pcr.BootSelection()...)},
		"in two parts, the VM's first":  {part(tpm2.TPMAlgSHA256, pcr.VM, pcr.Tunnel), part(tpm2.TPMAlgSHA256, pcr.Static...)},
		"in two parts, the VM's behind": {part(tpm2.TPMAlgSHA256, pcr.Static...), part(tpm2.TPMAlgSHA256, pcr.VM, pcr.Tunnel)},
		"the same registers twice":      {part(tpm2.TPMAlgSHA256, pcr.BootSelection()...), part(tpm2.TPMAlgSHA256, pcr.BootSelection()...)},
	} {
		a := w.attempt()
		a.selection = selection
		a.quote()
		admitted, verdict := v.Boot(a.expect, a.ev)
		if admitted != nil || !strings.Contains(checks(verdict), "selection") {
			t.Errorf("%s: want a finding of selection, got %v", what, verdict.Findings)
		}
		if quoted, err := parseQuote(a.ev.Quote.Attest); err != nil || !slices.EqualFunc(quoted.selection, selection, func(a, b tpm2.TPMSPCRSelection) bool {
			return a.Hash == b.Hash && slices.Equal(a.PCRSelect, b.PCRSelect)
		}) {
			t.Errorf("%s: the TPM quoted %v, %v", what, quoted.selection, err)
		}
	}

	a := w.attempt()
	a.quote()
	sig, err := tpm2.Unmarshal[tpm2.TPMTSignature](a.ev.Quote.Signature)
	if err != nil {
		t.Fatal(err)
	}
	ec, err := sig.Signature.ECDSA()
	if err != nil {
		t.Fatal(err)
	}
	ec.Hash = tpm2.TPMAlgSHA1
	a.ev.Quote.Signature = tpm2.Marshal(sig)
	if admitted, verdict := v.Boot(a.expect, a.ev); admitted != nil || !slices.ContainsFunc(verdict.Findings, func(f Finding) bool {
		return f.Check == "signature" && strings.Contains(f.Detail, "SHA-256")
	}) {
		t.Errorf("signature that says SHA-1: %v", verdict.Findings)
	}
	// The key itself signs with nothing else.
	qualifying := digest.Of(nil)
	_, err = tpm2.Quote{
		SignHandle: w.host.aik.Auth(tpm2.PasswordAuth(nil)), QualifyingData: tpm2.TPM2BData{Buffer: qualifying[:]},
		InScheme: tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgECDSA,
			Details: tpm2.NewTPMUSigScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSchemeHash{HashAlg: tpm2.TPMAlgSHA1})},
		PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{part(tpm2.TPMAlgSHA256, pcr.BootSelection()...)}},
	}.Execute(w.host.dev)
	if err == nil {
		t.Error("the attestation key signed with SHA-1")
	}
}
