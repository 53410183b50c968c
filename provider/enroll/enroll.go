// Package enroll makes a host's TPM keys and the host's entry in the provider's
// inventory, and signs the inventory.
//
// Enrolment is idempotent: keys that are there and have the right form are kept.
package enroll

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/subtle"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"foothold/internal/tpm"
	"foothold/protocol/inventory"
	"foothold/protocol/signed"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// Enroll completes entry - name, API, location, asset and software given - with the keys of
// the TPM, making those that are missing, and the endorsement certificate's chain, as far as
// the TPM holds it, behind what of it is given. It refuses a TPM that does not prove, as each tenant will have it proved, that the attestation
// key lies with the endorsement key of the certificate that the entry names.
func Enroll(t transport.TPM, entry inventory.Host) (inventory.Host, error) {
	ek, err := tpm.EndorsementCertificate(t)
	if err != nil {
		return entry, fmt.Errorf("enrol %s: %w", entry.Name, err)
	}
	if entry.EKChain, err = chain(t, ek, entry.EKChain); err != nil {
		return entry, fmt.Errorf("enrol %s: %w", entry.Name, err)
	}
	aik, err := ensure(t, inventory.AIKHandle, tpm.AIKTemplate(), tpm.CheckAIK)
	if err != nil {
		return entry, fmt.Errorf("enrol %s: attestation key: %w", entry.Name, err)
	}
	if err := prove(t, ek, aik); err != nil {
		return entry, fmt.Errorf("enrol %s: attestation key beside the endorsement certificate's: %w", entry.Name, err)
	}
	session, err := ensure(t, inventory.SessionHandle, tpm.SessionTemplate(), tpm.CheckSession)
	if err != nil {
		return entry, fmt.Errorf("enrol %s: session key: %w", entry.Name, err)
	}
	certify, signature, err := certify(t, aik, session)
	if err != nil {
		return entry, fmt.Errorf("enrol %s: %w", entry.Name, err)
	}
	entry.EK, entry.AIK, entry.Session = ek, tpm2.Marshal(aik.Public), tpm2.Marshal(session.Public)
	entry.SessionCertify, entry.SessionSignature = certify, signature
	return entry, nil
}

// chain adds the certificates in the TPM to those given. What a TPM holds there that is no
// chain matters only if none is given: nobody trusts one of these for lying there.
func chain(t transport.TPM, ek []byte, given [][]byte) ([][]byte, error) {
	held, err := tpm.EndorsementChain(t)
	if err != nil && len(given) == 0 {
		return nil, fmt.Errorf("%w; give the manufacturer's certificates, as PEM: --ek-chain FILE", err)
	}
	all := slices.Clone(given)
	for _, der := range held {
		if !bytes.Equal(der, ek) && !slices.ContainsFunc(all, func(c []byte) bool { return bytes.Equal(c, der) }) {
			all = append(all, der)
		}
	}
	if len(all) > inventory.MaxEKChain {
		return nil, fmt.Errorf("endorsement certificate's chain: %d certificates, at most %d are recorded; --ek-chain gives those alone that the TPM's %d lack up to the root", len(all), inventory.MaxEKChain, len(held))
	}
	return all, nil
}

// ReadChain reads the certificates of an endorsement certificate's chain from PEM files, in
// any order.
func ReadChain(files []string) (chain [][]byte, err error) {
	for _, file := range files {
		part, err := readChain(file)
		if err != nil {
			return nil, fmt.Errorf("endorsement certificate's chain: %w", err)
		}
		chain = append(chain, part...)
	}
	if len(chain) > inventory.MaxEKChain {
		return nil, fmt.Errorf("endorsement certificate's chain: %d certificates, at most %d are recorded; leave out the root and those of other TPMs", len(chain), inventory.MaxEKChain)
	}
	return chain, nil
}

func readChain(file string) (chain [][]byte, err error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	rest, err := io.ReadAll(io.LimitReader(f, maxChainFile+1))
	if err != nil {
		return nil, err
	}
	if len(rest) > maxChainFile {
		return nil, fmt.Errorf("%s has more than %d bytes; give the certificates between the TPM's and the root alone", file, maxChainFile)
	}
	for rest = bytes.TrimSpace(rest); len(rest) > 0; rest = bytes.TrimSpace(rest) {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil || block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("%s holds something that is no PEM certificate; openssl x509 -inform DER -in FILE makes PEM of DER", file)
		}
		if _, err := x509.ParseCertificate(block.Bytes); err != nil {
			return nil, fmt.Errorf("%s: %w", file, err)
		}
		chain = append(chain, block.Bytes)
	}
	if len(chain) == 0 {
		return nil, fmt.Errorf("%s holds no certificate", file)
	}
	return chain, nil
}

// maxChainFile bounds a file of certificates in bytes.
const maxChainFile = 64 << 10

