package verify

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/big"

	"github.com/google/go-tpm/tpm2"
)

// parseAttest accepts exactly the canonical bytes of one TPMS_ATTEST that a TPM made
// (TPM 2.0 Library, part 2, "TPMS_ATTEST"): the decoder alone would ignore what follows.
func parseAttest(data []byte) (*tpm2.TPMSAttest, error) {
	if len(data) == 0 || len(data) > maxQuote {
		return nil, fmt.Errorf("it has %d bytes, want 1 to %d", len(data), maxQuote)
	}
	attest, err := tpm2.Unmarshal[tpm2.TPMSAttest](data)
	if err != nil {
		return nil, errors.New("it is not a TPMS_ATTEST")
	}
	if !bytes.Equal(tpm2.Marshal(attest), data) {
		return nil, errors.New("it is not in canonical form")
	}
	if attest.Magic != tpm2.TPMGeneratedValue {
		return nil, errors.New("no TPM made it")
	}
	return attest, nil
}

// checkSignature accepts exactly a TPMT_SIGNATURE of ECDSA with SHA-256 over message.
func checkSignature(key *ecdsa.PublicKey, message, signature []byte) error {
	if key == nil {
		return errors.New("there is no key to check it with")
	}
	if len(signature) == 0 || len(signature) > maxQuote {
		return fmt.Errorf("it has %d bytes, want 1 to %d", len(signature), maxQuote)
	}
	sig, err := tpm2.Unmarshal[tpm2.TPMTSignature](signature)
	if err != nil {
		return errors.New("it is not a TPMT_SIGNATURE")
	}
	if !bytes.Equal(tpm2.Marshal(sig), signature) {
		return errors.New("it is not in canonical form")
	}
	if sig.SigAlg != tpm2.TPMAlgECDSA {
		return errors.New("it is not ECDSA")
	}
	ec, err := sig.Signature.ECDSA()
	if err != nil || ec.Hash != tpm2.TPMAlgSHA256 {
		return errors.New("it is not ECDSA with SHA-256")
	}
	sum := sha256.Sum256(message)
	r, s := new(big.Int).SetBytes(ec.SignatureR.Buffer), new(big.Int).SetBytes(ec.SignatureS.Buffer)
	if !ecdsa.Verify(key, sum[:], r, s) {
		return errors.New("the host's attestation key did not make it")
	}
	return nil
}

// selected reads the registers of a selection that names the SHA-256 bank alone.
func selected(sel tpm2.TPMLPCRSelection) ([]int, error) {
	if len(sel.PCRSelections) != 1 || sel.PCRSelections[0].Hash != tpm2.TPMAlgSHA256 {
		return nil, errors.New("it names another bank than SHA-256, or more than one")
	}
	var list []int
	for i, b := range sel.PCRSelections[0].PCRSelect {
		for bit := range 8 {
			if b&(1<<bit) != 0 {
				list = append(list, 8*i+bit)
			}
		}
	}
	return list, nil
}
