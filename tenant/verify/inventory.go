package verify

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"foothold/internal/strictjson"
	"foothold/internal/tpm"
	"foothold/protocol/digest"
	"foothold/protocol/inventory"
	"foothold/protocol/signed"
	"foothold/protocol/transcript"
	"foothold/protocol/vmspec"

	"github.com/google/go-tpm/tpm2"
)

const (
	maxInventory = 16 << 20 // bytes
	maxHosts     = 10000
	// clockSkew is how far another's clock may run ahead of ours, or ours may have been
	// set back: ten minutes, and what a document is under way.
	clockSkew = 15 * time.Minute
)

// Inventory is a provider's inventory whose signature was verified and whose hosts
// were examined. Hosts that failed stay in it, with what is wrong: they are known, and
// refused.
type Inventory struct {
	doc    inventory.Inventory
	digest digest.SHA256
	signed Document  // the envelope
	read   time.Time // the hosts were examined as of then
	hosts  map[string]*hostKeys
}

// hostKeys is an examined host.
type hostKeys struct {
	entry    inventory.Host
	problems []string
	aik      *ecdsa.PublicKey // nil if there is a problem with it
	name     digest.SHA256    // of the AIK's public area
}

// Standing is one host and what is wrong with its entry; nothing, for a good one.
type Standing struct {
	Host     inventory.Host
	Problems []string
}

// Keys names a host's keys: its EK certificate, attestation key and session key. One that
// changes makes another host of it.
func (s Standing) Keys() digest.SHA256 {
	return transcript.Sum("foothold/host-keys/v1", s.Host.EK, s.Host.AIK, s.Host.Session)
}

// OpenInventory reads the signed inventory in file and examines every host, whose TPM one
// of the manufacturers must have made. The
// provider's signature, the version and the validity concern the whole document and
// are errors; what is wrong with one host refuses that host.
//
// An older inventory than the last one is the caller's to refuse: see [Inventory.Version].
func OpenInventory(file string, key ed25519.PublicKey, makers *Manufacturers, now time.Time) (*Inventory, error) {
	data, err := readFile(file, maxInventory)
	if err != nil {
		return nil, fmt.Errorf("open inventory: %w", err)
	}
	inv, err := ParseInventory(data, key, makers, now)
	if err != nil {
		return nil, fmt.Errorf("open inventory %s: %w", file, err)
	}
	return inv, nil
}

// ParseInventory is OpenInventory for an inventory in memory.
func ParseInventory(data []byte, key ed25519.PublicKey, makers *Manufacturers, now time.Time) (*Inventory, error) {
	inv, err := StoredInventory(data, key, makers, now)
	if err != nil {
		return nil, err
	}
	if err := inv.InForce(now); err != nil {
		return nil, err
	}
	return inv, nil
}

// StoredInventory is ParseInventory for one that was taken into use before and may have
// expired since: a verifier of it refuses every quote then.
func StoredInventory(data []byte, key ed25519.PublicKey, makers *Manufacturers, now time.Time) (*Inventory, error) {
	if makers == nil {
		return nil, errors.New("no TPM manufacturers are trusted")
	}
	var env signed.Envelope
	if err := strictjson.Unmarshal(data, &env); err != nil {
		return nil, err
	}
	now = now.UTC().Round(0)
	inv := &Inventory{digest: digest.Of(env.Payload), read: now, hosts: map[string]*hostKeys{}}
	if err := env.Open(key, signed.Inventory, &inv.doc); err != nil {
		return nil, err
	}
	switch doc := inv.doc; {
	case doc.Version < 1:
		return nil, errors.New("it has no version")
	case len(doc.Hosts) > maxHosts:
		return nil, fmt.Errorf("it lists more than %d hosts", maxHosts)
	case doc.Issued.After(now.Add(clockSkew)):
		return nil, ahead("it was issued", doc.Issued, now)
	}
	var err error
	if inv.signed, err = document(env); err != nil {
		return nil, err
	}
	return inv, inv.examine(makers, now)
}

// Version grows with each inventory of a provider.
func (inv *Inventory) Version() int { return inv.doc.Version }

// Digest is the SHA-256 of the signed payload, which the provider publishes.
func (inv *Inventory) Digest() digest.SHA256 { return inv.digest }

// Provider is whose inventory it is.
func (inv *Inventory) Provider() string { return inv.doc.Provider }

// Issued is when it was signed.
func (inv *Inventory) Issued() time.Time { return inv.doc.Issued }

// Expires is when the inventory stops counting.
func (inv *Inventory) Expires() time.Time { return inv.doc.Expires }

// Hosts lists every host, in the document's order.
func (inv *Inventory) Hosts() []Standing {
	list := make([]Standing, 0, len(inv.doc.Hosts))
	for _, h := range inv.doc.Hosts {
		if s, ok := inv.Host(h.Name); ok {
			list = append(list, s)
		}
	}
	return list
}

