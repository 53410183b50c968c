// Package event is what daemons, guests and the orchestrator tell the journal, and
// the stable reason codes that errors, journal and counters share.
package event

import "time"

// Event is one entry of an emitter's sequence. Detail holds no secret: values are
// names, addresses, digests and counts.
type Event struct {
	Seq         int64             `json:"seq"` // of the emitter, from 1
	Time        time.Time         `json:"time"`
	Source      string            `json:"source"`                // role/name of the emitter
	Kind        string            `json:"kind"`                  // dotted, past tense: "boot.opened", "component.delivered"
	Reservation string            `json:"reservation,omitempty"` //
	Reason      Reason            `json:"reason,omitempty"`      // set for every refusal and failure
	Detail      map[string]string `json:"detail,omitempty"`
}

// MaxBatch bounds the events of one message.
const MaxBatch = 256
