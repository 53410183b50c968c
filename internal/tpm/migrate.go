package tpm

import (
	"crypto/ecdh"
	"crypto/rand"
	"errors"
	"fmt"

	"foothold/internal/secret"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// A migrated key salts sessions in place of a host's own session key. Whoever made it
// knows its private part and encrypts that to the host's session key - which the host's
// AIK certifies, and which is a storage key too: a restricted decryption key - off line
// (TPM 2.0 Library, part 1, "Duplication"). So it is known to its maker and to that TPM.

// Bounds of a migrated key's parts in bytes: TPM2B_PRIVATE of a P-256 key with SHA-256,
// ECDH point on P-256.
const (
	maxDuplicate = 256
	maxSeed      = saltLen
	saltLen      = 68
)

// scalarLen is the length in bytes of a private key on P-256.
const scalarLen = 32

// migratedTemplate is [SessionTemplate], but for where the key comes from: it was made
// outside, and is not bound to one TPM or parent. Its policy is empty, so no TPM that has
// it gives it away again.
func migratedTemplate() tpm2.TPMTPublic {
	t := SessionTemplate()
	t.ObjectAttributes.FixedTPM, t.ObjectAttributes.FixedParent, t.ObjectAttributes.SensitiveDataOrigin = false, false, false
	return t
}

// CheckMigrated refuses a public area that is not one of a migrated key.
func CheckMigrated(pub *tpm2.TPMTPublic) error {
	if err := match(pub, migratedTemplate()); err != nil {
		return fmt.Errorf("migrated session key: %w", err)
	}
	return nil
}

// MigratedLen is the length in bytes of a migrated key's secret: a private key on P-256,
// and the seed that a storage key has.
const MigratedLen = 2 * scalarLen

// NewMigrated makes the secret of a key to migrate.
func NewMigrated() (secret.Bytes, error) {
	key, err := ecdh.P256().GenerateKey(rand.Reader)
	if err != nil {
		return secret.Bytes{}, fmt.Errorf("make session key: %w", err)
	}
	seed := make([]byte, scalarLen)
	rand.Read(seed)
	return secret.New(append(key.Bytes(), seed...)), nil
}

// MigratedPublic is the public area of that key.
func MigratedPublic(key secret.Bytes) (tpm2.TPMTPublic, error) {
	pub := migratedTemplate()
	if len(key.Reveal()) != MigratedLen {
		return pub, fmt.Errorf("session key: it has not %d bytes", MigratedLen)
	}
	private, err := ecdh.P256().NewPrivateKey(key.Reveal()[:scalarLen])
	if err != nil {
		return pub, errors.New("session key: it is no private key on P-256")
	}
	point := private.PublicKey().Bytes() // uncompressed: 4, x, y
	pub.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: point[1 : 1+scalarLen]}, Y: tpm2.TPM2BECCParameter{Buffer: point[1+scalarLen:]}})
	return pub, nil
}

// Duplicate encrypts the key to a host's session key, from the inventory. It returns
// what TPM2_Import takes: the outer wrapping and its seed.
func Duplicate(parent *tpm2.TPMTPublic, key secret.Bytes) (duplicate, seed []byte, err error) {
	if err := CheckSession(parent); err != nil {
		return nil, nil, fmt.Errorf("duplicate session key: %w", err)
	}
	pub, err := MigratedPublic(key)
	if err != nil {
		return nil, nil, err
	}
	name, err := tpm2.ObjectName(&pub)
	if err != nil {
		return nil, nil, fmt.Errorf("duplicate session key: %w", err)
	}
	to, err := tpm2.ImportEncapsulationKey(parent)
	if err != nil {
		return nil, nil, fmt.Errorf("duplicate session key: %w", err)
	}
	private := key.Reveal()
	sensitive := tpm2.Marshal(tpm2.TPMTSensitive{SensitiveType: tpm2.TPMAlgECC, SeedValue: tpm2.TPM2BDigest{Buffer: private[scalarLen:]},
		Sensitive: tpm2.NewTPMUSensitiveComposite(tpm2.TPMAlgECC, &tpm2.TPM2BECCParameter{Buffer: private[:scalarLen]})})
	defer clear(sensitive)
	if duplicate, seed, err = tpm2.CreateDuplicate(rand.Reader, to, name.Buffer, sensitive); err != nil {
		return nil, nil, fmt.Errorf("duplicate session key: %w", err)
	}
	return duplicate, seed, nil
}

// Import has the TPM take a migrated key under parent, its session key. It returns the
// private part as that TPM has wrapped it, for [Load].
func Import(t transport.TPM, parent Key, pub *tpm2.TPMTPublic, duplicate, seed []byte) ([]byte, error) {
	if err := CheckMigrated(pub); err != nil {
		return nil, err
	}
	if len(duplicate) == 0 || len(duplicate) > maxDuplicate || len(seed) == 0 || len(seed) > maxSeed {
		return nil, errors.New("import session key: it has not the right form")
	}
	session := tpm2.HMAC(tpm2.TPMAlgSHA256, 16, tpm2.Salted(parent.Handle, parent.Public))
	rsp, err := tpm2.Import{
		ParentHandle: parent.Auth(session), ObjectPublic: tpm2.New2B(*pub), Duplicate: tpm2.TPM2BPrivate{Buffer: duplicate},
		InSymSeed: tpm2.TPM2BEncryptedSecret{Buffer: seed}, Symmetric: tpm2.TPMTSymDef{Algorithm: tpm2.TPMAlgNull},
	}.Execute(t)
	if err != nil {
		return nil, fmt.Errorf("import session key: %w", err)
	}
	// The TPM checks that both parts belong together when it loads them.
	key, err := Load(t, parent, pub, rsp.OutPrivate.Buffer)
	if err != nil {
		return nil, err
	}
	if _, err := (tpm2.FlushContext{FlushHandle: key.Handle}).Execute(t); err != nil {
		return nil, fmt.Errorf("import session key: %w", err)
	}
	return rsp.OutPrivate.Buffer, nil
}

// Load loads a migrated key; the caller flushes it.
func Load(t transport.TPM, parent Key, pub *tpm2.TPMTPublic, private []byte) (Key, error) {
	session := tpm2.HMAC(tpm2.TPMAlgSHA256, 16, tpm2.Salted(parent.Handle, parent.Public))
	rsp, err := tpm2.Load{ParentHandle: parent.Auth(session), InPrivate: tpm2.TPM2BPrivate{Buffer: private}, InPublic: tpm2.New2B(*pub)}.Execute(t)
	if err != nil {
		return Key{}, fmt.Errorf("load session key: %w", err)
	}
	return Key{rsp.ObjectHandle, rsp.Name, *pub}, nil
}
