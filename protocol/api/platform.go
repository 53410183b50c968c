package api

import (
	"time"

	"foothold/protocol/digest"
	"foothold/protocol/event"
)

// TryPlatform is reference values to be tried: signed by nobody yet, or not counting yet.
type TryPlatform struct {
	Manifest []byte `json:"manifest"` // JSON of a platform.Manifest
}

// What a host was judged by.
const (
	EvidenceAsked  = "asked"  // a quote for no VM, asked for it
	EvidenceStored = "stored" // the newest quote of a live VM whose evidence is kept, judged as of then
)

// Judged is one piece of a host's evidence held against reference values: those in force,
// or others that are tried. Nothing is released or refused by it.
type Judged struct {
	Host     string              `json:"host"`
	Release  string              `json:"release"`            // that the inventory names for the host
	By       string              `json:"by"`                 // release of the reference values
	Manifest *digest.SHA256      `json:"manifest,omitempty"` // of several with that name: the one that it satisfies, or misses least
	Evidence string              `json:"evidence"`           // EvidenceAsked or EvidenceStored
	VM       string              `json:"vm,omitempty"`       // stored: whose
	Role     string              `json:"role,omitempty"`     // stored: of the quote
	At       time.Time           `json:"at,omitzero"`        // when the host was asked
	Accepted bool                `json:"accepted"`           // nothing differs
	Findings []event.FailedCheck `json:"findings"`           // each check that fails
	Problem  string              `json:"problem,omitempty"`  // why there was nothing to judge, or not the host's own answer
}
