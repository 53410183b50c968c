// Package auditor is what the first process of a host audit's medium does: it asks the
// physical host's TPM itself, without the provider's software between, and signs what it
// found. It decides nothing; tenant/verify does, on the tenant's side.
package auditor

import (
	"crypto/ed25519"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"

	"foothold/internal/strictjson"
	"foothold/internal/tpm"
	"foothold/protocol/hostaudit"
	"foothold/protocol/inventory"
	"foothold/protocol/signed"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
)

// maxText bounds what firmware states of the machine, in bytes.
const maxText = 128

// ReadMedium reads the order and the signing key of this medium.
func ReadMedium(file string) (m hostaudit.Medium, key ed25519.PrivateKey, err error) {
	f, err := os.Open(file)
	if err != nil {
		return m, nil, fmt.Errorf("read order: %w", err)
	}
	defer f.Close()
	if err := strictjson.Read(f, hostaudit.MaxMedium, &m); err != nil {
		return m, nil, fmt.Errorf("read order: %w", err)
	}
	key, err = m.Key()
	return m, key, err
}

// Examine asks the TPM everything that the order wants. What cannot be asked is a problem
// in the report, and the rest is asked all the same.
func Examine(t transport.TPM, o hostaudit.Order) hostaudit.Report {
	r := hostaudit.Report{Number: o.Number, Host: o.Host, Problems: []string{}}
	problem := func(err error) bool {
		if err != nil {
			r.Problems = append(r.Problems, err.Error())
		}
		return err != nil
	}
	var err error
	r.EK, err = tpm.EndorsementCertificate(t)
	problem(err)
	session, err := tpm.ReadKey(t, inventory.SessionHandle)
	if !problem(named("session key", err)) {
		r.Session = tpm2.Marshal(session.Public)
	}
	aik, err2 := tpm.ReadKey(t, inventory.AIKHandle)
	if problem(named("attestation key", err2)) {
		return r
	}
	r.AIK = tpm2.Marshal(aik.Public)
	r.Answer, err2 = tpm.Activate(t, aik, o.Blob, o.Secret)
	problem(err2)
	if err == nil {
		r.Certify, r.Signed, err = certify(t, aik, session, o)
		problem(err)
	}
	return r
}

func named(what string, err error) error {
	if err != nil {
		err = fmt.Errorf("%s: %w", what, err)
	}
	return err
}

// certify lets the AIK state, now and for this order, that the session key lies in the same
// TPM; beside it stand the TPM's counters of resets and restarts.
func certify(t transport.TPM, aik, session tpm.Key, o hostaudit.Order) (attest, signature []byte, err error) {
	qualifying := o.Qualifying()
	rsp, err := tpm2.Certify{
		ObjectHandle:   session.Auth(tpm2.PasswordAuth(nil)),
		SignHandle:     aik.Auth(tpm2.PasswordAuth(nil)),
		QualifyingData: tpm2.TPM2BData{Buffer: qualifying[:]},
		InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
	}.Execute(t)
	if err != nil {
		return nil, nil, fmt.Errorf("certify session key: %w", err)
	}
	return rsp.CertifyInfo.Bytes(), tpm2.Marshal(rsp.Signature), nil
}

// Describe adds what the machine's firmware states of it. dmi is /sys/class/dmi/id.
func Describe(r *hostaudit.Report, dmi string) {
	r.Asset, r.Serial = stated(dmi+"/chassis_asset_tag"), stated(dmi+"/product_serial")
}

// stated reads a line; one that is not there is empty.
func stated(file string) string {
	f, err := os.Open(file)
	if err != nil {
		return ""
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxText))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}

// Sign seals the report.
func Sign(key ed25519.PrivateKey, r hostaudit.Report) (signed.Envelope, error) {
	payload, err := json.Marshal(r)
	if err != nil {
		return signed.Envelope{}, fmt.Errorf("sign report: %w", err)
	}
	return signed.Seal(key, signed.HostAudit, payload), nil
}
