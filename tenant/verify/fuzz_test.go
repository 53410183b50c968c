package verify

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/rand"
	"encoding/json"
	"slices"
	"testing"
	"time"

	"foothold/internal/strictjson"
	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/inventory"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/vmspec"

	"github.com/google/go-tpm/tpm2"
)

// attestSeed is a well-formed TPMS_ATTEST of a quote, made without a TPM.
func attestSeed() []byte {
	return tpm2.Marshal(tpm2.TPMSAttest{
		Magic:     tpm2.TPMGeneratedValue,
		Type:      tpm2.TPMSTAttestQuote,
		ExtraData: tpm2.TPM2BData{Buffer: make([]byte, 32)},
		Attested: tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, &tpm2.TPMSQuoteInfo{
			PCRSelect: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: bitmap(pcr.BootSelection())}}},
			PCRDigest: tpm2.TPM2BDigest{Buffer: make([]byte, 32)},
		}),
	})
}

func signatureSeed() []byte {
	return tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
		Hash:       tpm2.TPMAlgSHA256,
		SignatureR: tpm2.TPM2BECCParameter{Buffer: make([]byte, 32)},
		SignatureS: tpm2.TPM2BECCParameter{Buffer: make([]byte, 32)},
	})})
}

// theirs reads a quote as go-tpm does, and holds what it read against what it would write.
func theirs(data []byte) (q quoted, ok bool) {
	if len(data) == 0 || len(data) > maxQuote {
		return q, false
	}
	attest, err := tpm2.Unmarshal[tpm2.TPMSAttest](data)
	if err != nil || !bytes.Equal(tpm2.Marshal(attest), data) || attest.Magic != tpm2.TPMGeneratedValue || attest.Type != tpm2.TPMSTAttestQuote {
		return q, false
	}
	info, err := attest.Attested.Quote()
	if err != nil {
		return q, false
	}
	return quoted{attest.ExtraData.Buffer, attest.ClockInfo, info.PCRSelect.PCRSelections, info.PCRDigest.Buffer}, true
}

// What is accepted is the one canonical form: what another library reads, with what it reads
// in it, and would write again as it is.
func FuzzAttest(f *testing.F) {
	seed := attestSeed()
	f.Add(seed)
	f.Add([]byte{})
	f.Add(append(slices.Clone(seed), 0))
	for i := range seed { // cut, and each byte altered
		f.Add(seed[:i])
		altered := slices.Clone(seed)
		altered[i] += 2
		f.Add(altered)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := parseQuote(data)
		want, ok := theirs(data)
		if ok != (err == nil) {
			t.Fatalf("%v, another library takes it: %v", err, ok)
		}
		if ok && !(bytes.Equal(got.extra, want.extra) && got.clock == want.clock && bytes.Equal(got.digest, want.digest) &&
			slices.EqualFunc(got.selection, want.selection, func(a, b tpm2.TPMSPCRSelection) bool {
				return a.Hash == b.Hash && bytes.Equal(a.PCRSelect, b.PCRSelect)
			})) {
			t.Fatalf("read %+v, another library %+v", got, want)
		}
		if ok {
			selected(got.selection)
		}
		if attest, err := parseAttest(data); err == nil && (!bytes.Equal(tpm2.Marshal(attest), data) || attest.Magic != tpm2.TPMGeneratedValue) {
			t.Fatal("accepted another form")
		}
	})
}

// No signature is accepted for a message that was not signed, and of one that was only its
// canonical form; nothing panics.
func FuzzSignature(f *testing.F) {
	key := selfSigned(f, "aik", nil).key
	signed := softQuote(f, key, digest.SHA256{}, digest.SHA256{})
	f.Add(signatureSeed())
	f.Add(signed.Signature)
	f.Add(append(slices.Clone(signed.Signature), 0))
	for i := range signed.Signature { // cut, and each byte altered
		f.Add(signed.Signature[:i])
		altered := slices.Clone(signed.Signature)
		altered[i] ^= 1
		f.Add(altered)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if checkSignature(&key.PublicKey, []byte("message"), data) == nil {
			t.Fatal("accepted a forged signature")
		}
		if checkSignature(&key.PublicKey, signed.Attest, data) != nil {
			return
		}
		sig, err := tpm2.Unmarshal[tpm2.TPMTSignature](data)
		if err != nil || !bytes.Equal(tpm2.Marshal(sig), data) || sig.SigAlg != tpm2.TPMAlgECDSA {
			t.Fatalf("accepted another form: %v", err)
		}
		if ec, err := sig.Signature.ECDSA(); err != nil || ec.Hash != tpm2.TPMAlgSHA256 {
			t.Fatal("accepted another algorithm")
		}
	})
}

