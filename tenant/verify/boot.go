package verify

import (
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/evidence"
	"foothold/protocol/pcr"
	"foothold/protocol/vmspec"
)

// BootExpectation is what the tenant knows when a boot quote arrives (act 5).
type BootExpectation struct {
	Reservation string      `json:"reservation"`
	Start       int         `json:"start"`
	Host        string      `json:"host"`     // that acknowledged this VM's creation
	Settings    vmspec.Spec `json:"settings"` // the reservation's own copy
	Nonce       []byte      `json:"nonce"`    // ours; fresh and unused as the ledger has just found
	Clock       Clock       `json:"clock"`    // Verifier.Last of the host
	// Ran: the host gave that last quote when it had started this VM already. A boot of the
	// host since would have ended the VM: who answers for it then is not it, or the TPM
	// alone was reset, and its registers extended as before.
	Ran   bool   `json:"ran,omitempty"`
	Claim *Claim `json:"claim,omitempty"`
}

// Claim is what the host says that it started (hostapi.VM). It serves to explain a
// refusal, never to accept.
type Claim struct {
	Settings digest.SHA256   `json:"settings"`
	Firmware vmspec.Firmware `json:"firmware"`
}

// BootEvidence is the boot server's end of the tunnel, the quote that came through it,
// and the host's logs.
type BootEvidence struct {
	ExporterHash digest.SHA256     `json:"exporter_hash"`
	ServerLeaf   []byte            `json:"server_leaf"` // DER
	LoaderLeaf   []byte            `json:"loader_leaf"` // DER
	VMKey        []byte            `json:"vm_key"`
	Quote        evidence.Quote    `json:"quote"`
	Platform     evidence.Platform `json:"platform"`
}

// Boot judges a boot quote. The permission is nil unless every check held.
func (v *Verifier) Boot(x BootExpectation, e BootEvidence) (*Admitted, Verdict) {
	verdict := v.boot(x, e, v.now().UTC().Round(0), 0)
	return admit(verdict), verdict
}

func (v *Verifier) boot(x BootExpectation, e BootEvidence, at time.Time, dropped int) Verdict {
	return v.byAny(x.Host, at, func(p *Platform) Verdict { return v.bootBy(p, x, e, at, dropped) })
}

func (v *Verifier) bootBy(p *Platform, x BootExpectation, e BootEvidence, at time.Time, dropped int) Verdict {
	settings := x.Settings.Digest()
	tunnel := evidence.Tunnel(e.ExporterHash, e.ServerLeaf, e.LoaderLeaf, e.VMKey)
	j := v.begin(evidence.RoleBoot, x.Reservation, x.Start, x.Host, at, p, e.Platform, dropped)
	j.verdict.VMKey, j.verdict.Tunnel = slices.Clone(e.VMKey), tunnel
	j.bootInput(x, e)
	static, claimed := j.readLogs(j.logs)

	firmware := j.firmware()
	want := map[int]digest.SHA256{
		pcr.VM:     vm(firmware, settings),
		pcr.Tunnel: pcr.Extend(digest.SHA256{}, tunnel),
	}
	other := map[int][]candidate{
		pcr.VM:     j.claimed(x.Claim, firmware, settings),
		pcr.Tunnel: {{value: digest.SHA256{}, says: "was not extended with a tunnel"}},
	}
	j.quote(e.Quote, quoteExpectation{
		binding:   evidence.Binding(evidence.RoleBoot, x.Reservation, tunnel, settings, x.Nonce),
		selection: pcr.BootSelection(),
		static:    static,
		registers: want,
		claimed:   claimed,
		others:    other,
		clock:     x.Clock,
		ran:       x.Ran,
	})
	return j.end(Record{Boot: &BootRecord{x, TunnelEnd{e.ExporterHash, e.ServerLeaf, e.LoaderLeaf, e.VMKey}, e.Quote}})
}

// bootInput checks what enters the transcripts. A compromised boot server chooses the
// evidence, so nothing of it is taken for well-formed.
func (j *judgement) bootInput(x BootExpectation, e BootEvidence) {
	if err := x.Settings.Validate(); err != nil {
		j.find("input", "%v", err)
	}
	if x.Settings.Reservation != x.Reservation || x.Settings.Start != x.Start {
		j.find("input", "the settings are of start %d of %s", x.Settings.Start, x.Settings.Reservation)
	}
	j.nonce(x.Nonce)
	if e.ExporterHash.IsZero() {
		j.find("input", "no exporter value of the tunnel")
	}
	if len(e.VMKey) != 32 {
		j.find("input", "the VM's key has %d bytes, want 32", len(e.VMKey))
	}
	if _, err := certificate(e.LoaderLeaf); err != nil {
		j.find("input", "the loader's certificate: %v", err)
	}
	if err := j.v.leaves.believable(e.ServerLeaf, x.Settings.Boot, j.verdict.At); err != nil {
		j.find("input", "the boot server's certificate: %v", err)
	}
}

// believable reports whether the loader, by its measured settings, accepts this leaf, and
// from when to when it does.
func believable(leaf []byte, boot vmspec.Boot, at time.Time) (v validity, err error) {
	cert, err := certificate(leaf)
	if err != nil {
		return v, err
	}
	ca, err := x509.ParseCertificate(boot.CA)
	if err != nil {
		return v, errors.New("the settings' boot authority is not a certificate")
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	chains, err := cert.Verify(x509.VerifyOptions{
		Roots: roots, DNSName: boot.ServerName, CurrentTime: at,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return v, err
	}
	v = validity{cert.NotBefore, cert.NotAfter}
	for _, c := range chains[0] { // the leaf and its authority: there is no other way
		if c.NotBefore.After(v.from) {
			v.from = c.NotBefore
		}
		if c.NotAfter.Before(v.until) {
			v.until = c.NotAfter
		}
	}
	return v, nil
}

func certificate(der []byte) (*x509.Certificate, error) {
	if len(der) == 0 || len(der) > maxLeaf {
		return nil, fmt.Errorf("it has %d bytes, want 1 to %d", len(der), maxLeaf)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, errors.New("it is malformed")
	}
	return cert, nil
}

// firmware is the reference firmware, or zero where there are no reference values
// (which is a finding of its own).
func (j *judgement) firmware() vmspec.Firmware {
	if j.platform == nil {
		return vmspec.Firmware{}
	}
	return j.platform.doc.Firmware
}

// claimed are the values that PCR 16 would have if the host did what it says.
func (j *judgement) claimed(c *Claim, want vmspec.Firmware, settings digest.SHA256) []candidate {
	list := []candidate{{value: digest.SHA256{}, says: "was not extended with the VM's measurements"}}
	if c == nil {
		return list
	}
	var parts []string
	differ := func(name string, got, want digest.SHA256) {
		if got != want {
			parts = append(parts, fmt.Sprintf("%s is %s, want %s", name, got, want))
		}
	}
	differ("firmware", c.Firmware.BIOS, want.BIOS)
	differ("loader kernel", c.Firmware.LoaderKernel, want.LoaderKernel)
	differ("loader initramfs", c.Firmware.LoaderInitramfs, want.LoaderInitramfs)
	differ("settings digest", c.Settings, settings)
	if c.Firmware.LoaderCmdline != want.LoaderCmdline {
		parts = append(parts, fmt.Sprintf("loader command line is %.200q, want %.200q", c.Firmware.LoaderCmdline, want.LoaderCmdline))
	}
	if len(parts) == 0 {
		return list
	}
	return append(list, candidate{
		value: vm(c.Firmware, c.Settings),
		says:  "holds what the host says it started: " + strings.Join(parts, ", "),
	})
}
