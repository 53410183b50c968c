// Package platform is the readable document of reference values: which files one
// release of the provider's platform consists of, and what each hashes to. The tenant
// signs it once it has examined the release.
package platform

import (
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
	Name       string          `json:"name"`        // release, for people
	Profile    string          `json:"profile"`     //
	ValidFrom  time.Time       `json:"valid_from"`  //
	ValidUntil time.Time       `json:"valid_until"` //
	Files      []File          `json:"files"`       // in the order in which they are measured into PCR 10
	Firmware   vmspec.Firmware `json:"firmware"`    // what the platform's VMs start with
}

// File is one measured file of the platform.
type File struct {
	Name   string        `json:"name"`
	SHA256 digest.SHA256 `json:"sha256"`
}