// softQuote signs what a TPM would say; the fuzzer has no time for a TPM.
func softQuote(t testing.TB, key *ecdsa.PrivateKey, binding, registers digest.SHA256) evidence.Quote {
	attest, err := tpm2.Unmarshal[tpm2.TPMSAttest](attestSeed())
	if err != nil {
		t.Fatal(err)
	}
	info, err := attest.Attested.Quote()
	if err != nil {
		t.Fatal(err)
	}
	attest.ExtraData.Buffer, info.PCRDigest.Buffer = binding[:], registers[:]
	attest.Attested = tpm2.NewTPMUAttest(tpm2.TPMSTAttestQuote, info)
	data := tpm2.Marshal(attest)
	sum := digest.Of(data)
	r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return evidence.Quote{Attest: data, Signature: tpm2.Marshal(tpm2.TPMTSignature{SigAlg: tpm2.TPMAlgECDSA, Signature: tpm2.NewTPMUSignature(tpm2.TPMAlgECDSA, &tpm2.TPMSSignatureECC{
		Hash:       tpm2.TPMAlgSHA256,
		SignatureR: tpm2.TPM2BECCParameter{Buffer: r.FillBytes(make([]byte, 32))},
		SignatureS: tpm2.TPM2BECCParameter{Buffer: s.FillBytes(make([]byte, 32))},
	})})}
}

// Whatever a boot server and a host may send is judged without a panic, and only the one
// right quote with the one right log admits.
func FuzzJudge(f *testing.F) {
	w := &world{t: f, now: time.Now(), ca: selfSigned(f, "ca", nil), loader: selfSigned(f, "loader", nil), vmKey: make([]byte, 32)}
	w.server = selfSigned(f, "boot.foothold.internal", &w.ca)
	w.files = []platform.File{file("qemu"), file("loader")}
	w.firmware = vmspec.Firmware{BIOS: w.files[0].SHA256, LoaderKernel: w.files[0].SHA256, LoaderInitramfs: w.files[1].SHA256}
	w.host = &host{}
	for _, x := range w.files {
		w.host.log = append(w.host.log, pcr.Event{PCR: pcr.Platform, Digest: x.SHA256, Name: x.Name})
	}
	key := selfSigned(f, "aik", nil).key
	plat := &Platform{doc: w.manifest()}
	v := &Verifier{
		inventory: &Inventory{doc: inventory.Inventory{Expires: w.now.Add(time.Hour)}, hosts: map[string]*hostKeys{
			"host-1": {entry: inventory.Host{Name: "host-1", Software: "release-1"}, aik: &key.PublicKey, name: digest.Of([]byte("aik"))},
		}},
		platforms: map[string][]*Platform{"release-1": {plat}}, profile: platform.Lab, now: func() time.Time { return w.now },
	}
	a := w.attempt()
	settings := a.settings.Digest()
	regs := plat.static()
	regs[pcr.VM], regs[pcr.Tunnel] = vm(w.firmware, settings), pcr.Extend(digest.SHA256{}, a.tunnel)
	a.ev.Quote = softQuote(f, key, evidence.Binding(evidence.RoleBoot, vmID, a.tunnel, settings, a.nonce), pcr.Composite(pcr.BootSelection(), regs))
	_, verdict := v.Boot(a.expect, a.ev)
	if !verdict.Good() {
		f.Fatal(verdict.Err())
	}
	log, err := json.Marshal(evidence.Platform{Log: a.ev.Platform.Log})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(log, a.ev.Quote.Attest, a.ev.Quote.Signature)
	f.Add([]byte(`{"log":[{"pcr":-1}]}`), attestSeed(), signatureSeed())
	f.Fuzz(func(t *testing.T, log, attest, signature []byte) {
		var p evidence.Platform
		if strictjson.Unmarshal(log, &p) != nil {
			return
		}
		ev := a.ev
		ev.Platform, ev.Quote = p, evidence.Quote{Attest: attest, Signature: signature}
		admitted, _ := v.Boot(a.expect, ev)
		right := bytes.Equal(attest, a.ev.Quote.Attest) && slices.EqualFunc(p.Log, a.ev.Platform.Log, func(x, y pcr.Event) bool { return x.PCR == y.PCR && x.Digest == y.Digest })
		if admitted != nil && !right {
			t.Fatal("admitted by another quote or log")
		}
	})
}
