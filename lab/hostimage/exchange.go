package hostimage

import (
	"encoding/json"

	"foothold/protocol/digest"
)

// Port is the name of the virtio port by which the machine is asked, one [Question], and
// answers, one [Answer], each a line of JSON.
const Port = "foothold.hostimage.0"

// Question is what the host is to quote.
type Question struct {
	Nonce digest.SHA256 `json:"nonce"`
}

// Answer is what foothold-host wrote inside the machine, or why it could not.
type Answer struct {
	Entry   json.RawMessage `json:"entry,omitempty"`   // inventory.Host
	Quote   json.RawMessage `json:"quote,omitempty"`   // hostapi.QuoteResponse of the command "quote"
	Served  json.RawMessage `json:"served,omitempty"`  // hostapi.QuoteResponse of the agent, by its API
	Modules []string        `json:"modules,omitempty"` // files that were loaded from the OS disk
	Error   string          `json:"error,omitempty"`
}
