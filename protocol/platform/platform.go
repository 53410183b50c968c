// Package platform is the readable document of reference values: what one release of the
// provider's platform measures while it boots, and which files it runs. The tenant signs
// it once it has examined the release.
package platform

import (
	"fmt"
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/vmspec"
)

// Profiles. An installation accepts documents of one profile.
const (
	Lab        = "lab"        // a launcher stands for firmware and IMA
	Production = "production" // measured firmware, UKI, IMA under a measured policy
)

// Manifest is the payload of a signed envelope with label signed.Platform.
type Manifest struct {
	Name       string          `json:"name"`                // release, for people
	Profile    string          `json:"profile"`             //
	ValidFrom  time.Time       `json:"valid_from"`          //
	ValidUntil time.Time       `json:"valid_until"`         //
	Boot       []Event         `json:"boot,omitempty"`      // production: what firmware and boot loader measure, register by register
	Userspace  []Text          `json:"userspace,omitempty"` // production: what the host's system measures once the kernel runs
	Files      []File          `json:"files"`               // measured into PCR 10: in a lab these, in this order; in production any of these
	Firmware   vmspec.Firmware `json:"firmware"`            // what the platform's VMs start with
}

// File is one measured file of the platform. In production Name is its path, and several
// may have one path.
type File struct {
	Name   string        `json:"name"`
	SHA256 digest.SHA256 `json:"sha256"`
}

// Event is one measurement of firmware or boot loader. The events of a register come in
// their order; those of different registers need not.
type Event struct {
	PCR       int             `json:"pcr"`
	Component string          `json:"component"`          // what is measured, for people
	SHA256    []digest.SHA256 `json:"sha256"`             // any of these
	Optional  bool            `json:"optional,omitempty"` // may be missing
	// Type is what kind of event it is (tcglog.Type), by the word of whoever signs; 0: not said.
	Type uint32 `json:"type,omitempty"`
}

// Text is what the host's system (systemd) measures once the kernel runs: the phases that a
// boot has reached, and what else it puts into words. The register is extended by the
// text's digest. The texts of a register come in their order, and a host has come to any
// point of them: the quote shows to which.
type Text struct {
	PCR  int    `json:"pcr"`
	Text string `json:"text"` // "enter-initrd"
}

// PhaseRegister is the one into which systemd measures the phases of a boot.
const PhaseRegister = 11

// Digest is what the register is extended by.
func (t Text) Digest() digest.SHA256 { return digest.Of([]byte(t.Text)) }

// Component is what is measured, for people.
func (t Text) Component() string {
	if t.PCR == PhaseRegister {
		return fmt.Sprintf("boot phase %q", t.Text)
	}
	return fmt.Sprintf("the system's text %q", t.Text)
}

// MaxTexts bounds a manifest's texts.
const MaxTexts = 32

// UserspaceRegisters are those that a host's system may extend once the kernel runs:
// firmware's are closed by then, and register 10 is the kernel's.
var UserspaceRegisters = []int{8, 9, 11, 12, 13, 14}
