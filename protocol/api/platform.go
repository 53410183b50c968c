package api

import "time"

// TryPlatform is reference values to be tried: signed by nobody yet, or not counting yet.
type TryPlatform struct {
	Manifest []byte `json:"manifest"` // JSON of a platform.Manifest
}

// What a host was judged by.
const (
	EvidenceAsked  = "asked"  // a quote for no VM, asked for it
	EvidenceStored = "stored" // the newest quote of a VM that was accepted, judged as of then
)

// Judged is one piece of a host's evidence held against reference values: those in force,
// or others that are tried. Nothing is released or refused by it.
type Judged struct {
	Host     string            `json:"host"`
	Release  string            `json:"release"`           // that the inventory names for the host
	By       string            `json:"by"`                // release of the reference values
	Evidence string            `json:"evidence"`          // EvidenceAsked or EvidenceStored
	VM       string            `json:"vm,omitempty"`      // stored: whose
	Role     string            `json:"role,omitempty"`    // stored: of the quote
	At       time.Time         `json:"at,omitzero"`       // when the host was asked
	Accepted bool              `json:"accepted"`          // nothing differs
	Findings []PlatformFinding `json:"findings"`          // each check that fails
	Problem  string            `json:"problem,omitempty"` // why there was nothing to judge, or not the host's own answer
}

// PlatformFinding is one check that fails, for one component where it is about one.
type PlatformFinding struct {
	Check     string `json:"check"`
	Detail    string `json:"detail"`
	Component string `json:"component,omitempty"`
	Expected  string `json:"expected,omitempty"`
	Seen      string `json:"seen,omitempty"`
	Do        string `json:"do,omitempty"`
}