// prove has the TPM answer a challenge to the endorsement key of the certificate, for the
// attestation key (TPM 2.0 Library, part 1, "Credential Protection").
func prove(t transport.TPM, ek []byte, aik tpm.Key) error {
	cert, err := x509.ParseCertificate(ek)
	if err != nil {
		return fmt.Errorf("endorsement certificate: %w", err)
	}
	secret := make([]byte, tpm.SecretLen)
	rand.Read(secret)
	blob, encrypted, err := tpm.Challenge(cert, &aik.Public, secret)
	if err != nil {
		return fmt.Errorf("%w; enrol a host whose TPM has an endorsement certificate for such a key", err)
	}
	answer, err := tpm.Activate(t, aik, blob, encrypted)
	switch {
	case errors.Is(err, tpm.ErrNoKey):
		return fmt.Errorf("%w; make it: tpm2_createek -c 0x81010001 -G rsa -u ek.pub", err)
	case err != nil:
		return fmt.Errorf("%w; %s", err, notProved)
	case subtle.ConstantTimeCompare(answer, secret) != 1:
		return errors.New("the TPM answered the challenge wrongly; " + notProved)
	}
	return nil
}

// notProved is what to do about a TPM that fails the challenge.
const notProved = "if the certificate in its NV memory is another TPM's, have the manufacturer's written again; else somebody may stand between: examine the host, and do not enrol it"

// ensure returns the key at handle; if there is none it makes one in the endorsement
// hierarchy and makes it persistent. A key of another form is an error, never replaced.
func ensure(t transport.TPM, handle tpm2.TPMHandle, template tpm2.TPMTPublic, check func(*tpm2.TPMTPublic) error) (tpm.Key, error) {
	key, err := tpm.ReadKey(t, handle)
	if errors.Is(err, tpm.ErrNoKey) {
		if err := create(t, handle, template); err != nil {
			return key, err
		}
		key, err = tpm.ReadKey(t, handle)
	}
	if err != nil {
		return key, err
	}
	return key, check(&key.Public)
}

func create(t transport.TPM, handle tpm2.TPMHandle, template tpm2.TPMTPublic) error {
	// A primary key follows from seed and template alone; the random point makes it new.
	x, y := make([]byte, 32), make([]byte, 32)
	rand.Read(x)
	rand.Read(y)
	template.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{X: tpm2.TPM2BECCParameter{Buffer: x}, Y: tpm2.TPM2BECCParameter{Buffer: y}})
	rsp, err := tpm2.CreatePrimary{
		PrimaryHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHEndorsement, Auth: tpm2.PasswordAuth(nil)},
		InPublic:      tpm2.New2B(template),
	}.Execute(t)
	if err != nil {
		return fmt.Errorf("create: %w", err)
	}
	defer tpm2.FlushContext{FlushHandle: rsp.ObjectHandle}.Execute(t)
	_, err = tpm2.EvictControl{
		Auth:             tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		ObjectHandle:     &tpm2.NamedHandle{Handle: rsp.ObjectHandle, Name: rsp.Name},
		PersistentHandle: handle,
	}.Execute(t)
	if err != nil {
		return fmt.Errorf("make persistent: %w", err)
	}
	return nil
}

// certify lets the AIK state that the session key lies in the same TPM.
func certify(t transport.TPM, aik, session tpm.Key) (attest, signature []byte, err error) {
	rsp, err := tpm2.Certify{
		ObjectHandle: session.Auth(tpm2.PasswordAuth(nil)),
		SignHandle:   aik.Auth(tpm2.PasswordAuth(nil)),
		InScheme:     tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
	}.Execute(t)
	if err != nil {
		return nil, nil, fmt.Errorf("certify session key: %w", err)
	}
	return rsp.CertifyInfo.Bytes(), tpm2.Marshal(rsp.Signature), nil
}

// Publish signs the inventory that holds the given hosts, each once and with a TPM of its own.
func Publish(key ed25519.PrivateKey, provider string, version int, issued time.Time, valid time.Duration, hosts []inventory.Host) (signed.Envelope, error) {
	names, owner := map[string]bool{}, map[string]string{}
	for _, h := range hosts {
		if names[h.Name] {
			return signed.Envelope{}, fmt.Errorf("publish inventory: host %s twice", h.Name)
		}
		names[h.Name] = true
		for _, key := range [][]byte{h.EK, h.AIK, h.Session} {
			if other := owner[string(key)]; other != "" && len(key) > 0 {
				return signed.Envelope{}, fmt.Errorf("publish inventory: hosts %s and %s have one TPM, and tenants would give neither a VM; enrol each on its own machine", other, h.Name)
			}
		}
		for _, key := range [][]byte{h.EK, h.AIK, h.Session} {
			owner[string(key)] = h.Name
		}
	}
	if version < 1 || valid <= 0 {
		return signed.Envelope{}, errors.New("publish inventory: version and validity must be positive")
	}
	issued = issued.UTC().Truncate(time.Second)
	payload, err := json.Marshal(inventory.Inventory{Provider: provider, Version: version, Issued: issued, Expires: issued.Add(valid), Hosts: hosts})
	if err != nil {
		return signed.Envelope{}, fmt.Errorf("publish inventory: %w", err)
	}
	return signed.Seal(key, signed.Inventory, payload), nil
}
