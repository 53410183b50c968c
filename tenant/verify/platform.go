package verify

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"slices"
	"time"

	"foothold/internal/strictjson"
	"foothold/protocol/digest"
	"foothold/protocol/imalog"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/signed"
	"foothold/protocol/tcglog"
	"foothold/protocol/vmspec"
)

const maxPlatform = 4 << 20 // bytes

// Platform is reference values whose signature was verified.
type Platform struct {
	doc    platform.Manifest
	digest digest.SHA256 // of the signed payload
	signed Document      // the envelope
	read   time.Time     // when it was read
	// Production: the document by what is looked for.
	boot  map[int][]platform.Event   // by register
	files map[string][]digest.SHA256 // by path
}

func validProfile(p string) bool { return p == platform.Lab || p == platform.Production }

// OpenPlatform reads signed reference values and refuses those of another profile:
// what a lab's launcher measured proves nothing elsewhere.
func OpenPlatform(file string, key ed25519.PublicKey, profile string, now time.Time) (*Platform, error) {
	data, err := readFile(file, maxPlatform)
	if err != nil {
		return nil, fmt.Errorf("open reference values: %w", err)
	}
	p, err := ParsePlatform(data, key, profile, now)
	if err != nil {
		return nil, fmt.Errorf("open reference values %s: %w", file, err)
	}
	return p, nil
}

// ParsePlatform is OpenPlatform for a document in memory.
func ParsePlatform(data []byte, key ed25519.PublicKey, profile string, now time.Time) (*Platform, error) {
	p, err := StoredPlatform(data, key, profile, now)
	if err != nil {
		return nil, err
	}
	if err := p.InForce(now); err != nil {
		return nil, err
	}
	return p, nil
}

// StoredPlatform is ParsePlatform whether they count now or not: for reference values that were taken
// into use before, or that begin to count later. A verifier asks the time of every quote.
func StoredPlatform(data []byte, key ed25519.PublicKey, profile string, now time.Time) (*Platform, error) {
	if len(data) > maxPlatform {
		return nil, fmt.Errorf("they have %d bytes signed, at most %d are read", len(data), maxPlatform)
	}
	var env signed.Envelope
	if err := strictjson.Unmarshal(data, &env); err != nil {
		return nil, err
	}
	p := &Platform{digest: digest.Of(env.Payload), read: now.UTC().Round(0)}
	if err := env.Open(key, signed.Platform, &p.doc); err != nil {
		return nil, err
	}
	if !validProfile(profile) || p.doc.Profile != profile {
		return nil, fmt.Errorf("they are of profile %q, this installation accepts %q", p.doc.Profile, profile)
	}
	p.index()
	var err error
	if p.signed, err = document(env); err != nil {
		return nil, err
	}
	return p, p.complete()
}

// Manifest is the document.
func (p *Platform) Manifest() platform.Manifest { return p.doc }

// Digest names the document: the SHA-256 of the signed payload.
func (p *Platform) Digest() digest.SHA256 { return p.digest }

// InForce refuses reference values that do not count now.
func (p *Platform) InForce(now time.Time) error {
	if p.doc.ValidFrom.After(now.Add(clockSkew)) {
		return ahead("they begin to count", p.doc.ValidFrom, now)
	}
	if !now.Before(p.doc.ValidUntil) {
		return fmt.Errorf("they count from %s to %s, this machine's clock says %s", p.doc.ValidFrom.UTC().Format(time.RFC3339),
			p.doc.ValidUntil.UTC().Format(time.RFC3339), now.UTC().Format(time.RFC3339))
	}
	return nil
}

// complete refuses documents that would let something unmeasured pass.
func (p *Platform) complete() error {
	fw, most := p.doc.Firmware, pcr.MaxEvents
	if p.doc.Profile == platform.Production {
		most = imalog.MaxEntries
	}
	if p.doc.Name == "" || len(p.doc.Files) == 0 || len(p.doc.Files) > most {
		return errors.New("they name no release or no files")
	}
	if fw.BIOS.IsZero() || fw.LoaderKernel.IsZero() || fw.LoaderInitramfs.IsZero() {
		return errors.New("they lack a digest of the VMs' firmware")
	}
	for _, f := range p.doc.Files {
		if f.Name == "" || f.SHA256.IsZero() {
			return fmt.Errorf("file %q has no name or no digest", f.Name)
		}
	}
	if p.doc.Profile == platform.Lab {
		if len(p.doc.Boot) > 0 || len(p.doc.Userspace) > 0 {
			return errors.New("a lab's host has no measured boot")
		}
		return nil
	}
	if err := textsComplete(p.doc.Userspace); err != nil {
		return err
	}
	return p.bootComplete()
}

// separators are what firmware extends into each of registers 0 to 7 before it hands over:
// the digests of four bytes of zeros, or of ones (TCG PC Client Platform Firmware Profile,
// "EV_SEPARATOR"; after an error they are others). A register without one could be a boot
// loader's work alone.
var separators = []digest.SHA256{digest.Of(make([]byte, 4)), digest.Of([]byte("\xff\xff\xff\xff"))}

func isSeparator(sum digest.SHA256) bool { return slices.Contains(separators, sum) }

// bootComplete checks the events of firmware and boot loader.
func (p *Platform) bootComplete() error {
	if len(p.doc.Boot) == 0 || len(p.doc.Boot) > tcglog.MaxEvents {
		return errors.New("they name no events of a measured boot, or too many")
	}
	separated := map[int]bool{}
	for _, e := range p.doc.Boot {
		switch {
		case e.PCR == pcr.Platform || !slices.Contains(pcr.Static, e.PCR):
			return fmt.Errorf("%q extends register %d, which is not firmware's or boot loader's", e.Component, e.PCR)
		case e.Component == "" || len(e.SHA256) == 0 || slices.Contains(e.SHA256, digest.SHA256{}):
			return fmt.Errorf("%q of register %d has no name or no digest", e.Component, e.PCR)
		case !e.Optional && !slices.ContainsFunc(e.SHA256, func(sum digest.SHA256) bool { return !isSeparator(sum) }):
			// There may be more: a firmware's part of four zero bytes has the same digest.
			separated[e.PCR] = true
		}
	}
	for i := range 8 {
		if !separated[i] {
			return fmt.Errorf("register %d has no separator", i)
		}
	}
	return nil
}

// static is what the reference values lead to.
func (p *Platform) static() map[int]digest.SHA256 {
	log := make([]pcr.Event, 0, len(p.doc.Files))
	for _, f := range p.doc.Files {
		log = append(log, pcr.Event{PCR: pcr.Platform, Digest: f.SHA256})
	}
	return pcr.Replay(log)
}

func (p *Platform) index() {
	p.boot, p.files = map[int][]platform.Event{}, map[string][]digest.SHA256{}
	for _, e := range p.doc.Boot {
		p.boot[e.PCR] = append(p.boot[e.PCR], e)
	}
	for _, f := range p.doc.Files {
		p.files[f.Name] = append(p.files[f.Name], f.SHA256)
	}
}

// vm is what a VM with these settings leads PCR 16 to.
func vm(fw vmspec.Firmware, settings digest.SHA256) digest.SHA256 {
	return pcr.Replay(vmspec.Measurements(fw, settings))[pcr.VM]
}
