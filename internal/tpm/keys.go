package tpm

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// AIKTemplate is the public area of a host's attestation key: a restricted signing
// key, so that it signs nothing but what the TPM itself has made (TPM 2.0 Library,
// part 1, "Restricted Attribute"), ECDSA on P-256 with SHA-256, empty authorisation.
func AIKTemplate() tpm2.TPMTPublic {
	return eccKey(tpm2.TPMAObject{SignEncrypt: true}, tpm2.TPMSECCParms{
		CurveID: tpm2.TPMECCNistP256,
		Scheme: tpm2.TPMTECCScheme{
			Scheme:  tpm2.TPMAlgECDSA,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
		},
	})
}

// SessionTemplate is the public area of the key that salts sessions: a restricted
// decryption key on P-256 with AES-128 in CFB mode, empty authorisation.
func SessionTemplate() tpm2.TPMTPublic {
	return eccKey(tpm2.TPMAObject{Decrypt: true}, tpm2.TPMSECCParms{
		CurveID: tpm2.TPMECCNistP256,
		Symmetric: tpm2.TPMTSymDefObject{
			Algorithm: tpm2.TPMAlgAES,
			KeyBits:   tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, tpm2.TPMKeyBits(128)),
			Mode:      tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
		},
	})
}

func eccKey(use tpm2.TPMAObject, parms tpm2.TPMSECCParms) tpm2.TPMTPublic {
	use.FixedTPM, use.FixedParent, use.SensitiveDataOrigin = true, true, true
	use.UserWithAuth, use.NoDA, use.Restricted = true, true, true
	return tpm2.TPMTPublic{
		Type:             tpm2.TPMAlgECC,
		NameAlg:          tpm2.TPMAlgSHA256,
		ObjectAttributes: use,
		Parameters:       tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &parms),
		Unique:           emptyPoint(),
	}
}

func emptyPoint() tpm2.TPMUPublicID {
	return tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{})
}

// CheckAIK refuses a public area that differs from AIKTemplate in anything but its point.
func CheckAIK(pub *tpm2.TPMTPublic) error {
	if err := match(pub, AIKTemplate()); err != nil {
		return fmt.Errorf("attestation key: %w", err)
	}
	return nil
}

// CheckSession refuses a public area that differs from SessionTemplate in anything but its point.
func CheckSession(pub *tpm2.TPMTPublic) error {
	if err := match(pub, SessionTemplate()); err != nil {
		return fmt.Errorf("session key: %w", err)
	}
	return nil
}

func match(pub *tpm2.TPMTPublic, want tpm2.TPMTPublic) error {
	if pub.Type != tpm2.TPMAlgECC {
		return errors.New("is not an elliptic-curve key")
	}
	bare := *pub
	bare.Unique = emptyPoint()
	if !bytes.Equal(tpm2.Marshal(bare), tpm2.Marshal(want)) {
		return errors.New("attributes or parameters are not those of its template")
	}
	parms, err := pub.Parameters.ECCDetail()
	if err != nil {
		return err
	}
	point, err := pub.Unique.ECC()
	if err != nil {
		return err
	}
	if _, err := tpm2.ECDHPub(parms, point); err != nil { // the point lies on the curve
		return errors.New("point is not on the curve")
	}
	return nil
}

// Key is a key that lies in the TPM.
type Key struct {
	Handle tpm2.TPMHandle
	Name   tpm2.TPM2BName // hash of the public area
	Public tpm2.TPMTPublic
}

// ErrNoKey is returned for a handle without a key.
var ErrNoKey = errors.New("no key at this handle")

// ReadKey reads the public area at handle and computes its name itself.
func ReadKey(t transport.TPM, handle tpm2.TPMHandle) (Key, error) {
	rsp, err := tpm2.ReadPublic{ObjectHandle: handle}.Execute(t)
	if errors.Is(err, tpm2.TPMRCHandle) {
		return Key{}, fmt.Errorf("read public area at %#x: %w", uint32(handle), ErrNoKey)
	}
	if err != nil {
		return Key{}, fmt.Errorf("read public area at %#x: %w", uint32(handle), err)
	}
	pub, err := rsp.OutPublic.Contents()
	if err != nil {
		return Key{}, fmt.Errorf("read public area at %#x: %w", uint32(handle), err)
	}
	name, err := tpm2.ObjectName(pub)
	if err != nil {
		return Key{}, fmt.Errorf("name the key at %#x: %w", uint32(handle), err)
	}
	return Key{handle, *name, *pub}, nil
}

// ParsePublic decodes a marshalled TPMT_PUBLIC and refuses trailing bytes.
func ParsePublic(data []byte) (*tpm2.TPMTPublic, error) {
	if len(data) > 1024 {
		return nil, errors.New("public area is too long")
	}
	pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](data)
	if err != nil {
		return nil, fmt.Errorf("decode public area: %w", err)
	}
	if !bytes.Equal(tpm2.Marshal(pub), data) {
		return nil, errors.New("decode public area: it is not in canonical form")
	}
	return pub, nil
}

// Auth names the key for a command that authorises it with session.
func (k Key) Auth(session tpm2.Session) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: k.Handle, Name: k.Name, Auth: session}
}
