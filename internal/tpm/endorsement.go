package tpm

import (
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
	maxCertificate = 8192 // bytes of an endorsement certificate
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
		return readNV(t, index, public)
	}
	return nil, errors.New("read endorsement certificate: the TPM holds none")
}

func readNV(t transport.TPM, index tpm2.TPMHandle, public *tpm2.NVReadPublicResponse) ([]byte, error) {
	area, err := public.NVPublic.Contents()
	if err != nil {
		return nil, fmt.Errorf("read endorsement certificate: %w", err)
	}
	if area.DataSize > maxCertificate {
		return nil, fmt.Errorf("read endorsement certificate: %d bytes", area.DataSize)
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
			return nil, fmt.Errorf("read endorsement certificate: %w", err)
		}
		if len(rsp.Data.Buffer) == 0 {
			return nil, errors.New("read endorsement certificate: the TPM gives no more")
		}
		data = append(data, rsp.Data.Buffer...)
	}
	return certificate(data)
}

// certificate cuts off what pads the certificate in NV memory.
func certificate(data []byte) ([]byte, error) {
	var raw asn1.RawValue
	if _, err := asn1.Unmarshal(data, &raw); err != nil {
		return nil, fmt.Errorf("read endorsement certificate: %w", err)
	}
	if _, err := x509.ParseCertificate(raw.FullBytes); err != nil {
		return nil, fmt.Errorf("read endorsement certificate: %w", err)
	}
	return raw.FullBytes, nil
}
