// Package hostaudit is what an audit of a host's TPM says: the order that the tenant puts
// on trusted media, and the report that the media, booted on the physical host, makes
// there. The seed asks for keys "verified by … directly accessing the TPM" of the machine
// that the provider's inventory names.
package hostaudit

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"foothold/internal/strictjson"
	"foothold/protocol/digest"
	"foothold/protocol/signed"
	"foothold/protocol/transcript"
)

// MediumFile is the path of the [Medium] in the initramfs, and on the console side the
// marks between which the report stands, in base64, lines of at most LineLen bytes.
const (
	MediumFile = "/medium.json"
	Begin      = "-----BEGIN FOOTHOLD HOST AUDIT-----"
	End        = "-----END FOOTHOLD HOST AUDIT-----"
	LineLen    = 64
)

// Bounds in bytes: MaxReport of a report's envelope, MaxMedium of a medium.
const (
	MaxReport = 64 << 10
	MaxMedium = 16 << 10
)

// Order is what is to be asked of one host's TPM. Nothing in it is secret: the credential
// is encrypted to that TPM.
type Order struct {
	Number  string    `json:"number"` // 32 hex digits, of this order alone
	Host    string    `json:"host"`
	Nonce   []byte    `json:"nonce"`  // 32 bytes
	Blob    []byte    `json:"blob"`   // TPM2_ActivateCredential: credentialBlob,
	Secret  []byte    `json:"secret"` // and secret
	Expires time.Time `json:"expires"`
}

// Medium is what the trusted media carries besides its programs: the order, and the key
// that signs the report, which is of this medium alone.
type Medium struct {
	Order Order  `json:"order"`
	Seed  []byte `json:"seed"` // Ed25519 private key, RFC 8032's 32 bytes
}

// Report is what the media found. Keys are marshalled TPMT_PUBLIC, as in the inventory.
type Report struct {
	Number   string   `json:"number"`
	Host     string   `json:"host"`
	EK       []byte   `json:"ek"`       // DER of the EK certificate in the TPM's NV memory
	AIK      []byte   `json:"aik"`      // at inventory.AIKHandle
	Session  []byte   `json:"session"`  // at inventory.SessionHandle
	Answer   []byte   `json:"answer"`   // of the credential's activation
	Certify  []byte   `json:"certify"`  // TPMS_ATTEST of TPM2_Certify(session key) by the AIK
	Signed   []byte   `json:"signed"`   // TPMT_SIGNATURE of it
	Asset    string   `json:"asset"`    // chassis asset tag that the firmware states, for people
	Serial   string   `json:"serial"`   // serial number that the firmware states, for people
	Problems []string `json:"problems"` // what could not be asked
}

// Qualifying is the qualifying data of the report's certification: the AIK signs it for this
// order and no other.
func (o Order) Qualifying() digest.SHA256 {
	return transcript.Sum("foothold/host-audit-order/v1", []byte(o.Number), []byte(o.Host), o.Nonce)
}

// Key is the medium's signing key.
func (m Medium) Key() (ed25519.PrivateKey, error) {
	if len(m.Seed) != ed25519.SeedSize {
		return nil, errors.New("the medium holds no signing key")
	}
	return ed25519.NewKeyFromSeed(m.Seed), nil
}

// Print gives the signed report as lines for a console.
func Print(env signed.Envelope) (string, error) {
	data, err := json.Marshal(env)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	b.WriteString(Begin + "\n")
	for text := base64.StdEncoding.EncodeToString(data); text != ""; {
		n := min(LineLen, len(text))
		b.WriteString(text[:n] + "\n")
		text = text[n:]
	}
	b.WriteString(End + "\n")
	return b.String(), nil
}

// Read finds the one report in what a console printed. A console may add carriage returns,
// and lines of others before and behind the report. Two reports are refused: which is
// meant would be a guess.
func Read(console []byte) (env signed.Envelope, err error) {
	console = bytes.ReplaceAll(console, []byte("\r"), nil)
	_, rest, ok := bytes.Cut(console, []byte(Begin+"\n"))
	if !ok {
		return env, errors.New("there is no report of a host audit in it")
	}
	text, rest, ok := bytes.Cut(rest, []byte("\n"+End))
	switch {
	case !ok:
		return env, errors.New("the report of the host audit is cut off")
	case bytes.Contains(rest, []byte(Begin)):
		return env, errors.New("there are several reports of a host audit in it")
	case len(text) > 2*MaxReport:
		return env, fmt.Errorf("the report of the host audit: %w", strictjson.ErrTooLarge)
	}
	data, err := base64.StdEncoding.Strict().DecodeString(string(bytes.ReplaceAll(text, []byte("\n"), nil)))
	if err != nil {
		return env, errors.New("the report of the host audit is garbled; take the console's text again")
	}
	if len(data) > MaxReport {
		return env, fmt.Errorf("the report of the host audit: %w", strictjson.ErrTooLarge)
	}
	if err := strictjson.Unmarshal(data, &env); err != nil {
		return env, fmt.Errorf("the report of the host audit: %w", err)
	}
	return env, nil
}
