package tpm

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// Credential activation proves that a key lies in the TPM of an endorsement
// certificate: the challenge can be answered only by that TPM, and only while it holds
// a key of that name (TPM 2.0 Library, part 1, "Credential Protection").

// ekHandle is where the RSA endorsement key lies (TCG EK Credential Profile,
// "Persistent Handles for EKs"). It is read, never made anew.
const ekHandle = 0x81010001

// SecretLen is the length in bytes of the secret in a challenge.
const SecretLen = 32

// Bounds of a challenge's parts in bytes: TPMS_ID_OBJECT with SHA-256, RSA 2048.
const (
	maxBlob      = 128
	maxEncrypted = 256
)

// Challenge encrypts secret to the TPM of the endorsement certificate, for the key
// with that public area. Whoever asks compares the answer in constant time.
func Challenge(ek *x509.Certificate, key *tpm2.TPMTPublic, secret []byte) (blob, encrypted []byte, err error) {
	public, ok := ek.PublicKey.(*rsa.PublicKey)
	if !ok || public.N.BitLen() != 2048 || public.E != 65537 {
		return nil, nil, errors.New("challenge TPM: the endorsement key is not RSA 2048")
	}
	if len(secret) != SecretLen {
		return nil, nil, fmt.Errorf("challenge TPM: a secret has %d bytes", SecretLen)
	}
	area := tpm2.RSAEKTemplate
	area.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: public.N.FillBytes(make([]byte, 256))})
	encapsulation, err := tpm2.ImportEncapsulationKey(&area)
	if err != nil {
		return nil, nil, fmt.Errorf("challenge TPM: %w", err)
	}
	name, err := tpm2.ObjectName(key)
	if err != nil {
		return nil, nil, fmt.Errorf("challenge TPM: %w", err)
	}
	if blob, encrypted, err = tpm2.CreateCredential(rand.Reader, encapsulation, name.Buffer, secret); err != nil {
		return nil, nil, fmt.Errorf("challenge TPM: %w", err)
	}
	return blob, encrypted, nil
}

// Activate answers a challenge for key.
func Activate(t transport.TPM, key Key, blob, encrypted []byte) ([]byte, error) {
	if len(blob) == 0 || len(blob) > maxBlob || len(encrypted) == 0 || len(encrypted) > maxEncrypted {
		return nil, errors.New("activate credential: the challenge has not the right form")
	}
	ek, err := ReadKey(t, ekHandle)
	if err != nil {
		return nil, fmt.Errorf("activate credential: endorsement key: %w", err)
	}
	// The endorsement key wants the endorsement hierarchy's authorisation, by policy.
	policy := tpm2.Policy(tpm2.TPMAlgSHA256, 16, func(t transport.TPM, handle tpm2.TPMISHPolicy, nonce tpm2.TPM2BNonce) error {
		_, err := tpm2.PolicySecret{
			AuthHandle:    tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
			PolicySession: handle, NonceTPM: nonce,
		}.Execute(t)
		return err
	})
	rsp, err := tpm2.ActivateCredential{
		ActivateHandle: key.Auth(tpm2.PasswordAuth(nil)), KeyHandle: ek.Auth(policy),
		CredentialBlob: tpm2.TPM2BIDObject{Buffer: blob}, Secret: tpm2.TPM2BEncryptedSecret{Buffer: encrypted},
	}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("activate credential: %w", err)
	}
	return rsp.CertInfo.Buffer, nil
}
