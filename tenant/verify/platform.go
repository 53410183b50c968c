package verify

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"time"

	"foothold/internal/strictjson"
	"foothold/protocol/digest"
	"foothold/protocol/pcr"
	"foothold/protocol/platform"
	"foothold/protocol/signed"
	"foothold/protocol/vmspec"
)

const maxPlatform = 4 << 20 // bytes

// Platform is reference values whose signature was verified.
type Platform struct{ doc platform.Manifest }

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
	var env signed.Envelope
	if err := strictjson.Unmarshal(data, &env); err != nil {
		return nil, err
	}
	p := &Platform{}
	if err := env.Open(key, signed.Platform, &p.doc); err != nil {
		return nil, err
	}
	if !validProfile(profile) || p.doc.Profile != profile {
		return nil, fmt.Errorf("they are of profile %q, this installation accepts %q", p.doc.Profile, profile)
	}
	if err := p.inForce(now); err != nil {
		return nil, err
	}
	return p, p.complete()
}

// Manifest is the document.
func (p *Platform) Manifest() platform.Manifest { return p.doc }

func (p *Platform) inForce(now time.Time) error {
	if now.Before(p.doc.ValidFrom) || !now.Before(p.doc.ValidUntil) {
		return fmt.Errorf("they count from %s to %s", p.doc.ValidFrom.UTC().Format(time.RFC3339), p.doc.ValidUntil.UTC().Format(time.RFC3339))
	}
	return nil
}

// complete refuses documents that would let something unmeasured pass.
func (p *Platform) complete() error {
	fw := p.doc.Firmware
	if p.doc.Name == "" || len(p.doc.Files) == 0 || len(p.doc.Files) > pcr.MaxEvents {
		return errors.New("they name no release or no files")
	}
	if fw.BIOS.IsZero() || fw.LoaderKernel.IsZero() || fw.LoaderInitramfs.IsZero() {
		return errors.New("they lack a digest of the VMs' firmware")
	}
	for _, f := range p.doc.Files {
		if f.SHA256.IsZero() {
			return fmt.Errorf("file %q has no digest", f.Name)
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

// vm is what a VM with these settings leads PCR 16 to.
func vm(fw vmspec.Firmware, settings digest.SHA256) digest.SHA256 {
	return pcr.Replay(vmspec.Measurements(fw, settings))[pcr.VM]
}
