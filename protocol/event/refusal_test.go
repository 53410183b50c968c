package event

import (
	"errors"
	"fmt"
	"testing"
)

func TestReasonOf(t *testing.T) {
	refusal := Refuse(QuoteRefused, "host %s", "h1")
	refusal.Findings = []FailedCheck{{Check: "registers", Detail: "PCR 16 differs"}, {Check: "input", Detail: "nonce is old"}}
	if got, want := refusal.Error(), "quote-refused: host h1: registers: PCR 16 differs; input: nonce is old"; got != want {
		t.Errorf("Error() = %q, want %q", got, want)
	}
	for _, c := range []struct {
		err  error
		want Reason
	}{
		{nil, ""},
		{refusal, QuoteRefused},
		{fmt.Errorf("act 5: %w", refusal), QuoteRefused},
		{errors.New("disk full"), InternalError},
	} {
		if got := ReasonOf(c.err); got != c.want {
			t.Errorf("ReasonOf(%v) = %q, want %q", c.err, got, c.want)
		}
	}
}
