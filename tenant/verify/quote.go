package verify

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"

	"github.com/google/go-tpm/tpm2"
)

// quoted is a TPMS_ATTEST of a quote (TPM 2.0 Library, part 2, "TPMS_ATTEST"):
//
//	magic u32 | type u16 | signer: size u16, name | extra data: size u16, bytes
//	clock u64 | resets u32 | restarts u32 | safe u8 | firmware version u64
//	count u32 | count x (bank u16 | size u8, bitmap) | digest: size u16, bytes
//
// All integers are big endian. Signer, safe and firmware version decide nothing.
type quoted struct {
	extra     []byte
	clock     tpm2.TPMSClockInfo
	selection []tpm2.TPMSPCRSelection
	digest    []byte // over the selected registers
}

// parseQuote accepts exactly the bytes of one TPMS_ATTEST that a TPM made for a quote, with
// nothing behind it. Of each quote there is one such form.
func parseQuote(data []byte) (q quoted, err error) {
	if len(data) == 0 || len(data) > maxQuote {
		return q, fmt.Errorf("it has %d bytes, want 1 to %d", len(data), maxQuote)
	}
	r := &marshalled{rest: data}
	if tpm2.TPMGenerated(r.u32()) != tpm2.TPMGeneratedValue {
		return q, errors.New("no TPM made it")
	}
	if tpm2.TPMST(r.u16()) != tpm2.TPMSTAttestQuote {
		return q, errors.New("the TPM made it for something else than a quote")
	}
	r.sized() // signer
	q.extra = r.sized()
	q.clock = tpm2.TPMSClockInfo{Clock: r.u64(), ResetCount: r.u32(), RestartCount: r.u32()}
	safe := r.u8()
	q.clock.Safe = safe == 1
	r.u64() // firmware version
	for range r.u32() {
		s := tpm2.TPMSPCRSelection{Hash: tpm2.TPMIAlgHash(r.u16())}
		s.PCRSelect = r.take(int(r.u8()))
		if r.short {
			break
		}
		q.selection = append(q.selection, s)
	}
	q.digest = r.sized()
	if r.short || len(r.rest) > 0 || safe > 1 {
		return q, errors.New("it is not exactly one TPMS_ATTEST")
	}
	return q, nil
}

// marshalled takes parts off the front of what a TPM wrote; where it is too short, zeros.
type marshalled struct {
	rest  []byte
	short bool // it was
}

var zeros [8]byte

func (m *marshalled) take(n int) []byte {
	if m.short = m.short || n > len(m.rest); m.short {
		return nil
	}
	part := m.rest[:n:n]
	m.rest = m.rest[n:]
	return part
}

func (m *marshalled) fixed(n int) []byte {
	if part := m.take(n); part != nil {
		return part
	}
	return zeros[:n]
}

func (m *marshalled) u8() uint8     { return m.fixed(1)[0] }
func (m *marshalled) u16() uint16   { return binary.BigEndian.Uint16(m.fixed(2)) }
func (m *marshalled) u32() uint32   { return binary.BigEndian.Uint32(m.fixed(4)) }
func (m *marshalled) u64() uint64   { return binary.BigEndian.Uint64(m.fixed(8)) }
func (m *marshalled) sized() []byte { return m.take(int(m.u16())) }

// parseAttest accepts exactly the canonical bytes of one TPMS_ATTEST of any kind that a TPM
// made: the decoder alone would ignore what follows.
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

// checkSignature accepts exactly a TPMT_SIGNATURE of ECDSA with SHA-256 over message:
//
//	algorithm u16 | hash u16 | r: size u16, bytes | s: size u16, bytes
func checkSignature(key *ecdsa.PublicKey, message, signature []byte) error {
	if key == nil {
		return errors.New("there is no key to check it with")
	}
	if len(signature) == 0 || len(signature) > maxQuote {
		return fmt.Errorf("it has %d bytes, want 1 to %d", len(signature), maxQuote)
	}
	m := &marshalled{rest: signature}
	if tpm2.TPMAlgID(m.u16()) != tpm2.TPMAlgECDSA {
		return errors.New("it is not ECDSA")
	}
	if tpm2.TPMAlgID(m.u16()) != tpm2.TPMAlgSHA256 {
		return errors.New("it is not ECDSA with SHA-256")
	}
	r, s := new(big.Int).SetBytes(m.sized()), new(big.Int).SetBytes(m.sized())
	if m.short || len(m.rest) > 0 {
		return errors.New("it is not exactly one TPMT_SIGNATURE")
	}
	sum := sha256.Sum256(message)
	if !ecdsa.Verify(key, sum[:], r, s) {
		return errors.New("the host's attestation key did not make it")
	}
	return nil
}

// selected reads the registers of a selection that names the SHA-256 bank alone.
func selected(parts []tpm2.TPMSPCRSelection) ([]int, error) {
	if len(parts) != 1 || parts[0].Hash != tpm2.TPMAlgSHA256 {
		return nil, errors.New("it names another bank than SHA-256, or more than one")
	}
	var list []int
	for i, b := range parts[0].PCRSelect {
		for bit := range 8 {
			if b&(1<<bit) != 0 {
				list = append(list, 8*i+bit)
			}
		}
	}
	return list, nil
}
