package tpm

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// ekCertificates are the NV indices of endorsement key certificates, in the order in
// which they are looked for: RSA 2048, ECC P-256, ECC P-384 (TCG EK Credential
// Profile, "EK Certificate NV indices").
var ekCertificates = []tpm2.TPMHandle{0x01c00002, 0x01c0000a, 0x01c00016}

const (
	nvChunk        = 512  // bytes of one NV read; every TPM gives that many
	maxCertificate = 8192 // bytes of one index that holds certificates
)

// EndorsementCertificate returns the DER of the first endorsement certificate in NV memory.
func EndorsementCertificate(t transport.TPM) ([]byte, error) {
	for _, index := range ekCertificates {
		public, err := tpm2.NVReadPublic{NVIndex: index}.Execute(t)
		if errors.Is(err, tpm2.TPMRCHandle) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("read endorsement certificate: %w", err)
		}
		data, err := readNV(t, index, public)
		if err != nil {
			return nil, fmt.Errorf("read endorsement certificate: %w", err)
		}
		der, _, err := certificate(data)
		if err != nil {
			return nil, fmt.Errorf("read endorsement certificate: %w", err)
		}
		return der, nil
	}
	return nil, errors.New("read endorsement certificate: the TPM holds none")
}

// The certificates of the authorities above the endorsement key's lie from firstChain on,
// one behind the other, cut over as many indices as they fill (TCG EK Credential Profile
// 2.x, "EK Certificate Chain": 0x01c00100 to 0x01c001ff).
const (
	firstChain = 0x01c00100
	lastChain  = 0x01c001ff
	maxChain   = 64 << 10 // bytes, together
)

// EndorsementChain returns the DER of the certificates in NV memory that lead from the
// endorsement certificate towards its manufacturer's root; none if the TPM holds none. They
// are what the TPM says: who trusts a root verifies them.
func EndorsementChain(t transport.TPM) ([][]byte, error) {
	var data []byte
	for index := tpm2.TPMHandle(firstChain); index <= lastChain; index++ {
		public, err := tpm2.NVReadPublic{NVIndex: index}.Execute(t)
		if errors.Is(err, tpm2.TPMRCHandle) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("read endorsement certificate's chain: index %#x: %w", uint32(index), err)
		}
		part, err := readNV(t, index, public)
		if err != nil {
			return nil, fmt.Errorf("read endorsement certificate's chain: index %#x: %w", uint32(index), err)
		}
		if data = append(data, part...); len(data) > maxChain {
			return nil, fmt.Errorf("read endorsement certificate's chain: more than %d bytes", maxChain)
		}
	}
	chain, err := certificates(data)
	if err != nil {
		return nil, fmt.Errorf("read endorsement certificate's chain: %w", err)
	}
	return chain, nil
}

// readNV reads all of an index that anybody may read.
func readNV(t transport.TPM, index tpm2.TPMHandle, public *tpm2.NVReadPublicResponse) ([]byte, error) {
	area, err := public.NVPublic.Contents()
	if err != nil {
		return nil, err
	}
	if area.DataSize > maxCertificate {
		return nil, fmt.Errorf("%d bytes", area.DataSize)
	}
	data := make([]byte, 0, area.DataSize)
	for len(data) < int(area.DataSize) {
		rsp, err := tpm2.NVRead{
			AuthHandle: tpm2.AuthHandle{Handle: index, Name: public.NVName, Auth: tpm2.PasswordAuth(nil)},
			NVIndex:    tpm2.NamedHandle{Handle: index, Name: public.NVName},
			Size:       min(nvChunk, area.DataSize-uint16(len(data))),
			Offset:     uint16(len(data)),
		}.Execute(t)
		if err != nil {
			return nil, err
		}
		if len(rsp.Data.Buffer) == 0 {
			return nil, errors.New("the TPM gives no more")
		}
		data = append(data, rsp.Data.Buffer...)
	}
	return data, nil
}

// certificates takes apart what is one behind the other, with padding between and after.
func certificates(data []byte) (chain [][]byte, err error) {
	for {
		if data = bytes.TrimLeft(data, "\x00\xff"); len(data) == 0 { // no certificate begins so
			return chain, nil
		}
		var der []byte
		if der, data, err = certificate(data); err != nil {
			return nil, err
		}
		chain = append(chain, der)
	}
}

// certificate cuts off what lies behind the certificate in NV memory.
func certificate(data []byte) (der, rest []byte, err error) {
	var raw asn1.RawValue
	if rest, err = asn1.Unmarshal(data, &raw); err != nil {
		return nil, nil, err
	}
	if _, err := x509.ParseCertificate(raw.FullBytes); err != nil {
		return nil, nil, err
	}
	return raw.FullBytes, rest, nil
}
