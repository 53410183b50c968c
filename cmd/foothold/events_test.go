package main

import (
	"io"
	"strings"
	"testing"

	"foothold/client/term"
	"foothold/protocol/api"
	"foothold/protocol/event"
)

// TestAnEventStaysOnItsLine: a compromised daemon writes neither lines of its own into
// the operator's journal nor to the operator's terminal.
func TestAnEventStaysOnItsLine(t *testing.T) {
	const bad = "x\n12:00:00.000  orchestrator  vm.ready\x1b[2J"
	text := eventText(term.New(io.Discard), api.JournalEntry{VM: bad, Event: event.Event{Source: bad, Kind: bad, Reason: bad, Detail: map[string]string{bad: bad}}})
	if strings.ContainsAny(text, "\n\x1b") {
		t.Errorf("%q", text)
	}
}