// Host is one host's standing.
func (inv *Inventory) Host(name string) (Standing, bool) {
	h, ok := inv.hosts[name]
	if !ok {
		return Standing{}, false
	}
	return Standing{Host: h.entry, Problems: slices.Clone(h.problems)}, true
}

// ahead is the refusal of what is of the future by this machine's clock.
func ahead(what string, at, now time.Time) error {
	return fmt.Errorf("%s at %s, %s ahead of this machine's clock (%s; %s is borne): set the clock that is wrong", what,
		at.UTC().Format(time.RFC3339), at.Sub(now).Round(time.Second), now.UTC().Format(time.RFC3339), clockSkew)
}

// InForce refuses an inventory that has expired.
func (inv *Inventory) InForce(now time.Time) error {
	if !now.Before(inv.doc.Expires) {
		return fmt.Errorf("it expired at %s, %s ago by this machine's clock", inv.doc.Expires.UTC().Format(time.RFC3339), now.Sub(inv.doc.Expires).Round(time.Second))
	}
	return nil
}

// examine checks each host's keys, and that no two hosts share a name or a key: with one AIK
// one host's quotes would pass for another's, with one session key so would its sessions, and
// with one endorsement key, whatever certificates it has, two hosts would be one TPM.
func (inv *Inventory) examine(makers *Manufacturers, now time.Time) error {
	owner := map[digest.SHA256]*hostKeys{}
	for _, entry := range inv.doc.Hosts {
		if !vmspec.ValidName(entry.Name) {
			return errors.New("a host's name is not a DNS label")
		}
		if inv.hosts[entry.Name] != nil {
			return fmt.Errorf("host %s is listed twice", entry.Name)
		}
		h := examineHost(entry, makers, now)
		inv.hosts[entry.Name] = h
		for _, key := range [][]byte{entry.AIK, entry.Session, endorsementKey(entry.EK)} {
			if len(key) == 0 { // a problem of its own
				continue
			}
			sum := digest.Of(key)
			if other := owner[sum]; other != nil {
				h.problems = append(h.problems, "shares a TPM key with host "+other.entry.Name)
				other.problems = append(other.problems, "shares a TPM key with host "+entry.Name)
			}
			owner[sum] = h
		}
	}
	return nil
}

// endorsementKey is what an EK certificate certifies; the whole, if it is malformed.
func endorsementKey(der []byte) []byte {
	if cert, err := certificate(der); err == nil {
		return cert.RawSubjectPublicKeyInfo
	}
	return der
}

func examineHost(entry inventory.Host, makers *Manufacturers, now time.Time) *hostKeys {
	h := &hostKeys{entry: entry}
	if err := makers.check(entry, now); err != nil {
		h.problems = append(h.problems, err.Error())
	}
	aik, err := attestationKey(entry.AIK)
	if err != nil {
		h.problems = append(h.problems, err.Error())
		return h
	}
	h.aik, h.name = aik, digest.Of(entry.AIK)
	if err := checkSession(entry, aik); err != nil {
		h.problems = append(h.problems, err.Error())
	}
	return h
}

// attestationKey accepts exactly the form in which foothold-host makes its AIK: a
// restricted key that signs nothing but what its TPM made.
func attestationKey(area []byte) (*ecdsa.PublicKey, error) {
	public, err := tpm.ParsePublic(area)
	if err != nil {
		return nil, fmt.Errorf("attestation key: %w", err)
	}
	if err := tpm.CheckAIK(public); err != nil {
		return nil, err
	}
	key, err := tpm2.Pub(*public)
	if err != nil {
		return nil, fmt.Errorf("attestation key: %w", err)
	}
	ec, ok := key.(*ecdsa.PublicKey)
	if !ok {
		return nil, errors.New("attestation key: it is not on an elliptic curve")
	}
	return ec, nil
}

// checkSession demands that the AIK has certified the session key: so both lie in one TPM.
func checkSession(entry inventory.Host, aik *ecdsa.PublicKey) error {
	public, err := tpm.ParsePublic(entry.Session)
	if err != nil {
		return fmt.Errorf("session key: %w", err)
	}
	if err := tpm.CheckSession(public); err != nil {
		return err
	}
	attest, err := parseAttest(entry.SessionCertify)
	if err != nil {
		return fmt.Errorf("session key's certification: %w", err)
	}
	if err := checkSignature(aik, entry.SessionCertify, entry.SessionSignature); err != nil {
		return fmt.Errorf("session key's certification: %w", err)
	}
	if attest.Type != tpm2.TPMSTAttestCertify {
		return errors.New("session key's certification is of another kind")
	}
	info, err := attest.Attested.Certify()
	if err != nil {
		return errors.New("session key's certification is of another kind")
	}
	name, err := tpm2.ObjectName(public)
	if err != nil || !bytes.Equal(info.Name.Buffer, name.Buffer) {
		return errors.New("session key's certification is of another key")
	}
	return nil
}

func readFile(file string, limit int64) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = strictjson.ErrTooLarge
	}
	return data, err
}
