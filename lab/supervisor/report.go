package supervisor

import (
	"encoding/json"
	"io"
	"sync"
)

// Step is one line of progress. The last one has Ready, or Error.
type Step struct {
	Text    string  `json:"text,omitempty"`
	Seconds float64 `json:"seconds,omitempty"`
	Ready   bool    `json:"ready,omitempty"`
	Error   string  `json:"error,omitempty"`
}

// reporter writes steps to whoever waits for the lab; that nobody does is no error.
type reporter struct {
	mu sync.Mutex
	w  io.WriteCloser // guarded by mu; nil once closed
}

func (r *reporter) send(s Step) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.w == nil {
		return
	}
	if json.NewEncoder(r.w).Encode(s) != nil {
		r.w.Close()
		r.w = nil
	}
}

func (r *reporter) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.w != nil {
		r.w.Close()
		r.w = nil
	}
}
