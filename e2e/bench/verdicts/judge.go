package verdicts

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/big"
	"slices"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/pcr"
	"foothold/protocol/tcglog"
	"foothold/tenant/verify"

	"github.com/google/go-attestation/attest"
	"github.com/google/go-tpm/tpm2"
)

// Judge is who judges evidence.
type Judge func(request) error

// Ours is the orchestrator's verifier: everything that it checks of a boot quote.
func (e *Evidence) Ours() Judge {
	return func(r request) error { return e.judged(r).Err() }
}

func (e *Evidence) judged(r request) verify.Verdict {
	x := verify.BootExpectation{Reservation: vmID, Start: 1, Host: hostName, Settings: e.settings, Nonce: r.Nonce}
	_, verdict := e.verifier.Boot(x, r.Evidence)
	return verdict
}

func (e *Evidence) binding(r request) digest.SHA256 {
	v := r.Evidence
	tunnel := evidence.Tunnel(v.ExporterHash, v.ServerLeaf, v.LoaderLeaf, v.VMKey)
	return evidence.Binding(evidence.RoleBoot, vmID, tunnel, e.settings.Digest(), r.Nonce)
}

// GoAttestation is that library: quote, registers and qualifying data, and the replay of
// the firmware's log. It takes the registers' values, compares nothing with reference
// values, and knows neither the VM nor the kernel's list.
func (e *Evidence) GoAttestation() (Judge, error) {
	aik, err := attest.ParseAKPublic(tpm2.Marshal(e.keys.AIK))
	if err != nil {
		return nil, err
	}
	return func(r request) error {
		var pcrs []attest.PCR
		for _, i := range pcr.BootSelection() {
			v, ok := e.regs[i]
			if !ok && slices.Contains(pcr.Dynamic, i) {
				for n := range v {
					v[n] = 0xff // no dynamic launch
				}
			}
			pcrs = append(pcrs, attest.PCR{Index: i, Digest: v[:], DigestAlg: crypto.SHA256})
		}
		want := e.binding(r)
		if err := aik.Verify(attest.Quote{Quote: r.Evidence.Quote.Attest, Signature: r.Evidence.Quote.Signature}, pcrs, want[:]); err != nil {
			return err
		}
		log, err := attest.ParseEventLog(r.Evidence.Platform.Firmware)
		if err != nil {
			return err
		}
		events, err := log.Verify(pcrs)
		if err == nil && len(events) < Events {
			err = fmt.Errorf("it replayed %d events", len(events))
		}
		return err
	}, nil
}

// Bare is the limit: the quote's signature checked, and the events extended.
func (e *Evidence) Bare() (Judge, error) {
	key, err := tpm2.Pub(e.keys.AIK)
	if err != nil {
		return nil, err
	}
	public, ok := key.(*ecdsa.PublicKey)
	if !ok {
		return nil, errors.New("the attestation key is no ECDSA key")
	}
	log, err := tcglog.Parse(e.requests[0].Evidence.Platform.Firmware)
	if err != nil {
		return nil, err
	}
	var events []pcr.Event
	for _, ev := range log.Events {
		if ev.Type != tcglog.NoAction {
			events = append(events, pcr.Event{PCR: ev.PCR, Digest: digest.SHA256(ev.Digest(tcglog.SHA256))})
		}
	}
	return func(r request) error {
		q := r.Evidence.Quote
		sig, err := tpm2.Unmarshal[tpm2.TPMTSignature](q.Signature)
		if err != nil {
			return err
		}
		ec, err := sig.Signature.ECDSA()
		if err != nil {
			return err
		}
		sum := sha256.Sum256(q.Attest)
		if !ecdsa.Verify(public, sum[:], new(big.Int).SetBytes(ec.SignatureR.Buffer), new(big.Int).SetBytes(ec.SignatureS.Buffer)) {
			return errors.New("the signature does not verify")
		}
		if regs := pcr.Replay(events); regs[0] != e.regs[0] {
			return errors.New("the events lead elsewhere")
		}
		return nil
	}, nil
}
